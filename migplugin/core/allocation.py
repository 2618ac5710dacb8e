"""What is offered, and what Allocate adds to a container.

All of it works on the offers in memory: an allocation never depends on a driver call, and the
kubelet, which waits for it in its sync loop, never waits for a GPU.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from migplugin.core import cdi
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.resource import Device, ResourceName, is_replica
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
    """The devices shown under one resource now, by the ids they are shown under.

    `fit` has the ids of each device that is Healthy, `fit_ids` all of them. `revision` only makes two equal
    offers differ: a list that is sent again makes the kubelet rewrite its checkpoint, which goes on
    naming deleted pods until then (kubelet.md 4).
    """

    devices: Mapping[DeviceId, OfferedDevice]
    revision: int = 0
    fit: Mapping[DeviceId, tuple[DeviceId, ...]] = field(init=False, repr=False, compare=False)
    fit_ids: frozenset[DeviceId] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids: dict[DeviceId, list[DeviceId]] = {}
        for id_, offered in self.devices.items():
            if offered.healthy:
                ids.setdefault(offered.device.id, []).append(id_)
        # Asked for with every preference and never changing: worked out once.
        object.__setattr__(self, "fit", {device: tuple(shown) for device, shown in ids.items()})
        object.__setattr__(self, "fit_ids", frozenset(id_ for shown in ids.values() for id_ in shown))


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
    """Every resource with its offer, and all that answers to the kubelet are made of.

    `control_nodes` exist on this node, `edits` is how containers are told. `one_replica_each` refuses more
    than one replica in a request. `policy` is how to choose among devices, "" for the usual; `use` is how
    many ids of which resource are held on each GPU, and `links` how near GPUs are to each other.
    """

    resources: Mapping[ResourceName, Offer] = field(default_factory=dict)
    control_nodes: tuple[str, ...] = ()
    edits: EditOptions = field(default_factory=EditOptions)
    one_replica_each: bool = False
    policy: str = ""
    use: Mapping[GpuUuid, Mapping[ResourceName, int]] = field(default_factory=dict)
    links: Mapping[tuple[GpuUuid, GpuUuid], int] = field(default_factory=dict)


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
    if offers.one_replica_each and len(found) > 1 and any(map(is_replica, found)):
        raise AllocationRefused(
            f"{resource}: maximum request size for shared resources is 1; found {len(found)}; "
            f"request one {resource}, or set failRequestsGreaterThanOne to false"
        )
    return tuple(found.values())


def granted(offers: Offers, resource: ResourceName, ids: Collection[DeviceId]) -> Offers:
    """`offers` once `ids`, which nobody held, are handed out: their GPUs are in more use."""
    use = {gpu: dict(held) for gpu, held in offers.use.items()}
    offer = offers.resources.get(resource) or Offer({})
    for id_ in ids:
        if id_ in offer.devices:
            held = use.setdefault(offer.devices[id_].device.gpu, {})
            held[resource] = held.get(resource, 0) + 1
    return replace(offers, use=use)


def edits(resource: ResourceName, ids: Iterable[str], offers: Offers, token: str = "") -> Edits:
    """The container edits for the devices `ids` of `resource` (nvidia-device-plugin.md 4.1).

    `token` makes the key of the CDI annotation differ from all others of a pod. Raises AllocationRefused
    as `check` does.
    """
    devices = [offered.device for offered in check(resource, ids, offers)]
    options = offers.edits
    by_index = options.device_id_strategy == "index"
    # Replicas of one device are one device.
    names = list(dict.fromkeys(device.index if by_index else device.id for device in devices))
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
