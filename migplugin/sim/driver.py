"""The simulated driver as one thing to open: its library, its files, and the state behind both.

    with Simulation.open("2xa100-40gb=1g.5gb*7") as simulation:
        pynvml.nvmlLib = simulation.library     # only nvml/binding does this in the program

A SPEC makes a fresh driver in a temporary directory that goes away with it. A directory is a driver
that others share: it stays, and its files are derived again from its state, in case its last writer
was killed between the two.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from migplugin.errors import InputError
from migplugin.sim import abi, files, spec
from migplugin.sim.privilege import ADMIN, privileges
from migplugin.sim.store import Store


class Simulation:
    """An open simulated driver. Closing it forgets the library; a temporary state directory is removed."""

    def __init__(self, store: Store, *, temporary: bool) -> None:
        self.store = store
        self.state_dir: Path = store.state_dir
        self._library = abi.Library(store)
        self.library: object = self._library
        self._temporary = temporary

    @classmethod
    def open(cls, where: str, *, seed: str = "") -> Self:
        """The driver that `where` names: a state directory, or a SPEC. InputError if it is neither."""
        if Path(where).is_dir():
            store = Store(Path(where).absolute())
            store.refresh_files()
            return cls(store, temporary=False)
        if "/" in where:
            raise InputError(f"{where!r} is not a directory, and a node spec has no slash in it")
        node = spec.build(where, seed=seed)
        store = Store(tempfile.mkdtemp(prefix="migplugin-sim-"))
        try:
            store.create(node)
        except BaseException:
            shutil.rmtree(store.state_dir, ignore_errors=True)
            raise
        return cls(store, temporary=True)

    @property
    def view(self) -> Path:
        """The tree that the node shows now: the host's, or what a container sees."""
        return self.state_dir / self.store.read().switches.runtime_view

    @property
    def proc_root(self) -> Path:
        return self.view / "proc"

    @property
    def sysfs_root(self) -> Path:
        return self.view / "sys"

    @property
    def dev_root(self) -> Path:
        """The directory that contains `dev/`, as NVIDIA's `--dev-root` has it."""
        return self.view

    @property
    def shows_host(self) -> bool:
        """Whether `dev_root` is the host's, and not what a container has for itself."""
        return self.view.name == files.HOST

    def make_nodes(self) -> None:
        """Make the missing capability nodes, as an admin may; OSError for anybody else."""
        with self.store.change() as node:
            if ADMIN not in privileges(node.switches, self.view):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            node.make_nodes()

    def close(self) -> None:
        self._library.close()
        if self._temporary:
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
