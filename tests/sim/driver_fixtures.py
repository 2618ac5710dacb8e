"""A simulated driver under the real pynvml, for the tests of it."""

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from migplugin.sim import spec
from migplugin.sim.driver import Simulation
from migplugin.sim.model import Node
from migplugin.sim.records import Switches
from migplugin.sim.store import Store

A100 = "1xa100-40gb"


@dataclass(frozen=True, slots=True)
class Driver:
    """An open session on a simulated node, and the node itself."""

    simulation: Simulation

    @property
    def store(self) -> Store:
        return self.simulation.store

    @property
    def node(self) -> Node:
        return self.store.read()

    def change(self, act: Callable[[Node], object]) -> None:
        """Change the node as another process would."""
        with Store(self.store.state_dir).change() as node:
            act(node)

    def set(self, **switches: object) -> None:
        with Store(self.store.state_dir).change() as node:
            for name, value in switches.items():
                setattr(node.switches, name, value)

    def gpu(self, index: int = 0) -> Any:
        return pynvml.nvmlDeviceGetHandleByIndex(index)

    def mig(self, index: int = 0, gpu: int = 0) -> Any:
        return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(self.gpu(gpu), index)

    def make_again(self, gi: int, name: str, gpu: int = 0) -> None:
        """Destroy a GPU instance and create one of the profile `name`, as another process would."""

        def act(node: Node) -> None:
            node.gpus[gpu].destroy(gi)
            node.gpus[gpu].create(name)

        self.change(act)

    def xids(self, *numbers: int, gpu: int = 0) -> None:
        def act(node: Node) -> None:
            for number in numbers:
                node.gpus[gpu].xid(number)

        self.change(act)

    def mig_uuids(self, gpu: int = 0) -> list[str]:
        """What a client finds when it walks over the indices as it should."""
        handle = self.gpu(gpu)
        found = []
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                found.append(
                    pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
                )
            except pynvml.NVMLError_NotFound:
                continue
        return found


@contextmanager
def directory(parent: str = "/tmp") -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent, prefix="sim-") as name:
        yield Path(name)


@contextmanager
def installed(library: object) -> Iterator[None]:
    """`library` under pynvml, as nvml/binding puts it there; afterwards pynvml is as if never used."""
    pynvml.nvmlLib = library
    pynvml._nvmlGetFunctionPointer_cache.clear()
    pynvml._nvmlLib_refcount = 0
    try:
        yield
    finally:
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlLib_refcount = 0


@contextmanager
def driver(node: str = A100, **switches: Any) -> Iterator[Driver]:
    """A session on a node made from `node`. The caller is an admin unless the switches say otherwise."""
    built = spec.build(node, switches=Switches(**{"privilege": "admin", **switches}))
    # Hundreds of nodes of some fifty files each: in memory that takes seconds, on a disk a minute.
    with directory("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") as state:
        store = Store(state)
        store.create(built)
        simulation = Simulation(store, temporary=False)  # open() would derive the files once more
        with installed(simulation.library):
            pynvml.nvmlInit()
            yield Driver(simulation)
            if pynvml._nvmlLib_refcount:
                pynvml.nvmlShutdown()


def refused(call: str, *arguments: Any, **options: Any) -> int:
    """The code with which a pynvml call fails, by its name."""
    try:
        getattr(pynvml, call)(*arguments, **options)
    except pynvml.NVMLError as exc:
        return int(exc.value)
    raise AssertionError(f"{call} was expected to fail")


def address(handle: Any) -> int:
    """The number behind a handle; two handles never compare equal in pynvml."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def create(
    gpu: Any, gi_profile: int, ci_profile: int | None = None, start: int | None = None
) -> tuple[Any, Any]:
    """A GPU instance and, with a `ci_profile`, a compute instance on it, through NVML."""
    if start is None:
        gi = pynvml.nvmlDeviceCreateGpuInstance(gpu, gi_profile)
    else:
        size = placements(gpu, gi_profile)[0][1]
        where = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
        gi = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, gi_profile, ctypes.byref(where))
    ci = None if ci_profile is None else pynvml.nvmlGpuInstanceCreateComputeInstance(gi, ci_profile)
    return gi, ci


def placements(gpu: Any, gi_profile: int) -> list[tuple[int, int]]:
    count = ctypes.c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, gi_profile, None, ctypes.byref(count))
    array = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, gi_profile, array, ctypes.byref(count))
    return [(place.start, place.size) for place in array]


def gpu_instances(gpu: Any, gi_profile: int, room: int = 8) -> list[Any]:
    array = (pynvml.c_nvmlGpuInstance_t * room)()
    count = ctypes.c_uint()
    pynvml.nvmlDeviceGetGpuInstances(gpu, gi_profile, array, ctypes.byref(count))
    return list(array[: count.value])


def compute_instances(gi: Any, ci_profile: int, room: int = 8) -> list[Any]:
    array = (pynvml.c_nvmlComputeInstance_t * room)()
    count = ctypes.c_uint()
    pynvml.nvmlGpuInstanceGetComputeInstances(gi, ci_profile, array, ctypes.byref(count))
    return list(array[: count.value])
