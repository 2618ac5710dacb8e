"""Capability device nodes on the host, for containers that get their nodes from the kubelet.

The node of a fresh instance does not exist on the host until somebody makes it: nvidia-smi or
nvidia-modprobe when a person runs them, or we. Where the host's /dev is mounted here it is one mknod, else
nvidia-modprobe of the driver root may do it. Where neither works, the device cannot be handed out, and
we go on looking whether the node has come.
"""

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from migplugin.core.cdi import DEFAULT_CAPABILITY_MODE, capability_path
from migplugin.core.inventory import DeviceId, Gpu, Inventory, MigDevice
from migplugin.nvml.driverfiles import caps_major

log = logging.getLogger(__name__)

MODPROBE = "/usr/bin/nvidia-modprobe"
MODPROBE_WITHIN = 5.0
KILLED_WITHIN = 0.5
MODPROBE_AGAIN = 60.0
COMMAND_SHOWS = 20


@dataclass(frozen=True, slots=True)
class Node:
    """A node that a device needs; `access` is the driver's file that describes it, as the host has it."""

    path: str
    minor: int
    mode: int
    access: str


class CapabilityNodes:
    """Looks for nodes below `dev_root`, our view of the host directory with `dev/`, and makes them there.

    `is_host` is false where that is only this container's own /dev, in which a node is of no use to
    anybody. `driver_root` is where nvidia-modprobe is looked for. `make` takes the place of mknod for a
    simulated driver: it makes all, and they have no numbers to compare.
    """

    def __init__(
        self,
        *,
        dev_root: Path,
        is_host: bool,
        proc_root: Path,
        driver_root: Path,
        make: Callable[[], None] | None = None,
    ) -> None:
        self._dev_root = dev_root
        self._is_host = is_host
        self._proc_root = proc_root
        self._driver_root = driver_root
        self._make = make
        self._tried: dict[str, tuple[float, str]] = {}
        self._hung = float("-inf")
        self._told: frozenset[str] = frozenset()

    async def ensure(self, inventory: Inventory) -> Mapping[DeviceId, str]:
        """Why a device lacks a node on the host, for each that does after this. Raises nothing."""
        major = caps_major(self._proc_root)
        needed = [(device.uuid, node) for gpu, device in inventory.devices() for node in _nodes(gpu, device)]
        missing = [node for node in dict.fromkeys(n for _, n in needed) if not self._is_there(node, major)]
        refused: dict[Node, str] = {}
        for node in missing:
            if not self._is_there(node, major) and (why := await self._put(node, major)):
                refused[node] = why
        if len(missing) > len(refused):
            log.info("capability nodes made", extra={"nodes": len(missing) - len(refused)})
        self._tell(refused)
        self._tried = {
            path: tried for path, tried in self._tried.items() if path in {n.path for n in refused}
        }
        unready: dict[DeviceId, str] = {}
        for id_, node in needed:
            if node in refused:
                reason = f"{node.path} is missing on the host, {refused[node]}; run there: {_command(node)}"
                unready.setdefault(id_, reason)
        return unready

    def _is_there(self, node: Node, major: int | None) -> bool:
        try:
            found = self._at(node).stat()
        except OSError:
            return False
        # The major number is dynamic: a node that another life of the driver left leads nowhere.
        exact = self._make is None and major is not None and stat.S_ISCHR(found.st_mode)
        return not exact or found.st_rdev == os.makedev(major or 0, node.minor)

    async def _put(self, node: Node, major: int | None) -> str:
        """Makes a node. Why it could not, or ""."""
        if not self._is_host:
            return await self._modprobe(node, major, "and the host's /dev is not mounted here")
        try:
            if self._make is not None:
                self._make()
            elif major is None:
                return f"and {self._proc_root}/devices has no line nvidia-caps"
            else:
                _mknod(self._at(node), major, node)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            return await self._modprobe(node, major, f"and cannot be made: {reason}")
        return "" if self._is_there(node, major) else "although it was made"

    async def _modprobe(self, node: Node, major: int | None, otherwise: str) -> str:
        """Has the driver's own program make a node, now and then; "" or why it is still not there."""
        hung = f"and {MODPROBE} does not end within {MODPROBE_WITHIN:g} s"
        program = self._driver_root / MODPROBE.lstrip("/")
        if not (os.access(program, os.X_OK) and program.is_file()):
            return otherwise
        last, why = self._tried.get(node.path, (float("-inf"), ""))
        if time.monotonic() < last + MODPROBE_AGAIN:
            return why
        if time.monotonic() < self._hung + MODPROBE_AGAIN:
            return hung
        # It makes nodes in the /dev that it sees, so it must see the host's.
        inside = ("chroot", str(self._driver_root)) if self._driver_root != Path("/") else ()
        try:
            why = await _run(*inside, MODPROBE, "-f", node.access)
        except TimeoutError:
            # For the next node it would hang as well, and all the while nothing else would be seen.
            self._hung = time.monotonic()
            return hung
        if not why and not self._is_there(node, major):
            why = "and nvidia-modprobe did not make it"
        self._tried[node.path] = time.monotonic(), why
        return why

    def _at(self, node: Node) -> Path:
        return self._dev_root / node.path.lstrip("/")

    def _tell(self, refused: Mapping[Node, str]) -> None:
        """One line for each reason that is new, with what a person can do about it."""
        for why in dict.fromkeys(refused.values()):
            if why not in self._told:
                nodes = [node for node in refused if refused[node] == why]
                log.warning(
                    "capability nodes are missing, their devices stay unhealthy until they are there",
                    extra={"nodes": len(nodes), "reason": why, "command": _command(*nodes)},
                )
        self._told = frozenset(refused.values())


def is_host_dev(dev_root: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a node made below `dev_root` is one that the host has.

    A container's own /dev is a tmpfs; the host's is a devtmpfs, wherever it is mounted. What lies
    elsewhere than at / was mounted there by somebody who meant the host's.
    """
    if dev_root != Path("/"):
        return True
    with contextlib.suppress(OSError):
        for line in mountinfo.read_text(errors="replace").splitlines():
            fields, _, source = line.partition(" - ")
            if fields.split()[4:5] == ["/dev"]:
                return source.split()[:1] == ["devtmpfs"]
    return False


def _nodes(gpu: Gpu, device: MigDevice) -> Iterator[Node]:
    gi = f"/proc/driver/nvidia/capabilities/gpu{gpu.minor}/mig/gi{device.gi}"
    found = ((gi, device.gi_minor, device.gi_mode), (f"{gi}/ci{device.ci}", device.ci_minor, device.ci_mode))
    for directory, minor, mode in found:
        if minor is not None:
            access = f"{directory}/access"
            yield Node(
                capability_path(minor), minor, DEFAULT_CAPABILITY_MODE if mode is None else mode, access
            )


def _mknod(path: Path, major: int, node: Node) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir()
        path.parent.chmod(0o755)  # whatever the umask is
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    os.mknod(scratch, stat.S_IFCHR | 0o600, os.makedev(major, node.minor))
    scratch.chmod(node.mode)
    scratch.replace(path)


def _command(*nodes: Node) -> str:
    files = [node.access for node in nodes]
    if len(files) > COMMAND_SHOWS:
        return "nvidia-smi -L"  # run by root it makes them all
    return " && ".join(f"nvidia-modprobe -f {file}" for file in files)


async def _run(*command: str) -> str:
    """Why a command failed, or "". Raises TimeoutError where it does not end."""
    program = command[-3]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except OSError as exc:
        return f"and {program} cannot be run: {(exc.strerror or str(exc)).lower()}"
    try:
        async with asyncio.timeout(MODPROBE_WITHIN):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            # Inside a hung driver it cannot be killed.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), KILLED_WITHIN)
    if process.returncode:
        words = said.decode(errors="replace").strip().splitlines()
        return f"and {program} ended with {process.returncode}: {words[-1] if words else 'without a word'}"
    return ""
