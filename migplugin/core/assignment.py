"""Which live devices are shown under which resource: the strategies `none`, `single` and `mixed`.

NVIDIA's plugin exits where a node does not fit its strategy. Here the part that does not fit is
left out and named, and the rest is served. Names come from `naming`; then `sharing` makes replicas
of what is to be shared, and the rest stays as it is.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from migplugin.core import profile as profiles
from migplugin.core.inventory import DeviceId, Gpu, Inventory, MigDevice
from migplugin.core.naming import Naming
from migplugin.core.resource import GPU, Device, ResourceName, Strategy, is_valid, replica
from migplugin.core.sharing import SHARED, TimeSlicing, chosen

USUAL = Naming()
NOT_SHARED = TimeSlicing()


@dataclass(frozen=True, slots=True)
class Assignment:
    """Each resource's devices by the id they are offered under: replicas are one device under many ids.

    `left_out` has one sentence for each thing that the strategy does not serve.
    """

    resources: Mapping[ResourceName, Mapping[DeviceId, Device]]
    left_out: tuple[str, ...] = ()
    served_profile: str = ""


def assign(
    inventory: Inventory,
    strategy: Strategy,
    naming: Naming = USUAL,
    sharing: TimeSlicing = NOT_SHARED,
    *,
    served: str = "",
    held: Mapping[DeviceId, str] | None = None,
    shared: Collection[DeviceId] = frozenset(),
    whole: Collection[DeviceId] = frozenset(),
) -> Assignment:
    """Every live device under its resource.

    `served` is the profile that `single` served until now, if a device that may be held still has
    it; `held` maps devices that pods hold under a name of `single` to their profiles, and decides
    where nothing has been served yet. `shared` devices are offered as replicas now, and `whole` ones are
    held by a pod that shares them with nobody.
    """
    if strategy is Strategy.NONE:
        assignment = _none(inventory, naming)
    elif strategy is Strategy.SINGLE:
        assignment = _single(inventory, naming, served, held or {})
    else:
        assignment = _mixed(inventory, naming)
    return _share(assignment, inventory, sharing, shared, whole)


def names_of_single(naming: Naming, sharing: TimeSlicing) -> frozenset[ResourceName]:
    """What MIG devices may be called under strategy `single`."""
    names = {GPU, naming.gpu, *(rule.name for rule in naming.mig)}
    renamed = {shared.rename for shared in sharing.resources if shared.name in names and shared.rename}
    return frozenset({*names, *renamed, *(ResourceName(name + SHARED) for name in names)})


def _share(
    assignment: Assignment,
    inventory: Inventory,
    sharing: TimeSlicing,
    already: Collection[DeviceId],
    whole: Collection[DeviceId],
) -> Assignment:
    """With replicas in place of the devices that are to be shared, by the first entry that means them."""
    if not sharing.resources:
        return assignment
    rest = {name: dict(devices) for name, devices in assignment.resources.items()}
    replicas: list[tuple[ResourceName, DeviceId, Device]] = []
    left_out = list(assignment.left_out)
    for shared in sharing.resources:
        devices = rest.get(shared.name, {})
        ids, missing = chosen(shared, tuple(devices), inventory, already, whole)
        left_out += [
            f"sharing.timeSlicing: {reference} is no device of {shared.name} here, or is shared already"
            for reference in missing
        ]
        name = sharing.name_of(shared)
        for id_ in [id_ for id_ in devices if id_ in ids]:
            device = devices.pop(id_)
            replicas += [(name, replica(id_, number), device) for number in range(shared.replicas)]
    resources = {name: devices for name, devices in rest.items() if devices}
    for name, id_, device in replicas:
        resources.setdefault(name, {})[id_] = device
    return replace(assignment, resources=resources, left_out=tuple(left_out))


def _none(inventory: Inventory, naming: Naming) -> Assignment:
    whole = [gpu for gpu in inventory.gpus if not gpu.mig_enabled]
    left_out = [
        f"GPU {gpu.index} has MIG enabled and strategy none serves whole GPUs only: "
        "disable MIG on it or set --mig-strategy=mixed"
        for gpu in inventory.gpus
        if gpu.mig_enabled
    ]
    return Assignment(_resources(_named_gpus(whole, naming)), tuple(left_out))


def _mixed(inventory: Inventory, naming: Naming) -> Assignment:
    named = list(_named_gpus([gpu for gpu in inventory.gpus if not gpu.mig_enabled], naming))
    left_out = []
    for gpu, device in inventory.devices():
        name = naming.of_mig(device.profile, single=False)
        if is_valid(name):
            named.append((name, _mig_device(gpu, device)))
        else:
            left_out.append(
                f"{device.uuid} on GPU {gpu.index}: the kubelet would refuse the resource name {name!r}"
            )
    return Assignment(_resources(named), tuple(left_out))


def _single(inventory: Inventory, naming: Naming, served: str, held: Mapping[DeviceId, str]) -> Assignment:
    if not any(gpu.mig_enabled for gpu in inventory.gpus):
        return Assignment(_resources(_named_gpus(inventory.gpus, naming)))
    live = {device.uuid: device.profile for _, device in inventory.devices()}
    if not served or served not in {*live.values(), *held.values()}:
        served = _most_frequent(live[id_] for id_ in held if id_ in live) or _most_frequent(live.values())
    shown, other = [], Counter[str]()
    for gpu, device in inventory.devices():
        if device.profile == served:
            shown.append(_mig_device(gpu, device))
        else:
            other[device.profile] += 1
    left_out = [
        f"{count} MIG device{'s' if count > 1 else ''} of profile {name}: strategy single serves one profile "
        f"and {served} is being served; set --mig-strategy=mixed to serve all"
        for name, count in sorted(other.items(), key=lambda item: profiles.size_key(item[0]))
    ]
    left_out += [
        f"GPU {gpu.index} has MIG disabled: strategy single does not mix whole GPUs with MIG devices; "
        "set --mig-strategy=mixed to serve both"
        for gpu in inventory.gpus
        if not gpu.mig_enabled
    ]
    left_out += [
        f"GPU {gpu.index} has MIG enabled and no MIG device: create some to have it served"
        for gpu in inventory.gpus
        if gpu.mig_enabled and not gpu.devices
    ]
    name = naming.of_mig(served, single=True)
    return Assignment(_resources((name, device) for device in shown), tuple(left_out), served)


def _most_frequent(names: Iterable[str]) -> str:
    counted = Counter(names)
    return min(counted, key=lambda name: (-counted[name], profiles.size_key(name)), default="")


def _named_gpus(gpus: Iterable[Gpu], naming: Naming) -> Iterator[tuple[ResourceName, Device]]:
    return ((naming.of_gpu(gpu.product), _whole_gpu(gpu)) for gpu in gpus)


def _resources(
    named: Iterable[tuple[ResourceName, Device]],
) -> Mapping[ResourceName, Mapping[DeviceId, Device]]:
    resources: dict[ResourceName, dict[DeviceId, Device]] = {}
    for name, device in named:
        resources.setdefault(name, {})[device.id] = device
    return resources


def _whole_gpu(gpu: Gpu) -> Device:
    return Device(
        DeviceId(gpu.uuid),
        gpu.uuid,
        gpu.index,
        "",
        gpu.numa_node,
        (f"/dev/nvidia{gpu.minor}",),
        str(gpu.index),
    )


def _mig_device(gpu: Gpu, device: MigDevice) -> Device:
    minors = (device.gi_minor, device.ci_minor)
    nodes = (f"/dev/nvidia{gpu.minor}", *(f"/dev/nvidia-caps/nvidia-cap{m}" for m in minors if m is not None))
    return Device(
        device.uuid, gpu.uuid, gpu.index, device.profile, gpu.numa_node, nodes, f"{gpu.index}:{device.index}"
    )
