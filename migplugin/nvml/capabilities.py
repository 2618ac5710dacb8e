"""What the driver shows as files: which instances exist, and by which device nodes they are reached.

    <proc>/driver/nvidia/capabilities/gpu<minor>/mig/gi<G>/access           comes and goes with the GI
    <proc>/driver/nvidia/capabilities/gpu<minor>/mig/gi<G>/ci<C>/access     comes and goes with the CI
    <proc>/driver/nvidia-caps/mig-minors                                    a static table of all minors

The first two are the live check: they come from the kernel module and not from the NVML session. In a
container the NVIDIA runtime may cover them with a tmpfs that shows no instances, or only those that
existed when it started; so what is not there is only not seen. The table says nothing about existence.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 1 << 20
CONTROL_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")

_MINOR = re.compile(r"^DeviceFileMinor:\s*(\d+)\s*$", re.MULTILINE)
_MODE = re.compile(r"^DeviceFileMode:\s*(\d+)\s*$", re.MULTILINE)  # decimal: 292 is 0444
_TABLE_LINE = re.compile(r"^(gpu\d+/gi\d+(?:/ci\d+)?)/access\s+(\d+)\s*$", re.MULTILINE)
_GI, _CI = re.compile(r"gi(\d+)"), re.compile(r"ci(\d+)")


@dataclass(frozen=True, slots=True)
class Capability:
    """/dev/nvidia-caps/nvidia-cap<minor>, the node of an instance; its `mode` only where its file is seen."""

    minor: int | None = None
    mode: int | None = None


class Capabilities:
    """Reads below one `/proc`. The static table is read once, and again after `forget`."""

    def __init__(self, proc_root: Path) -> None:
        self._tree = proc_root / "driver/nvidia/capabilities"
        self._table_path = proc_root / "driver/nvidia-caps/mig-minors"
        self._table: dict[str, int] | None = None

    def forget(self) -> None:
        """Another driver may be loaded now."""
        self._table = None

    def seen(self, gpu_minor: int) -> frozenset[tuple[int, int]] | None:
        """The (gi, ci) pairs whose files are there, or None where the tree of this GPU cannot be seen."""
        found = set()
        try:
            instances = list((self._tree / f"gpu{gpu_minor}/mig").iterdir())
        except OSError:
            return None
        for gi in instances:
            if match := _GI.fullmatch(gi.name):
                try:
                    for ci in gi.iterdir():
                        if (inner := _CI.fullmatch(ci.name)) and (ci / "access").exists():
                            found.add((int(match[1]), int(inner[1])))
                except (FileNotFoundError, NotADirectoryError):
                    continue  # it went away while we looked, and takes none of the others with it
                except OSError:
                    return None
        return frozenset(found)

    def node(self, gpu_minor: int, gi: int, ci: int | None = None) -> Capability:
        """The node of a GPU instance, or of a compute instance in it; its parts None where no file tells."""
        compute = "" if ci is None else f"/ci{ci}"
        access = _read(self._tree / f"gpu{gpu_minor}/mig/gi{gi}{compute}/access")
        if match := _MINOR.search(access):
            mode = _MODE.search(access)
            return Capability(int(match[1]), int(mode[1]) & 0o777 if mode else None)
        if self._table is None:
            self._table = {name: int(number) for name, number in _TABLE_LINE.findall(_read(self._table_path))}
        return Capability(self._table.get(f"gpu{gpu_minor}/gi{gi}{compute}"))


def control_nodes(dev_root: Path) -> tuple[str, ...]:
    """The control nodes that exist below `dev_root`, the directory that contains `dev/`."""
    # Not Path.exists, which raises where a directory may not be entered.
    return tuple(node for node in CONTROL_NODES if os.path.exists(dev_root / node.lstrip("/")))  # noqa: PTH110


def numa_node(sysfs_root: Path, pci_address: str) -> int | None:
    """The NUMA node of a PCI device; None where sysfs has none, which it writes as -1."""
    text = _read(sysfs_root / "bus/pci/devices" / pci_address / "numa_node").strip()
    return int(text) if text.isdecimal() else None


def loaded_module(sysfs_root: Path) -> int | None:
    """What tells one loading of the kernel module from another: the inode of its directory in sysfs.

    The kernel counts these numbers up (kernfs) and shows the same ones in every container, while it tells
    nobody when a module was loaded, and its address to the privileged only.
    """
    try:
        return (sysfs_root / "module/nvidia").stat().st_ino
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""
