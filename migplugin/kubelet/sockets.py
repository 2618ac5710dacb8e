"""The device-plugin directory: one agent's lock, our sockets in it, and what is wrong with any of it.

gRPC says "failed to connect" of a socket that is missing, stale, forbidden or too long alike, so
everything that a person could act on is found out here with plain system calls.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
from pathlib import Path

from migplugin.errors import KubeletError

log = logging.getLogger(__name__)

LOCK_NAME = "migplugin.lock"
LOCK_RETRY = 0.5
SOCKET_PATH_LIMIT = 107  # bytes, without the final zero (unix(7))
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
            raise KubeletError(f"{self._path}: {_reason(exc)}; {_advice(exc, self._path.parent)}") from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(file)
            if exc.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise KubeletError(f"{self._path}: {_reason(exc)}; locks must work in this directory") from exc
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
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise KubeletError(
            f"{directory}/migplugin-{suffix}-<random>.sock: {len(os.fsencode(path))} bytes are too long "
            f"for a socket, at most {SOCKET_PATH_LIMIT}; mount the kubelet's directory at a shorter path"
        )
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
        return f"{directory}: {_reason(exc)}; {_advice(exc, directory)}"
    return f"{directory}: not writable for us; run as root, or mount it writable"


def is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False


def is_served(path: Path) -> bool:
    """Whether somebody accepts connections at `path`. Does not block: a full backlog counts as served."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def other_plugin(directory: Path, resource: str) -> Path | None:
    """The live socket of NVIDIA's plugin for this very resource (nvidia-device-plugin.md 7.2), or None."""
    path = directory / f"nvidia-{resource.partition('/')[2]}.sock"
    return path if is_socket(path) and is_served(path) else None


def explain(path: Path) -> str:
    """In one line, why nobody can be reached at the socket `path`; "" where somebody can."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        return f"{path}: {length} bytes are too long for a socket, at most {SOCKET_PATH_LIMIT}"
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            what = "no such socket" if path.parent.is_dir() else "no such directory"
            return f"{path}: {what}; the kubelet is not running, or its directory is not mounted here"
        return f"{path}: {_reason(exc)}; {_advice(exc, path.parent)}"
    if not stat.S_ISSOCK(mode):
        return f"{path}: not a socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return f"{path}: its server does not take connections"
        except OSError as exc:
            if exc.errno == errno.ECONNREFUSED:
                return f"{path}: connection refused; a socket left by a kubelet that is gone"
            return f"{path}: {_reason(exc)}; {_advice(exc, path.parent)}"
    return ""


def _reason(exc: OSError) -> str:
    return (exc.strerror or str(exc)).lower()


def _advice(exc: OSError, directory: Path) -> str:
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return f"run as root, or with write access to {directory}"
    if exc.errno in {errno.ENOENT, errno.ENOTDIR}:
        return f"{directory} must be the kubelet's device-plugin directory"
    if exc.errno == errno.EROFS:
        return f"mount {directory} writable"
    if exc.errno == errno.ELOOP:
        return "remove the symbolic link"
    return f"check {directory}"
