"""Resources and what is offered under them: names as the kubelet takes them, devices, ids of replicas."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from migplugin.core import profile as profiles
from migplugin.core.inventory import DeviceId, GpuUuid

ResourceName = NewType("ResourceName", str)

NVIDIA = "nvidia.com"
GPU = ResourceName(NVIDIA + "/gpu")
REPLICA = "::"

_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
MAX_DOMAIN, MAX_NAME = 253 - len("requests."), 63


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

    @property
    def is_whole(self) -> bool:
        """Whether it is a GPU and no part of one."""
        return self.id == DeviceId(self.gpu)


def of_profile(profile: str, domain: str = NVIDIA) -> ResourceName:
    """`<domain>/mig-<profile>`, spelt as the kubelet accepts it (kubelet.md 1.1)."""
    return ResourceName(f"{domain}/{profiles.resource_suffix(profile)}")


def is_domain(text: str) -> bool:
    """Whether resources can have this domain: DNS rules, and none of Kubernetes' own (kubelet.md 1.1)."""
    own = text == "kubernetes.io" or text.endswith(".kubernetes.io") or text.startswith("requests.")
    return len(text) <= MAX_DOMAIN and not own and _DOMAIN.fullmatch(text) is not None


def is_valid(name: str) -> bool:
    """Whether the kubelet takes `name`: a domain, and 1 to 63 characters alphanumeric at both ends."""
    domain, _, suffix = name.partition("/")
    return is_domain(domain) and len(suffix) <= MAX_NAME and _NAME.fullmatch(suffix) is not None


def is_ours(resource: ResourceName, id_: str = "", domain: str = NVIDIA) -> bool:
    """Whether this plugin, or NVIDIA's before it, may have offered `id_` under `resource`.

    A name of our domain that is not one of the usual may be of an earlier configuration, or another
    plugin's: then the id tells, since only GPUs and MIG devices have such.
    """
    at, _, name = resource.partition("/")
    if at not in {NVIDIA, domain}:
        return False
    return name in {"gpu", "gpu.shared"} or name.startswith("mig-") or id_.startswith(("GPU-", "MIG-"))


def replica(id_: DeviceId, number: int) -> DeviceId:
    """The id under which a shared device is offered for the `number`th time."""
    return DeviceId(f"{id_}{REPLICA}{number}")


def device_of(id_: str) -> DeviceId:
    """The device behind an id: without the number of a replica."""
    return DeviceId(id_.partition(REPLICA)[0])


def is_replica(id_: str) -> bool:
    return REPLICA in id_
