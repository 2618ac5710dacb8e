"""The kubelet as a whole: lives that begin and end, pods that outlive them, a node that is watched.

A life owns both sockets, the connections to plugins and a device manager; it ends gracefully, as by
SIGKILL, or by a panic. What the API server and the container runtime would still know afterwards, the
pods and the node object, stays here and in `pods.json` under the root, so that a kubelet process that
was killed is followed by one that finds its running pods again. Without a scheduler and a status sync
in between, the node shows each change at once.
"""

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2_grpc as deviceplugin_grpc
from migplugin._proto.podresources.v1 import api_pb2_grpc as podresources_grpc
from migplugin.errors import KubeletError
from migplugin.sim.kubelet import checkpoint
from migplugin.sim.kubelet.checkpoint import Checkpoint
from migplugin.sim.kubelet.manager import DeviceManager, Rules
from migplugin.sim.kubelet.plugins import Listed, Registration
from migplugin.sim.kubelet.podresources import PodResources
from migplugin.sim.kubelet.pods import (
    ContainerEdits,
    NotAdmitted,
    Panic,
    Pod,
    PodStatus,
    StartFailed,
)
from migplugin.sim.kubelet.records import Records
from migplugin.sim.kubelet.topology import POLICIES

HISTORY = 1000
SOCKET_PATH_LIMIT = 107


class Registered(NamedTuple):
    """A registration that was accepted; `time` is of the monotonic clock."""

    resource: str
    endpoint: str
    time: float


@dataclass(slots=True)
class _Life:
    """From a start of the kubelet to its end."""

    manager: DeviceManager
    registration: Registration
    servers: tuple[grpc.aio.Server, ...]
    sync_loop: asyncio.Lock = field(default_factory=asyncio.Lock)  # pods are admitted one at a time
    ended: bool = False


class Kubelet:
    """A stand-in kubelet under `root`, as `device-plugins/` and `pod-resources/` of /var/lib/kubelet.

    `grace` is how long a resource outlives its plugin's stream, `dial_timeout` how long a plugin that
    registers is dialled. `pod_resources_synced` tells whether the API server answers at once after a
    restart; where it does not, pod-resources is empty until `sync`. `seed` decides every order that the
    real kubelet leaves to chance.
    """

    def __init__(
        self,
        root: Path,
        *,
        grace: float = 300.0,
        dial_timeout: float = 10.0,
        topology_policy: str = "best-effort",
        pod_resources_synced: bool = True,
        numa_nodes: tuple[int, ...] = (0, 1),
        seed: int = 0,
    ) -> None:
        if topology_policy not in POLICIES:
            raise ValueError(f"topology policy {topology_policy!r} is none of {', '.join(POLICIES)}")
        self.root = root
        self.socket = root / "device-plugins" / "kubelet.sock"
        self.pod_resources_socket = root / "pod-resources" / "kubelet.sock"
        self.checkpoint_path = root / "device-plugins" / checkpoint.NAME
        self.pod_resources_synced = pod_resources_synced
        self.registrations: list[Registered] = []
        self.refusals: list[tuple[str, str]] = []
        self._rules = Rules(grace, topology_policy, numa_nodes)
        self._dial_timeout = dial_timeout
        self._rng = random.Random(seed)  # noqa: S311  not a secret
        self._records = Records(root)
        self._life: _Life | None = None
        self._pods: dict[str, tuple[Pod, PodStatus]] = {}
        self._resources: set[str] = set()
        self._messages: dict[str, deque[tuple[Listed, ...]]] = {}
        self._synced = True
        self._panic: Panic | None = None
        self._panic_told = False
        self._burial: asyncio.Task[None] | None = None
        self._change = asyncio.Event()

    async def start(self) -> None:
        """Both sockets answer. Every other socket in the directory is gone, files stay, capacity is 0."""
        if self._life is not None and not self._life.ended:
            raise KubeletError("the stand-in kubelet is running already")
        await self._bury()
        self._panic, self._panic_told = None, False
        for directory in (self.socket.parent, self.pod_resources_socket.parent):
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        if not self._pods:
            pods, resources = self._records.load()
            self._pods = {pod.uid: (pod, status) for pod, status in pods}
            self._resources.update(resources)
        self._synced = self.pod_resources_synced or not self._pods
        manager = DeviceManager(
            Checkpoint(self.socket.parent, self._rng),
            self._rules,
            self._rng,
            active_pods=self._active_pods,
            heard=self._heard,
            changed=self._changed,
        )
        registration = Registration(
            self.socket.parent,
            manager.devices,
            dial_timeout=self._dial_timeout,
            registered=self._registered,
            refused=lambda resource, text: self.refusals.append((resource, text)),
            crash=self._crash,
        )
        self._restore_edits(manager)
        checkpoint.remove_sockets(self.socket.parent)
        plugins, lister = grpc.aio.server(), grpc.aio.server()
        deviceplugin_grpc.add_RegistrationServicer_to_server(registration, plugins)
        podresources_grpc.add_PodResourcesListerServicer_to_server(
            PodResources(manager, self._active_pods), lister
        )
        self._life = _Life(manager, registration, (plugins, lister))
        try:
            # First, so that it may get the inode number that the old socket has just given up.
            await self._listen(plugins, self.socket)
            await self._listen(lister, self.pod_resources_socket)
        except BaseException:
            await self.stop()
            raise
        self._changed()

    async def stop(self) -> None:
        """As by SIGTERM: kubelet.sock goes away, and nothing else does."""
        life = self._life
        if life is not None and not life.ended:
            self.socket.unlink(missing_ok=True)
            self._end(life)
        await self._bury()

    async def kill(self) -> None:
        """As by SIGKILL: everything is cut, and the sockets stay where they are."""
        if self._life is not None and not self._life.ended:
            self._end(self._life)
        await self._bury()

    async def restart(self, kill: bool = False) -> None:
        """Another life, as the node's init system would begin it, after a panic too."""
        await (self.kill() if kill else self.stop())
        await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops; raises a Panic that nobody has seen."""
        await self.stop()
        if exc is None and not self._panic_told and self._panic is not None:
            raise self._panic

    @property
    def panic(self) -> Panic | None:
        """Why it crashed, if it did."""
        self._panic_told = self._panic_told or self._panic is not None
        return self._panic

    def capacity(self, resource: str) -> int | None:
        """Devices of `resource`, None where the node has never had it: it falls to 0, it never goes away."""
        return self.node()["capacity"].get(resource)

    def allocatable(self, resource: str) -> int | None:
        return self.node()["allocatable"].get(resource)

    def node(self) -> dict[str, dict[str, int]]:
        """Capacity and allocatable by resource, as in the status of the node object."""
        self._raise_panic()
        nothing = dict.fromkeys(sorted(self._resources), 0)
        if self._life is None:
            return {"capacity": nothing, "allocatable": dict(nothing)}
        devices = self._life.manager.devices
        return {
            "capacity": nothing | devices.capacity(),
            "allocatable": nothing | devices.allocatable(),
        }

    def devices(self, resource: str) -> Mapping[str, str]:
        """Health by id: what was last listed, and Unhealthy for all once the plugin is gone."""
        self._raise_panic()
        return {} if self._life is None else self._life.manager.devices.health(resource)

    def messages(self, resource: str) -> list[tuple[Listed, ...]]:
        """The last 1000 lists of `resource`, oldest first, over all lives."""
        return list(self._messages.get(resource, ()))

    def pods(self) -> list[Pod]:
        """Every pod that was admitted or refused and is not deleted."""
        return [pod for pod, _ in self._pods.values()]

    def status(self, pod: Pod) -> PodStatus:
        """The pod's status now. Raises KeyError for one that was never admitted, or is deleted."""
        return self._pods[pod.uid][1]

    def device_health(self, pod: Pod, container: str) -> dict[str, dict[str, str]]:
        """`allocatedResourcesStatus` of the pod's status: health by resource and id."""
        return self._alive().manager.pod_health(pod, container)

    async def until(
        self,
        condition: Callable[["Kubelet"], object],
        timeout: float | None = 5.0,  # noqa: ASYNC109
    ) -> None:
        """Returns when `condition` is true, which is asked again at each change of anything here.

        Raises TimeoutError with the state of the node, and Panic when the kubelet crashes meanwhile.
        """
        try:
            async with asyncio.timeout(timeout):
                while not condition(self):
                    self._raise_panic()
                    await self._change.wait()
        except TimeoutError as exc:
            raise TimeoutError(f"not within {timeout:g} s; {self._describe()}") from exc

    async def admit(self, pod: Pod) -> PodStatus:
        """The pod's status after its admission, one pod at a time, and after its containers' first start.

        A pod that was admitted before, or failed, is not looked at again. Raises Panic.
        """
        life = self._alive()
        async with life.sync_loop:
            self._alive(life)
            if pod.uid in self._pods:
                return self.status(pod)
            try:
                with self._watching(life):
                    await life.manager.admit(pod)
            except NotAdmitted as exc:
                return self._set(pod, PodStatus("Failed", exc.reason, str(exc)))
            self._set(pod, PodStatus("Pending"))
        with contextlib.suppress(StartFailed):
            for container in pod.in_order():
                await self.restart_container(pod, container.name)
        return self.status(pod)

    async def restart_container(self, pod: Pod, name: str) -> ContainerEdits:
        """Starts the container again, from the cached answers: no Allocate. Raises StartFailed."""
        life = self._alive()
        status = self.status(pod)
        if not status.is_active:
            raise ValueError(f"pod {pod.name} is {status.phase}: its containers do not start again")
        try:
            with self._watching(life):
                edits = await life.manager.start(pod, pod.container(name))
        except (NotAdmitted, StartFailed) as exc:
            reason = exc.reason if isinstance(exc, StartFailed) else "CreateContainerConfigError"
            self._set(pod, replace(self.status(pod), reason=reason, message=str(exc)))
            raise StartFailed(str(exc), reason) from exc
        status = self.status(pod)
        containers = {**status.containers, name: edits}
        phase = "Running" if len(containers) == len(pod.containers) else status.phase
        self._set(pod, PodStatus(phase, containers=containers))
        return edits

    async def finish(self, pod: Pod, phase: str = "Succeeded") -> PodStatus:
        """All its containers have ended. What it held is free after the next admission or List."""
        self._alive()
        return self._set(pod, replace(self.status(pod), phase=phase))

    async def delete(self, pod: Pod) -> None:
        """The pod has ended and is gone. Its devices are free after the next admission or List."""
        self._raise_panic()
        self._pods.pop(pod.uid, None)
        self._save()
        self._changed()

    def sync(self) -> None:
        """The API server answers at last: the kubelet hears of its pods and admits the running ones again."""
        life = self._alive()
        self._synced = True
        with self._watching(life):
            life.manager.readmit()
        self._changed()

    def _alive(self, life: _Life | None = None) -> _Life:
        """The present life, which must still be `life` if given. Raises Panic or KubeletError."""
        self._raise_panic()
        if self._life is None or self._life.ended or (life is not None and life is not self._life):
            raise KubeletError("the stand-in kubelet does not run")
        return self._life

    def _raise_panic(self) -> None:
        if self._panic is not None:
            self._panic_told = True
            raise self._panic

    @contextlib.contextmanager
    def _watching(self, life: _Life) -> Iterator[None]:
        """What fails because the life has ended is told as that, and a panic ends the life."""
        try:
            yield
        except Panic as exc:
            if not life.ended:
                self._crash(exc)
        except (NotAdmitted, StartFailed):
            self._alive(life)
            raise
        self._alive(life)

    def _crash(self, panic: Panic) -> None:
        if self._life is not None and not self._life.ended:
            self._panic = panic
            self._end(self._life)

    def _end(self, life: _Life) -> None:
        """Nothing changes any more; the connections are cut in the background (`_bury` waits for it)."""
        life.ended = True
        life.manager.close()
        self._burial = asyncio.create_task(_cut(life))
        self._changed()

    async def _bury(self) -> None:
        if self._burial is not None:
            await self._burial
            self._burial = None

    async def _listen(self, server: grpc.aio.Server, path: Path) -> None:
        """Serves at `path`, which appears when the server is ready.

        gRPC unlinks the path that it bound when it stops. So it binds another name, and `path` is a
        second link to that socket, which outlives the server as the socket of a killed process does.
        """
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise KubeletError(f"{path}: too long for a socket, at most {SOCKET_PATH_LIMIT} bytes")
        bound = self.root / f".{secrets.token_hex(4)}"
        server.add_insecure_port(f"unix:{bound}")
        await server.start()
        checkpoint.move_socket(bound, path)

    def _active_pods(self) -> list[Pod] | None:
        if not self._synced:
            return None
        return [pod for pod, status in self._pods.values() if status.is_active]

    def _set(self, pod: Pod, status: PodStatus) -> PodStatus:
        self._pods[pod.uid] = pod, status
        self._save()
        self._changed()
        return status

    def _registered(self, resource: str, endpoint: str) -> None:
        self.registrations.append(Registered(resource, endpoint, time.monotonic()))
        self._changed()

    def _heard(self, resource: str, devices: tuple[Listed, ...]) -> None:
        self._messages.setdefault(resource, deque(maxlen=HISTORY)).append(devices)
        if resource not in self._resources:
            self._resources.add(resource)
            self._save()

    def _changed(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()

    def _describe(self) -> str:
        devices = {resource: dict(self.devices(resource)) for resource in sorted(self._resources)}
        return (
            f"node {self.node()}, devices {devices}, registrations "
            f"{[(name, endpoint) for name, endpoint, _ in self.registrations]}, refused {self.refusals}, "
            f"running {self._life is not None and not self._life.ended}"
        )

    def _save(self) -> None:
        self._records.save(self._pods.values(), self._resources)

    def _restore_edits(self, manager: DeviceManager) -> None:
        """The containers of a pod that another process admitted, as the checkpoint has them."""
        for pod, status in self._pods.values():
            if status.phase == "Running" and not status.containers:
                edits = {container.name: manager.edits(pod, container.name) for container in pod.containers}
                self._pods[pod.uid] = pod, replace(status, containers=edits)


async def _cut(life: _Life) -> None:
    for server in life.servers:
        await server.stop(None)
    await life.registration.close()
