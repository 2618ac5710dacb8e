"""One process's NVML session: its reference count, its handles, and what it believes where it is stale.

A handle is an opaque number that means something in this session only and is never given twice. Behind
each is not an object but an address (GPU, GI with its serial, CI with its serial), looked up again on
every call: a handle to a destroyed instance is INVALID_ARGUMENT even when its ids have come back.

The stale session (a reported behaviour of real drivers) freezes the list of MIG devices at nvmlInit.
What this session itself creates or destroys it does see.
"""

import os
import threading
from dataclasses import dataclass, field
from typing import Self

import msgspec

from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu, Node, Refusal
from migplugin.sim.records import CiRecord, GiRecord
from migplugin.sim.store import Store
from migplugin.sim.watch import Watch


@dataclass(frozen=True, slots=True)
class GpuHandle:
    uuid: str


@dataclass(frozen=True, slots=True)
class MigHandle:
    uuid: str
    gi: int
    ci: int
    serial: int

    @classmethod
    def of(cls, gpu: Gpu, gi: GiRecord, ci: CiRecord) -> Self:
        return cls(gpu.uuid, gi.id, ci.id, ci.serial)


@dataclass(frozen=True, slots=True)
class GiHandle:
    uuid: str
    gi: int
    serial: int

    @classmethod
    def of(cls, gpu: Gpu, gi: GiRecord) -> Self:
        return cls(gpu.uuid, gi.id, gi.serial)


@dataclass(frozen=True, slots=True)
class CiHandle:
    uuid: str
    gi: int
    ci: int
    serial: int

    @classmethod
    def of(cls, gpu: Gpu, gi: GiRecord, ci: CiRecord) -> Self:
        return cls(gpu.uuid, gi.id, ci.id, ci.serial)


@dataclass(slots=True, eq=False)
class EventSet:
    """What one set is registered for: per GPU, each event type and the journal's end at that moment."""

    watch: Watch
    since: dict[str, dict[int, int]] = field(default_factory=dict)
    seen: int = 0


Target = GpuHandle | MigHandle | GiHandle | CiHandle | EventSet


class Session:
    """The state that dies with the process. Guarded by one lock, which is never held while waiting."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.references = 0
        self._loads = 0
        self._lock = threading.Lock()
        # Looks like a pointer, is none, and differs between processes: whoever dereferences it or
        # passes it on finds out.
        self._next = 0x5A00_0000_0000 + (os.getpid() & 0xFFFF) * 0x1_0000
        self._targets: dict[int, Target] = {}
        self._handles: dict[Target, int] = {}
        self._believed: Node | None = None

    def open(self) -> None:
        node = self.store.read()
        if not node.switches.driver_loaded:
            raise Refusal(Code.DRIVER_NOT_LOADED, "the simulated driver is not loaded")
        with self._lock:
            self.references += 1
            if self.references == 1:
                self._believed = node
                self._loads = node.record.loads

    def check(self, node: Node) -> None:
        """Refuses where the driver that this session was opened with is no longer in the kernel."""
        if not node.switches.driver_loaded or node.record.loads != self._loads:
            raise Refusal(Code.UNKNOWN, "the driver was unloaded under this session")

    def close(self) -> None:
        """One reference less; at none, every handle dies. NVML was observed to refuse one close too many."""
        with self._lock:
            if not self.references:
                raise Refusal(Code.UNINITIALIZED, "nvmlShutdown without nvmlInit")
            self.references -= 1
            if self.references:
                return
            targets = list(self._targets.values())
            self._targets.clear()
            self._handles.clear()
            self._believed = None
        for target in targets:
            if isinstance(target, EventSet):
                target.watch.close()

    def handle(self, target: Target) -> int:
        """The handle of `target`: the same number for the same thing as long as the session lives."""
        with self._lock:
            if target not in self._handles:
                self._next += 0x10
                self._handles[target] = self._next
                self._targets[self._next] = target
            return self._handles[target]

    def target(self, handle: int | None) -> Target:
        target = self._targets.get(handle or 0)
        if target is None:
            raise Refusal(Code.INVALID_ARGUMENT, "not a handle of this session")
        return target

    def forget(self, handle: int) -> None:
        with self._lock:
            self._handles.pop(self._targets.pop(handle), None)

    def believed(self, node: Node) -> Node:
        """The node whose MIG devices this session lists: the present one, or the one it was opened on."""
        if node.switches.stale_sessions and self._believed is not None:
            return self._believed
        return node

    def saw_own_change(self, node: Node, uuid: str) -> None:
        """A stale session still knows what it did itself: look again at that one GPU."""
        with self._lock:
            if self._believed is None:
                return
            old = self._believed.record
            fresh = {gpu.uuid: gpu for gpu in node.record.gpus if gpu.uuid == uuid}
            gpus = [fresh.get(gpu.uuid, gpu) for gpu in old.gpus]
            self._believed = Node(msgspec.structs.replace(old, gpus=gpus))


def find_gi(gpu: Gpu, gi_id: int, serial: int) -> GiRecord:
    for gi in gpu.instances:
        if gi.id == gi_id and gi.serial == serial:
            return gi
    raise Refusal(Code.INVALID_ARGUMENT, f"GPU instance {gi_id} of GPU {gpu.index} is gone")


def find_ci(gpu: Gpu, gi_id: int, ci_id: int, serial: int) -> tuple[GiRecord, CiRecord]:
    for gi in gpu.instances:
        for ci in gi.compute:
            if (gi.id, ci.id, ci.serial) == (gi_id, ci_id, serial):
                return gi, ci
    raise Refusal(Code.INVALID_ARGUMENT, f"compute instance {gi_id}/{ci_id} of GPU {gpu.index} is gone")
