"""What the manager says of its servers, for the probes. The rest of it is tested by the whole agent."""

import socket
from pathlib import Path

from migplugin.aio import Cell
from migplugin.core.allocation import Offer, Offers
from migplugin.core.resource import ResourceName
from migplugin.kubelet.deviceplugin import DevicePlugin, Server
from migplugin.kubelet.manager import Manager
from migplugin.unixsocket import identity

NAME = ResourceName("nvidia.com/gpu")


def grant(*_: object) -> None:
    raise AssertionError("nobody asked")


async def test_a_server_is_dead_when_its_socket_is_there_and_nobody_listens(short: Path) -> None:
    offers = Cell(Offers({NAME: Offer({})}))
    manager = Manager(short / "kubelet.sock", offers, grant, preferred=lambda: False)
    server = Server(DevicePlugin(NAME, offers, grant, preferred=False), short)
    assert manager.states() == {NAME: False}
    await server.start()
    life = (1, 1, 1)
    manager.incarnation.set(life)
    manager._servers[NAME] = server, life
    assert manager.dead() == []
    assert manager.states() == {NAME: False}, "the kubelet has not taken the list"
    server.plugin.listed.set()
    assert manager.states() == {NAME: True}
    manager.incarnation.set((2, 2, 2))
    assert manager.states() == {NAME: False}, "another kubelet"
    await server.stop()
    assert manager.dead() == [], "a socket that is gone is noticed and made anew"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(server.path))
    server._identity = identity(server.path)
    assert manager.dead() == [NAME]
