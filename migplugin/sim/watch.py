"""Waiting for another process to change the state: inotify through ctypes, and poll(2).

What is watched is the directory, where the rename of a new state into place is the only event of this
kind. ctypes because the standard library has no inotify, and a watchdog thread per waiter would be a
second thread for each.
"""

import contextlib
import ctypes
import errno
import math
import os
import select
from pathlib import Path

from migplugin.errors import SimulatorError

_IN_MOVED_TO = 0x80
_IN_DELETE_SELF = 0x400


class Watch:
    """Tells when the state in a directory was replaced: poll(2) on inotify, without the GIL or a timer."""

    def __init__(self, state_dir: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _os_error("inotify_init1")
        if libc.inotify_add_watch(self._fd, os.fsencode(state_dir), _IN_MOVED_TO | _IN_DELETE_SELF) < 0:
            error = _os_error("inotify_add_watch")
            os.close(self._fd)
            raise error
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self, timeout: float | None) -> bool:
        """Whether something happened within `timeout` seconds (None: for ever). True may be a false alarm."""
        millis = None if timeout is None else min(math.ceil(max(timeout, 0) * 1000), 2**31 - 1)
        if not self._poll.poll(millis):
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                pass
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _os_error(call: str) -> SimulatorError:
    code = ctypes.get_errno()
    hint = "; raise fs.inotify.max_user_instances" if code == errno.EMFILE else ""
    return SimulatorError(f"{call} failed: {os.strerror(code)}{hint}")
