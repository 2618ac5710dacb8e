"""The one status document: what this node has, what is offered of it, and who holds it.

The same tree is printed by `migplugin status`, drawn by `picture` and answered by the agent, so its
field names are a published schema (`SCHEMA`) and every leaf is plain JSON. None means "not known
here", never "no": who looks from outside has no memory, and where the kubelet tells nothing nobody
can say that a device is free.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from migplugin.core import profile as profiles
from migplugin.core.decide import Entry, Key, Outcome, Source, World
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuProfile, MigDevice, Placement
from migplugin.core.resource import ResourceName, device_of

SCHEMA = "migplugin/status/v1"
HEALTHY, UNHEALTHY = "healthy", "unhealthy"
BY_AGENT, BY_COMMAND = "agent", "command"
UNTIL_UNSAID = "until that is no longer so"


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What only the running agent knows; `registrations` has one phrase for each resource."""

    registrations: Mapping[ResourceName, str] = field(default_factory=dict)
    refused_allocations: Mapping[ResourceName, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A MIG device, or a whole GPU that is offered as one device (`gi` and `ci` are then None).

    `resources` are those that list it, the one it is offered under first; where it is in none,
    `health` is None. `until` says what ends it where that is known, `unhealthy_for` is in seconds. `holders`
    are "namespace/pod:container" and None where pod-resources does not tell; a device can be `held` without
    a holder that can be named.
    """

    uuid: str
    gi: int | None
    ci: int | None
    profile: str
    placement: Placement | None
    memory_mib: int | None
    multiprocessors: int | None
    resources: tuple[str, ...]
    health: str | None
    reason: str | None
    until: str | None
    unhealthy_for: float | None
    held: bool | None
    holders: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """A GPU instance with its MIG devices, of which it can have none."""

    gi: int
    profile: str
    placement: Placement | None
    devices: tuple[DeviceStatus, ...]


@dataclass(frozen=True, slots=True)
class FitStatus:
    """`count` more instances of `profile` could be created if nothing else were."""

    profile: str
    count: int


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """One card; of a broken one only `index`, `broken` and perhaps `uuid` are known.

    `memory_slices` is the length of the placement grid, `fits` what could still be created, small to
    large: both None where the driver told no placements. `whole` is the GPU as a device of its own.
    """

    index: int
    uuid: str | None
    product: str | None
    memory_mib: int | None
    minor: int | None
    pci_address: str | None
    numa_node: int | None
    mig_enabled: bool | None
    mig_pending: bool | None
    memory_slices: int | None
    broken: str | None
    whole: DeviceStatus | None
    instances: tuple[InstanceStatus, ...]
    fits: tuple[FitStatus, ...] | None


@dataclass(frozen=True, slots=True)
class MissingDevice:
    """An id that `resource` still lists although no such device can be seen now.

    `gone`: there is no such device of this resource any more. Else its GPU, or the driver, does not answer.
    """

    uuid: str
    resource: str
    gpu_index: int | None
    profile: str
    gone: bool
    reason: str
    unhealthy_for: float | None
    held: bool | None
    holders: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class SickStatus:
    """What faults have made sick, or what the driver has something against.

    `id` is the UUID of a MIG device or, where `profile` is None, of a whole GPU with all that is on it.
    `sick_for` is in seconds. What is not `clearable` is seen by asking the driver, and lasts for as long as
    it is so.
    """

    id: str
    gpu_index: int | None
    profile: str | None
    reason: str
    until: str
    sick_for: float
    clearable: bool


@dataclass(frozen=True, slots=True)
class PastStatus:
    """What was sick, of what, when `ended` made it well: for people to know."""

    id: str
    reason: str
    ended: str


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """One resource as the kubelet is shown it. `leased` devices were handed out, and not yet seen held."""

    name: str
    total: int
    healthy: int
    held: int | None
    leased: int | None
    refused_allocations: int | None
    registration: str | None


@dataclass(frozen=True, slots=True)
class UsageStatus:
    """How the two sources of who holds what answered: "ok", "absent" or "failed"."""

    checkpoint: str
    pod_resources: str


@dataclass(frozen=True, slots=True)
class Status:
    """`driver_error` is None where the driver answers; the GPUs are then those of now, else the last seen."""

    schema: str
    node: str
    seen_by: str
    driver_version: str | None
    driver_error: str | None
    strategy: str
    usage: UsageStatus
    gpus: tuple[GpuStatus, ...]
    missing: tuple[MissingDevice, ...]
    sick: tuple[SickStatus, ...]
    history: tuple[PastStatus, ...]
    resources: tuple[ResourceStatus, ...]
    warnings: tuple[str, ...]


def status(world: World, outcome: Outcome, *, node: str = "", agent: AgentFacts | None = None) -> Status:
    """The document for `world` and what was decided of it.

    `agent` is None where a command looked for itself; `world` then has no memory, and what only
    memory can tell is None.
    """
    leases = {key for key, answered in world.leases.items() if (key, answered) not in outcome.ended_leases}
    held = outcome.memory.named | leases
    view = _View(world, outcome, agent, leases, held, _by_device(outcome), _keys_by_device(held))
    inventory = world.inventory
    gpus = [view.gpu(gpu) for gpu in inventory.gpus] if inventory is not None else []
    gpus += [_broken(gpu) for gpu in inventory.broken] if inventory is not None else []
    return Status(
        schema=SCHEMA,
        node=node,
        seen_by=BY_COMMAND if agent is None else BY_AGENT,
        driver_version=inventory.driver_version if inventory is not None else None,
        driver_error=world.driver_error if world.driver_failed is not None else None,
        strategy=world.options.strategy.value,
        usage=UsageStatus(world.usage.checkpoint.value, world.usage.pod_resources.value),
        gpus=tuple(sorted(gpus, key=lambda gpu: gpu.index)),
        missing=view.missing(),
        sick=view.sick(),
        history=tuple(PastStatus(*past) for past in outcome.memory.health.history),
        resources=tuple(view.resource(name) for name in outcome.offers.resources),
        warnings=outcome.warnings,
    )


def fits(gpu: Gpu) -> tuple[FitStatus, ...] | None:
    """What could still be created on `gpu`, each profile by itself, small to large.

    None where that cannot be said: MIG is off, or the driver told no placements. Creation can
    still be refused for what placements do not show, media engines for example.
    """
    if not gpu.mig_enabled or not gpu.memory_slices or not gpu.profiles:
        return None
    known = {instance.gi for instance in gpu.instances if instance.placement is not None}
    if {instance.gi for instance in gpu.instances} | {device.gi for device in gpu.devices} != known:
        return None
    taken = [instance.placement for instance in gpu.instances if instance.placement is not None]
    counts = {}
    for offered in gpu.profiles:
        live = sum(instance.profile == offered.name for instance in gpu.instances)
        counts[offered.name] = min(_room(offered, taken), max(offered.max_instances - live, 0))
    ordered = sorted(counts, key=profiles.size_key)
    return tuple(FitStatus(name, counts[name]) for name in ordered if counts[name])


def _room(offered: GpuProfile, taken: Iterable[Placement]) -> int:
    """How many placements of one profile are free of `taken` and of each other.

    From the left, whatever is free: for pieces of one length nothing does better.
    """
    blocked = list(taken)
    count = 0
    for place in sorted(offered.placements, key=lambda place: place.start + place.size):
        if not any(_overlap(place, other) for other in blocked):
            blocked.append(place)
            count += 1
    return count


def _overlap(one: Placement, other: Placement) -> bool:
    return one.start < other.start + other.size and other.start < one.start + one.size


@dataclass(frozen=True, slots=True)
class _View:
    """The decision, asked device by device."""

    world: World
    outcome: Outcome
    agent: AgentFacts | None
    leases: AbstractSet[Key]
    held: AbstractSet[Key]
    listed: Mapping[DeviceId, Mapping[ResourceName, Entry]]
    keys: Mapping[DeviceId, AbstractSet[Key]]

    def gpu(self, gpu: Gpu) -> GpuStatus:
        own = self._listed(DeviceId(gpu.uuid))
        whole = None
        if any(entry.vanished is None for entry in own.values()):
            whole = self._device(gpu.uuid, None, None, "", None, gpu.memory_mib, None)
        return GpuStatus(
            index=gpu.index,
            uuid=gpu.uuid,
            product=gpu.product,
            memory_mib=gpu.memory_mib,
            minor=gpu.minor,
            pci_address=gpu.pci_address,
            numa_node=gpu.numa_node,
            mig_enabled=gpu.mig_enabled,
            mig_pending=gpu.mig_pending,
            memory_slices=gpu.memory_slices or None,
            broken=None,
            whole=whole,
            instances=self._instances(gpu),
            fits=fits(gpu),
        )

    def missing(self) -> tuple[MissingDevice, ...]:
        inventory = self.world.inventory
        seen = (
            {device.uuid for _, device in inventory.devices()} | {gpu.uuid for gpu in inventory.gpus}
            if inventory is not None
            else set()
        )
        found = [
            MissingDevice(
                uuid=device,
                resource=resource,
                gpu_index=entry.device.gpu_index if entry.device.gpu_index >= 0 else None,
                profile=entry.device.profile,
                gone=entry.vanished is not None,
                reason=entry.sick,
                unhealthy_for=self._unhealthy_for(entry),
                held=self._is_held({key for key in self.keys.get(device, ()) if key[0] == resource}),
                holders=self._holders(device),
            )
            for device, listed in self.listed.items()
            for resource, entry in listed.items()
            if entry.vanished is not None or device not in seen
        ]
        return tuple(sorted(found, key=lambda device: (device.resource, device.uuid)))

    def sick(self) -> tuple[SickStatus, ...]:
        """Who is, in order of GPU, also where it is in no resource."""
        health, inventory = self.outcome.memory.health, self.world.inventory
        index: dict[str | None, int] = {}
        if inventory is not None:
            index |= {gpu.uuid: gpu.index for gpu in inventory.gpus}
            index |= {gpu.uuid: gpu.index for gpu in inventory.broken}
        found = [
            SickStatus(
                id=id_,
                gpu_index=index.get(sickness.gpu),
                profile=None if sickness.device is None else sickness.device.profile,
                reason=sickness.cause,
                until=sickness.until,
                sick_for=max(self.world.now - sickness.since, 0.0),
                clearable=True,
            )
            for id_, sickness in health.sick.items()
        ]
        profile = {d.uuid: (gpu.uuid, d.profile) for gpu in health.gpus.values() for d in gpu.devices}
        for id_, sign in health.signs.items():
            gpu, of = profile.get(DeviceId(id_), (id_, None))
            since = max(self.world.now - sign.since, 0.0)
            found.append(SickStatus(id_, index.get(gpu), of, sign.text, UNTIL_UNSAID, since, clearable=False))
        return tuple(sorted(found, key=lambda s: (s.gpu_index is None, s.gpu_index, s.id, s.clearable)))

    def resource(self, name: ResourceName) -> ResourceStatus:
        offer = self.outcome.offers.resources[name]
        held = [self._is_held({(name, id_)}) for id_ in offer.devices]
        leased = sum(key[0] == name for key in self.leases)
        agent = self.agent
        return ResourceStatus(
            name=name,
            total=len(offer.devices),
            healthy=sum(device.healthy for device in offer.devices.values()),
            held=None if None in held else sum(map(bool, held)),
            leased=None if agent is None else leased,
            refused_allocations=None if agent is None else agent.refused_allocations.get(name, 0),
            registration=None if agent is None else agent.registrations.get(name, "not registered"),
        )

    def _instances(self, gpu: Gpu) -> tuple[InstanceStatus, ...]:
        """The GPU instances, also those that only their devices tell of, in order of place, then id."""
        found = {instance.gi: (instance.profile, instance.placement) for instance in gpu.instances}
        for device in gpu.devices:
            profile, placement = found.get(device.gi, ("", device.placement))
            found[device.gi] = (profile or profiles.of_gpu_instance(device.profile), placement)
        instances = [
            InstanceStatus(
                gi,
                profile,
                placement,
                tuple(
                    self._mig_device(device)
                    for device in sorted(gpu.devices, key=lambda d: d.ci)
                    if device.gi == gi
                ),
            )
            for gi, (profile, placement) in found.items()
        ]
        return tuple(sorted(instances, key=lambda i: (i.placement.start if i.placement else -1, i.gi)))

    def _mig_device(self, device: MigDevice) -> DeviceStatus:
        return self._device(
            device.uuid,
            device.gi,
            device.ci,
            device.profile,
            device.placement,
            device.memory_mib,
            device.multiprocessors,
        )

    def _device(
        self,
        uuid: str,
        gi: int | None,
        ci: int | None,
        profile: str,
        placement: Placement | None,
        memory_mib: int | None,
        multiprocessors: int | None,
    ) -> DeviceStatus:
        id_ = DeviceId(uuid)
        listed = self._listed(id_)
        names = sorted(listed, key=lambda name: (listed[name].vanished is not None, name))
        entry = listed[names[0]] if names else None
        reason, until, since = self._ailment(id_, entry)
        return DeviceStatus(
            uuid=uuid,
            gi=gi,
            ci=ci,
            profile=profile,
            placement=placement,
            memory_mib=memory_mib,
            multiprocessors=multiprocessors,
            resources=tuple(names),
            health=None if entry is None else HEALTHY if reason is None else UNHEALTHY,
            reason=reason,
            until=until,
            unhealthy_for=since,
            held=self._is_held(self.keys.get(id_, frozenset())),
            holders=self._holders(id_),
        )

    def _listed(self, id_: DeviceId) -> Mapping[ResourceName, Entry]:
        return self.listed.get(id_, {})

    def _is_held(self, keys: AbstractSet[Key]) -> bool | None:
        if keys & self.held:
            return True
        return False if self.world.usage.complete else None

    def _holders(self, id_: DeviceId) -> tuple[str, ...] | None:
        usage = self.world.usage
        if usage.pod_resources is not Source.OK:
            return None
        ids = sorted({id_, *(key[1] for key in self.keys.get(id_, ()))})
        return tuple(dict.fromkeys(holder for one in ids for holder in usage.holders.get(one, ())))

    def _ailment(self, id_: DeviceId, entry: Entry | None) -> tuple[str | None, str | None, float | None]:
        """Why a device is unfit, until what, and for how long it has been."""
        if entry is None or not entry.sick:
            return None, None, None
        health, gpu = self.outcome.memory.health, entry.device.gpu
        found = health.sickness(id_, gpu)
        if found is not None and found.reason == entry.sick:
            return found.cause, found.until, max(self.world.now - found.since, 0.0)
        sign = health.signs.get(gpu) or health.signs.get(id_)
        if sign is not None and sign.text == entry.sick:
            return sign.text, UNTIL_UNSAID, max(self.world.now - sign.since, 0.0)
        return entry.sick, None, self._unhealthy_for(entry)

    def _unhealthy_for(self, entry: Entry) -> float | None:
        if self.agent is None or not entry.sick or entry.sick_since is None:
            return None
        return max(self.world.now - entry.sick_since, 0.0)


def _by_device(outcome: Outcome) -> Mapping[DeviceId, Mapping[ResourceName, Entry]]:
    """How each device is listed in each resource: of replicas, one that is there if any is."""
    found: dict[DeviceId, dict[ResourceName, Entry]] = {}
    for resource, listed in outcome.memory.entries.items():
        for entry in listed.values():
            shown = found.setdefault(entry.device.id, {})
            if resource not in shown or (shown[resource].vanished is not None and entry.vanished is None):
                shown[resource] = entry
    return found


def _keys_by_device(held: AbstractSet[Key]) -> Mapping[DeviceId, AbstractSet[Key]]:
    found: dict[DeviceId, set[Key]] = {}
    for key in held:
        found.setdefault(device_of(key[1]), set()).add(key)
    return found


def _broken(gpu: BrokenGpu) -> GpuStatus:
    return GpuStatus(
        index=gpu.index,
        uuid=gpu.uuid,
        product=None,
        memory_mib=None,
        minor=None,
        pci_address=None,
        numa_node=None,
        mig_enabled=None,
        mig_pending=None,
        memory_slices=None,
        broken=gpu.reason,
        whole=None,
        instances=(),
        fits=None,
    )
