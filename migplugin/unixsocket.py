"""Unix sockets by plain system calls: whether somebody serves one, and why nobody can be reached at it.

gRPC says "failed to connect" of a socket that is missing, stale, forbidden or too long alike, and it
binds a path without a word to whoever is there. What a person could act on is found out here.
"""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

LIMIT = 107  # bytes, without the final zero (unix(7))


def too_long(path: Path) -> str:
    """Why `path` does not fit into a socket address, or ""."""
    length = len(os.fsencode(path))
    return f"{path}: {length} bytes are too long for a socket, at most {LIMIT}" if length > LIMIT else ""


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


def explain(path: Path, server: str) -> str:
    """In one line, why `server`, such as "the kubelet", cannot be reached at `path`; "" where it can."""
    if reason := too_long(path):
        return reason
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            what = "no such socket" if path.parent.is_dir() else "no such directory"
            return f"{path}: {what}; {server} is not running, or its directory is not mounted here"
        return f"{path}: {why(exc)}; {advice(exc, path.parent)}"
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
                return f"{path}: connection refused; {server} that made this socket is gone"
            return f"{path}: {why(exc)}; {advice(exc, path.parent)}"
    return ""


def identity(path: Path) -> tuple[int, int] | None:
    """What tells this socket from a later one at the same path; None where there is nothing."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Sockets that are bound meanwhile get modes without `mask`: gRPC would make them 0755."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def why(exc: OSError) -> str:
    return (exc.strerror or str(exc)).lower()


def advice(exc: OSError, directory: Path) -> str:
    """What to do about a socket or file in `directory` that could not be had."""
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return f"run as root, or with write access to {directory}"
    if exc.errno == errno.EROFS:
        return f"mount {directory} writable"
    if exc.errno == errno.ELOOP:
        return "remove the symbolic link"
    return f"check {directory}"
