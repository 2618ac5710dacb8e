"""The files of the simulated node: what the driver and the NVIDIA runtime leave under /proc, /dev and /sys.

Two trees are kept side by side, each with `proc`, `sys` and `dev`: `host` as the node itself has them,
and `container` as the NVIDIA runtime shows them to a container that asked for all GPUs, where a tmpfs
over /proc/driver/nvidia hides every instance and no capability node is passed in.

Everything is derived from the state: `plan` says what must be there, `apply` turns one plan into the
next. The `access` files follow the instances at once, as in the driver; the capability device nodes
are there only once something has made them. Device nodes are character devices 1:3 (harmless: they
read as /dev/null) where this process may make such, else empty files. An existing file's mode is left
alone, because chmod of mig/config is how a node's owner delegates it.
"""

import contextlib
import functools
import os
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from migplugin.sim.model import Gpu, Node
from migplugin.sim.privilege import CONFIG_MINOR, MONITOR_MINOR

HOST, CONTAINER = "host", "container"
VIEWS = (HOST, CONTAINER)

CAPS_MAJOR = 234  # dynamic on a real node: whoever needs it reads /proc/devices
GIS_PER_GPU, CIS_PER_GI = 15, 8
GPUS = 32


class Kind(Enum):
    DIRECTORY = "directory"
    FILE = "file"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Entry:
    kind: Kind
    content: str = ""
    mode: int = 0o444


Plan = dict[str, Entry]

_DIRECTORY = Entry(Kind.DIRECTORY)
_OPEN_DEVICE = Entry(Kind.DEVICE, mode=0o666)


def capability_minor(gpu_minor: int, gi: int, ci: int | None = None) -> int:
    """The minor of an instance's capability node: a function of the ids, there or not."""
    return (
        3 + GIS_PER_GPU * (1 + CIS_PER_GI) * gpu_minor + (1 + CIS_PER_GI) * gi + (0 if ci is None else 1 + ci)
    )


def plan(node: Node) -> Plan:
    """Every file of both views, by its path under the state directory."""
    wanted: Plan = {f"{view}/{tree}": _DIRECTORY for view in VIEWS for tree in ("proc", "sys", "dev")}
    for view in VIEWS:
        wanted[f"{view}/proc/devices"] = Entry(Kind.FILE, _devices(loaded=node.switches.driver_loaded))
        for gpu in node.gpus:
            _plan_sysfs(wanted, view, gpu)
        if node.switches.driver_loaded:
            wanted[f"{view}/sys/module/nvidia"] = _DIRECTORY
            _plan_driver(wanted, view, node)
            _plan_capabilities(wanted, view, node)
    return wanted


def apply(wanted: Plan, present: Plan, state_dir: Path) -> None:
    """Turn the files of `present` into those of `wanted`."""
    for path in sorted(present.keys() - wanted.keys(), reverse=True):
        _remove(state_dir, path, wanted)
    for path, entry in wanted.items():
        if present.get(path) != entry:
            _make(state_dir / path, entry, state_dir / "file.new")


def present(state_dir: Path, wanted: Plan) -> Plan:
    """What lies there now. A device node counts as what was wanted in its place, whatever it is."""
    found: Plan = {}
    for view in VIEWS:
        for directory, names, files in os.walk(state_dir / view):
            here = Path(directory).relative_to(state_dir).as_posix()
            if not names and not files:
                found[here] = _DIRECTORY
            elif here in wanted:
                found[here] = wanted[here]
            for name in files:
                path = f"{here}/{name}"
                entry = wanted.get(path)
                if entry is not None and entry.kind is Kind.DEVICE:
                    found[path] = entry
                else:
                    content = (state_dir / path).read_text(encoding="utf-8", errors="replace")
                    found[path] = Entry(Kind.FILE, content, entry.mode if entry else 0)
    return found


def _plan_sysfs(wanted: Plan, view: str, gpu: Gpu) -> None:
    base = f"{view}/sys/bus/pci/devices/{gpu.pci_address}"
    device = int(gpu.product.pci_device_ids[0], 16) >> 16
    wanted[f"{base}/numa_node"] = Entry(Kind.FILE, f"{gpu.numa}\n", 0o644)
    wanted[f"{base}/vendor"] = Entry(Kind.FILE, "0x10de\n")
    wanted[f"{base}/device"] = Entry(Kind.FILE, f"{device:#06x}\n")
    wanted[f"{base}/class"] = Entry(Kind.FILE, "0x030200\n")


def _plan_driver(wanted: Plan, view: str, node: Node) -> None:
    proc = f"{view}/proc/driver/nvidia"
    version = node.switches.driver_version
    wanted[f"{proc}/version"] = Entry(
        Kind.FILE,
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (simulated)\n",
    )
    wanted[f"{proc}/params"] = Entry(Kind.FILE, f"ModifyDeviceFiles: {int(view == HOST)}\n")
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"):
        wanted[f"{view}/dev/{name}"] = _OPEN_DEVICE
    for gpu in node.gpus:
        wanted[f"{view}/dev/nvidia{gpu.minor}"] = _OPEN_DEVICE
        wanted[f"{proc}/gpus/{gpu.pci_address}/information"] = Entry(
            Kind.FILE,
            f"Model: \t\t {gpu.product.nvml_name}\nGPU UUID: \t {gpu.uuid}\n"
            f"Bus Location: \t {gpu.pci_address}\nDevice Minor: \t {gpu.minor}\n",
        )


def _plan_capabilities(wanted: Plan, view: str, node: Node) -> None:
    # /proc/driver/nvidia-caps lies beside the runtime's tmpfs, so containers see it too.
    wanted[f"{view}/proc/driver/nvidia-caps/mig-minors"] = Entry(Kind.FILE, _mig_minors())
    wanted[f"{view}/proc/driver/nvidia-caps/nvlink-minors"] = Entry(Kind.FILE, "fabric-mgmt 0\n")
    wanted[f"{view}/proc/driver/nvidia-caps/sys-minors"] = Entry(
        Kind.FILE, f"fabric-imex-mgmt {_LAST_MINOR}\n"
    )
    passed = {"none": (), "monitor": ("monitor",), "config": ("monitor", "config")}
    for name in ("config", "monitor") if view == HOST else passed[node.switches.container_capabilities]:
        minor, mode = (CONFIG_MINOR, 0o400) if name == "config" else (MONITOR_MINOR, 0o444)
        wanted[f"{view}/proc/driver/nvidia/capabilities/mig/{name}"] = _access(minor, mode)
        wanted[f"{view}/dev/nvidia-caps/nvidia-cap{minor}"] = Entry(Kind.DEVICE, mode=mode)
    if view == CONTAINER:
        return
    capabilities = f"{view}/proc/driver/nvidia/capabilities"
    wanted[f"{capabilities}/fabric-imex-mgmt"] = _access(_LAST_MINOR, 0o400)
    for gpu in node.gpus:
        mig = f"{capabilities}/gpu{gpu.minor}/mig"
        wanted[mig] = _DIRECTORY
        for gi in gpu.instances:
            _plan_instance(wanted, f"{mig}/gi{gi.id}", capability_minor(gpu.minor, gi.id), made=gi.node_made)
            for ci in gi.compute:
                minor = capability_minor(gpu.minor, gi.id, ci.id)
                _plan_instance(wanted, f"{mig}/gi{gi.id}/ci{ci.id}", minor, made=ci.node_made)


def _plan_instance(wanted: Plan, directory: str, minor: int, *, made: bool) -> None:
    wanted[f"{directory}/access"] = _access(minor, 0o444)
    if made:
        wanted[f"{HOST}/dev/nvidia-caps/nvidia-cap{minor}"] = Entry(Kind.DEVICE, mode=0o444)


def _access(minor: int, mode: int) -> Entry:
    # The mode is written in decimal: 292 is 0444, 256 is 0400.
    content = f"DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n"
    return Entry(Kind.FILE, content, mode)


_LAST_MINOR = capability_minor(GPUS, 0)


@functools.cache
def _mig_minors() -> str:
    """The driver's static table: every instance that could ever be. Its paths lack the files' `/mig/`."""
    lines = [f"config {CONFIG_MINOR}", f"monitor {MONITOR_MINOR}"]
    for gpu in range(GPUS):
        for gi in range(GIS_PER_GPU):
            lines.append(f"gpu{gpu}/gi{gi}/access {capability_minor(gpu, gi)}")
            lines += [
                f"gpu{gpu}/gi{gi}/ci{ci}/access {capability_minor(gpu, gi, ci)}" for ci in range(CIS_PER_GI)
            ]
    return "\n".join(lines) + "\n"


@functools.cache
def _devices(*, loaded: bool) -> str:
    majors = {1: "mem", 5: "/dev/tty", 10: "misc", 136: "pts"}
    if loaded:
        majors |= {195: "nvidia", CAPS_MAJOR: "nvidia-caps", CAPS_MAJOR + 1: "nvidia-uvm"}
    lines = [f"{major:3} {name}" for major, name in sorted(majors.items())]
    return "\n".join(["Character devices:", *lines, "", "Block devices:", "259 blkext"]) + "\n"


def _make(path: Path, entry: Entry, scratch: Path) -> None:
    if entry.kind is Kind.DIRECTORY:
        path.mkdir(parents=True, exist_ok=True)
        return
    mode = entry.mode
    scratch.unlink(missing_ok=True)  # a killed writer's may be a device, and swallow what is written
    if entry.kind is Kind.DEVICE:
        try:
            os.mknod(scratch, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            scratch.touch()
    else:
        scratch.write_text(entry.content, encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
    scratch.chmod(mode)
    try:
        scratch.replace(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(path)


def _remove(state_dir: Path, path: str, wanted: Plan) -> None:
    """Remove what lies at `path`, and every directory above that is then empty and not wanted."""
    gone = state_dir / path
    if gone.is_dir():
        with contextlib.suppress(OSError):
            gone.rmdir()
    else:
        gone.unlink(missing_ok=True)
    for parent in gone.parents:
        if parent == state_dir or parent.relative_to(state_dir).as_posix() in wanted:
            return
        try:
            parent.rmdir()
        except OSError:
            return
