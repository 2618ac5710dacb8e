"""A simulated node under our driver edge, what other processes do to it, and what is called on it."""

import asyncio
import os
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml

from migplugin.core.inventory import Gpu, Inventory, MigDevice
from migplugin.errors import DriverTimeout
from migplugin.nvml import binding
from migplugin.nvml.driver import Driver
from migplugin.nvml.snapshot import Look, Snapshots
from migplugin.sim import spec
from migplugin.sim.driver import Simulation
from migplugin.sim.model import Node
from migplugin.sim.records import WHOLE, Switches
from migplugin.sim.store import Store

A100 = "1xa100-40gb"
SEVEN = "1xa100-40gb=1g.5gb*7"


class Counting:
    """A library whose calls are counted by their C names; everything else is the library's."""

    def __init__(self, library: object) -> None:
        self._library = library
        self.calls: Counter[str] = Counter()
        # Called with the arguments of the C function; `original` is what stands behind it.
        self.replaced: dict[str, Callable[..., int]] = {}

    def original(self, name: str) -> Callable[..., int]:
        function: Callable[..., int] = getattr(self._library, name)
        return function

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name == "nvmlErrorString":  # pynvml sets its result type
            return function

        def counted(*arguments: object) -> int:
            self.calls[name] += 1
            return int(self.replaced.get(name, function)(*arguments))

        return counted


class Machine:
    """One node. Each change is made through a store of its own, as another process would make it."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.library = Counting(simulation.library)

    @property
    def node(self) -> Node:
        return self.simulation.store.read()

    @property
    def calls(self) -> Counter[str]:
        return self.library.calls

    def change(self, act: Callable[[Node], object]) -> None:
        with Store(self.simulation.state_dir).change() as node:
            act(node)

    def switch(self, **switches: object) -> None:
        def act(node: Node) -> None:
            for name, value in switches.items():
                assert hasattr(node.switches, name)
                setattr(node.switches, name, value)

        self.change(act)

    def create(self, *names: str, gpu: int = 0) -> None:
        def act(node: Node) -> None:
            for name in names:
                node.gpus[gpu].create(name)

        self.change(act)

    def destroy(self, *gis: int, gpu: int = 0) -> None:
        def act(node: Node) -> None:
            for gi in gis:
                node.gpus[gpu].destroy(gi)

        self.change(act)

    def recarve(self, *names: str, gpu: int = 0) -> None:
        """Destroys everything on a GPU and creates `names`, in one step."""

        def act(node: Node) -> None:
            for gi in tuple(node.gpus[gpu].instances):
                node.gpus[gpu].destroy(gi.id)
            for name in names:
                node.gpus[gpu].create(name)

        self.change(act)

    def xid(self, number: int, *, gpu: int = 0, gi: int = WHOLE, ci: int = WHOLE) -> None:
        self.change(lambda node: node.gpus[gpu].xid(number, gi, ci))

    def lose(self, gpu: int = 0, *, lost: bool = True) -> None:
        self.change(lambda node: setattr(node.gpus[gpu].record, "lost", lost))

    def mig_mode(self, *, on: bool, gpu: int = 0) -> None:
        self.change(lambda node: node.gpus[gpu].set_mig_mode(on=on))

    def uuids(self, gpu: int = 0) -> set[str]:
        return {ci.uuid for _, ci in self.node.gpus[gpu].mig_devices()}

    def snapshots(self) -> Snapshots:
        simulation = self.simulation
        return Snapshots(simulation.proc_root, simulation.sysfs_root, simulation.dev_root)

    @contextmanager
    def session(self) -> Iterator[Snapshots]:
        """An open session without a driver around it, for tests of single looks."""
        binding.load(self.library)
        binding.init()
        try:
            yield self.snapshots()
        finally:
            if pynvml._nvmlLib_refcount:
                binding.shutdown()

    def look(self) -> Look:
        """One look through a session of its own."""
        with self.session() as snapshots:
            return snapshots.take()

    @contextmanager
    def refusing(self, name: str, code: int) -> Iterator[None]:
        """Every call of `name` answers `code`, without the driver being asked."""
        self.library.replaced[name] = lambda *_: code
        try:
            yield
        finally:
            del self.library.replaced[name]


@contextmanager
def machine(node: str = A100, **switches: Any) -> Iterator[Machine]:
    """A node made from a spec. The caller is an admin unless the switches say otherwise."""
    built = spec.build(node, switches=Switches(**{"privilege": "admin", **switches}))
    before = set(threading.enumerate())
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    with tempfile.TemporaryDirectory(dir=parent, prefix="nvml-") as directory:
        store = Store(directory)
        store.create(built)
        try:
            yield Machine(Simulation(store, temporary=False))
        finally:
            with store.change() as there:
                there.switches.hang = []
            for thread in set(threading.enumerate()) - before:
                if thread.name.startswith("nvml"):
                    thread.join(5)
                    assert not thread.is_alive(), f"{thread.name} is left behind"
            binding.load(object())  # of this machine nothing can be called any more


@dataclass
class Watched:
    """A driver edge, and what it told its loop."""

    driver: Driver
    geometry: asyncio.Event = field(default_factory=asyncio.Event)
    fault: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    told: Counter[str] = field(default_factory=Counter)

    def hears(self) -> bool:
        return self.driver.events_work

    async def changed(self) -> Inventory:
        """What a look shows after the driver has told of a change."""
        await asyncio.wait_for(self.geometry.wait(), 5)
        self.geometry.clear()
        return await self.driver.look(suspect=True)


def edge(place: Machine, *, deadline: float = 5.0) -> Watched:
    """A driver edge on `place`, not yet looking."""
    simulation = place.simulation

    def on_geometry() -> None:
        watched.told["geometry"] += 1
        watched.geometry.set()

    def on_fault() -> None:
        watched.told["fault"] += 1
        watched.fault.set()

    def on_news() -> None:
        watched.told["news"] += 1
        watched.news.set()

    watched = Watched(
        Driver(
            library=lambda: place.library,
            search=Path("/nonexistent"),
            proc_root=simulation.proc_root,
            sysfs_root=simulation.sysfs_root,
            dev_root=simulation.dev_root,
            deadline=deadline,
            on_geometry=on_geometry,
            on_fault=on_fault,
            on_news=on_news,
        )
    )
    return watched


@asynccontextmanager
async def watching(place: Machine, *, deadline: float = 5.0) -> AsyncIterator[Watched]:
    """A driver edge on `place`, closed at the end."""
    watched = edge(place, deadline=deadline)
    try:
        yield watched
    finally:
        await watched.driver.close()


def devices(inventory: Inventory) -> list[MigDevice]:
    return [device for _, device in inventory.devices()]


def only_gpu(look: Look) -> Gpu:
    assert not look.inventory.broken
    (gpu,) = look.inventory.gpus
    return gpu


async def patiently(driver: Driver) -> Inventory:
    """A look that may need more than one deadline, on a busy machine."""
    for _ in range(200):
        try:
            return await driver.look()
        except DriverTimeout:
            await asyncio.sleep(0.01)
    raise AssertionError("no answer")


async def until(claim: Callable[[], object]) -> None:
    """Returns once `claim` holds: of what other threads do, which tell no loop."""
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
