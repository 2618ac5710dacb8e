"""A node at play: whatever happens in whatever order, `decide` keeps its promises.

The machine holds the truth (instances, pods, what the kubelet has written down) and shows `decide`
only what the edges could see of it, late or broken as it may be. After every decision the promises of
DESIGN 5 are held against the truth; at the end only the alarms that `decide` asked for are rung, and
the list must come to show what is there and nothing else.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migplugin.core.decide import Key, Options, Outcome, Source, Usage, World, decide
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuUuid, Inventory, MigDevice
from migplugin.core.naming import Naming, Rule
from migplugin.core.resource import GPU, ResourceName, Strategy, device_of, is_replica, of_profile
from migplugin.core.sharing import Shared, TimeSlicing

REMOVAL_DELAY, GRACE, EMPTY_KEPT = 20.0, 30.0, 60.0
GPUS = (0, 1)
IDS = tuple(f"MIG-{gpu}-{n}" for gpu in GPUS for n in range(2))
PROFILES = ("1g.5gb", "2g.10gb")
SMALL = ResourceName("nvidia.com/small")
NAMINGS = (Naming(), Naming(mig=(Rule("1g.*", SMALL),)))
# By resource: how many replicas, and what they are called.
SHARINGS: tuple[dict[ResourceName, tuple[int, ResourceName]], ...] = (
    {},
    {of_profile("1g.5gb"): (2, of_profile("1g.5gb"))},
    {of_profile("1g.5gb"): (3, of_profile("1g.5gb")), GPU: (2, ResourceName("nvidia.com/gpu.shared"))},
    {SMALL: (2, ResourceName("nvidia.com/small.shared"))},
)


@dataclass
class Pod:
    """A pod that lives and holds `key`; the kubelet has written that down from `recorded` on."""

    key: Key
    recorded: float


class Node(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.devices: dict[str, str] = {}
        self.mig = set(GPUS)
        self.broken: dict[int, bool] = {}
        self.pods: list[Pod] = []
        self.stale: set[Key] = set()
        self.checkpoint_works = True
        self.list_works = True
        self.list_forgot = False
        self.reading: Usage | None = None
        self.leases: dict[Key, float] = {}
        self.last: Outcome | None = None
        self.unhealthy_since: dict[Key, float] = {}
        self.empty_since: dict[ResourceName, float] = {}
        self.naming, self.sharing = NAMINGS[0], SHARINGS[0]

    # What there is.

    @initialize(
        strategy=st.sampled_from([Strategy.MIXED, Strategy.MIXED, Strategy.SINGLE]),
        listed=st.booleans(),
        mig=st.sets(st.sampled_from(GPUS)),
        busy=st.booleans(),
        profiles=st.tuples(*(st.sampled_from((*PROFILES, "")) for _ in IDS)),
    )
    def start(
        self, strategy: Strategy, listed: bool, mig: set[int], profiles: Sequence[str], busy: bool
    ) -> None:
        self.pod_resources_there, self.mig = listed, mig
        made = zip(IDS, profiles, strict=True)
        self.devices = {id_: profile for id_, profile in made if profile and gpu_of(id_) in mig}
        options = Options(strategy, removal_delay=REMOVAL_DELAY, driver_grace=GRACE)
        self.world = World(self.now, usage=self.seen_usage(), options=options)
        self.look()
        if busy:
            self.pods_start(True, 0.0)
            self.usage_is_read(True, True)

    @rule(id_=st.sampled_from(IDS), profile=st.sampled_from((*PROFILES, "")))
    def make_or_destroy(self, id_: str, profile: str) -> None:
        self.devices.pop(id_, None)
        if profile and gpu_of(id_) in self.mig:
            self.devices[id_] = profile
        self.look()

    @rule(profile=st.sampled_from((*PROFILES, "")))
    def carve_all_anew(self, profile: str) -> None:
        """The same ids come back as another profile, or not at all."""
        self.devices = {id_: profile for id_ in IDS if profile and gpu_of(id_) in self.mig}
        self.look()

    @rule(gpu=st.sampled_from(GPUS))
    def switch_mig_mode(self, gpu: int) -> None:
        self.mig ^= {gpu}
        self.devices = {id_: p for id_, p in self.devices.items() if gpu_of(id_) in self.mig}
        self.look()

    @rule(gpu=st.sampled_from(GPUS), named=st.booleans())
    def gpu_breaks_or_returns(self, gpu: int, named: bool) -> None:
        if self.broken.pop(gpu, None) is None:
            self.broken[gpu] = named
        self.look()

    @rule()
    def driver_falls_silent_or_answers(self) -> None:
        failed = self.now if self.world.driver_failed is None else None
        self.world = replace(self.world, driver_failed=failed, driver_error="no answer" if failed else "")
        self.look()

    @precondition(lambda self: self.world.options.strategy is Strategy.MIXED)
    @rule(naming=st.sampled_from(NAMINGS), sharing=st.sampled_from(SHARINGS))
    def reconfigure(self, naming: Naming, sharing: dict[ResourceName, tuple[int, ResourceName]]) -> None:
        """Other names and other replicas, while pods hold what they hold."""
        self.naming, self.sharing = naming, sharing
        shared = tuple(Shared(name, count, rename) for name, (count, rename) in sharing.items())
        options = replace(self.world.options, naming=naming, sharing=TimeSlicing(shared))
        self.world = replace(self.world, options=options)
        self.decide()

    # Pods and the kubelet.

    @rule(all_of_them=st.booleans(), delay=st.sampled_from([0.0, 3.0, 8.0]))
    def pods_start(self, all_of_them: bool, delay: float) -> None:
        for key in self.free() if all_of_them else self.free()[:1]:
            self.pods.append(Pod(key, self.now + delay))
            self.leases[key] = self.now

    @rule()
    def kubelet_drops_an_allocation(self) -> None:
        for key in self.free()[:1]:
            self.leases[key] = self.now

    def free(self) -> list[Key]:
        taken = {pod.key for pod in self.pods}
        return [key for key, healthy in self.shown().items() if healthy and key not in taken]

    @precondition(lambda self: self.pods)
    @rule(last=st.booleans())
    def pod_ends(self, last: bool) -> None:
        pod = self.pods.pop(-1 if last else 0)
        if pod.recorded <= self.now:
            self.stale.add(pod.key)

    @rule(api_server=st.booleans())
    def kubelet_restarts(self, api_server: bool) -> None:
        """Until it has heard of the API server, it lists no pod."""
        self.pods = [pod for pod in self.pods if pod.recorded <= self.now]
        self.list_forgot = not api_server

    @rule(checkpoint=st.booleans(), listed=st.booleans())
    def usage_is_read(self, checkpoint: bool, listed: bool) -> None:
        """And will be answered so until the next time."""
        self.checkpoint_works, self.list_works = checkpoint, listed
        self.world = replace(self.world, usage=self.seen_usage())
        self.decide()

    @rule()
    def a_read_of_usage_begins(self) -> None:
        self.reading = self.seen_usage()

    @precondition(lambda self: self.reading is not None)
    @rule()
    def that_read_ends(self) -> None:
        assert self.reading is not None
        if self.reading.began > self.world.usage.began:
            self.world = replace(self.world, usage=self.reading)
        self.reading = None
        self.decide()

    @precondition(lambda self: self.checkpoint_works and all(pod.recorded <= self.now for pod in self.pods))
    @rule()
    def agent_restarts(self) -> None:
        """Nothing is promised across it but what the first list shows; the kubelet forgets old lists."""
        self.leases, self.last, self.reading = {}, None, None
        self.unhealthy_since, self.empty_since = {}, {}
        self.world = World(self.now, usage=self.seen_usage(), options=self.world.options)
        self.look()

    # Time.

    @rule(seconds=st.sampled_from([0.5, 5.0, 10.0, REMOVAL_DELAY, 33.3, EMPTY_KEPT]))
    def time_passes(self, seconds: float) -> None:
        """Waking where `decide` asked for it: in between, nothing is to change by itself."""
        until = self.now + seconds
        while True:
            self.check_that_only_alarms_matter(until)
            alarm = self.next_alarm()
            if alarm is None or alarm > until:
                break
            self.ring(alarm)
        self.now = until
        self.decide()

    def next_alarm(self) -> float | None:
        assert self.last is not None
        alarms = [t for t in (self.last.wake_at, self.last.usage_at) if t is not None]
        return max(min(alarms), self.now) if alarms else None

    def ring(self, alarm: float) -> None:
        assert self.last is not None
        usage_at = self.last.usage_at
        self.now = alarm
        if usage_at is not None and usage_at <= alarm:
            assert alarm >= self.world.usage.began + 2, "usage is read in a spin"
            self.world = replace(self.world, usage=self.seen_usage())
        self.decide()

    def check_that_only_alarms_matter(self, until: float) -> None:
        outcome = self.last
        assert outcome is not None
        end = until if outcome.wake_at is None else min(until, outcome.wake_at)
        world = replace(self.world, memory=outcome.memory, leases=dict(self.leases))
        for part in (0.0, 0.5, 0.999999):
            moment = self.now + (end - self.now) * part
            assert decide(replace(world, now=moment)).offers.resources == outcome.offers.resources, moment

    # What the edges see of it.

    def look(self) -> None:
        if self.world.driver_failed is None:
            self.world = replace(self.world, inventory=self.seen_inventory())
        self.decide()

    def seen_inventory(self) -> Inventory:
        gpus, broken = [], []
        for n in GPUS:
            uuid, mig = GpuUuid(f"GPU-{n}"), n in self.mig
            if n in self.broken:
                broken.append(BrokenGpu(n, uuid if self.broken[n] else None, "GPU is lost"))
                continue
            devices = tuple(
                MigDevice(DeviceId(id_), uuid, k, k, 0, profile, None, None, None, None, None)
                for k, (id_, profile) in enumerate(sorted(self.devices.items()))
                if gpu_of(id_) == n
            )
            gpus.append(Gpu(uuid, n, n, f"0000:0{n}:00.0", None, "A100", 40960, mig, mig, devices=devices))
        return Inventory("1", tuple(gpus), tuple(broken))

    def seen_usage(self) -> Usage:
        recorded = {pod.key for pod in self.pods if pod.recorded <= self.now}
        # The kubelet writes the new holder over the old one: a name it is about to write stays.
        by_checkpoint = frozenset(recorded | self.stale if self.checkpoint_works else ())
        answers = self.pod_resources_there and self.list_works
        by_list = frozenset(recorded if answers and not self.list_forgot else ())
        return Usage(
            self.now,
            Source.OK if self.checkpoint_works else Source.FAILED,
            Source.OK if answers else Source.FAILED if self.pod_resources_there else Source.ABSENT,
            by_checkpoint | by_list,
            by_list,
        )

    # The decision, and what it promised.

    def decide(self) -> None:
        before = self.last
        memory = before.memory if before is not None else self.world.memory
        self.world = replace(self.world, now=self.now, memory=memory, leases=dict(self.leases))
        outcome = decide(self.world)
        assert decide(self.world) == outcome, "not deterministic"
        for key, answered in outcome.ended_leases:
            if self.leases.get(key) == answered:
                del self.leases[key]
        again = decide(replace(self.world, memory=outcome.memory, leases=dict(self.leases)))
        assert again.offers == outcome.offers, "not idempotent"
        assert outcome.wake_at is None or outcome.wake_at > self.now
        assert outcome.usage_at is None or outcome.usage_at >= self.world.usage.began + 2
        self.last = outcome
        self.check_what_left(before)
        self.check_live_devices()
        if before is not None and before.offers.resources != outcome.offers.resources:
            # A list that is sent makes the kubelet rewrite its checkpoint.
            pending = {pod.key for pod in self.pods if pod.recorded > self.now}
            self.stale &= pending

    def shown(self, outcome: Outcome | None = None) -> dict[Key, bool]:
        outcome = outcome or self.last
        if outcome is None:
            return {}
        return {
            (resource, id_): offered.healthy
            for resource, offer in outcome.offers.resources.items()
            for id_, offered in offer.devices.items()
        }

    def check_what_left(self, before: Outcome | None) -> None:
        assert self.last is not None
        old, new = self.shown(before) if before is not None else {}, self.shown()
        for key in old.keys() - new.keys():
            assert self.now >= self.unhealthy_since[key] + REMOVAL_DELAY, f"{key} left too soon"
            assert self.world.driver_failed is None, f"{key} left while the driver was silent"
            silent = gpu_of(key[1]) in self.broken
            assert not silent or key not in self.meant(), f"{key} left while its GPU was silent"
        self.unhealthy_since = {
            key: self.unhealthy_since.get(key, self.now) for key, healthy in new.items() if not healthy
        }
        lists = self.last.offers.resources
        for resource, offer in before.offers.resources.items() if before is not None else ():
            if resource not in lists:
                assert not offer.devices, f"{resource} dropped with ids"
                assert self.now >= self.empty_since[resource] + EMPTY_KEPT, f"{resource} dropped too soon"
        self.empty_since = {
            resource: self.empty_since.get(resource, self.now)
            for resource, offer in lists.items()
            if not offer.devices
        }

    def check_live_devices(self) -> None:
        """What lives, is not held as something else as far as anybody can know, and answers, is on offer."""
        if self.world.driver_failed is not None:
            return
        shown = self.shown()
        if self.world.options.strategy is Strategy.SINGLE:
            self.check_single_profile({key[1] for key, healthy in shown.items() if healthy})
            return
        maybe_held = self.world.usage.named | self.leases.keys() | self.stale | {pod.key for pod in self.pods}
        # Where a source is silent, what was named once may still be held.
        sure = self.world.usage.complete
        for key in self.live():
            elsewhere = {other for other in maybe_held if is_in_the_way(other, key)}
            if sure and not elsewhere:
                assert shown.get(key) is True, f"{key} is not offered"
            wrong = {other for other, healthy in shown.items() if healthy and is_in_the_way(other, key)}
            assert not wrong, f"{key[1]} is offered as {wrong}"

    def check_single_profile(self, healthy: set[DeviceId]) -> None:
        """Every device of one profile; none only while a pod holds what is gone of the one that is served."""
        assert self.last is not None
        live = {id_: p for id_, p in self.devices.items() if gpu_of(id_) not in self.broken}
        profiles = {live[id_] for id_ in healthy if id_ in live}
        assert len(profiles) <= 1
        if live:
            served = profiles or {self.last.memory.served_profile}
            assert "" not in served
            assert {id_ for id_, profile in live.items() if profile in served} <= healthy

    def live(self) -> set[Key]:
        return {key for key in self.meant() if gpu_of(key[1]) not in self.broken}

    def meant(self) -> set[Key]:
        """What is to be on offer once every GPU answers."""
        found = {f"GPU-{n}": GPU for n in GPUS if n not in self.mig}
        for id_, profile in self.devices.items():
            is_small = bool(self.naming.mig) and profile.startswith("1g.")
            found[id_] = SMALL if is_small else of_profile(profile)
        keys = set()
        for id_, name in found.items():
            count, rename = self.sharing.get(name, (0, name))
            ids = [f"{id_}::{n}" for n in range(count)] if count else [id_]
            keys |= {(rename, DeviceId(one)) for one in ids}
        return keys

    @invariant()
    def what_a_pod_holds_is_listed_and_healthy_nowhere_else(self) -> None:
        shown = self.shown()
        for pod in self.pods:
            assert pod.key in shown, f"{pod.key} left the list while a pod holds it"
            other = [key for key, healthy in shown.items() if healthy and is_in_the_way(pod.key, key)]
            assert not other, f"{pod.key} is held and also offered as {other}"

    def teardown(self) -> None:
        """All pods end, everything answers: by its own alarms the list comes to show what is there."""
        if self.last is None:
            return
        self.pods, self.broken = [], {}
        self.checkpoint_works, self.list_works, self.list_forgot = True, True, False
        self.now += 20
        self.world = replace(self.world, driver_failed=None, usage=self.seen_usage())
        self.look()
        for _ in range(100):
            alarm = self.next_alarm()
            if alarm is None:
                break
            self.ring(alarm)
        else:
            raise AssertionError("it never comes to rest")
        ids = {key[1] for key in self.shown()}
        if self.world.options.strategy is Strategy.MIXED:
            assert self.shown() == dict.fromkeys(self.live(), True)
        else:
            assert ids <= {key[1] for key in self.live()}
            assert all(self.shown().values())
            assert bool(ids) == bool(self.devices or not self.mig), "nothing is served"


def gpu_of(id_: str) -> int:
    return int(device_of(id_).split("-")[1])


def is_in_the_way(held: Key, key: Key) -> bool:
    """Whether `held` is the device of `key` in another way: replicas of one resource get on together."""
    ways = [(resource, is_replica(id_)) for resource, id_ in (held, key)]
    return device_of(held[1]) == device_of(key[1]) and ways[0] != ways[1]


# What happens how often in a long life; Hypothesis finds the short stories, this the tangled ones.
LIFE: dict[str, tuple[int, dict[str, tuple[Any, ...]]]] = {
    "time_passes": (8, {"seconds": (0.5, 3.0, 7.0, REMOVAL_DELAY, 33.3, EMPTY_KEPT)}),
    "usage_is_read": (6, {"checkpoint": (True, True, False), "listed": (True, True, False)}),
    "make_or_destroy": (6, {"id_": IDS, "profile": (*PROFILES, "")}),
    "carve_all_anew": (1, {"profile": (*PROFILES, "")}),
    "pods_start": (5, {"all_of_them": (True, False), "delay": (0.0, 3.0, 8.0)}),
    "pod_ends": (4, {"last": (True, False)}),
    "kubelet_drops_an_allocation": (1, {}),
    "kubelet_restarts": (1, {"api_server": (True, False)}),
    "a_read_of_usage_begins": (1, {}),
    "that_read_ends": (1, {}),
    "gpu_breaks_or_returns": (1, {"gpu": GPUS, "named": (True, False)}),
    "driver_falls_silent_or_answers": (1, {}),
    "switch_mig_mode": (1, {"gpu": GPUS}),
    "agent_restarts": (1, {}),
    "reconfigure": (1, {"naming": NAMINGS, "sharing": SHARINGS}),
}


@pytest.mark.parametrize("strategy", [Strategy.MIXED, Strategy.SINGLE])
@pytest.mark.parametrize("seed", range(12))
def test_a_long_life(seed: int, strategy: Strategy) -> None:
    dice = random.Random(seed)
    node = Node()
    node.start(
        strategy=strategy,
        listed=bool(seed % 3),
        mig=set(GPUS),
        busy=True,
        profiles=dice.choices(PROFILES, k=len(IDS)),
    )
    names, weights = list(LIFE), [weight for weight, _ in LIFE.values()]
    for name in dice.choices(names, weights, k=250):
        if is_possible(node, name):
            getattr(node, name)(**{word: dice.choice(values) for word, values in LIFE[name][1].items()})
            node.what_a_pod_holds_is_listed_and_healthy_nowhere_else()
    node.teardown()


def is_possible(node: Node, name: str) -> bool:
    if name == "pod_ends":
        return bool(node.pods)
    if name == "reconfigure":
        return node.world.options.strategy is Strategy.MIXED
    if name == "that_read_ends":
        return node.reading is not None
    if name == "agent_restarts":
        return node.checkpoint_works and all(pod.recorded <= node.now for pod in node.pods)
    return True


Node.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
TestNode = Node.TestCase
