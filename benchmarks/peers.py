"""The two things that are compared, started the same way against a stand-in kubelet each."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.sim.kubelet import Kubelet
from migplugin.sim.store import Store

NODE = "8xa100-40gb=1g.5gb*7"
RESOURCE = "nvidia.com/mig-1g.5gb"
DEVICES = 56
REPLICAS = 100

Command = Callable[[Kubelet, Path], tuple[str, ...]]


def ours(kubelet: Kubelet, state: Path) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "migplugin", "serve", f"--simulate={state}", "--removal-delay=1s"),
        "--force-simulate",
        *(f"--kubelet-socket={kubelet.socket}", f"--pod-resources-socket={kubelet.pod_resources_socket}"),
        f"--control-socket={kubelet.socket.parent.parent}/agent.sock",
    )


def floor(kubelet: Kubelet, state: Path) -> tuple[str, ...]:
    node = Store(state).read()
    ids = [compute.uuid for gpu in node.gpus for _, compute in gpu.mig_devices()]
    return (sys.executable, "-m", "benchmarks.floor", str(kubelet.socket), json.dumps({RESOURCE: ids}))


def ours_shared(kubelet: Kubelet, state: Path) -> tuple[str, ...]:
    """Every device 100 times, by time-slicing."""
    resources = [{"name": RESOURCE, "replicas": REPLICAS}]
    file = kubelet.socket.parent.parent / "config.json"
    file.write_text(json.dumps({"sharing": {"timeSlicing": {"resources": resources}}}))
    return (*ours(kubelet, state), f"--config-file={file}")


def floor_shared(kubelet: Kubelet, state: Path) -> tuple[str, ...]:
    # 5,600 ids do not fit into an argument of the command line; the floor makes them itself.
    return (*floor(kubelet, state), str(REPLICAS))


@dataclass
class Peer:
    """A plugin in a process, known to its kubelet; `stub` calls it as the kubelet does."""

    name: str
    kubelet: Kubelet
    process: asyncio.subprocess.Process
    cold_start: float
    stub: "api_pb2_grpc.DevicePluginAsyncStub"  # known to the type checker only
    ids: list[str]

    async def allocate(self, id_: str) -> None:
        request = api_pb2.AllocateRequest(
            container_requests=[api_pb2.ContainerAllocateRequest(devices_ids=[id_])]
        )
        await self.stub.Allocate(request)

    async def prefer(self, size: int) -> None:
        """As the kubelet asks: with everything that is available."""
        wanted = api_pb2.ContainerPreferredAllocationRequest(
            available_deviceIDs=self.ids, allocation_size=size
        )
        await self.stub.GetPreferredAllocation(
            api_pb2.PreferredAllocationRequest(container_requests=[wanted])
        )


@contextlib.asynccontextmanager
async def started(name: str, command: Command, state: Path, devices: int = DEVICES) -> AsyncIterator[Peer]:
    """The plugin, running, with its first list taken by the kubelet."""
    root = Path(tempfile.mkdtemp(prefix="migbench-", dir="/tmp"))
    try:
        async with Kubelet(root) as kubelet:
            words = command(kubelet, state)
            with (root / "log").open("wb") as log:
                began = time.perf_counter()
                process = await asyncio.create_subprocess_exec(
                    *words, stdout=log, stderr=log, env=environment()
                )
            try:
                await kubelet.until(lambda k: k.allocatable(RESOURCE) == devices, timeout=30.0)
                cold_start = time.perf_counter() - began
                endpoint = kubelet.registrations[-1][1]
                options = (("grpc.default_authority", "localhost"),)
                path = kubelet.socket.parent / endpoint
                async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
                    stub = api_pb2_grpc.DevicePluginStub(channel)
                    yield Peer(name, kubelet, process, cold_start, stub, sorted(kubelet.devices(RESOURCE)))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()
    finally:
        shutil.rmtree(root, ignore_errors=True)


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key in {"PATH", "HOME", "PYTHONPATH", "LANG"}}
