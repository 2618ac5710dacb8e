"""Where everything is put together: builds every part, starts and stops them in order.

Start: node lock, driver and its events, first look, who holds what, first decision, kubelet. Stop in
reverse, sockets first. Rooms that do not know each other meet here, and mypy sees whether they fit.
Imports that only one command needs are made by that command: starting fast is a feature.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from migplugin import __version__
from migplugin.aio import keep_running
from migplugin.control.reconciler import Pace, Reconciler
from migplugin.core.allocation import EditOptions
from migplugin.core.decide import Options
from migplugin.core.resource import Strategy
from migplugin.kubelet.podresources import CHECKPOINT_NAME, UsageReader
from migplugin.kubelet.sockets import NodeLock, remove_stale
from migplugin.nvml.driver import Driver
from migplugin.settings import Settings, describe

if TYPE_CHECKING:
    from migplugin.core.status import Status

log = logging.getLogger(__name__)

SAFE_REMOVAL_DELAY = 60.0
OK, FAILED, USAGE, NO_DRIVER, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the driver and its files are found: on this machine, or in the simulation.

    `dev` is the directory with `dev/` as we see it, `host_dev` the same as the host sees it.
    """

    library: object | None
    proc: Path
    sysfs: Path
    dev: Path
    host_dev: str


@contextlib.contextmanager
def roots(settings: Settings) -> Iterator[Roots]:
    """The real roots of `settings`, or those of the simulation it asks for, which ends with the context.

    Raises InputError or SimulatorError for a simulation that cannot be made.
    """
    if not settings.simulate:
        seen = (Path(settings.dev_root or "/"), settings.driver_root_ctr_path)
        dev = next((root for root in seen if (root / "dev").is_dir()), Path("/"))
        yield Roots(None, settings.proc_root, settings.sysfs_root, dev, settings.host_dev_root)
        return
    from migplugin.sim.driver import Simulation  # noqa: PLC0415  the practice ground stays out of production

    with Simulation.open(settings.simulate) as simulation:
        log.warning(
            "SIMULATED driver: none of these GPUs exists",
            extra={"state": str(simulation.state_dir), "spec": settings.simulate},
        )
        dev = Path(settings.dev_root or simulation.dev_root)
        proc = simulation.proc_root if settings.proc_root == Path("/proc") else settings.proc_root
        sysfs = simulation.sysfs_root if settings.sysfs_root == Path("/sys") else settings.sysfs_root
        yield Roots(simulation.library, proc, sysfs, dev, str(dev))


async def serve(settings: Settings) -> int:
    """Runs the agent until SIGTERM (answers 0) or SIGINT (130); 3 where the driver must be there and is not.

    Raises InputError or SimulatorError for a simulation that cannot be made.
    """
    stop = _stop_on_signals()
    log.info(
        "starting",
        extra={"version": __version__, **{name: value or None for name, value, _ in describe(settings)}},
    )
    for warning in warnings(settings):
        log.warning("attention", extra={"reason": warning})
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(roots(settings))
        lock = NodeLock(settings.kubelet_socket.parent)
        stack.callback(lock.release)
        if not await _unless(stop, lock.acquire()):
            return stop.result()
        if removed := remove_stale(settings.kubelet_socket.parent):
            log.info("removed stale sockets of ours", extra={"count": removed})
        driver = _driver(
            settings,
            where,
            on_geometry=lambda: reconciler.geometry_changed(),  # noqa: PLW0108  made after the driver
            on_fault=lambda: reconciler.fault_arrived(),  # noqa: PLW0108
        )
        reconciler = Reconciler(driver, _usage(settings), options(settings), Pace(settings.poll_interval))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reconciler.geometry_changed)
        try:
            return await _serve(settings, where, reconciler, stop)
        finally:
            await driver.close()


async def _serve(settings: Settings, where: Roots, reconciler: Reconciler, stop: asyncio.Future[int]) -> int:
    if not await _unless(stop, reconciler.first()):
        return stop.result()
    if settings.fail_on_init_error and reconciler.world.driver_failed is not None:
        reason = reconciler.world.driver_error
        log.error("no driver, and --fail-on-init-error asks to exit", extra={"reason": reason})
        return NO_DRIVER
    from migplugin.kubelet.manager import Manager  # noqa: PLC0415  with it gRPC, which status does not need

    _collect_garbage_again()

    def more_than_one_gpu() -> bool:
        # By what the node could offer, not by today's geometry: options are fixed at registration.
        inventory = reconciler.world.inventory
        return inventory is None or inventory.gpu_count > 1

    async def follow_kubelet() -> None:
        version = manager.incarnation.version
        while True:
            version, _ = await manager.incarnation.after(version)
            reconciler.kubelet_changed()

    strategies = frozenset(settings.device_list_strategy)
    edits = EditOptions(strategies, settings.pass_device_specs, where.host_dev)
    manager = Manager(
        settings.kubelet_socket, reconciler.offers, edits, reconciler.grant, preferred=more_than_one_gpu
    )
    loops = [
        asyncio.ensure_future(keep_running("reconciler", reconciler.run)),
        asyncio.ensure_future(follow_kubelet()),
    ]
    serving = asyncio.ensure_future(keep_running("manager", manager.run))
    await stop
    began = time.monotonic()
    manager.stop()
    await serving
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    log.info("stopped", extra={"seconds": time.monotonic() - began})
    return stop.result()


async def status(settings: Settings) -> "Status":
    """What this node looks like from outside the agent: opens NVML itself and decides once.

    Raises InputError or SimulatorError for a simulation that cannot be made, and never DriverError: a
    driver that does not answer is part of the status.
    """
    from migplugin.core.status import status as describe  # noqa: PLC0415

    with roots(settings) as where:
        driver = _driver(settings, where, on_geometry=lambda: None, on_fault=lambda: None)
        reconciler = Reconciler(driver, _usage(settings), options(settings), Pace())
        logging.getLogger("migplugin").setLevel(logging.CRITICAL)  # what it would log is what is printed
        try:
            await reconciler.first()
        finally:
            await driver.close()
        assert reconciler.outcome is not None
        return describe(reconciler.world, reconciler.outcome, node=socket.gethostname())


def _driver(
    settings: Settings, where: Roots, on_geometry: Callable[[], None], on_fault: Callable[[], None]
) -> Driver:
    library = where.library
    return Driver(
        library=None if library is None else lambda: library,
        search=settings.driver_root_ctr_path,
        proc_root=where.proc,
        sysfs_root=where.sysfs,
        dev_root=where.dev,
        deadline=settings.nvml_timeout,
        on_geometry=on_geometry,
        on_fault=on_fault,
    )


def _usage(settings: Settings) -> UsageReader:
    return UsageReader(settings.kubelet_socket.parent / CHECKPOINT_NAME, settings.pod_resources_socket)


def warnings(settings: Settings) -> list[str]:
    """What a person should know of these settings, a sentence each."""
    found = list(settings.document.findings)
    if settings.removal_delay < SAFE_REMOVAL_DELAY:
        found.append(
            f"--removal-delay={settings.removal_delay:g}s is for demos and tests: "
            "a kubelet that is just allocating a device crashes when it leaves the list"
        )
    if settings.device_id_strategy == "index" and settings.mig_strategy != "none":
        found.append(
            "--device-id-strategy=index: the kubelet replays its answer at each container restart, "
            "and after a re-carve the same index is another pod's MIG device; use uuid"
        )
    if settings.device_list_strategy == ("envvar",) and settings.mig_strategy == "mixed":
        found.append(
            "--device-list-strategy=envvar: a container that asks for two MIG profiles sees only one of "
            "them, since the kubelet keeps one NVIDIA_VISIBLE_DEVICES; volume-mounts and cdi-cri carry both"
        )
    if settings.cdi_feature_flags:
        found.append("--cdi-feature-flags has no effect: they set how NVIDIA's library looks for files")
    return found


def options(settings: Settings) -> Options:
    """What the decision is to go by. Raises InputError where a section of the file does not make sense."""
    return Options(Strategy(settings.mig_strategy), settings.removal_delay, settings.driver_grace)


def _collect_garbage_again() -> None:
    """Off since the start. What is there now stays, and need not be looked through ever again."""
    gc.freeze()
    gc.enable()


def _stop_on_signals() -> asyncio.Future[int]:
    """Done with the exit code when a signal asks to stop."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def ask(name: str, code: int) -> None:
        if not stop.done():
            log.info("stopping", extra={"signal": name})
            stop.set_result(code)

    loop.add_signal_handler(signal.SIGTERM, ask, "SIGTERM", OK)
    loop.add_signal_handler(signal.SIGQUIT, ask, "SIGQUIT", OK)
    loop.add_signal_handler(signal.SIGINT, ask, "SIGINT", INTERRUPTED)
    return stop


async def _unless(stop: asyncio.Future[int], work: Coroutine[object, object, None]) -> bool:
    """Whether `work` was finished before somebody asked to stop; else it is cancelled."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((stop, task), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
        return not stop.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False
