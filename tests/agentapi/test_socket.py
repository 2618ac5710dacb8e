"""The control socket between both its ends: who gets at it, what is said, and what is in its way."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import grpc.aio
import pytest

from migplugin.agentapi import client, server
from migplugin.agentapi.document import encode
from migplugin.agentapi.server import ControlSocket
from migplugin.core.decide import World, decide
from migplugin.core.health import Cleared, Health
from migplugin.core.inventory import GpuUuid
from migplugin.core.sickness import Sickness
from migplugin.core.status import Status, status
from migplugin.errors import AgentError, InputError
from tests.core.examples import SEVENTHS, inventory, usage
from tests.fakes.sockets import left_behind, listening

GPU = GpuUuid("GPU-1")
SICK = Sickness(GPU, None, (79,), 1.0, 1.0)


def document() -> Status:
    world = World(1.0, inventory(SEVENTHS), usage=usage())
    return status(world, decide(world), node="node-a")


class Told:
    """An agent that says what it is told to, or nothing until `let`."""

    def __init__(self) -> None:
        self.document = encode(document())
        self.asked: list[list[str] | None] = []
        self.let = asyncio.Event()
        self.let.set()

    async def status(self) -> bytes:
        await self.let.wait()
        return self.document

    def clear_health(self, ids: Collection[str] | None) -> Cleared:
        self.asked.append(None if ids is None else list(ids))
        if ids is not None and GPU not in ids:
            raise InputError("'x' is not sick; nobody is")
        return Cleared(Health(), {GPU: SICK}, ("GPU-2 stays unhealthy",))


@contextlib.asynccontextmanager
async def answering(path: Path, agent: Told) -> AsyncIterator[asyncio.Event]:
    """Runs the server, and ends it within a second; set the event to do so sooner."""
    stopping = asyncio.Event()
    running = asyncio.ensure_future(ControlSocket(path, agent, stopping).run())
    try:
        yield stopping
    finally:
        stopping.set()
        agent.let.set()
        await asyncio.wait_for(running, 1.0)


async def until_served(path: Path) -> None:
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(AgentError):
                await client.status(path)
                return
            await asyncio.sleep(0.005)


def made(directory: Path, bits: int) -> None:
    directory.mkdir(exist_ok=True)
    directory.chmod(bits)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


async def test_both_ends_understand_each_other(short: Path) -> None:
    path, agent = short / "run/agent.sock", Told()
    async with answering(path, agent):
        await until_served(path)
        assert await client.status(path) == document()
        sick, notes = await client.clear_health(path, [GPU])
        assert sick == [(GPU, SICK.cause)]
        assert notes == ["GPU-2 stays unhealthy"]
        await client.clear_health(path, None)
        with pytest.raises(InputError, match="'x' is not sick; nobody is"):
            await client.clear_health(path, ["x"])
        with pytest.raises(InputError, match="either ids or all"):
            await client.clear_health(path, [])
        assert agent.asked == [[GPU], None, ["x"]]
    assert not list(path.parent.iterdir())


async def test_root_alone_gets_at_it(short: Path) -> None:
    emptydir, mine = short / "emptydir", short / "mine"
    for directory, bits in ((emptydir, 0o777), (mine, 0o755), (short, 0o1777)):
        made(directory, bits)
    for path, expected in (
        (short / "run/agent.sock", 0o700),
        (emptydir / "agent.sock", 0o700),
        (mine / "agent.sock", 0o755),
        (short / "agent.sock", 0o1777),
    ):
        async with answering(path, Told()):
            await until_served(path)
            assert (mode(path.parent), mode(path)) == (expected, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
@pytest.mark.parametrize("bits", [0o777, 0o770, 0o755])
async def test_a_directory_of_somebody_else_is_not_used(
    short: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    made(short, bits)
    os.chown(short, 65534, 65534)
    async with answering(short / "agent.sock", Told()) as stopping:
        await until_said(caplog, "belongs to uid 65534")
        stopping.set()
    assert mode(short) == bits


@pytest.mark.parametrize("bits", [0o777, 0o775])
async def test_a_directory_with_other_things_is_neither_used_nor_changed_where_others_may_write(
    short: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    made(short, bits)
    (short / "another's").touch()
    async with answering(short / "agent.sock", Told()) as stopping:
        await until_said(caplog, f"others may write there (mode {bits:04o})")
        stopping.set()
    assert mode(short) == bits


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a socket away")
async def test_a_socket_of_somebody_else_is_not_asked(short: Path) -> None:
    path = short / "agent.sock"
    async with answering(path, Told()):
        await until_served(path)
        os.chown(path, 65534, 65534)
        with pytest.raises(AgentError, match="belongs to uid 65534"):
            await client.status(path)


async def until_said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(5):
        while not any(text in str(vars(record).get("reason")) for record in caplog.records):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_an_agent_that_answers_there_is_not_driven_away_and_followed_when_it_ends(
    short: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SHORTEST_PAUSE", 0.02)
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(client, "WITHIN", 0.5)  # who asks just when the first one ends may not be answered
    path, first, second = short / "agent.sock", Told(), Told()
    async with answering(path, first) as end_first:
        await until_served(path)
        async with answering(path, second):
            await until_said(caplog, "another agent answers there")
            for _ in range(5):
                await client.clear_health(path, None)
            assert (len(first.asked), len(second.asked)) == (5, 0)
            end_first.set()
            async with asyncio.timeout(20):
                while not second.asked:
                    with contextlib.suppress(AgentError):
                        await client.clear_health(path, None)
                    await asyncio.sleep(0.005)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "no control socket yet, will try again"
    ]


async def test_a_socket_that_nobody_serves_any_more_is_replaced(short: Path) -> None:
    path = short / "agent.sock"
    left_behind(path)
    async with answering(path, Told()):
        await until_served(path)


async def test_what_is_not_a_socket_is_left_where_it_is(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = short / "agent.sock"
    path.write_text("mine")
    async with answering(path, Told()):
        await until_said(caplog, f"{path}: not a socket; remove it, or choose another path")
    assert path.read_text() == "mine"


async def test_a_directory_that_cannot_be_made_is_said_once_and_tried_again(
    short: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SHORTEST_PAUSE", 0.01)
    path = short / "run/agent.sock"
    path.parent.write_text("in the way")
    async with answering(path, Told()):
        await until_said(caplog, str(path.parent))
        tried = 0
        original = server.prepare

        def count(path: Path) -> None:
            nonlocal tried
            tried += 1
            original(path)

        monkeypatch.setattr(server, "prepare", count)
        async with asyncio.timeout(5):
            while tried < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        path.parent.unlink()
        await until_served(path)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


async def test_a_path_too_long_is_given_up_with_one_line(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = short / ("x" * 100)
    await asyncio.wait_for(ControlSocket(path, Told(), asyncio.Event()).run(), 1.0)
    (record,) = caplog.records
    assert record.message == "no control socket, commands look for themselves"
    assert "too long for a socket" in vars(record)["reason"]
    with pytest.raises(AgentError, match="too long for a socket"):
        await client.status(path)


async def test_a_socket_that_was_removed_or_replaced_is_made_anew(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LOOK_EVERY", 0.02)
    path = short / "agent.sock"
    async with answering(path, Told()):
        await until_served(path)
        path.unlink()
        await until_served(path)
        path.unlink()
        left_behind(path)
        await until_served(path)


async def test_at_the_end_somebody_else_s_socket_is_left_where_it_is(short: Path) -> None:
    path = short / "agent.sock"
    async with answering(path, Told()):
        await until_served(path)
        path.unlink()
        other = listening(path)
    with other:
        assert path.is_socket()


async def test_a_request_of_more_than_a_mebibyte_is_refused_and_others_are_answered(short: Path) -> None:
    path, agent = short / "agent.sock", Told()
    async with answering(path, agent):
        await until_served(path)
        with pytest.raises(AgentError, match="larger than max"):
            await client.clear_health(path, ["x" * (1 << 20)])
        await client.status(path)
    assert not agent.asked


async def test_clients_that_hang_hold_back_no_end(
    short: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, agent = short / "agent.sock", Told()
    with socket.socket(socket.AF_UNIX) as silent:
        async with answering(path, agent) as stopping:
            await until_served(path)
            silent.connect(str(path))
            silent.send(b"PRI * HTTP/2.0\r\n")
            agent.let.clear()
            asking = asyncio.ensure_future(client.status(path))
            await asyncio.wait((asking,), timeout=0.1)
            assert not asking.done()
            loop = asyncio.get_running_loop()
            began = loop.time()
            stopping.set()
            with pytest.raises(AgentError):
                await asyncio.wait_for(asking, 1.0)
            assert loop.time() - began < 0.5
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_what_keeps_a_client_from_an_answer_is_one_line(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, agent = short / "agent.sock", Told()
    with pytest.raises(AgentError, match="no such socket; the agent is not running"):
        await client.status(path)
    left_behind(path)
    with pytest.raises(AgentError, match="connection refused; the agent that made this socket is gone"):
        await client.status(path)
    async with answering(path, agent):
        await until_served(path)
        agent.document = b'{"schema": "migplugin/status/v2"}'
        with pytest.raises(AgentError, match="the agent's status is of another version"):
            await client.status(path)
        monkeypatch.setattr(client, "WITHIN", 0.05)
        agent.let.clear()
        with pytest.raises(AgentError, match=r"no answer within 0\.05 s"):
            await client.status(path)


async def test_an_agent_that_does_not_know_the_question_is_of_another_version(short: Path) -> None:
    path = short / "agent.sock"
    other = grpc.aio.server()
    other.add_insecure_port(f"unix:{path}")
    await other.start()
    try:
        with pytest.raises(AgentError, match="that agent is of another version and cannot do this"):
            await client.clear_health(path, None)
    finally:
        await other.stop(0)
