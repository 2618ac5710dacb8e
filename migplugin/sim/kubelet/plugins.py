"""The kubelet's side of the wire to device plugins: registration, dial back, list stream, calls.

Register answers only after the kubelet has dialled the plugin and asked for its options. From then on
there is one client for each resource *name*, whatever its socket: a second registration takes the
first one's place, the first one's stream goes on being read, and when any stream of the name ends,
whoever is current is disconnected. That is how 1.36.2 behaves (kubernetes#127803), and why a plugin
must stop its old server before the new one registers. A stream that ended is never opened again.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.sim.kubelet.pods import Panic

T = TypeVar("T")

VERSION = "v1beta1"
HEALTHY = "Healthy"
MAX_MESSAGE_BYTES = 4_194_304
PRE_START_TIMEOUT = 30.0

_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Two registrations of one socket are two connections, as with the kubelet's Go client.
    ("grpc.use_local_subchannel_pool", 1),
)
_DOMAIN_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = re.compile(rf"{_DOMAIN_LABEL}(\.{_DOMAIN_LABEL})*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


class Refused(Exception):
    """A registration that is turned down, in the kubelet's words."""


class CallFailed(Exception):
    """A plugin's call failed, in the words of gRPC for Go."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A device as a plugin listed it. `nodes` is None without a topology, empty where it has no node."""

    id: str
    health: str
    nodes: tuple[int, ...] | None = None


class Receiver(Protocol):
    """Who is told what plugins say: the device manager."""

    def connected(self, resource: str, client: "Client", options: api_pb2.DevicePluginOptions) -> None: ...
    def received(self, resource: str, devices: tuple[Listed, ...]) -> None: ...
    def disconnected(self, resource: str) -> None: ...


class Client:
    """A connection to one plugin for one resource."""

    def __init__(self, resource: str, path: Path) -> None:
        self.resource = resource
        self.path = path
        self.dialled = False
        self._closed = False
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = api_pb2_grpc.DevicePluginStub(self._channel)

    async def connect(self, dial_timeout: float, deadline: float | None) -> api_pb2.DevicePluginOptions:
        """The plugin's options. `deadline` is what is left of the time that the plugin gave to Register."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), dial_timeout)
        except TimeoutError as exc:
            raise Refused("failed to dial device plugin: context deadline exceeded") from exc
        self.dialled = True
        try:
            return await self._call(self._stub.GetDevicePluginOptions(api_pb2.Empty(), timeout=deadline))
        except CallFailed as exc:
            raise Refused(f"failed to get device plugin options: {exc}") from exc

    async def watch(self, receive: Callable[[tuple[Listed, ...]], None]) -> None:
        """Reads the list stream until it ends, for whatever reason. No deadline, no second try."""
        try:
            async for message in self._stub.ListAndWatch(api_pb2.Empty()):
                receive(tuple(map(_listed, message.devices)))
        except grpc.aio.AioRpcError:
            return
        except asyncio.CancelledError:
            if not self._was_closed():
                raise

    async def prefer(
        self, available: Iterable[str], must_include: Iterable[str], size: int
    ) -> frozenset[str] | None:
        """What the plugin would rather see taken; None where it answers without a container."""
        request = api_pb2.PreferredAllocationRequest()
        request.container_requests.add(
            available_deviceIDs=available, must_include_deviceIDs=must_include, allocation_size=size
        )
        answer = await self._call(self._stub.GetPreferredAllocation(request))
        return frozenset(answer.container_responses[0].deviceIDs) if answer.container_responses else None

    async def allocate(self, ids: Iterable[str]) -> api_pb2.AllocateResponse:
        """One request with one container, without deadline: nothing bounds a plugin that hangs."""
        request = api_pb2.AllocateRequest()
        request.container_requests.add(devices_ids=ids)
        return await self._call(self._stub.Allocate(request))

    async def pre_start(self, ids: Iterable[str]) -> None:
        request = api_pb2.PreStartContainerRequest(devices_ids=ids)
        await self._call(self._stub.PreStartContainer(request, timeout=PRE_START_TIMEOUT))

    async def close(self) -> None:
        """Cuts the stream and every call."""
        self._closed = True
        await self._channel.close()

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as exc:
            raise CallFailed(_go_text(exc)) from exc
        except asyncio.CancelledError:
            if self._was_closed():
                text = "rpc error: code = Canceled desc = grpc: the client connection is closing"
                raise CallFailed(text) from None
            raise

    def _was_closed(self) -> bool:
        """Whether a CancelledError means our channel, and not our task."""
        task = asyncio.current_task()
        return self._closed and not (task is not None and task.cancelling())


class Registration(api_pb2_grpc.RegistrationServicer):
    """kubelet.sock of one life, and the clients it made."""

    def __init__(
        self,
        directory: Path,
        receiver: Receiver,
        *,
        dial_timeout: float,
        registered: Callable[[str, str], None],
        refused: Callable[[str, str], None],
        crash: Callable[[Panic], None],
    ) -> None:
        self._directory = directory
        self._receiver = receiver
        self._dial_timeout = dial_timeout
        self._registered = registered
        self._refused = refused
        self._crash = crash
        self._current: dict[str, Client] = {}
        self._open: set[Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def Register(
        self, request: api_pb2.RegisterRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> api_pb2.Empty:
        """Dials back and asks for the options before it answers; `request.options` means nothing."""
        resource = request.resource_name
        try:
            _check(request)
            # Joined and cleaned as Go does: an absolute path lands below the directory all the same.
            path = Path(f"{self._directory}/{request.endpoint}")
            await self._connect(resource, path, context.time_remaining())
        except Refused as exc:
            self._refused(resource, str(exc))
            await context.abort(grpc.StatusCode.UNKNOWN, str(exc))
        self._registered(resource, request.endpoint)
        return api_pb2.Empty()

    async def close(self) -> None:
        """Cuts every connection and waits until nothing runs any more."""
        self._closing = True
        self._current.clear()
        await asyncio.gather(*(client.close() for client in self._open))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, resource: str, path: Path, deadline: float | None) -> None:
        client = Client(resource, path)
        self._open.add(client)
        self._current[resource] = client
        try:
            options = await client.connect(self._dial_timeout, deadline)
        except BaseException:
            # By name: an older client that was current until now is forgotten too.
            self._current.pop(resource, None)
            await self._close(client)
            raise
        self._receiver.connected(resource, client, options)
        task = asyncio.create_task(self._run(resource, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, resource: str, client: Client) -> None:
        try:
            await client.watch(lambda devices: self._receiver.received(resource, devices))
        except Panic as exc:
            self._crash(exc)
            return
        if self._closing:
            return
        # Whoever is current, not the one whose stream has ended.
        current = self._current.pop(resource, None)
        if current is not None:
            self._receiver.disconnected(resource)
            # One that is still being dialled has no connection to close: it goes on, and is forgotten.
            if current.dialled:
                await self._close(current)
        await self._close(client)

    async def _close(self, client: Client) -> None:
        if client in self._open:
            self._open.discard(client)
            await client.close()


def _check(request: api_pb2.RegisterRequest) -> None:
    if request.version != VERSION:
        raise Refused(
            f"requested API version {json.dumps(request.version)} is not supported by kubelet. "
            f'Supported version is ["{VERSION}"]'
        )
    if not is_extended_resource_name(request.resource_name):
        raise Refused(f"the ResourceName {json.dumps(request.resource_name)} is invalid")


def is_extended_resource_name(name: str) -> bool:
    """Whether a plugin may register under `name` (IsExtendedResourceName of Kubernetes' core helpers).

    It is judged as it would stand in a quota, "requests.<name>".
    """
    if "/" not in name or "kubernetes.io/" in name or name.startswith("requests."):
        return False
    domain, _, rest = f"requests.{name}".partition("/")
    return (
        len(domain) <= 253
        and _DOMAIN.fullmatch(domain) is not None
        and len(rest) <= 63
        and _NAME.fullmatch(rest) is not None
    )


def _listed(device: api_pb2.Device) -> Listed:
    nodes = tuple(node.ID for node in device.topology.nodes) if device.HasField("topology") else None
    return Listed(device.ID, device.health, nodes)


def _go_text(error: grpc.aio.AioRpcError) -> str:
    """As gRPC for Go prints it, which is what ends up in a pod's message."""
    words = error.code().name.split("_")
    code = "".join(word.capitalize() for word in words).replace("Cancelled", "Canceled").replace("Ok", "OK")
    return f"rpc error: code = {code} desc = {error.details()}"
