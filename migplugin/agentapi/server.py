"""The socket at which the running agent answers its own commands.

It is not what the agent is there for: where it cannot be had, that is said once, tried again now and
then, and the agent serves on. Only root gets at it: a directory of mode 0700, a socket of 0600. Whoever
answers at the path already is never driven away, since gRPC would do that without a word. So the server
binds a name that nobody knows, and that name is renamed to the path once it answers: nobody ever finds a
socket there that does not, and when gRPC removes the name it bound, it removes nobody else's.

No answer waits for the driver. A change is one synchronous step on the event loop, and so there is never
more than one at a time.
"""

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from migplugin import unixsocket
from migplugin._proto.agent.v1 import agent_pb2, agent_pb2_grpc
from migplugin.aio import first_of
from migplugin.core.health import Cleared
from migplugin.errors import AgentError, InputError
from migplugin.unixsocket import advice, identity, is_served, is_socket, too_long, why

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 1 << 20
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
LOOK_EVERY = 30.0

Context = grpc.aio.ServicerContext[object, object]


class Agent(Protocol):
    """What is answered."""

    async def status(self) -> bytes:
        """The status document as JSON; soon, and without asking the driver."""

    def clear_health(self, ids: Collection[str] | None) -> Cleared:
        """Takes `ids`, or all, for well. Raises InputError where that makes no sense, and changes nothing."""


class Service(agent_pb2_grpc.AgentServicer):
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def Status(self, request: agent_pb2.StatusRequest, context: Context) -> agent_pb2.StatusResponse:
        return agent_pb2.StatusResponse(document=await self._agent.status())

    async def ClearHealth(
        self, request: agent_pb2.ClearHealthRequest, context: Context
    ) -> agent_pb2.ClearHealthResponse:
        try:
            if bool(request.ids) == request.all:
                raise InputError("health clear: expected either ids or all")
            cleared = self._agent.clear_health(None if request.all else request.ids)
        except InputError as exc:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))
        return agent_pb2.ClearHealthResponse(
            cleared=[
                agent_pb2.Cleared(id=id_, gpu=sickness.gpu, reason=sickness.cause)
                for id_, sickness in cleared.sick.items()
            ],
            notes=cleared.notes,
        )


class ControlSocket:
    """Answers for `agent` at `path` until `stopping` is set."""

    def __init__(self, path: Path, agent: Agent, stopping: asyncio.Event) -> None:
        self._path = path
        self._agent = agent
        self._stopping = stopping

    async def run(self) -> None:
        """Answers, again where its socket goes away; afterwards the socket is gone.

        Ends at once where the path can never be a socket.
        """
        pause, said = SHORTEST_PAUSE, ""
        while not self._stopping.is_set():
            if reason := too_long(self._path) or too_long(_new_name(self._path)):
                log.warning("no control socket, commands look for themselves", extra={"reason": reason})
                return
            try:
                await self._serve()
                pause, said = SHORTEST_PAUSE, ""
            except AgentError as exc:
                if str(exc) != said:
                    log.warning(
                        "no control socket yet, will try again", extra={"reason": str(exc), "retry_in": pause}
                    )
                said = str(exc)
                await first_of(self._stopping.wait(), timeout=pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _serve(self) -> None:
        """Answers until asked to stop, or until the socket is no longer at its path.

        Raises AgentError where it cannot be made.
        """
        prepare(self._path)
        bound = _new_name(self._path)
        server = grpc.aio.server(
            options=(("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0))
        )
        agent_pb2_grpc.add_AgentServicer_to_server(Service(self._agent), server)
        ours = None
        try:
            try:
                with unixsocket.umask(0o177):
                    server.add_insecure_port(f"unix:{bound}")
                await server.start()
                bound.rename(self._path)
            except (RuntimeError, OSError) as exc:
                raise AgentError(f"{self._path}: no socket can be made; {_about(exc, self._path)}") from exc
            ours = identity(self._path)
            log.info("control socket", extra={"path": str(self._path)})
            while not self._stopping.is_set() and identity(self._path) == ours:
                await first_of(self._stopping.wait(), timeout=LOOK_EVERY)
        finally:
            await asyncio.shield(server.stop(0))
            if ours is not None and identity(self._path) == ours:
                with contextlib.suppress(OSError):
                    self._path.unlink()


def prepare(path: Path) -> None:
    """A socket of ours can be put at `path`: nobody answers there, and nobody but root can put his own there.

    An empty directory of ours where others may write, as the kubelet makes an emptyDir, is made ours alone.
    Raises AgentError where all that is not so.
    """
    directory = path.parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid not in {0, os.geteuid()}:
            raise AgentError(f"{directory}: belongs to uid {found.st_uid}; choose another path")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            others = next((there for there in directory.iterdir() if not there.match(f"{path.name}*")), None)
            if others is not None:
                bits = f"mode {stat.S_IMODE(found.st_mode):04o}"
                raise AgentError(
                    f"{directory}: others may write there ({bits}), and it is not for us alone: there is "
                    f"{others.name}; choose another path, or chmod go-w"
                )
            directory.chmod(0o700)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise AgentError(f"{directory}: not writable for us; run as root, or mount it writable")
        if not is_socket(path) and os.path.lexists(path):
            raise AgentError(f"{path}: not a socket; remove it, or choose another path")
    except OSError as exc:
        raise AgentError(f"{directory}: {_about(exc, path)}") from exc
    if is_served(path):
        raise AgentError(f"{path}: another agent answers there; end it, or choose another path")


def _new_name(path: Path) -> Path:
    return path.with_name(f".{os.urandom(3).hex()}")


def _about(exc: Exception, path: Path) -> str:
    if isinstance(exc, OSError):
        return f"{why(exc)}; {advice(exc, path.parent)}"
    return f"is the disk of {path.parent} full?"
