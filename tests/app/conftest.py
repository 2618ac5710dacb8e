"""The whole agent as a process, on the simulated driver and the stand-in kubelet."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migplugin.sim.driver import Simulation
from migplugin.sim.kubelet import Kubelet
from migplugin.sim.model import Node
from migplugin.sim.store import Store

PATIENCE = 10.0
DEMO_NODE = "1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2"


class Agent:
    """`migplugin serve` in a process of its own; its log is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.stray: list[str] = []
        self._changed = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            text = raw.decode().rstrip()
            try:
                self.lines.append(json.loads(text))
            except ValueError:
                self.stray.append(text)
            self._changed.set()

    def said(self, phrase: str, **fields: object) -> list[dict[str, Any]]:
        return [
            line
            for line in self.lines
            if line["message"] == phrase and all(line.get(key) == value for key, value in fields.items())
        ]

    async def until_said(self, phrase: str, **fields: object) -> dict[str, Any]:
        """The first line with this phrase and these fields."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not self.said(phrase, **fields):
                    self._changed.clear()
                    await self._changed.wait()
        found = self.said(phrase, **fields)
        assert found, f"never said {phrase!r} {fields}; it said: {self.lines} {self.stray}"
        return found[0]

    async def until_next(self) -> None:
        """Returns when it has said something more."""
        self._changed.clear()
        async with asyncio.timeout(PATIENCE):
            await self._changed.wait()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal; every agent ends without a traceback."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        await self._reader
        assert not [line for line in self.lines if "traceback" in line], self.lines
        assert not [text for text in self.stray if "Traceback" in text], self.stray
        return code

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self._reader


class Machine:
    """A node: the simulated driver's directory, a kubelet, and the agents that were started on it."""

    def __init__(self, root: Path, state: Path, kubelet: Kubelet) -> None:
        self.root = root
        self.state = state
        self.store = Store(state)
        self.kubelet = kubelet
        self.agents: list[Agent] = []

    def change(self, function: Callable[[Node], object]) -> None:
        with self.store.change() as node:
            function(node)

    async def serve(self, *flags: str, **env: str) -> Agent:
        return await self.run(
            *(sys.executable, "-m", "migplugin", "serve", "--log-format=json", *self.simulated),
            f"--kubelet-socket={self.kubelet.socket}",
            f"--pod-resources-socket={self.kubelet.pod_resources_socket}",
            *flags,
            **env,
        )

    @property
    def control_socket(self) -> Path:
        return self.root / "run/agent.sock"

    @property
    def environment(self) -> dict[str, str]:
        """What every process is given: there is more than one node on this machine."""
        return {"PATH": os.environ["PATH"], "MIGPLUGIN_CONTROL_SOCKET": str(self.control_socket)}

    async def command(self, *words: str) -> tuple[int | None, str, str]:
        """A command of ours as a person types it on this node: its exit code, and what it said on both."""
        sockets = {
            "KUBELET_SOCKET": str(self.kubelet.socket),
            "MIGPLUGIN_POD_RESOURCES_SOCKET": str(self.kubelet.pod_resources_socket),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migplugin", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment | sockets,
        )
        out, err = await asyncio.wait_for(process.communicate(), 2 * PATIENCE)
        return process.returncode, out.decode(), err.decode()

    @property
    def simulated(self) -> tuple[str, str]:
        """The flags that an agent needs to run on this node's driver."""
        return f"--simulate={self.state}", "--force-simulate"

    async def run(self, *words: str, **env: str) -> Agent:
        process = await asyncio.create_subprocess_exec(
            *words,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment | env,
        )
        agent = Agent(process)
        self.agents.append(agent)
        return agent

    async def until(self, condition: Callable[[Kubelet], bool], timeout: float = PATIENCE) -> None:  # noqa: ASYNC109
        try:
            await self.kubelet.until(condition, timeout=timeout)
        except TimeoutError as exc:
            said = [agent.lines + agent.stray for agent in self.agents]
            raise AssertionError(f"{exc}; the agents said: {said}") from exc

    def allocatable(self, profile: str) -> int | None:
        return self.kubelet.allocatable(f"nvidia.com/mig-{profile}")


Start = Callable[..., Awaitable[Machine]]


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="migapp-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def machine(root: Path) -> AsyncIterator[Start]:
    """Makes the machine of a spec, with a running kubelet unless told otherwise."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(spec: str = DEMO_NODE, *, running: bool = True, **options: Any) -> Machine:
            simulation = stack.enter_context(Simulation.open(spec))
            kubelet = Kubelet(root, **options)
            made = Machine(root, simulation.state_dir, kubelet)

            async def end() -> None:
                for agent in made.agents:
                    await agent.kill()
                with contextlib.suppress(Exception):
                    await kubelet.stop()

            stack.push_async_callback(end)
            if running:
                await kubelet.start()
            else:
                kubelet.socket.parent.mkdir(parents=True, exist_ok=True)
            return made

        yield make
