"""The device-plugin directory: one agent's lock, our sockets in it, and what is wrong with any of it."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
from pathlib import Path

from migplugin.errors import KubeletError
from migplugin.unixsocket import advice, is_served, is_socket, too_long, why

log = logging.getLogger(__name__)

LOCK_NAME = "migplugin.lock"
LOCK_RETRY = 0.5
_OURS = re.compile(r"migplugin-[A-Za-z0-9._-]+-[0-9a-f]{6}\.sock")


class NodeLock:
    """Held by the one agent of a node, for as long as it lives: flock, which ends with the process.

    It lies in the device-plugin directory because that is the one host directory that is always mounted.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._file: int | None = None

    def try_acquire(self) -> bool:
        """Whether the lock is ours now. Raises KubeletError where the directory does not let us."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise KubeletError(f"{self._path}: {why(exc)}; {_advice(exc, self._path.parent)}") from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(file)
            if exc.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise KubeletError(f"{self._path}: {why(exc)}; locks must work in this directory") from exc
        self._file = file
        return True

    async def acquire(self) -> None:
        """Waits until the directory is there and no other agent holds the lock; says once why it waits."""
        said = ""
        while True:
            try:
                if self.try_acquire():
                    if said:
                        log.info("node lock taken over", extra={"lock": str(self._path)})
                    return
                reason = "another agent holds the node lock"
            except KubeletError as exc:
                reason = str(exc)
            if reason != said:
                log.warning("waiting for the node lock", extra={"lock": str(self._path), "reason": reason})
                said = reason
            await asyncio.sleep(LOCK_RETRY)

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def new_socket_path(directory: Path, resource: str) -> Path:
    """A path that no server has used: gRPC unlinks the path it served, whoever has bound it since.

    Raises KubeletError where it would not fit into a socket address.
    """
    suffix = resource.partition("/")[2] or resource
    path = directory / f"migplugin-{suffix}-{os.urandom(3).hex()}.sock"
    # A name that says so, for a reason that differs each time would be logged each time.
    if reason := too_long(path.with_name(f"migplugin-{suffix}-random.sock")):
        raise KubeletError(f"{reason}; mount the kubelet's directory at a shorter path")
    return path


def remove_stale(directory: Path) -> int:
    """Removes our sockets that nobody serves any more, and tells how many; with the node lock held."""
    removed = 0
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if _OURS.fullmatch(path.name) and is_socket(path) and not is_served(path):
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed += 1
    return removed


def unusable(directory: Path) -> str:
    """Why no socket can be made in `directory`, or "" where one probably can."""
    if os.access(directory, os.W_OK | os.X_OK):
        return ""
    try:
        directory.stat()
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            return f"{directory}: no such directory; the kubelet makes it, or it is not mounted here"
        return f"{directory}: {why(exc)}; {_advice(exc, directory)}"
    return f"{directory}: not writable for us; run as root, or mount it writable"


def other_plugin(directory: Path, resource: str) -> Path | None:
    """The live socket of NVIDIA's plugin for this very resource (nvidia-device-plugin.md 7.2), or None."""
    path = directory / f"nvidia-{resource.partition('/')[2]}.sock"
    return path if is_socket(path) and is_served(path) else None


def _advice(exc: OSError, directory: Path) -> str:
    if exc.errno in {errno.ENOENT, errno.ENOTDIR}:
        return f"{directory} must be the kubelet's device-plugin directory"
    return advice(exc, directory)
