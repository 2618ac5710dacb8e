"""What the driver's files say that a container will need: no NVML here, only a driver root, /proc and /sys.

The driver root is where the host's driver is seen from here. What is found in it is told as the driver
root itself has it, `/usr/bin/nvidia-smi`, which is also where it goes in a container.
"""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from migplugin.core.cdi import BINARIES, FIRMWARE, SOCKETS, Facts
from migplugin.core.inventory import Inventory

# Those of 64 bits; what a distribution uses for 32 bits comes only where there is nothing else.
LIBRARY_DIRECTORIES = (
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib/aarch64-linux-gnu/nvidia/current",
)
OTHER_LIBRARY_DIRECTORIES = ("/usr/lib", "/lib")
BINARY_DIRECTORIES = ("/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/usr/local/sbin")
LARGEST_MAJOR = 4095  # 12 bits (makedev(3))
MAX_BYTES = 1 << 16

_CAPS_MAJOR = re.compile(r"^ *(\d+) nvidia-caps$", re.MULTILINE)
_DRM = re.compile(r"card\d+|renderD\d+")


class DriverFiles:
    """Reads below one driver root, one /proc and one /sys. What belongs to a driver version is found once."""

    def __init__(self, driver_root: Path, proc_root: Path, sysfs_root: Path) -> None:
        self._driver_root = driver_root
        self._proc_root = proc_root
        self._sysfs_root = sysfs_root
        self._found: tuple[str, Facts] | None = None

    def facts(self, inventory: Inventory) -> Facts:
        """What is there now. Raises nothing: what cannot be read is not there."""
        version = inventory.driver_version
        if self._found is None or self._found[0] != version or not self._found[1].libraries:
            self._found = version, self._files(version)
        files = self._found[1]
        return Facts(
            caps_major=caps_major(self._proc_root),
            drm={gpu.pci_address: nodes for gpu in inventory.gpus if (nodes := self._drm(gpu.pci_address))},
            libraries=files.libraries,
            binaries=files.binaries,
            sockets=tuple(path for path in SOCKETS if _is_there(self._at(path))),
            firmware=files.firmware,
        )

    def has(self, path: str) -> bool:
        """Whether the driver root has the program `path`."""
        return _is_program(self._at(path))

    def _files(self, version: str) -> Facts:
        return Facts(
            libraries=self._libraries(LIBRARY_DIRECTORIES, version)
            or self._libraries(OTHER_LIBRARY_DIRECTORIES, version),
            binaries=tuple(path for name in BINARIES if (path := self._binary(name))),
            firmware=tuple(self._firmware(version)),
        )

    def _libraries(self, directories: Iterable[str], version: str) -> tuple[str, ...]:
        seen: set[tuple[int, int]] = set()
        found: list[str] = []
        for directory in (each for base in directories for each in (base, base + "/vdpau")):
            try:
                stat = self._at(directory).stat()
                # Where /lib is a link to /usr/lib, each library is there twice.
                if (stat.st_dev, stat.st_ino) not in seen:
                    seen.add((stat.st_dev, stat.st_ino))
                    names = _names(self._at(directory))
                    found += [f"{directory}/{name}" for name in names if name.endswith(f".so.{version}")]
            except OSError:
                continue
        return tuple(sorted(found))

    def _binary(self, name: str) -> str:
        paths = (f"{directory}/{name}" for directory in BINARY_DIRECTORIES)
        return next((path for path in paths if self.has(path)), "")

    def _firmware(self, version: str) -> Iterator[str]:
        directory, _, pattern = ("/" + FIRMWARE.format(version=version)).rpartition("/")
        for name in _names(self._at(directory)):
            if fnmatch(name, pattern):
                yield f"{directory}/{name}"

    def _drm(self, pci_address: str) -> tuple[str, ...]:
        names = _names(self._sysfs_root / "bus/pci/devices" / pci_address / "drm")
        return tuple(f"/dev/dri/{name}" for name in names if _DRM.fullmatch(name))

    def _at(self, path: str) -> Path:
        return self._driver_root / path.lstrip("/")


def caps_major(proc_root: Path) -> int | None:
    """The major number of capability nodes: dynamic, and None where <proc>/devices does not say one."""
    try:
        with (proc_root / "devices").open("rb") as file:
            text = file.read(MAX_BYTES).decode(errors="replace")
    except OSError:
        return None
    match = _CAPS_MAJOR.search(text.partition("Block devices:")[0])
    major = int(match[1]) if match and len(match[1]) < 6 else 0
    return major if 0 < major <= LARGEST_MAJOR else None


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises where a directory may not be entered


def _is_program(path: Path) -> bool:
    return os.access(path, os.X_OK) and path.is_file()


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError:
        return []
