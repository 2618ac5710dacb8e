"""How a command asks the running agent."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio

from migplugin._proto.agent.v1 import agent_pb2, agent_pb2_grpc
from migplugin.agentapi.document import decode
from migplugin.core.status import Status
from migplugin.errors import AgentError, InputError
from migplugin.unixsocket import explain

WITHIN = 5.0
MAX_ANSWER_BYTES = 64 << 20


async def status(path: Path) -> Status:
    """The agent's status document.

    Raises AgentError where no agent answers at `path`, or one of another version.
    """
    async with _asking(path) as agent:
        answer = await agent.Status(agent_pb2.StatusRequest(), timeout=WITHIN)
    return decode(answer.document)


async def clear_health(path: Path, ids: Sequence[str] | None) -> tuple[list[tuple[str, str]], list[str]]:
    """The agent takes `ids`, or all that is sick, for well. Answers whom, and of what, and notes.

    Raises InputError where the agent says that this makes no sense, AgentError where none answers.
    """
    request = agent_pb2.ClearHealthRequest(ids=ids or (), all=ids is None)
    async with _asking(path) as agent:
        answer = await agent.ClearHealth(request, timeout=WITHIN)
    return [(cleared.id, cleared.reason) for cleared in answer.cleared], list(answer.notes)


@asynccontextmanager
async def _asking(path: Path) -> AsyncIterator["agent_pb2_grpc.AgentAsyncStub"]:
    _check(path)
    options = (
        ("grpc.default_authority", "localhost"),
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    )
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        try:
            yield agent_pb2_grpc.AgentStub(channel)
        except grpc.aio.AioRpcError as exc:
            if exc.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise InputError(exc.details() or "the agent refused") from exc
            if exc.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise AgentError(f"{path}: that agent is of another version and cannot do this") from exc
            if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise AgentError(f"{path}: no answer within {WITHIN:g} s") from exc
            raise AgentError(f"{path}: {exc.details() or exc.code().name}") from exc


def _check(path: Path) -> None:
    """Raises AgentError where no agent of ours is at `path`: gRPC says the same of everything."""
    if reason := explain(path, "the agent"):
        raise AgentError(reason)
    owner = path.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise AgentError(f"{path}: belongs to uid {owner}, and so it is not the agent's")
