"""One resource served over a real unix socket, called as the kubelet calls it."""

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.aio import Cell
from migplugin.core.allocation import EditOptions, Offer, OfferedDevice, Offers
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.resource import Device, ResourceName
from migplugin.errors import KubeletError
from migplugin.kubelet.deviceplugin import DevicePlugin, Server

MIG = ResourceName("nvidia.com/mig-1g.5gb")


def device(id_: str, gpu: int = 0, numa: int | None = None) -> Device:
    return Device(DeviceId(id_), GpuUuid(f"GPU-{gpu}"), gpu, "1g.5gb", numa, (f"/dev/nvidia{gpu}",))


def offers(*devices: Device, sick: str = "", resource: ResourceName = MIG) -> Offers:
    return Offers({resource: Offer({d.id: OfferedDevice(d, sick) for d in devices})}, ("/dev/nvidiactl",))


class Served:
    """A running server, and a client of it."""

    def __init__(self, directory: Path, first: Offers, options: EditOptions) -> None:
        self.offers = Cell(replace(first, edits=options))
        self.granted: list[str] = []
        self.plugin = DevicePlugin(MIG, self.offers, lambda _, ids: self.granted.extend(ids), preferred=True)
        self.server = Server(self.plugin, directory)

    async def __aenter__(self) -> Self:
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(
            f"unix:{self.server.path}", options=(("grpc.default_authority", "localhost"),)
        )
        self.stub = api_pb2_grpc.DevicePluginStub(self.channel)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()
        await self.server.stop()

    def list_and_watch(self) -> Any:
        return self.stub.ListAndWatch(api_pb2.Empty())

    async def allocate(self, *ids: str) -> api_pb2.ContainerAllocateResponse:
        request = api_pb2.AllocateRequest(
            container_requests=[api_pb2.ContainerAllocateRequest(devices_ids=ids)]
        )
        (answer,) = (await self.stub.Allocate(request, timeout=5)).container_responses
        return answer


@pytest.fixture
async def served(short: Path) -> AsyncIterator[Served]:
    options = EditOptions(frozenset({"envvar"}), pass_device_specs=True, dev_root="/host")
    async with Served(short, offers(device("MIG-a"), device("MIG-b", numa=1)), options) as running:
        yield running


async def test_the_list_is_whole_sorted_and_sent_again_only_when_it_differs(served: Served) -> None:
    stream = served.list_and_watch()
    first = await stream.read()
    assert [(d.ID, d.health) for d in first.devices] == [("MIG-a", "Healthy"), ("MIG-b", "Healthy")]
    assert not first.devices[0].HasField("topology")
    assert [node.ID for node in first.devices[1].topology.nodes] == [1]
    other = ResourceName("nvidia.com/gpu")
    served.offers.set(
        replace(served.offers.value, resources={**served.offers.value.resources, other: Offer({})})
    )
    served.offers.set(offers(device("MIG-a"), sick="gone"))
    second = await stream.read()
    assert [(d.ID, d.health) for d in second.devices] == [("MIG-a", "Unhealthy")]
    stream.cancel()


async def test_a_resource_that_is_offered_no_more_sends_nothing_and_keeps_its_stream(served: Served) -> None:
    stream = served.list_and_watch()
    await stream.read()
    served.offers.set(Offers())
    served.offers.set(offers(device("MIG-c")))
    assert [d.ID for d in (await stream.read()).devices] == ["MIG-c"]
    stream.cancel()


async def test_a_revision_sends_the_same_list_again(served: Served) -> None:
    stream = served.list_and_watch()
    first = await stream.read()
    offer = served.offers.value.resources[MIG]
    served.offers.set(Offers({MIG: replace(offer, revision=1)}))
    assert await stream.read() == first
    stream.cancel()


async def test_allocate_answers_with_environment_and_nodes_and_grants(served: Served) -> None:
    answer = await served.allocate("MIG-b", "MIG-a")
    assert dict(answer.envs) == {"NVIDIA_VISIBLE_DEVICES": "MIG-b,MIG-a"}
    assert [(d.container_path, d.host_path, d.permissions) for d in answer.devices] == [
        ("/dev/nvidiactl", "/host/dev/nvidiactl", "rw"),
        ("/dev/nvidia0", "/host/dev/nvidia0", "rw"),
    ]
    assert served.granted == ["MIG-b", "MIG-a"]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ((), "without device ids"),
        (("MIG-x",), "unknown device 'MIG-x'"),
        (("MIG-a", "MIG-a"), "named twice"),
    ],
)
async def test_a_request_that_must_not_be_granted_fails_with_a_reason(
    served: Served, ids: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.allocate(*ids)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason in str(caught.value.details())
    assert MIG in str(caught.value.details())
    assert not served.granted


async def test_a_device_that_was_withdrawn_a_moment_ago_is_refused(served: Served) -> None:
    served.offers.set(offers(device("MIG-a"), sick="gone: no such device on this node now"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.allocate("MIG-a")
    assert "unhealthy: gone" in str(caught.value.details())


async def test_a_request_without_containers_fails_and_does_not_leak(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Allocate(api_pb2.AllocateRequest(), timeout=5)
    assert "without containers" in str(caught.value.details())


async def test_preferred_allocation_answers_garbage_with_what_there_is(served: Served) -> None:
    request = api_pb2.PreferredAllocationRequest(
        container_requests=[
            api_pb2.ContainerPreferredAllocationRequest(
                available_deviceIDs=["MIG-a", "?"], must_include_deviceIDs=["?"], allocation_size=9
            ),
            api_pb2.ContainerPreferredAllocationRequest(allocation_size=-3),
        ]
    )
    answer = await served.stub.GetPreferredAllocation(request, timeout=5)
    assert [list(c.deviceIDs) for c in answer.container_responses] == [["?", "MIG-a"], []]


async def test_volume_mounts_name_each_device(short: Path) -> None:
    options = EditOptions(frozenset({"volume-mounts"}))
    async with Served(short, offers(device("MIG-a")), options) as running:
        answer = await running.allocate("MIG-a")
    assert dict(answer.envs) == {"NVIDIA_VISIBLE_DEVICES": "/var/run/nvidia-container-devices"}
    assert [(m.host_path, m.container_path) for m in answer.mounts] == [
        ("/dev/null", "/var/run/nvidia-container-devices/MIG-a")
    ]


async def test_open_streams_do_not_hold_allocate_back(served: Served) -> None:
    streams = [served.list_and_watch() for _ in range(20)]
    for stream in streams:
        await stream.read()
    assert (await served.allocate("MIG-a")).envs
    for stream in streams:
        stream.cancel()


async def test_stopping_ends_the_streams_in_order_and_removes_the_socket(short: Path) -> None:
    async with Served(short, offers(device("MIG-a")), EditOptions()) as running:
        mode = running.server.path.stat().st_mode
        assert stat.S_IMODE(mode) == 0o700
        assert running.server.is_reachable()
        stream = running.list_and_watch()
        await stream.read()
        stopping = asyncio.ensure_future(running.server.stop())
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        await asyncio.wait_for(stopping, 2.0)
        assert not running.server.path.exists()


async def test_a_socket_that_somebody_removed_is_noticed(served: Served) -> None:
    served.server.path.unlink()
    assert not served.server.is_reachable()


FORBIDDEN = """
import asyncio, os, sys
from pathlib import Path
from migplugin.errors import KubeletError
from tests.kubelet.test_deviceplugin import MIG, device, offers
from migplugin.aio import Cell
from migplugin.core.allocation import EditOptions
from migplugin.kubelet.deviceplugin import DevicePlugin, Server
directory = Path(sys.argv[1])
def made():
    cell = Cell(offers(device("MIG-a")))
    return Server(DevicePlugin(MIG, cell, lambda *_: None, preferred=False), directory)
async def main():
    served = made()
    await served.start()
    directory.chmod(0o555)
    await served.stop()
    for _ in range(2):
        try:
            await made().start()
        except KubeletError as exc:
            print(exc)
os.setuid(65534)
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_directory_that_is_not_writable_any_more_is_said_in_one_line_and_once(short: Path) -> None:
    os.chown(short, 65534, -1)
    command = [sys.executable, "-c", FORBIDDEN, str(short)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    first, second = ran.stdout.splitlines()
    assert first == second == f"{short}: not writable for us; run as root, or mount it writable"
    assert not ran.stderr, "gRPC does not speak for us"


async def test_a_directory_that_is_missing_is_named(short: Path) -> None:
    plugin = DevicePlugin(MIG, Cell(Offers()), lambda *_: None, preferred=False)
    server = Server(plugin, short / "nowhere")
    with pytest.raises(KubeletError, match=r"nowhere: no such directory"):
        await server.start()
    assert os.umask(0o022) == 0o022, "the umask is as it was"


async def test_replicas_are_listed_and_chosen_by_their_own_ids_and_granted_as_their_device(
    short: Path,
) -> None:
    shown = {
        DeviceId(f"MIG-{d}::{n}"): OfferedDevice(device(f"MIG-{d}", numa=1)) for d in "ab" for n in range(3)
    }
    async with Served(short, Offers({MIG: Offer(shown)}), EditOptions()) as running:
        stream = running.list_and_watch()
        listed = await stream.read()
        stream.cancel()
        assert [d.ID for d in listed.devices] == sorted(shown)
        assert {node.ID for d in listed.devices for node in d.topology.nodes} == {1}
        request = api_pb2.PreferredAllocationRequest(
            container_requests=[
                api_pb2.ContainerPreferredAllocationRequest(
                    available_deviceIDs=sorted(shown), allocation_size=2
                )
            ]
        )
        (chosen,) = (await running.stub.GetPreferredAllocation(request, timeout=5)).container_responses
        assert list(chosen.deviceIDs) == ["MIG-a::0", "MIG-b::0"]
        answer = await running.allocate("MIG-a::0", "MIG-b::0", "MIG-a::1")
    assert dict(answer.envs) == {"NVIDIA_VISIBLE_DEVICES": "MIG-a,MIG-b"}
    assert running.granted == ["MIG-a::0", "MIG-b::0", "MIG-a::1"]
