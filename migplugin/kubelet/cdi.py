"""The CDI document on disk, for the container runtime, which watches its directory.

What is there is the old document or the new one and never half of one, whenever we are killed. Our own
last one, or that of NVIDIA's plugin under the same name, is replaced; nothing else is touched.
"""

import errno
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from migplugin.errors import CdiError

log = logging.getLogger(__name__)

MODE, DIRECTORY_MODE = 0o644, 0o755
MAX_BYTES = 16 << 20


class CdiFile:
    """One document in the directory `root`, which is made when the first one is written."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        # Runtimes read *.json and *.yaml. Always the same name: what a killed writer left is written over.
        self._scratch = root / f".{name}.new"

    def read(self) -> Mapping[str, Any] | None:
        """The document that is there, or None where none is, or nothing that is one."""
        found = self._bytes()
        try:
            document = json.loads(found) if found is not None else None
        except ValueError:
            return None
        return document if isinstance(document, dict) else None

    def put(self, document: Mapping[str, Any] | None) -> None:
        """The file is `document` after this, or is not there if that is None; one log line per change.

        Raises CdiError, saying what to do, where that cannot be.
        """
        try:
            if document is None:
                self._remove()
            else:
                self._write(document)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise CdiError(f"{self.path}: {reason}; {_advice(exc, self.path.parent)}") from exc

    def _write(self, document: Mapping[str, Any]) -> None:
        wanted = text(document).encode()
        if self._bytes() == wanted and stat.S_IMODE(self.path.lstat().st_mode) == MODE:
            return
        _make_directory(self.path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(self._scratch, flags, MODE), "wb") as file:  # noqa: PTH123  of a descriptor
            os.fchmod(file.fileno(), MODE)  # whatever the umask is
            file.write(wanted)
            file.flush()
            os.fsync(file.fileno())
        self._scratch.replace(self.path)
        _sync(self.path.parent)
        log.info("cdi document", extra={"path": str(self.path), "devices": len(document["devices"])})

    def _remove(self) -> None:
        try:
            self.path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        log.info(
            "cdi document removed: no device is left, and one without devices would be invalid",
            extra={"path": str(self.path)},
        )

    def _bytes(self) -> bytes | None:
        try:
            if not stat.S_ISREG(self.path.lstat().st_mode):
                return None
            with self.path.open("rb") as file:
                return file.read(MAX_BYTES)
        except OSError:
            return None


def text(document: Mapping[str, Any]) -> str:
    """The document as it is written and printed."""
    return json.dumps(document, indent=2) + "\n"


def _make_directory(directory: Path) -> None:
    for path in (*reversed(directory.parents), directory):
        if not path.is_dir():
            path.mkdir()
            path.chmod(DIRECTORY_MODE)  # whatever the umask is


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advice(exc: OSError, directory: Path) -> str:
    if exc.errno == errno.EROFS:
        return f"mount {directory} writable"
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return f"run as root, or with write access to {directory}"
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"make room in {directory}"
    if exc.errno in {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP}:
        return "something else is in its place, remove it"
    return f"check {directory}, or set --cdi-root"
