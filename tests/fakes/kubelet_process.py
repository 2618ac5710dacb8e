"""The stand-in kubelet as a process of its own, which can really be killed."""

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from migplugin.errors import MigpluginError


class CommandFailed(MigpluginError):
    pass


class KubeletProcess:
    """A running `python -m migplugin.sim.kubelet`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.ready: dict[str, str] = {}
        self.node: dict[str, dict[str, int]] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[int | None, dict[str, Any]] = {}
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def do(self, command: str, **words: Any) -> Any:
        """The answer to a command. Raises CommandFailed with its error."""
        number = next(self._numbers)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "do": command, **words}).encode() + b"\n")
        await self._until(lambda: number in self._answers)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise CommandFailed(answer["error"])
        return answer["answer"]

    async def allocatable(self, resource: str, count: int) -> None:
        """Returns once the node shows `count`."""
        await self._until(lambda: self.node.get("allocatable", {}).get(resource) == count)

    async def ended(self) -> tuple[int, str]:
        """The exit status and what it said on stderr."""
        assert self.process.stderr is not None
        said = await self.process.stderr.read()
        return await self.process.wait(), said.decode()

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self._changed.wait()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            document = json.loads(line)
            self.ready = document.get("ready", self.ready)
            self.node = document.get("node", self.node)
            if "id" in document:
                self._answers[document["id"]] = document
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()


@contextlib.asynccontextmanager
async def kubelet_process(root: Path, *options: str) -> AsyncIterator[KubeletProcess]:
    """Started and ready; killed at the end if it still runs."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migplugin.sim.kubelet", str(root), *options),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )
    started = KubeletProcess(process)
    try:
        await started._until(lambda: started.ready)
        yield started
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        await started._reading
