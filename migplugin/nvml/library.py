"""libnvidia-ml.so.1 as a file: found where the driver is mounted, loaded by its full path, and watched.

A process keeps the library that it has loaded, whatever a driver update puts in its place, and pynvml
offers no way to be rid of it. So when another file lies there, a process of its own tries whether that one
gets on with the kernel's driver; if it does, only a new start of ours can help (LibraryOutdated). If it
does not, the update is under way, or waits for a reboot, and the old library may serve until then.
"""

import ctypes
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from migplugin.errors import LibraryMissing
from migplugin.nvml import machine

log = logging.getLogger(__name__)

SONAME = "libnvidia-ml.so.1"
# Where NVIDIA's own plugin looks below the driver root (nvidia-device-plugin.md 1.1).
LIBRARY_DIRECTORIES = (
    "usr/lib64",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib64",
    "lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
)
TRY_EVERY, TRY_WITHIN = 10.0, 5.0

_TRIAL = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).nvmlInitWithFlags(0) != 0)"

File = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Library:
    """What pynvml is to speak to, and the file it is of: None where it is no file (the simulator)."""

    functions: object
    path: Path | None = None
    file: File | None = None


def find(search: Path | None) -> Library:
    """The driver's own library, below `search` or by its soname.

    Raises LibraryMissing, naming what can be done about it.
    """
    unloadable = ""
    for directory in LIBRARY_DIRECTORIES if search is not None else ():
        path = (search or Path("/")) / directory / SONAME
        try:
            path.lstat()
            file = _file(path)
            functions = ctypes.CDLL(str(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as exc:
            # Also of a link that leads out of the mounted root, and of a directory that we may not enter.
            unloadable = unloadable or f"{path} cannot be loaded ({exc}); "
            continue
        log.info("NVML library", extra={"path": str(path)})
        return Library(functions, path, file)
    try:
        functions = ctypes.CDLL(SONAME)
    except OSError as exc:
        where = (
            "not known to the dynamic linker"
            if search is None
            else f"not below {search}, nor known to the linker"
        )
        at = "" if search is None else f" at {search}"
        advice = machine.unsupported() or (
            "run this container with the NVIDIA runtime (runtimeClassName: nvidia), or mount the host's "
            f"driver root{at}"
        )
        raise LibraryMissing(f"{unloadable}{SONAME} is {where}: {advice}") from exc
    if unloadable:
        log.warning(
            "the driver root's NVML library was passed over", extra={"reason": unloadable.strip("; ")}
        )
    linked = _linked()
    return Library(functions, linked, None if linked is None else _file(linked))


class Successor:
    """Whether a library that works lies where `library` was loaded from. It is tried now and then, in a
    thread, since it may hang; `on_working` is called there.
    """

    def __init__(self, library: Library, on_working: Callable[[], None]) -> None:
        self._library = library
        self._on_working = on_working
        self._tried_at = float("-inf")
        self._told: File | None = None
        self._trial: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._works = self._closed = False

    def works(self) -> bool:
        """Whether one was found. A file that is gone, as in every update for a while, is no successor."""
        path = self._library.path
        if path is not None and self._library.file is not None and not self._works:
            file, now = _file(path), time.monotonic()
            # One that cannot even be killed is waited for: there is never a second beside it.
            busy = self._trial is not None and self._trial.is_alive()
            if file not in {None, self._library.file} and now >= self._tried_at + TRY_EVERY and not busy:
                self._tried_at = now
                self._trial = threading.Thread(
                    target=self._try, args=(path, file), name="nvml-trial", daemon=True
                )
                self._trial.start()
        return self._works

    def close(self) -> None:
        """A trial that is under way is over."""
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _try(self, path: Path, file: File) -> None:
        command = (sys.executable, "-ISc", _TRIAL, str(path))
        quiet = subprocess.DEVNULL
        try:
            with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as self._process:
                try:
                    code = self._process.wait(0.0 if self._closed else TRY_WITHIN)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    code = -1
        except OSError:
            code = -1
        if code == 0:
            self._works = True
            self._on_working()
        elif file != self._told and not self._closed:
            self._told = file
            log.info(
                "another NVML library lies there now and does not fit the driver, the loaded one stays",
                extra={"path": str(path)},
            )


def _linked() -> Path | None:
    """Where the dynamic linker found it: the name that a driver update changes, beside the file itself."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        name = Path(line.partition("/")[2])
        if name.name.startswith("libnvidia-ml.so"):
            return Path("/") / name.with_name(SONAME)
    return None


def _file(path: Path) -> File | None:
    """What tells one file from another, None where there is none. The inode of a loaded one stays taken."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
