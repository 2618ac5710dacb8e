"""Pods as the API server gives them, what became of them, and how a device manager says no."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from migplugin.errors import MigpluginError


@dataclass(frozen=True, slots=True)
class Container:
    """`requests` are counts by resource. `restartable` makes a sidecar, which counts as an init container."""

    name: str
    requests: Mapping[str, int] = field(default_factory=dict)
    init: bool = False
    restartable: bool = False

    @property
    def is_init(self) -> bool:
        return self.init or self.restartable

    @property
    def is_ordinary_init(self) -> bool:
        return self.init and not self.restartable


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as it was created; the kubelet holds its status (`Kubelet.status`)."""

    name: str
    containers: tuple[Container, ...]
    namespace: str = "default"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def in_order(self) -> tuple[Container, ...]:
        """The containers in the order in which they are admitted and started: init containers first."""
        return tuple(sorted(self.containers, key=lambda container: not container.is_init))

    def container(self, name: str) -> Container:
        for container in self.containers:
            if container.name == name:
                return container
        raise ValueError(f"pod {self.name} has no container {name}")


@dataclass(frozen=True, slots=True)
class Mount:
    container_path: str
    host_path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class DeviceNode:
    container_path: str
    host_path: str
    permissions: str


@dataclass(frozen=True, slots=True)
class ContainerEdits:
    """What the plugins added to a container, and the ids it holds by resource."""

    envs: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    devices: tuple[DeviceNode, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    cdi_devices: tuple[str, ...] = ()
    device_ids: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PodStatus:
    """`phase` is Running, Failed, Succeeded, or Pending while a container does not start."""

    phase: str
    reason: str = ""
    message: str = ""
    containers: Mapping[str, ContainerEdits] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return self.phase in {"Running", "Pending"}


class Panic(Exception):
    """The kubelet has crashed, as the real one does; the text names the device."""


class NotAdmitted(Exception):
    """The pod fails for good."""

    def __init__(self, message: str, reason: str = "UnexpectedAdmissionError") -> None:
        super().__init__(message)
        self.reason = reason


class StartFailed(MigpluginError):
    """A container was not started. Unlike a refused admission, the kubelet tries this again."""

    def __init__(self, message: str, reason: str = "CreateContainerConfigError") -> None:
        super().__init__(message)
        self.reason = reason
