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
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from migplugin.core.allocation import Offer, Offers
from migplugin.core.inventory import DeviceId, GpuUuid, Inventory
from migplugin.core.resource import Device, ResourceName, Strategy

EMPTY_OFFER_KEPT = 60.0
LEASE_CERTAIN_AFTER = 10.0
USAGE_SOONEST = 2.0
USAGE_LATEST = 30.0

Key = tuple[ResourceName, DeviceId]


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
class Fault:
    """An XID event, repeated `count` times; `gi` and `ci` are None where it concerns the whole GPU or GI."""

    gpu: GpuUuid
    gi: int | None
    ci: int | None
    xid: int
    count: int
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds."""

    strategy: Strategy = Strategy.MIXED
    removal_delay: float = 60.0
    driver_grace: float = 60.0


@dataclass(frozen=True, slots=True)
class Entry:
    """An id that was offered: its last known device, and since when it is Unhealthy, if it is.

    `vanished` is since when it is known not to be there, which is another thing than being sick: a
    device on a GPU that does not answer is not gone.
    """

    device: Device
    sick_since: float | None = None
    sick: str = ""
    vanished: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next."""

    entries: Mapping[ResourceName, Mapping[DeviceId, Entry]] = field(default_factory=dict)
    emptied: Mapping[ResourceName, float] = field(default_factory=dict)
    revisions: Mapping[ResourceName, int] = field(default_factory=dict)
    unseen_leases: Mapping[tuple[Key, float], int] = field(default_factory=dict)
    usage_counted: float = float("-inf")
    served_profile: str = ""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is known; `now` and all other times are seconds on one monotonic clock.

    `inventory` is the last one that could be read; `driver_failed` is since when it could not be
    read again, with `driver_error` saying why. `leases` maps allocations to the time of our answer.
    """

    now: float
    inventory: Inventory | None = None
    driver_failed: float | None = None
    driver_error: str = ""
    usage: Usage = field(default_factory=Usage)
    leases: Mapping[Key, float] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    memory: Memory = field(default_factory=Memory)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wake_at` is when the answer would change by time alone, `usage_at` when usage must be read again.

    `warnings` are sentences for the log, each worth one line when it first appears.
    """

    offers: Offers
    memory: Memory
    ended_leases: frozenset[tuple[Key, float]] = frozenset()
    wake_at: float | None = None
    usage_at: float | None = None
    warnings: tuple[str, ...] = ()


def decide(world: World) -> Outcome:
    """What to show, what to remember and when to look again, given `world`."""
    leases, unseen, ended = _age_leases(world)
    entries, served, warnings = _see(world, leases)
    entries, blocked = _forget(world, entries, leases)
    offers, emptied = _show(world, entries, leases)

    vanished = [
        entry.vanished
        for listed in entries.values()
        for entry in listed.values()
        if entry.vanished is not None
    ]
    due = [since + world.options.removal_delay for since in vanished]
    moments = [moment for moment in due if moment > world.now]
    moments += [since + EMPTY_OFFER_KEPT for since in emptied.values()]
    if world.driver_failed is not None:
        moments.append(world.driver_failed + world.options.driver_grace)
    usage_at = None
    if vanished:
        # Soon after a change, seldom when a pod goes on holding what is gone; at once when one falls due.
        pause = min(max((world.now - max(vanished)) / 2, USAGE_SOONEST), USAGE_LATEST)
        unread = [moment for moment in due if moment > world.usage.began]
        usage_at = max(world.usage.began + USAGE_SOONEST, min([world.usage.began + pause, *unread]))
    if any(
        entry.vanished is not None and world.usage.checkpoint is Source.FAILED
        for e in entries.values()
        for entry in e.values()
    ):
        warnings += (
            "the kubelet's checkpoint cannot be read: devices that are gone stay listed as unhealthy until it can",
        )

    revisions = dict(world.memory.revisions)
    for resource in blocked:
        revisions[resource] = revisions.get(resource, 0) + 1
    memory = Memory(
        entries=entries,
        emptied=emptied,
        revisions={resource: n for resource, n in revisions.items() if resource in offers},
        unseen_leases=unseen,
        usage_counted=max(world.usage.began, world.memory.usage_counted),
        served_profile=served,
    )
    control_nodes = world.inventory.control_nodes if world.inventory is not None else ()
    shown = {
        resource: Offer(devices, memory.revisions.get(resource, 0))
        for resource, devices in sorted(offers.items())
    }
    return Outcome(
        Offers(shown, control_nodes),
        memory,
        ended,
        min((moment for moment in moments if moment > world.now), default=None),
        usage_at,
        warnings,
    )
