"""The stand-in kubelet as a process that can be killed: `python -m migplugin.sim.kubelet ROOT`.

On stdout, one JSON document a line: `{"ready": …}` with both socket paths, `{"node": …}` whenever
capacity or allocatable changes, and an answer for each command. On stdin, one command a line:

    {"id": 1, "do": "admit", "pod": {"name": "a", "containers": [{"name": "main", "requests": {"x/y": 1}}]}}
    {"id": 2, "do": "restart_container", "pod": "a", "container": "main"}

`do` is one of admit, status, restart_container, finish, delete (a pod is named by its name, and
`namespace` where that is not "default"), node, devices (with `resource`), sync and restart (with `kill`).
The answer has the same id, and `answer` or `error`. SIGTERM ends it gracefully. When the kubelet
panics, it prints one line with the device on stderr and exits with status 70.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from migplugin.errors import MigpluginError
from migplugin.sim.kubelet import Kubelet, Panic, Pod
from migplugin.sim.kubelet.topology import POLICIES

EXIT_PANIC = 70


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    do: str
    id: int | None = None
    pod: Pod | str = ""
    namespace: str = "default"
    container: str = ""
    resource: str = ""
    phase: str = "Succeeded"
    kill: bool = False


@click.command(help="A stand-in kubelet that serves ROOT/device-plugins and ROOT/pod-resources.")
@click.argument("root", type=click.Path(path_type=Path, file_okay=False))
@click.option("--grace", default=300.0, show_default=True, help="Seconds a resource outlives its plugin.")
@click.option("--dial-timeout", default=10.0, show_default=True, help="Seconds a plugin is dialled.")
@click.option("--topology-policy", type=click.Choice(POLICIES), default="best-effort", show_default=True)
@click.option("--unsynced", is_flag=True, help="After a restart the API server does not answer until `sync`.")
@click.option("--seed", default=0, show_default=True, help="Decides every order that is left to chance.")
def main(
    root: Path, grace: float, dial_timeout: float, topology_policy: str, unsynced: bool, seed: int
) -> None:
    kubelet = Kubelet(
        root,
        grace=grace,
        dial_timeout=dial_timeout,
        topology_policy=topology_policy,
        pod_resources_synced=not unsynced,
        seed=seed,
    )
    try:
        asyncio.run(_serve(kubelet))
    except Panic as exc:
        click.echo(exc, err=True)
        sys.exit(EXIT_PANIC)
    except (MigpluginError, OSError) as exc:
        click.echo(f"stand-in kubelet: {exc}", err=True)
        sys.exit(1)


async def _serve(kubelet: Kubelet) -> None:
    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    commands: set[asyncio.Task[None]] = set()

    def obey(line: bytes) -> None:
        task = asyncio.create_task(_obey(kubelet, line))
        commands.add(task)
        task.add_done_callback(commands.discard)

    async with kubelet:
        _say({"ready": {"socket": str(kubelet.socket), "pod_resources": str(kubelet.pod_resources_socket)}})
        reader = threading.Thread(target=_read, args=(loop, obey), name="stdin", daemon=True)
        reader.start()
        watch = asyncio.create_task(_watch(kubelet))
        stop = asyncio.create_task(asked_to_stop.wait())
        await asyncio.wait((watch, stop), return_when=asyncio.FIRST_COMPLETED)
        for task in (watch, stop, *commands):
            task.cancel()
        ends = await asyncio.gather(watch, stop, *commands, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _watch(kubelet: Kubelet) -> None:
    """Tells of every change of the node. Raises Panic."""
    seen: dict[str, dict[str, int]] = {}

    def differs(kubelet: Kubelet) -> bool:
        return kubelet.node() != seen

    while True:
        await kubelet.until(differs, timeout=None)
        seen = kubelet.node()
        _say({"node": seen})


def _read(loop: asyncio.AbstractEventLoop, obey: Callable[[bytes], None]) -> None:
    """Reads stdin without its buffer, whose lock a thread would still hold when the process ends."""
    rest = b""
    while chunk := os.read(0, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # The loop is closed when the process is about to end.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(obey, line)


async def _obey(kubelet: Kubelet, line: bytes) -> None:
    number = None
    try:
        command = msgspec.json.decode(line, type=_Command)
        number = command.id
        _say({"id": number, "answer": await _do(kubelet, command)})
    except (MigpluginError, msgspec.MsgspecError, ValueError, KeyError) as exc:
        _say({"id": number, "error": str(exc)})
    except Panic as exc:
        # Not the end of it: the watch raises it too, and ends the process.
        _say({"id": number, "error": str(exc)})


async def _do(kubelet: Kubelet, command: _Command) -> Any:
    match command.do:
        case "admit" if isinstance(command.pod, Pod):
            return await kubelet.admit(command.pod)
        case "status":
            return kubelet.status(_pod(kubelet, command))
        case "restart_container":
            return await kubelet.restart_container(_pod(kubelet, command), command.container)
        case "finish":
            return await kubelet.finish(_pod(kubelet, command), command.phase)
        case "delete":
            return await kubelet.delete(_pod(kubelet, command))
        case "node":
            return kubelet.node()
        case "devices":
            return kubelet.devices(command.resource)
        case "sync":
            return kubelet.sync()
        case "restart":
            return await kubelet.restart(command.kill)
        case _:
            raise ValueError(f"unknown command {command.do!r}, or one without a pod's description")


def _pod(kubelet: Kubelet, command: _Command) -> Pod:
    for pod in kubelet.pods():
        if (pod.namespace, pod.name) == (command.namespace, command.pod):
            return pod
    raise ValueError(f"no pod {command.namespace}/{command.pod}")


def _say(document: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        click.echo(msgspec.json.encode(document).decode())


if __name__ == "__main__":
    main()
