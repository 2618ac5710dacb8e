"""Which live devices are shown under which resource: the strategies `none`, `single` and `mixed`.

NVIDIA's plugin exits where a node does not fit its strategy. Here the part that does not fit is
left out and named, and the rest is served.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from migplugin.core import profile as profiles
from migplugin.core.inventory import DeviceId, Gpu, GpuUuid, Inventory, MigDevice

ResourceName = NewType("ResourceName", str)

DOMAIN = "nvidia.com/"
GPU = ResourceName(DOMAIN + "gpu")


class Strategy(StrEnum):
    NONE = "none"
    SINGLE = "single"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Device:
    """What is offered under one id: a MIG device, or a whole GPU (`profile` is then "").

    `nodes` are the device nodes of its own, below the root that holds `dev/`. `index` is what NVIDIA
    calls it by index: `0`, or `0:1` for a MIG device.
    """

    id: DeviceId
    gpu: GpuUuid
    gpu_index: int
    profile: str
    numa_node: int | None
    nodes: tuple[str, ...]
    index: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """`left_out` has one sentence for each thing that the strategy does not serve."""

    resources: Mapping[ResourceName, Mapping[DeviceId, Device]]
    left_out: tuple[str, ...] = ()
    served_profile: str = ""


def of_profile(profile: str) -> ResourceName:
    """`nvidia.com/mig-<profile>`, spelt as the kubelet accepts it (kubelet.md 1.1)."""
    return ResourceName(DOMAIN + profiles.resource_suffix(profile))


def is_valid(name: str) -> bool:
    """Whether the kubelet takes the part after the domain: 1 to 63 characters, alphanumeric at both ends."""
    suffix = name.partition("/")[2]
    return 0 < len(suffix) <= 63 and suffix[0].isalnum() and suffix[-1].isalnum()


def is_ours(resource: ResourceName) -> bool:
    """Whether this plugin, or NVIDIA's before it, may have offered `resource`."""
    return resource == GPU or resource.startswith(DOMAIN + "mig-")


def assign(
    inventory: Inventory, strategy: Strategy, *, served: str = "", held: Mapping[DeviceId, str] | None = None
) -> Assignment:
    """Every live device under its resource.

    `served` is the profile that `single` served until now, if a device that may be held still has
    it; `held` maps devices that pods hold under `nvidia.com/gpu` to their profiles, and decides
    where nothing has been served yet.
    """
    if strategy is Strategy.NONE:
        return _none(inventory)
    if strategy is Strategy.SINGLE:
        return _single(inventory, served, held or {})
    return _mixed(inventory)


def _none(inventory: Inventory) -> Assignment:
    whole = [gpu for gpu in inventory.gpus if not gpu.mig_enabled]
    left_out = [
        f"GPU {gpu.index} has MIG enabled and strategy none serves whole GPUs only: "
        "disable MIG on it or set --mig-strategy=mixed"
        for gpu in inventory.gpus
        if gpu.mig_enabled
    ]
    return Assignment(_resources(GPU, map(_whole_gpu, whole)), tuple(left_out))


def _mixed(inventory: Inventory) -> Assignment:
    resources: dict[ResourceName, dict[DeviceId, Device]] = {}
    left_out = []
    for gpu in inventory.gpus:
        if not gpu.mig_enabled:
            resources.setdefault(GPU, {})[DeviceId(gpu.uuid)] = _whole_gpu(gpu)
        for device in gpu.devices:
            name = of_profile(device.profile)
            if is_valid(name):
                resources.setdefault(name, {})[device.uuid] = _mig_device(gpu, device)
            else:
                left_out.append(
                    f"{device.uuid} on GPU {gpu.index}: the kubelet would refuse the resource name {name!r}"
                )
    return Assignment(resources, tuple(left_out))


def _single(inventory: Inventory, served: str, held: Mapping[DeviceId, str]) -> Assignment:
    if not any(gpu.mig_enabled for gpu in inventory.gpus):
        return Assignment(_resources(GPU, map(_whole_gpu, inventory.gpus)))
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
    return Assignment(_resources(GPU, shown), tuple(left_out), served)


def _most_frequent(names: Iterable[str]) -> str:
    counted = Counter(names)
    return min(counted, key=lambda name: (-counted[name], profiles.size_key(name)), default="")


def _resources(
    name: ResourceName, devices: Iterable[Device]
) -> Mapping[ResourceName, Mapping[DeviceId, Device]]:
    by_id = {device.id: device for device in devices}
    return {name: by_id} if by_id else {}


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
