"""The demo: the main job on a simulated node, told with measured times, every step asserted.

Three real parts play: the simulated driver (a state directory that processes share), the stand-in
kubelet (in this process), and the agent as it runs on a node (`python -m migplugin serve`, a process of
its own). GPUs are re-carved by yet another process, as a person with nvidia-smi would.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from migplugin.sim.driver import Simulation
from migplugin.sim.kubelet import Container, Kubelet, Pod

NODE = "1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2"
OFFERED = {"nvidia.com/mig-1g.5gb": 9, "nvidia.com/mig-2g.10gb": 1, "nvidia.com/mig-3g.20gb": 1}
REMOVAL_DELAY = 3.0
PATIENCE = 10.0


class DemoFailed(Exception):
    pass


class Story:
    """Prints what happened, and how long after its cause."""

    def __init__(self) -> None:
        self._steps = 0
        self._began = time.monotonic()

    def start(self) -> None:
        self._began = time.monotonic()

    def step(self, title: str, *details: str) -> None:
        self._steps += 1
        print(f"{self._steps:>2}  {title:<66}{_time(time.monotonic() - self._began):>9}", flush=True)
        for detail in details:
            print(f"      {detail}", flush=True)
        self.start()


def run() -> int:
    """Tells the story; 0 when every step came true."""
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="migdemo-", dir="/tmp"))
    log = root / "agent.log"
    try:
        asyncio.run(asyncio.wait_for(_play(root, log), 60))
    except (DemoFailed, TimeoutError) as exc:
        print(f"\nthe demo failed: {exc or 'it took more than 60 s'}", file=sys.stderr)
        if log.exists():
            print("the agent said:", log.read_text()[-4000:], sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"\nall of it came true, in {time.monotonic() - began:.1f} s, on a machine without a GPU.")
    print(
        "next: migplugin status --simulate '1xh100-80gb=3g.40gb:1g.10gb*3', migplugin sim --help, README.md"
    )
    return 0


async def _play(root: Path, log: Path) -> None:
    print("migplugin on a simulated node: two A100-40GB, a stand-in kubelet, and the real agent")
    print(
        "times run from the cause (a process started, a command that returned) to its effect at the kubelet\n"
    )
    story = Story()
    with Simulation.open(NODE) as simulation:
        state = simulation.state_dir
        story.step("a node with two GPUs is made", "GPU 0  1g.5gb x7", "GPU 1  3g.20gb + 2g.10gb + 1g.5gb x2")
        async with Kubelet(root) as kubelet, _agent(state, kubelet, log) as agent:
            await _until(
                kubelet, "the three resources to be offered", lambda: _allocatable(kubelet) == OFFERED
            )
            story.step(
                "the agent enumerated them by NVML and registered with the kubelet",
                *(f"{name:<24} {count}" for name, count in OFFERED.items()),
            )
            held = await _pod(kubelet, story)
            await _recarve(kubelet, state, held, story)
            await _restart(kubelet, held, story)
            agent.send_signal(signal.SIGTERM)
            _check(
                await asyncio.wait_for(agent.wait(), PATIENCE) == 0, "the agent did not end with exit code 0"
            )
            left = [path.name for path in kubelet.socket.parent.glob("migplugin-*.sock")]
            _check(not left, f"the agent left sockets behind: {left}")
            story.step("SIGTERM: the agent ended with exit code 0 and left no socket")


async def _pod(kubelet: Kubelet, story: Story) -> str:
    """A pod takes one device; answers its id."""
    resource = "nvidia.com/mig-1g.5gb"
    status = await kubelet.admit(Pod("trainer", (Container("main", {resource: 1}),)))
    _check(status.phase == "Running", f"the pod did not run: {status.reason} {status.message}")
    edits = status.containers["main"]
    (held,) = edits.device_ids[resource]
    _check(edits.envs.get("NVIDIA_VISIBLE_DEVICES") == held, f"wrong environment: {edits.envs}")
    nodes = [spec.container_path for spec in edits.devices]
    _check(sum("nvidia-cap" in node for node in nodes) == 2, f"GI and CI capability nodes expected: {nodes}")
    story.step(
        f"a pod asked for {resource}: 1 and runs",
        f"NVIDIA_VISIBLE_DEVICES={held}",
        *(f"device {node}" for node in nodes),
    )
    return held


async def _recarve(kubelet: Kubelet, state: Path, held: str, story: Story) -> None:
    """Another process turns the 3g.20gb of GPU 1 into 2g.10gb + 1g.5gb."""
    old, new = "nvidia.com/mig-3g.20gb", "nvidia.com/mig-2g.10gb"
    (gone,) = kubelet.devices(old)
    await _sim(state, "destroy", "--uuid", gone)
    story.start()
    await _until(kubelet, "the destroyed device to be Unhealthy", lambda: _healthy(kubelet.devices(old)) == 0)
    _check(gone in kubelet.devices(old), "the destroyed device left the list at once, which crashes kubelets")
    story.step("another process destroyed the 3g.20gb: shown as Unhealthy", gone)
    await _sim(state, "create", "1", "2g.10gb")
    story.start()
    await _until(kubelet, "the new device to be offered", lambda: _healthy(kubelet.devices(new)) == 2)
    story.step("it made a 2g.10gb in its place: offered", f"{new} {_healthy(kubelet.devices(new))}")
    await _until(kubelet, "the old device to leave the list", lambda: not kubelet.devices(old))
    story.step(f"nobody holds the old one: it left the list (--removal-delay {REMOVAL_DELAY:g}s)")
    _check(kubelet.devices("nvidia.com/mig-1g.5gb")[held] == "Healthy", "the pod's device was disturbed")


async def _restart(kubelet: Kubelet, held: str, story: Story) -> None:
    """The kubelet dies and comes back; everything registers again and the pod keeps its device."""
    before = {name: count for name, count in _allocatable(kubelet).items() if count}
    await kubelet.restart(kill=True)
    story.start()
    await _until(
        kubelet,
        "all resources to be back",
        lambda: {name: count for name, count in _allocatable(kubelet).items() if count} == before,
    )
    _check(kubelet.devices("nvidia.com/mig-1g.5gb").get(held) == "Healthy", "the pod's device is not back")
    story.step("the kubelet was killed and started again: all is back", "the pod kept its device")


@contextlib.asynccontextmanager
async def _agent(state: Path, kubelet: Kubelet, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (
        *(sys.executable, "-m", "migplugin", "serve", f"--simulate={state}", "--pass-device-specs"),
        "--force-simulate",  # the kubelet is ours, so no real workload can come
        f"--kubelet-socket={kubelet.socket}",
        f"--pod-resources-socket={kubelet.pod_resources_socket}",
        f"--control-socket={kubelet.socket.parent.parent}/agent.sock",
        f"--removal-delay={REMOVAL_DELAY:g}s",
    )
    with log.open("wb") as file:
        agent = await asyncio.create_subprocess_exec(*command, stderr=file, env=_environment())
    try:
        yield agent
    finally:
        if agent.returncode is None:
            agent.kill()
            await agent.wait()


async def _sim(state: Path, *words: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migplugin", "sim", f"--state={state}", *words),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
    )
    _, said = await process.communicate()
    _check(process.returncode == 0, f"migplugin sim {' '.join(words)}: {said.decode().strip()}")


def _environment() -> dict[str, str]:
    """Ours, without variables that would set the agent otherwise than the demo means it."""
    return {
        name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "PYTHONPATH", "LANG"}
    }


async def _until(kubelet: Kubelet, what: str, condition: Callable[[], bool]) -> None:
    try:
        await kubelet.until(lambda _: condition(), timeout=PATIENCE)
    except TimeoutError as exc:
        raise DemoFailed(f"waited {PATIENCE:g} s for {what}; {exc}") from exc


def _allocatable(kubelet: Kubelet) -> Mapping[str, int]:
    return {
        name: count for name, count in kubelet.node()["allocatable"].items() if name.startswith("nvidia.com/")
    }


def _healthy(devices: Mapping[str, str]) -> int:
    return sum(health == "Healthy" for health in devices.values())


def _check(claim: bool, otherwise: str) -> None:
    if not claim:
        raise DemoFailed(otherwise)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
