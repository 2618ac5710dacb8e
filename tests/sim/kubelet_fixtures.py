"""A stand-in kubelet in a short directory, with small words for pods and plugins."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from migplugin._proto.podresources.v1 import api_pb2, api_pb2_grpc
from migplugin.sim.kubelet import Container, Kubelet, Pod

R = "nvidia.com/mig-1g.5gb"


@contextmanager
def directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="kube-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Kubelet]:
    with directory() as root:
        async with Kubelet(root, **options) as kubelet:
            yield kubelet


def pod(name: str = "a", count: int = 1, resource: str = R) -> Pod:
    """One container, "main", with `count` of `resource`."""
    return Pod(name, (Container("main", {resource: count}),))


async def listed(kubelet: Kubelet, count: int, resource: str = R, within: float = 10.0) -> None:
    await kubelet.until(lambda k: k.allocatable(resource) == count, timeout=within)


@asynccontextmanager
async def pod_resources(kubelet: Kubelet) -> "AsyncIterator[api_pb2_grpc.PodResourcesListerAsyncStub]":
    options = (("grpc.default_authority", "localhost"),)
    address = f"unix:{kubelet.pod_resources_socket}"
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield api_pb2_grpc.PodResourcesListerStub(channel)


async def list_pods(kubelet: Kubelet) -> dict[str, dict[str, list[str]]]:
    """What List says: the ids by pod and container, in order, as often as they come."""
    async with pod_resources(kubelet) as stub:
        answer = await stub.List(api_pb2.ListPodResourcesRequest())
    return {
        entry.name: {
            container.name: sorted(id_ for devices in container.devices for id_ in devices.device_ids)
            for container in entry.containers
        }
        for entry in answer.pod_resources
    }
