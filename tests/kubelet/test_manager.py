"""Lives of the kubelet that end at awkward moments: found at once, and said once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.aio import Cell
from migplugin.kubelet.manager import Manager
from migplugin.sim.kubelet import Kubelet
from tests.kubelet.test_deviceplugin import MIG, device, offers


class Deaf(api_pb2_grpc.RegistrationServicer):
    """A kubelet that answers a registration and then does not ask for the list."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def Register(self, request: api_pb2.RegisterRequest, context: object) -> api_pb2.Empty:
        self.asked.set()
        return api_pb2.Empty()


@contextlib.asynccontextmanager
async def managed(socket: Path) -> AsyncIterator[Manager]:
    cell = Cell(offers(device("MIG-a")))
    manager = Manager(socket, cell, lambda *_: None, preferred=lambda: True)
    running = asyncio.ensure_future(manager.run())
    try:
        yield manager
    finally:
        manager.stop()
        await asyncio.wait_for(running, 5)


async def test_a_kubelet_that_dies_before_it_asks_for_the_list_is_not_waited_for(short: Path) -> None:
    kubelet = Kubelet(short)
    kubelet.socket.parent.mkdir()
    deaf, server = Deaf(), grpc.aio.server()
    api_pb2_grpc.add_RegistrationServicer_to_server(deaf, server)
    server.add_insecure_port(f"unix:{kubelet.socket}")
    await server.start()
    async with managed(kubelet.socket):
        await asyncio.wait_for(deaf.asked.wait(), 5)
        await server.stop(0)
        began = time.monotonic()
        async with kubelet:
            await kubelet.until(lambda _: kubelet.allocatable(MIG) == 1)
            assert time.monotonic() - began < 1.5


async def test_the_end_does_not_wait_for_a_kubelet_that_does_not_ask_for_the_list(short: Path) -> None:
    deaf, server = Deaf(), grpc.aio.server()
    api_pb2_grpc.add_RegistrationServicer_to_server(deaf, server)
    server.add_insecure_port(f"unix:{short}/kubelet.sock")
    await server.start()
    async with managed(short / "kubelet.sock") as manager:
        await asyncio.wait_for(deaf.asked.wait(), 5)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        manager.stop()
    assert time.monotonic() - began < 0.5
    await server.stop(0)


async def test_a_kubelet_that_is_killed_is_said_to_be_away_and_nothing_else(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kubelet = Kubelet(short)
    await kubelet.start()
    async with managed(kubelet.socket):
        await kubelet.until(lambda _: kubelet.allocatable(MIG) == 1)
        await kubelet.kill()
        await asyncio.sleep(0.5)
        said = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert said == ["no kubelet, waiting for it"]
        await kubelet.start()
        await kubelet.until(lambda _: kubelet.allocatable(MIG) == 1)
    await kubelet.stop()
