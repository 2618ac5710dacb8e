"""What is offered, what Allocate adds to a container, and which devices we would rather see taken.

All of it works on the offers in memory: an allocation never depends on a driver call, and the
kubelet, which waits for it in its sync loop, never waits for a GPU.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from migplugin.core import cdi
from migplugin.core.inventory import DeviceId
from migplugin.core.resource import Device, ResourceName
from migplugin.errors import AllocationRefused

ENVVAR = "envvar"
VOLUME_MOUNTS = "volume-mounts"
CDI_ANNOTATIONS = "cdi-annotations"
CDI_CRI = "cdi-cri"
VISIBLE_DEVICES = "NVIDIA_VISIBLE_DEVICES"
MOUNT_ROOT = "/var/run/nvidia-container-devices"
MAX_DEVICES_IN_REQUEST = 4096


@dataclass(frozen=True, slots=True)
class OfferedDevice:
    """A device as the kubelet is shown it; `sick` says why it is Unhealthy and is "" where it is not."""

    device: Device
    sick: str = ""

    @property
    def healthy(self) -> bool:
        return not self.sick


@dataclass(frozen=True, slots=True)
class Offer:
    """The devices shown under one resource now.

    `revision` only makes two equal offers differ: a list that is sent again makes the kubelet
    rewrite its checkpoint, which goes on naming deleted pods until then (kubelet.md 4).
    """

    devices: Mapping[DeviceId, OfferedDevice]
    revision: int = 0


@dataclass(frozen=True, slots=True)
class EditOptions:
    """How containers are told their devices.

    `dev_root` is the host's directory that contains `dev/`; `features` are those of GDRCOPY, GDS and
    MOFED that the NVIDIA runtime is asked for.
    """

    device_list_strategies: frozenset[str] = frozenset({ENVVAR})
    pass_device_specs: bool = False
    dev_root: str = "/"
    device_id_strategy: str = "uuid"
    cdi_annotation_prefix: str = "cdi.k8s.io/"
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Offers:
    """Every resource with its offer, the control nodes of this node, and how containers are told."""

    resources: Mapping[ResourceName, Offer] = field(default_factory=dict)
    control_nodes: tuple[str, ...] = ()
    edits: EditOptions = field(default_factory=EditOptions)


@dataclass(frozen=True, slots=True)
class Mount:
    host_path: str
    container_path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class DeviceNode:
    host_path: str
    container_path: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True)
class Edits:
    """What one container gets; `cdi_devices` are fully qualified names."""

    envs: Mapping[str, str]
    mounts: tuple[Mount, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    cdi_devices: tuple[str, ...] = ()


def check(resource: ResourceName, ids: Iterable[str], offers: Offers) -> tuple[OfferedDevice, ...]:
    """The devices behind `ids`, each of them fit to be handed out.

    Raises AllocationRefused, which fails the pod for good: better than a container with a device
    that is not there (kubelet.md 1.7).
    """
    wanted = tuple(ids)
    if not wanted:
        raise AllocationRefused(f"{resource}: a request without device ids")
    if len(wanted) > MAX_DEVICES_IN_REQUEST:
        raise AllocationRefused(
            f"{resource}: {len(wanted)} device ids in one request, at most {MAX_DEVICES_IN_REQUEST}"
        )
    offer = offers.resources.get(resource)
    if offer is None:
        raise AllocationRefused(
            f"{resource}: not offered on this node any more; delete the pod to schedule it anew"
        )
    found: dict[str, OfferedDevice] = {}
    for id_ in wanted:
        offered = offer.devices.get(DeviceId(id_))
        if offered is None:
            raise AllocationRefused(
                f"{resource}: unknown device {id_[:100]!r}; it was never offered or has left this node, "
                "delete the pod to schedule it anew"
            )
        # The kubelet may have chosen this device before it read our last list. Refusing costs one
        # pod admission; agreeing would hand a container a device that does not work.
        if not offered.healthy:
            raise AllocationRefused(
                f"{resource}: device {id_} is unhealthy: {offered.sick}; delete the pod to schedule it anew"
            )
        if id_ in found:
            raise AllocationRefused(f"{resource}: device {id_} is named twice in one request")
        found[id_] = offered
    return tuple(found.values())


def edits(resource: ResourceName, ids: Iterable[str], offers: Offers, token: str = "") -> Edits:
    """The container edits for the devices `ids` of `resource` (nvidia-device-plugin.md 4.1).

    `token` makes the key of the CDI annotation differ from all others of a pod. Raises AllocationRefused
    as `check` does.
    """
    devices = [offered.device for offered in check(resource, ids, offers)]
    options = offers.edits
    by_index = options.device_id_strategy == "index"
    names = [device.index if by_index else device.id for device in devices]
    strategies = options.device_list_strategies
    qualified = tuple(f"{cdi.KIND}={name}" for name in names)
    envs = {f"NVIDIA_{feature}": "enabled" for feature in options.features}
    annotations = {}
    if CDI_ANNOTATIONS in strategies:
        annotations[f"{options.cdi_annotation_prefix}nvidia-device-plugin_{token}"] = ",".join(qualified)
    cdi_devices = qualified if CDI_CRI in strategies else ()
    if cdi.is_alone(strategies):
        # The runtime makes nodes and environment by the CDI document; anything here would contradict it.
        return Edits(envs, annotations=annotations, cdi_devices=cdi_devices)
    mounts: tuple[Mount, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    if ENVVAR in strategies:
        envs[VISIBLE_DEVICES] = ",".join(names)
    if VOLUME_MOUNTS in strategies:
        envs[VISIBLE_DEVICES] = MOUNT_ROOT
        mounts = tuple(Mount("/dev/null", f"{MOUNT_ROOT}/{name}") for name in names)
    if options.pass_device_specs:
        paths = dict.fromkeys((*offers.control_nodes, *(node for device in devices for node in device.nodes)))
        root = options.dev_root.rstrip("/")
        nodes = tuple(DeviceNode(root + path, path) for path in paths)
    return Edits(envs, mounts, nodes, annotations, cdi_devices)


def prefer(
    available: Collection[str], must: Iterable[str], size: int, offer: Offer | None
) -> tuple[str, ...]:
    """Which `size` of the `available` ids to take, `must` among them: packed on the fewest GPUs.

    Never fails, whatever it is given, since an error fails the pod (kubelet.md 1.6): ids that we do
    not know are taken last, and a size that cannot be reached gives all there is.
    """
    known = offer.devices if offer is not None else {}
    chosen = list(dict.fromkeys(must))
    free: dict[tuple[int, str], list[str]] = defaultdict(list)
    used: set[tuple[int, str]] = set()
    for id_ in chosen:
        used.add(_gpu_of(id_, known))
    for id_ in sorted(set(available) - set(chosen)):
        free[_gpu_of(id_, known)].append(id_)
    while free and len(chosen) < size:
        missing = size - len(chosen)
        # GPUs already in use first; then the tightest GPU that ends it, else the one that brings most.
        gpu = min(
            free,
            key=lambda key: (
                key == _UNKNOWN,
                key not in used,
                len(free[key]) if len(free[key]) >= missing else 1 << 30,
                -len(free[key]),
                key,
            ),
        )
        chosen += free.pop(gpu)[:missing]
        used.add(gpu)
    return tuple(chosen)


_UNKNOWN = (1 << 30, "")


def _gpu_of(id_: str, known: Mapping[DeviceId, OfferedDevice]) -> tuple[int, str]:
    offered = known.get(DeviceId(id_))
    return (offered.device.gpu_index, offered.device.gpu) if offered is not None else _UNKNOWN
