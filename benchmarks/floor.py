"""The floor: the least that a Python device plugin can be, with constant lists of the same devices.

It is started as `migplugin serve` is, speaks to the same kubelet, and does nothing else: no NVML, no
decision, no watch. What migplugin takes beyond this is the price of being live.

    python -m benchmarks.floor KUBELET_SOCKET '{"nvidia.com/mig-1g.5gb": ["MIG-…", …], …}' [REPLICAS]
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc
import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc


class Plugin(api_pb2_grpc.DevicePluginServicer):
    def __init__(self, ids: list[str], stop: asyncio.Event) -> None:
        self._ids = ids
        self._stop = stop

    async def GetDevicePluginOptions(
        self, request: api_pb2.Empty, context: object
    ) -> api_pb2.DevicePluginOptions:
        return api_pb2.DevicePluginOptions(get_preferred_allocation_available=True)

    async def ListAndWatch(
        self, request: api_pb2.Empty, context: object
    ) -> AsyncIterator[api_pb2.ListAndWatchResponse]:
        yield api_pb2.ListAndWatchResponse(
            devices=[api_pb2.Device(ID=id_, health="Healthy") for id_ in self._ids]
        )
        await self._stop.wait()

    async def GetPreferredAllocation(
        self, request: api_pb2.PreferredAllocationRequest, context: object
    ) -> api_pb2.PreferredAllocationResponse:
        answer = api_pb2.PreferredAllocationResponse()
        for wanted in request.container_requests:
            answer.container_responses.add(deviceIDs=wanted.available_deviceIDs[: wanted.allocation_size])
        return answer

    async def Allocate(self, request: api_pb2.AllocateRequest, context: object) -> api_pb2.AllocateResponse:
        answer = api_pb2.AllocateResponse()
        for container in request.container_requests:
            answer.container_responses.add(envs={"NVIDIA_VISIBLE_DEVICES": ",".join(container.devices_ids)})
        return answer

    async def PreStartContainer(
        self, request: api_pb2.PreStartContainerRequest, context: object
    ) -> api_pb2.PreStartContainerResponse:
        return api_pb2.PreStartContainerResponse()


async def main(kubelet_socket: Path, resources: dict[str, list[str]]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    servers = []
    for number, (resource, ids) in enumerate(resources.items()):
        server = grpc.aio.server()
        api_pb2_grpc.add_DevicePluginServicer_to_server(Plugin(ids, stop), server)
        name = f"floor-{os.getpid()}-{number}.sock"
        server.add_insecure_port(f"unix:{kubelet_socket.parent / name}")
        await server.start()
        servers.append(server)
        options = (("grpc.default_authority", "localhost"),)
        async with grpc.aio.insecure_channel(f"unix:{kubelet_socket}", options=options) as channel:
            request = api_pb2.RegisterRequest(version="v1beta1", endpoint=name, resource_name=resource)
            await api_pb2_grpc.RegistrationStub(channel).Register(request, timeout=15)
    await stop.wait()
    for server in servers:
        await server.stop(0.2)


if __name__ == "__main__":
    shown = json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        shown = {
            name: [f"{i}::{n}" for i in ids for n in range(int(sys.argv[3]))] for name, ids in shown.items()
        }
    asyncio.run(main(Path(sys.argv[1]), shown))
