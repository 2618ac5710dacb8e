"""What every simulated NVML function gets: the node as it is now, and handles turned into things.

A function reads its arguments as C passed them (numbers and addresses), raises `Refusal` to answer with
a code, and returns nothing for SUCCESS. `Exports` collects them under their C names.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_char, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu, Node, Refusal
from migplugin.sim.privilege import privileges
from migplugin.sim.records import CiRecord, GiRecord
from migplugin.sim.session import (
    CiHandle,
    GiHandle,
    GpuHandle,
    MigHandle,
    Session,
    Target,
    find_ci,
    find_gi,
)
from migplugin.sim.structs import Placement

HANDLE = POINTER = c_void_p
INT, UINT, ULONGLONG = c_int, c_uint, c_ulonglong

Function = Callable[..., None]
S = TypeVar("S", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class Export:
    function: Function
    argtypes: tuple[type[Any], ...]


@dataclass(slots=True)
class Exports:
    """C names and what answers them."""

    by_name: dict[str, Export] = field(default_factory=dict)

    def add(self, names: str, *argtypes: type[Any]) -> Callable[[Function], Function]:
        """Export the decorated function under one or more C names, separated by spaces."""

        def keep(function: Function) -> Function:
            for name in names.split():
                self.by_name[name] = Export(function, argtypes)
            return function

        return keep


@dataclass(frozen=True, slots=True)
class Mig:
    """A MIG device as a handle names it. `gpu` is as the session believes it, see `Session.believed`."""

    gpu: Gpu
    gi: GiRecord
    ci: CiRecord


@dataclass(frozen=True, slots=True)
class Call:
    """One call in flight: its C name, the session it came through, and the node at that moment."""

    name: str
    session: Session
    node: Node

    def refuse(self, code: Code, message: str = "") -> NoReturn:
        raise Refusal(code, f"{self.name}: {message or code.name}")

    def reach(self, gpu: Gpu) -> Gpu:
        """`gpu`, if calls on it come back at all."""
        if gpu.record.lost:
            self.refuse(Code.GPU_IS_LOST, f"GPU {gpu.index} is lost")
        failure = self.node.switches.fail.get(self.name)
        if failure is not None and failure.gpu == gpu.index:
            raise Injected(failure.code)
        return gpu

    def gpu(self, handle: int | None, otherwise: Code = Code.INVALID_ARGUMENT) -> Gpu:
        """The GPU behind a GPU handle; `otherwise` is the answer for a MIG device's."""
        target = self.session.target(handle)
        if isinstance(target, MigHandle):
            self.refuse(otherwise, "a MIG device handle; ask its GPU")
        if not isinstance(target, GpuHandle):
            self.refuse(Code.INVALID_ARGUMENT, "not a device handle")
        return self.reach(self.known(target.uuid))

    def known(self, uuid: str) -> Gpu:
        """The GPU of a handle. It may be gone: `sim init --replace` swaps the whole node."""
        if uuid not in self.node.by_uuid:
            self.refuse(Code.INVALID_ARGUMENT, f"GPU {uuid} is gone")
        return self.node.by_uuid[uuid]

    def mig(self, handle: int | None, otherwise: Code = Code.INVALID_ARGUMENT) -> Mig:
        """The MIG device behind a MIG device handle; `otherwise` is the answer for a GPU's."""
        device = self.device(handle)
        if isinstance(device, Gpu):
            self.refuse(otherwise, "not a MIG device handle")
        return device

    def device(self, handle: int | None) -> Gpu | Mig:
        target = self.session.target(handle)
        if isinstance(target, GpuHandle):
            return self.gpu(handle)
        if not isinstance(target, MigHandle):
            self.refuse(Code.INVALID_ARGUMENT, "not a device handle")
        self.reach(self.known(target.uuid))
        gpu = self.session.believed(self.node).by_uuid[target.uuid]
        return Mig(gpu, *find_ci(gpu, target.gi, target.ci, target.serial))

    def gi(self, handle: int | None) -> tuple[Gpu, GiRecord]:
        target = self.session.target(handle)
        if not isinstance(target, GiHandle):
            self.refuse(Code.INVALID_ARGUMENT, "not a GPU instance handle")
        gpu = self.reach(self.known(target.uuid))
        return gpu, find_gi(gpu, target.gi, target.serial)

    def ci(self, handle: int | None) -> tuple[Gpu, GiRecord, CiRecord]:
        target = self.session.target(handle)
        if not isinstance(target, CiHandle):
            self.refuse(Code.INVALID_ARGUMENT, "not a compute instance handle")
        gpu = self.reach(self.known(target.uuid))
        return gpu, *find_ci(gpu, target.gi, target.ci, target.serial)

    def may(self, privilege: str) -> bool:
        switches = self.node.switches
        dev_root = self.session.store.state_dir / switches.runtime_view
        return privilege in privileges(switches, dev_root)

    def require(self, privilege: str) -> None:
        if not self.may(privilege):
            self.refuse(Code.NO_PERMISSION, f"the caller lacks {privilege!r}")

    def mig_gpu(self, handle: int | None) -> Gpu:
        """The GPU behind a GPU handle, if MIG is on there."""
        gpu = self.gpu(handle)
        if not gpu.record.mig_current:
            self.refuse(Code.NOT_SUPPORTED, f"MIG is off on GPU {gpu.index}")
        return gpu

    @contextlib.contextmanager
    def change(self, gpu: Gpu) -> Iterator[Gpu]:
        """`gpu` as it is under the lock, to be changed; afterwards this session knows of the change."""
        with self.session.store.change() as node:
            yield node.by_uuid[gpu.uuid]
        self.session.saw_own_change(node, gpu.uuid)

    def struct(self, address: int | None, kind: type[S]) -> S:
        """The caller's struct at `address`, in our own layout."""
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
        return kind.from_address(address)

    def put(self, address: int | None, value: int) -> None:
        """Write an unsigned int."""
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
        c_uint.from_address(address).value = value

    def put_wide(self, address: int | None, value: int) -> None:
        """Write an unsigned long long."""
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
        c_ulonglong.from_address(address).value = value

    def put_handle(self, address: int | None, handle: int) -> None:
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
        c_void_p.from_address(address).value = handle

    def put_text(self, address: int | None, length: int, text: str) -> None:
        """Write a C string, or INSUFFICIENT_SIZE and nothing."""
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
        raw = text.encode() + b"\0"
        if len(raw) > length:
            self.refuse(Code.INSUFFICIENT_SIZE, f"{len(raw)} bytes do not fit in {length}")
        (c_char * len(raw)).from_address(address).raw = raw

    def put_handles(self, address: int | None, count: int | None, targets: Iterable[Target]) -> None:
        """Write an array of handles and its length. Nothing checks the caller's room, as in nvml.h."""
        if not address:
            self.refuse(Code.INVALID_ARGUMENT, "a NULL array")
        handles = [self.session.handle(target) for target in targets]
        self.put(count, len(handles))
        for slot, handle in enumerate(handles):
            self.put_handle(address + slot * ctypes.sizeof(c_void_p), handle)

    def put_placements(
        self, address: int | None, count: int | None, starts: Sequence[int], size: int
    ) -> None:
        """Write an array of placements and its length; without an array the length alone."""
        self.put(count, len(starts))
        for slot, start in enumerate(starts if address else ()):
            place = Placement.from_address((address or 0) + slot * ctypes.sizeof(Placement))
            place.start, place.size = start, size


class Injected(Exception):
    """An error that the `fail` switch asked for: any code, also one that NVML never returns."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code
