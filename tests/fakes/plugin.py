"""A device plugin that does as it is told, and counts what it is asked.

Change the attributes at any time: `list(...)` sends another list, `options` and `answer` are read at
each call, `failures` gives the error for a method, and an event in `gates` holds a method's answers
back until it is set.
"""

import asyncio
import contextlib
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
Devices = Iterable[api_pb2.Device]
Wanted = api_pb2.ContainerPreferredAllocationRequest

_numbers = itertools.count(1)


def device(id_: str, health: str = "Healthy", nodes: Iterable[int] | None = None) -> api_pb2.Device:
    """`nodes` None sends no topology, an empty one sends a topology without nodes."""
    made = api_pb2.Device(ID=id_, health=health)
    if nodes is not None:
        made.topology.CopyFrom(api_pb2.TopologyInfo(nodes=[api_pb2.NUMANode(ID=node) for node in nodes]))
    return made


def answer_with_env(ids: list[str]) -> api_pb2.AllocateResponse:
    response = api_pb2.ContainerAllocateResponse(envs={"DEVICES": ",".join(sorted(ids))})
    return api_pb2.AllocateResponse(container_responses=[response])


def prefer_the_first(wanted: Wanted) -> list[str]:
    return sorted(wanted.available_deviceIDs)[: wanted.allocation_size]


class Plugin(api_pb2_grpc.DevicePluginServicer):
    """Use as `async with Plugin(kubelet.socket, resource, [device("a")])`: serves, registers, and stops."""

    def __init__(
        self,
        kubelet_socket: Path,
        resource: str = "nvidia.com/mig-1g.5gb",
        devices: Devices = (),
        *,
        preferred: bool = False,
        pre_start: bool = False,
        endpoint: str = "",
    ) -> None:
        self.resource = resource
        self.kubelet_socket = kubelet_socket
        self.endpoint = endpoint or f"fake-{next(_numbers)}.sock"
        self.options = api_pb2.DevicePluginOptions(
            get_preferred_allocation_available=preferred, pre_start_required=pre_start
        )
        self.answer: Callable[[list[str]], api_pb2.AllocateResponse] = answer_with_env
        self.prefer: Callable[[Wanted], Iterable[str]] = prefer_the_first
        self.failures: dict[str, tuple[grpc.StatusCode, str]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: Counter[str] = Counter()
        self.allocated: list[list[str]] = []
        self.preferences: list[Wanted] = []
        self.pre_started: list[list[str]] = []
        self.deadlines: dict[str, float | None] = {}
        self.order: list[str] = []
        self._list = tuple(devices)
        self._version = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._server: grpc.aio.Server | None = None

    @property
    def path(self) -> Path:
        return self.kubelet_socket.parent / self.endpoint

    def list(self, *devices: api_pb2.Device) -> None:
        """Sends this list on every open stream."""
        self._list = devices
        self._version += 1
        self._wake()

    async def serve(self) -> None:
        self._ended = False
        self._server = grpc.aio.server()
        api_pb2_grpc.add_DevicePluginServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.path}")
        await self._server.start()

    async def register(self, *, version: str = "v1beta1", timeout: float = 15.0) -> None:  # noqa: ASYNC109
        """Raises grpc.aio.AioRpcError with what the kubelet says against it."""
        async with self.kubelet() as channel:
            await api_pb2_grpc.RegistrationStub(channel).Register(
                api_pb2.RegisterRequest(version=version, endpoint=self.endpoint, resource_name=self.resource),
                timeout=timeout,
            )
        self.order.append("registered")

    def kubelet(self) -> grpc.aio.Channel:
        options = (("grpc.default_authority", "localhost"),)
        return grpc.aio.insecure_channel(f"unix:{self.kubelet_socket}", options=options)

    async def end_stream(self) -> None:
        """Lets ListAndWatch return, while the server goes on."""
        self._ended = True
        self._wake()

    async def stop(self) -> None:
        """Ends the streams, then the server."""
        await self.end_stream()
        if self._server is not None:
            for gate in self.gates.values():
                gate.set()
            server, self._server = self._server, None
            await server.stop(0)

    async def called(self, method: str, times: int = 1) -> None:
        """Returns once `method` was called that often; "stream ended" counts the ends of ListAndWatch."""
        async with asyncio.timeout(5):
            while self.calls[method] < times:
                await self._changed.wait()

    async def __aenter__(self) -> Self:
        await self.serve()
        await self.register()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def GetDevicePluginOptions(
        self, request: api_pb2.Empty, context: Context
    ) -> api_pb2.DevicePluginOptions:
        await self._enter("GetDevicePluginOptions", context)
        return self.options

    async def ListAndWatch(
        self, request: api_pb2.Empty, context: Context
    ) -> AsyncIterator[api_pb2.ListAndWatchResponse]:
        await self._enter("ListAndWatch", context)
        version = -1
        try:
            while not self._ended:
                if version != self._version:
                    version = self._version
                    yield api_pb2.ListAndWatchResponse(devices=self._list)
                else:
                    await self._changed.wait()
        finally:
            self.calls["stream ended"] += 1
            self._wake()

    async def GetPreferredAllocation(
        self, request: api_pb2.PreferredAllocationRequest, context: Context
    ) -> api_pb2.PreferredAllocationResponse:
        (wanted,) = request.container_requests
        self.preferences.append(wanted)
        await self._enter("GetPreferredAllocation", context)
        response = api_pb2.ContainerPreferredAllocationResponse(deviceIDs=self.prefer(wanted))
        return api_pb2.PreferredAllocationResponse(container_responses=[response])

    async def Allocate(self, request: api_pb2.AllocateRequest, context: Context) -> api_pb2.AllocateResponse:
        (wanted,) = request.container_requests
        ids = [*wanted.devices_ids]
        self.allocated.append(ids)
        await self._enter("Allocate", context)
        return self.answer(ids)

    async def PreStartContainer(
        self, request: api_pb2.PreStartContainerRequest, context: Context
    ) -> api_pb2.PreStartContainerResponse:
        self.pre_started.append([*request.devices_ids])
        await self._enter("PreStartContainer", context)
        return api_pb2.PreStartContainerResponse()

    async def _enter(self, method: str, context: Context) -> None:
        self.calls[method] += 1
        self.order.append(method)
        self.deadlines[method] = context.time_remaining()
        self._wake()
        if method in self.gates:
            with contextlib.suppress(asyncio.CancelledError):
                await self.gates[method].wait()
        if method in self.failures:
            await context.abort(*self.failures[method])

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
