"""The one decision: from everything that is known to everything that is to be done.

`decide` is called after every look at the world and answers three things: what the kubelet is to
be shown, what to remember, and when to ask again though nothing happens. It keeps three promises
to the kubelet and its pods (DESIGN 5):

* An id never leaves a list while anybody may hold it. A device that vanished stays, Unhealthy,
  until `removal_delay` is over and a look at every source of usage, begun after that, names it
  nowhere. Removing one in flight crashes the kubelet.
* A resource lives as long as one of its ids is listed, and a minute longer with an empty list.
* Losing sight of the driver takes nothing away: the last inventory stands, and after
  `driver_grace` its devices turn Unhealthy.

What faults make sick is told by `health` and shown here.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum

from migplugin.core import health as healths
from migplugin.core.allocation import EditOptions, Offer, OfferedDevice, Offers
from migplugin.core.assignment import Assignment, assign, names_of_single
from migplugin.core.health import Health, Scene
from migplugin.core.inventory import DeviceId, GpuUuid, Inventory
from migplugin.core.naming import Naming
from migplugin.core.resource import Device, ResourceName, Strategy, device_of, is_ours, is_replica
from migplugin.core.sharing import TimeSlicing
from migplugin.core.sickness import Change, Fault
from migplugin.core.xid import Checks

EMPTY_OFFER_KEPT = 60.0
LEASE_CERTAIN_AFTER = 10.0
LEASE_CERTAIN_READS = 2
USAGE_SOONEST = 2.0
USAGE_LATEST = 30.0

Key = tuple[ResourceName, DeviceId]
Hold = tuple[ResourceName, bool]


class Source(StrEnum):
    """How one source of usage answered: `absent` is not mounted at all, `failed` is mounted and silent."""

    OK = "ok"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Usage:
    """Which devices pods hold, as the kubelet's checkpoint and pod-resources name them.

    `began` is when the read began, so that a read from before a change is not taken for one after it.
    `holders` is for people: "namespace/pod:container" of a device, where pod-resources says so.
    """

    began: float = float("-inf")
    checkpoint: Source = Source.FAILED
    pod_resources: Source = Source.ABSENT
    named: frozenset[Key] = frozenset()
    named_by_pod_resources: frozenset[Key] = frozenset()
    holders: Mapping[DeviceId, tuple[str, ...]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether silence about a device means that nobody holds it."""
        return self.checkpoint is Source.OK and self.pod_resources is not Source.FAILED


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds; `policy` is how to choose among devices, "" for the usual (preference)."""

    strategy: Strategy = Strategy.MIXED
    removal_delay: float = 60.0
    driver_grace: float = 60.0
    health_recovery_after: float = 300.0
    edits: EditOptions = field(default_factory=EditOptions)
    checks: Checks = field(default_factory=Checks)
    naming: Naming = field(default_factory=Naming)
    sharing: TimeSlicing = field(default_factory=TimeSlicing)
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """An id that was offered, or that a pod holds: its last known device, and why it is unfit, if it is.

    `vanished` is since when it is known not to be there, which is another thing than being sick: a
    device on a GPU that does not answer is not gone. Replicas that share their fate are one entry, which
    stays the same object while nothing changes: there may be thousands.
    """

    offered: OfferedDevice
    sick_since: float | None = None
    vanished: float | None = None

    @property
    def device(self) -> Device:
        return self.offered.device

    @property
    def sick(self) -> str:
        return self.offered.sick


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next.

    `named` is what the sources of usage name, or named when they were last all heard: one that falls
    silent frees nothing. `offers` are those that were shown.
    """

    entries: Mapping[ResourceName, Mapping[DeviceId, Entry]] = field(default_factory=dict)
    offers: Mapping[ResourceName, Offer] = field(default_factory=dict)
    emptied: Mapping[ResourceName, float] = field(default_factory=dict)
    revisions: Mapping[ResourceName, int] = field(default_factory=dict)
    unseen_leases: Mapping[tuple[Key, float], int] = field(default_factory=dict)
    named: frozenset[Key] = frozenset()
    usage_counted: float = float("-inf")
    served_profile: str = ""
    health: Health = field(default_factory=Health)


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is known; `now` and all other times are seconds on one monotonic clock.

    `inventory` is the last one that could be read, at `looked`; `driver_failed` is since when it could not be
    read again, with `driver_error` saying why. `unready` says of devices what no container would find
    of them on this node: a CDI document, a device node. `leases` maps allocations to the time of our answer.
    `faults` came while `inventory` was in force.
    """

    now: float
    inventory: Inventory | None = None
    looked: float = float("-inf")
    driver_failed: float | None = None
    driver_error: str = ""
    unready: Mapping[DeviceId, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    leases: Mapping[Key, float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    memory: Memory = field(default_factory=Memory)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wake_at` is when the answer would change by time alone, `usage_at` when usage must be read again,
    `look_at` when the driver must be asked again, the sooner for what it was not yet asked about.

    `warnings` are sentences for the log, each worth one line when it first appears.
    """

    offers: Offers
    memory: Memory
    ended_leases: frozenset[tuple[Key, float]] = frozenset()
    wake_at: float | None = None
    usage_at: float | None = None
    look_at: float | None = None
    warnings: tuple[str, ...] = ()
    health_changes: tuple[Change, ...] = ()


Entries = Mapping[ResourceName, Mapping[DeviceId, Entry]]


def decide(world: World) -> Outcome:
    """What to show, what to remember and when to look again, given `world`."""
    unseen, ended = _age_leases(world)
    named = world.usage.named if world.usage.complete else world.usage.named | world.memory.named
    held = named | {key for key, answered in world.leases.items() if (key, answered) not in ended}
    health, changes = _judge(world, held)
    entries, served, warnings = _see(world, held, health)
    entries, waiting = _forget(world, entries, held)
    waiting |= _hardly_held(world, health)
    entries, emptied = _retire(world, entries)

    fresh = world.usage.began > world.memory.usage_counted
    revisions = {
        # A list that is sent again makes the kubelet rewrite the checkpoint that is in the way.
        resource: world.memory.revisions.get(resource, 0) + (fresh and resource in waiting)
        for resource in entries
    }
    offers = {
        resource: _offer(listed, revisions[resource], world.memory.offers.get(resource))
        for resource, listed in sorted(entries.items())
    }
    memory = Memory(
        entries=entries,
        offers=offers,
        emptied=emptied,
        revisions=revisions,
        unseen_leases=unseen,
        named=named,
        usage_counted=max(world.usage.began, world.memory.usage_counted),
        served_profile=served,
        health=health,
    )
    inventory = world.inventory
    return Outcome(
        Offers(
            offers,
            inventory.control_nodes if inventory is not None else (),
            world.options.edits,
            world.options.sharing.fail_requests_greater_than_one,
            world.options.policy,
            _use(world, entries, held),
            inventory.links if inventory is not None else {},
        ),
        memory,
        ended,
        _wake_at(world, entries, emptied, health),
        _usage_at(world, entries, health, [answered for _, answered in unseen]),
        healths.look_at(health, world.looked) if world.driver_failed is None else None,
        warnings,
        changes,
    )


def _offer(listed: Mapping[DeviceId, Entry], revision: int, before: Offer | None) -> Offer:
    """The offer of `listed`, which is `before` itself where nothing has changed."""
    devices = {id_: entry.offered for id_, entry in listed.items()}
    if before is not None and before.revision == revision and before.devices == devices:
        return before
    return Offer(devices, revision)


def _use(
    world: World, entries: Entries, held: AbstractSet[Key]
) -> Mapping[GpuUuid, Mapping[ResourceName, int]]:
    """How many ids of which resource are held on each GPU."""
    gpus: dict[DeviceId, GpuUuid] = {}
    if world.inventory is not None:
        gpus = {DeviceId(gpu.uuid): gpu.uuid for gpu in world.inventory.gpus}
        gpus |= {device.uuid: gpu.uuid for gpu, device in world.inventory.devices()}
    use: dict[GpuUuid, dict[ResourceName, int]] = {}
    for resource, id_ in held:
        entry = entries.get(resource, {}).get(id_)
        on = (entry is not None and entry.device.gpu) or gpus.get(device_of(id_))
        if on:
            here = use.setdefault(on, {})
            here[resource] = here.get(resource, 0) + 1
    return use


def _judge(world: World, held: AbstractSet[Key]) -> tuple[Health, tuple[Change, ...]]:
    """Who is sick now, by the faults that came and what is known of usage."""
    scene = Scene(
        world.now,
        world.inventory,
        world.looked,
        answers=world.driver_failed is None,
        held=frozenset(device_of(id_) for _, id_ in held),
        held_known=world.usage.began if world.usage.complete else None,
    )
    options = world.options
    return healths.fold(
        world.memory.health, scene, world.faults, options.checks, options.health_recovery_after
    )


def _age_leases(world: World) -> tuple[Mapping[tuple[Key, float], int], frozenset[tuple[Key, float]]]:
    """How often each lease was looked for in vain, and which leases are over.

    A lease is over when a read of usage begun after our answer names the device, or when two begun
    ten seconds after it do not: the kubelet has then dropped the allocation, or never took it.
    """
    usage, fresh = world.usage, world.usage.began > world.memory.usage_counted
    unseen: dict[tuple[Key, float], int] = {}
    ended = set()
    for key, answered in world.leases.items():
        lease = (key, answered)
        count = world.memory.unseen_leases.get(lease, 0)
        if usage.began >= answered and key in usage.named:
            ended.add(lease)
            continue
        if fresh and usage.complete and usage.began >= answered + LEASE_CERTAIN_AFTER:
            count += 1
        if count >= LEASE_CERTAIN_READS:
            ended.add(lease)
        else:
            unseen[lease] = count
    return unseen, frozenset(ended)


def _see(world: World, held: AbstractSet[Key], health: Health) -> tuple[Entries, str, tuple[str, ...]]:
    """Every id that lives, was offered, or is held by a pod; the profile that `single` serves; warnings."""
    known = world.memory.entries
    # Each device that somebody holds: under which resources, and whether as a replica.
    holders: dict[DeviceId, set[Hold]] = {}
    for resource, id_ in held:
        holders.setdefault(device_of(id_), set()).add((resource, is_replica(id_)))
    assignment = _assign(world, held, holders)
    driver = _driver_sickness(world)

    entries: dict[ResourceName, dict[DeviceId, Entry]] = {resource: {} for resource in known}
    live: dict[DeviceId, tuple[ResourceName, Device]] = {}
    for resource, devices in assignment.resources.items():
        listed, listed_before = entries.setdefault(resource, {}), known.get(resource, {})
        last: tuple[Device, Entry | None, Entry] | None = None
        for id_, device in devices.items():
            before = listed_before.get(id_)
            if last is None or last[0] is not device or last[1] is not before:
                live[device.id] = resource, device
                sick = driver or _elsewhere(holders.get(device.id, set()), resource, id_)
                sick = sick or health.why(device.id, device.gpu) or world.unready.get(device.id, "")
                last = device, before, _entry(world, device, sick, before, vanished=False)
            listed[id_] = last[2]

    absent: list[tuple[ResourceName, DeviceId, Entry | None]] = [
        (resource, id_, entry)
        for resource, remembered in known.items()
        for id_, entry in remembered.items()
        if id_ not in entries[resource]
    ]
    absent += [
        (resource, id_, None)
        for resource, id_ in held
        if id_ not in entries.get(resource, ()) and id_ not in known.get(resource, ())
        if is_ours(resource, id_, world.options.naming.domain)
    ]
    answering = _answering(world)
    missing: tuple[ResourceName, DeviceId, Entry | None, Entry] | None = None
    for resource, id_, before in sorted(absent, key=lambda one: one[:2]):
        behind = device_of(id_)
        if missing is None or missing[:2] != (resource, behind) or missing[2] is not before:
            unknown = None, Device(behind, GpuUuid(""), -1, "", None, ())
            live_as, device = live.get(behind, unknown)
            device = before.device if before is not None else device
            sick, vanished = _absence(world, device, resource, live_as, answering)
            entry = _entry(world, device, driver or sick, before, vanished=vanished)
            missing = resource, behind, before, entry
        entries.setdefault(resource, {})[id_] = missing[3]

    warnings = list(assignment.left_out)
    if world.inventory is not None:
        warnings += world.inventory.unreadable
        warnings += [f"GPU {gpu.index} is left out: {gpu.reason}" for gpu in world.inventory.broken]
    if _vanished(entries) and world.usage.checkpoint is Source.FAILED:
        warnings.append(
            "the kubelet's checkpoint cannot be read: "
            "devices that are gone stay listed as unhealthy until it can"
        )
    return entries, assignment.served_profile, tuple(warnings)


def _assign(
    world: World, held: AbstractSet[Key], holders: Mapping[DeviceId, AbstractSet[Hold]]
) -> Assignment:
    known, options = world.memory.entries, world.options
    if world.inventory is None:
        return Assignment({}, (), world.memory.served_profile)
    profiles: dict[DeviceId, str] = {}
    if options.strategy is Strategy.SINGLE:
        names = names_of_single(options.naming, options.sharing)
        for resource, id_ in held:
            if resource in names:
                entry = known.get(resource, {}).get(id_)
                profiles[device_of(id_)] = entry.device.profile if entry is not None else ""
    shared: set[DeviceId] = set()
    if any(isinstance(resource.devices, int) for resource in options.sharing.resources):
        shared = {device for device, ways in holders.items() if any(as_replica for _, as_replica in ways)}
        shared |= {
            entry.device.id
            for listed in known.values()
            for id_, entry in listed.items()
            if entry.vanished is None and is_replica(id_)
        }
    whole = {device for device, ways in holders.items() if not all(as_replica for _, as_replica in ways)}
    return assign(
        world.inventory,
        options.strategy,
        options.naming,
        options.sharing,
        served=world.memory.served_profile,
        held=profiles,
        shared=shared,
        whole=whole,
    )


def _elsewhere(ways: AbstractSet[Hold], resource: ResourceName, id_: DeviceId) -> str:
    """Why a device that is held in these ways is not to be offered as `id_` of `resource`, or "".

    Replicas of one resource do not stand in each other's way.
    """
    others = sorted(ways - {(resource, is_replica(id_))})
    if not others:
        return ""
    name, as_replica = others[0]
    if name != resource:
        return f"still held by a pod as {name}"
    return "a pod still holds a replica of it" if as_replica else "a pod still has it to itself"


def _driver_sickness(world: World) -> str:
    """Why every device is sick because the driver as a whole is, or ""."""
    if world.driver_failed is None or world.now < world.driver_failed + world.options.driver_grace:
        return ""
    return f"the driver does not answer: {world.driver_error}"


def _answering(world: World) -> AbstractSet[str]:
    """The ids of all that the driver shows, offered or not."""
    if world.inventory is None:
        return frozenset()
    return {mig.uuid for _, mig in world.inventory.devices()} | {gpu.uuid for gpu in world.inventory.gpus}


def _absence(
    world: World,
    device: Device,
    resource: ResourceName,
    live_as: ResourceName | None,
    answering: AbstractSet[str],
) -> tuple[str, bool]:
    """Why a device is not there to be offered as `resource`, and whether it is known to be gone."""
    if live_as == resource:
        return "no longer offered under this id: how its device is shared has changed", True
    if live_as is not None:
        return f"no longer offered as {resource} but as {live_as}", True
    if world.inventory is None:
        return "the driver has not answered yet", False
    if device.id in answering:
        return f"no longer offered as {resource}", True
    for gpu in world.inventory.broken:
        # A broken GPU without its uuid may be anyone's, and a device that only a pod names may be on
        # any: then nothing unaccounted for counts as gone.
        unaccounted = device.gpu not in {answering.uuid for answering in world.inventory.gpus}
        if gpu.uuid == device.gpu or (unaccounted and not (gpu.uuid and device.gpu)):
            return f"GPU {gpu.index}: {gpu.reason}", False
    return "gone: no such device on this node now", True


def _entry(world: World, device: Device, sick: str, before: Entry | None, *, vanished: bool) -> Entry:
    since = before.sick_since if before is not None and before.sick else None
    gone = before.vanished if before is not None else None
    entry = Entry(
        OfferedDevice(device, sick),
        (world.now if since is None else since) if sick else None,
        (world.now if gone is None else gone) if vanished else None,
    )
    return before if before is not None and before == entry else entry


def _forget(world: World, entries: Entries, held: AbstractSet[Key]) -> tuple[Entries, set[ResourceName]]:
    """The entries that stay, and the resources where only the checkpoint still names what is long gone."""
    kept: dict[ResourceName, Mapping[DeviceId, Entry]] = {}
    waiting = set()
    stale = world.usage.named - world.usage.named_by_pod_resources
    for resource, listed in entries.items():
        leaving = set()
        for id_, entry in listed.items():
            if entry.vanished is None:
                continue
            due = entry.vanished + world.options.removal_delay
            past = world.now >= due and world.driver_failed is None
            asked = world.usage.complete and world.usage.began >= due
            if past and asked and (resource, id_) not in held:
                leaving.add(id_)
            elif past and asked and (resource, id_) in stale:
                waiting.add(resource)
        kept[resource] = {i: e for i, e in listed.items() if i not in leaving} if leaving else listed
    return kept, waiting


def _hardly_held(world: World, health: Health) -> set[ResourceName]:
    """The resources where only the checkpoint still names what must be let go of to get well."""
    awaited = healths.awaits_release(health, world.options.health_recovery_after)
    by_checkpoint = world.usage.named - world.usage.named_by_pod_resources
    return {resource for resource, id_ in by_checkpoint if device_of(id_) in awaited}


def _retire(world: World, entries: Entries) -> tuple[Entries, Mapping[ResourceName, float]]:
    """Without the resources that had no id for a minute, and since when others have none."""
    emptied = {
        resource: world.memory.emptied.get(resource, world.now)
        for resource, listed in entries.items()
        if not listed
    }
    over = {resource for resource, since in emptied.items() if world.now >= since + EMPTY_OFFER_KEPT}
    return (
        {resource: listed for resource, listed in entries.items() if resource not in over},
        {resource: since for resource, since in emptied.items() if resource not in over},
    )


def _vanished(entries: Entries) -> list[float]:
    return [e.vanished for listed in entries.values() for e in listed.values() if e.vanished is not None]


def _wake_at(
    world: World, entries: Entries, emptied: Mapping[ResourceName, float], health: Health
) -> float | None:
    moments = [since + world.options.removal_delay for since in _vanished(entries)]
    moments += [since + EMPTY_OFFER_KEPT for since in emptied.values()]
    moments += healths.wake_at(health, world.options.health_recovery_after)
    if world.driver_failed is not None:
        moments.append(world.driver_failed + world.options.driver_grace)
    return min((moment for moment in moments if moment > world.now), default=None)


def _usage_at(world: World, entries: Entries, health: Health, leases: Collection[float]) -> float | None:
    """When to ask again who holds what: only while something waits to leave, or to get well if nobody has it,
    or leases, by the time of our answer, wait to end; and never faster than every 2 s.

    Soon after a change, seldom when a pod goes on holding what is gone, and at once when one falls due.
    """
    began, vanished = world.usage.began, _vanished(entries)
    due = [since + world.options.removal_delay for since in vanished]
    due += [answered + LEASE_CERTAIN_AFTER for answered in leases]
    moments = [moment for moment in due if moment > began]
    waiting = [*vanished, *healths.awaits_release(health, world.options.health_recovery_after).values()]
    if waiting:
        moments.append(began + min(max((world.now - max(waiting)) / 2, USAGE_SOONEST), USAGE_LATEST))
    if any(answered + LEASE_CERTAIN_AFTER <= began for answered in leases):
        # It was looked for in vain once, or a source was silent.
        moments.append(began + (USAGE_SOONEST if world.usage.complete else USAGE_LATEST))
    return max(began + USAGE_SOONEST, min(moments)) if moments else None
