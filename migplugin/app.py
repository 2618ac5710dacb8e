"""Where everything is put together: builds every part, starts and stops them in order.

Start: node lock, driver and its events, first look, who holds what, first decision, kubelet. Stop in
reverse, sockets first. Rooms that do not know each other meet here, and mypy sees whether they fit.
Imports that only one command needs are made by that command: starting fast is a feature.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from migplugin import __version__
from migplugin.aio import first_of, keep_running
from migplugin.control.healthfile import HealthFile
from migplugin.control.ports import Preparation
from migplugin.control.preparation import Nodes, Publication
from migplugin.control.reconciler import Pace, Reconciler
from migplugin.core import cdi
from migplugin.core.allocation import EditOptions
from migplugin.core.decide import Memory, Options
from migplugin.core.health import Cleared, clear
from migplugin.core.naming import naming
from migplugin.core.resource import Strategy
from migplugin.core.sharing import ALL, time_slicing
from migplugin.core.xid import parse_checks
from migplugin.errors import AgentError, InputError
from migplugin.kubelet.cdi import CdiFile
from migplugin.kubelet.podresources import CHECKPOINT_NAME, UsageReader
from migplugin.kubelet.sockets import NodeLock, remove_stale
from migplugin.nvml.driver import Driver
from migplugin.nvml.driverfiles import DriverFiles
from migplugin.nvml.nodes import CapabilityNodes, is_host_dev
from migplugin.reload import Reload
from migplugin.settings import DEFAULT, Settings, describe
from migplugin.telemetry.http import HttpServer
from migplugin.telemetry.probes import Probes
from migplugin.unixsocket import explain

if TYPE_CHECKING:
    from migplugin.core.status import Status
    from migplugin.kubelet.manager import Manager

log = logging.getLogger(__name__)

SAFE_REMOVAL_DELAY = 60.0
USAGE_WITHIN = 1.0
# Importing and opening the control socket takes the loop as long as a registration does.
ANSWER_AFTER, ANSWER_PAUSE, ANSWERED_WITHIN = 1.0, 0.2, 0.5
OK, FAILED, USAGE, NO_DRIVER, LIBRARY_OUTDATED, INTERRUPTED = 0, 1, 2, 3, 4, 130


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the driver and its files are found: on this machine, or in the simulation.

    `dev` is the directory with `dev/` as we see it, `host_dev` the same as the host sees it. Device nodes
    are made below `node_dev`, if that `is_host`, by `make_node` where the driver is simulated.
    """

    library: object | None
    proc: Path
    sysfs: Path
    dev: Path
    host_dev: str
    node_dev: Path
    is_host: bool
    make_nodes: Callable[[], None] | None = None


@contextlib.contextmanager
def roots(settings: Settings) -> Iterator[Roots]:
    """The real roots of `settings`, or those of the simulation it asks for, which ends with the context.

    Raises InputError or SimulatorError for a simulation that cannot be made.
    """
    if not settings.simulate:
        seen = (Path(settings.dev_root or "/"), settings.driver_root_ctr_path)
        dev = next(filter(_has_dev, seen), Path("/"))
        node_dev = _host_dev(settings)
        host = settings.host_dev_root
        yield Roots(None, settings.proc_root, settings.sysfs_root, dev, host, node_dev, is_host_dev(node_dev))
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
        shows_host, make = simulation.shows_host, simulation.make_nodes
        yield Roots(simulation.library, proc, sysfs, dev, str(dev), dev, shows_host, make)


def _host_dev(settings: Settings) -> Path:
    """Our view of the host's directory with `dev/`: below the mounted driver root, else at its own path."""
    host, driver = PurePosixPath(settings.host_dev_root or "/"), PurePosixPath(settings.driver_root or "/")
    if host.is_relative_to(driver):
        seen = settings.driver_root_ctr_path / host.relative_to(driver)
        if _has_dev(seen):
            return seen
    return Path(host) if _has_dev(Path(host)) else Path("/")


def _has_dev(root: Path) -> bool:
    return os.path.isdir(root / "dev")  # noqa: PTH112  Path.is_dir raises where a root may not be entered


async def serve(settings: Settings, again: Callable[[], Settings]) -> int:
    """Runs the agent until SIGTERM (answers 0) or SIGINT (130); 3 where the driver must be there and is not,
    4 where only a new process can load the library that the driver needs.

    `again` resolves the configuration anew when it may have changed.

    Raises InputError or SimulatorError for a simulation that cannot be made, or must not be.
    """
    _refuse_painted_gpus(settings)
    stop = _stop_on_signals()
    log.info(
        "starting",
        extra={"version": __version__, **{name: value or None for name, value, _ in describe(settings)}},
    )
    for warning in warnings(settings):
        log.warning("attention", extra={"reason": warning})
    with contextlib.ExitStack() as stack:
        probes = stack.enter_context(_probes(settings))
        where = stack.enter_context(roots(settings))
        chosen = options(settings, where.host_dev)
        _tell_honoured(chosen)
        lock = NodeLock(settings.kubelet_socket.parent)
        stack.callback(lock.release)
        probes.stage = "waiting for the node lock"
        if not await _unless(stop, lock.acquire()):
            return stop.result()
        probes.stage = "waiting for the first look at the driver"
        if removed := remove_stale(settings.kubelet_socket.parent):
            log.info("removed stale sockets of ours", extra={"count": removed})
        driver = _driver(
            settings,
            where,
            on_geometry=lambda: reconciler.geometry_changed(),  # noqa: PLW0108  made after the driver
            on_fault=lambda: reconciler.fault_arrived(),  # noqa: PLW0108
            on_news=lambda: reconciler.look_soon(),  # noqa: PLW0108
        )

        def outdated(reason: str) -> None:
            if not stop.done():
                log.error("the NVML library is outdated, ending to be started anew", extra={"reason": reason})
                stop.set_result(LIBRARY_OUTDATED)

        reconciler = Reconciler(
            driver,
            _usage(settings),
            chosen,
            Pace(settings.poll_interval),
            preparations=_preparations(settings, where),
            record=HealthFile(_state_dir(settings), where.proc),
            on_outdated=outdated,
        )

        def reconfigure(new: Settings) -> None:
            before, after = reconciler.world.options, options(new, where.host_dev)
            if (before.naming, before.sharing) != (after.naming, after.sharing):
                _tell_honoured(after)
            reconciler.reconfigure(after, Pace(new.poll_interval))
            logging.getLogger().setLevel(new.log_level.upper())

        reload = Reload(settings, again, reconfigure)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.ask)
        try:
            return await _serve(settings, reconciler, reload, stop, probes)
        finally:
            await driver.close()


def _refuse_painted_gpus(settings: Settings) -> None:
    """Raises InputError where a simulation would offer GPUs on a node that has a real driver."""
    version = settings.proc_root / "driver/nvidia/version"
    if settings.simulate and not settings.force_simulate and os.path.exists(version):  # noqa: PTH110  raises nothing
        raise InputError(
            f"--simulate: {version} says that a real driver is loaded here, and pods would be given GPUs "
            "that do not exist; --force-simulate if that is meant"
        )


@contextlib.contextmanager
def _probes(settings: Settings) -> Iterator[Probes]:
    """What the probes are to say, answered over HTTP if the settings want it."""
    probes = Probes()
    address = settings.http_listen
    if address is None:
        yield probes
        return
    beat = asyncio.ensure_future(probes.beat())
    server = HttpServer(address.host, address.port, probes.pages)
    server.start()
    try:
        yield probes
    finally:
        server.close()
        beat.cancel()


async def _serve(
    settings: Settings, reconciler: Reconciler, reload: Reload, stop: asyncio.Future[int], probes: Probes
) -> int:
    if not await _unless(stop, keep_running("first decision", reconciler.first)):
        return stop.result()
    if settings.fail_on_init_error and reconciler.world.driver_failed is not None:
        reason = reconciler.world.driver_error
        log.error("no driver, and --fail-on-init-error asks to exit", extra={"reason": reason})
        return NO_DRIVER
    from migplugin.kubelet.manager import Manager  # noqa: PLC0415  with it gRPC, which status does not need

    _collect_garbage_again()

    def is_a_choice() -> bool:
        # By what the node could offer, not by today's geometry: options are fixed at registration.
        inventory, sharing = reconciler.world.inventory, reconciler.world.options.sharing
        return inventory is None or inventory.gpu_count > 1 or bool(sharing.resources)

    async def follow_kubelet() -> None:
        version = manager.incarnation.version
        while True:
            version, _ = await manager.incarnation.after(version)
            reconciler.kubelet_changed()

    manager = Manager(
        settings.kubelet_socket,
        reconciler.offers,
        reconciler.grant,
        preferred=is_a_choice,
    )
    loops = [
        asyncio.ensure_future(keep_running("reconciler", reconciler.run)),
        asyncio.ensure_future(keep_running("reload", reload.run)),
        asyncio.ensure_future(follow_kubelet()),
    ]
    serving = asyncio.ensure_future(keep_running("manager", manager.run))
    answers, mute = _Answers(reconciler, manager), asyncio.Event()
    answering = asyncio.ensure_future(_answer(settings.control_socket, answers, manager.registered, mute))
    probes.serving(manager.states, manager.dead, lambda: reconciler.world.driver_error)
    await stop
    probes.stopping()
    began = time.monotonic()
    mute.set()
    manager.stop()
    await serving
    await asyncio.wait((answering,), timeout=ANSWERED_WITHIN)
    for loop in (answering, *loops):
        loop.cancel()
    await asyncio.gather(answering, *loops, return_exceptions=True)
    log.info("stopped", extra={"seconds": time.monotonic() - began})
    return stop.result()


class _Answers:
    """What the control socket answers, put together from the parts of the running agent."""

    def __init__(self, reconciler: Reconciler, manager: "Manager") -> None:
        self._reconciler = reconciler
        self._manager = manager

    async def status(self) -> bytes:
        from migplugin.agentapi.document import encode  # noqa: PLC0415
        from migplugin.core.status import AgentFacts  # noqa: PLC0415
        from migplugin.core.status import status as describe  # noqa: PLC0415

        world, outcome = await self._reconciler.seen(within=USAGE_WITHIN)
        facts = AgentFacts(self._manager.registrations(), dict(self._manager.refused))
        return encode(describe(world, outcome, node=socket.gethostname(), agent=facts))

    def clear_health(self, ids: Collection[str] | None) -> Cleared:
        return self._reconciler.clear_health(ids)


async def _answer(
    path: Path | None, answers: _Answers, registered: asyncio.Event, stop: asyncio.Event
) -> None:
    """Answers commands at `path` until `stop`, first things first: once a resource is registered."""
    if path is None:
        return
    await first_of(registered.wait(), stop.wait(), timeout=ANSWER_AFTER)
    await first_of(stop.wait(), timeout=ANSWER_PAUSE)
    if stop.is_set():
        return
    from migplugin.agentapi.server import ControlSocket  # noqa: PLC0415

    await keep_running("control socket", ControlSocket(path, answers, stop).run)


async def status(settings: Settings) -> tuple["Status", str]:
    """What this node looks like, as the running agent says or, where none does, as we see it ourselves.

    Also says in a sentence why no agent was heard, "" where one was or none was wanted. Raises InputError or
    SimulatorError for a simulation that cannot be made, and never DriverError: a driver that does not answer
    is part of the status.
    """
    if settings.simulate:
        return await _look(settings), ""
    try:
        path = _where_answered(settings)
        from migplugin.agentapi import client  # noqa: PLC0415  with it gRPC

        return await client.status(path), ""
    except AgentError as exc:
        return await _look(settings), f"looked without the agent: {exc}"


def _where_answered(settings: Settings) -> Path:
    """The control socket, at which somebody takes connections. Raises AgentError where nobody does."""
    if settings.control_socket is None:
        raise AgentError("--control-socket is empty")
    if reason := explain(settings.control_socket, "the agent"):
        raise AgentError(reason)
    return settings.control_socket


async def clear_health(settings: Settings, ids: Sequence[str] | None) -> list[str]:
    """`ids`, or all that is sick, are taken for well: by the agent or, where none runs, for the next one.

    Answers in sentences. Raises InputError where that makes no sense, AgentError where an agent runs and does
    not answer, KubeletError where the node lock cannot be had.
    """
    try:
        path = _where_answered(settings)
        from migplugin.agentapi import client  # noqa: PLC0415  with it gRPC

        sick, notes = await client.clear_health(path, ids)
        return _tell_cleared(sick, notes)
    except AgentError as exc:
        reason = str(exc)
    lock = NodeLock(settings.kubelet_socket.parent)
    if not lock.try_acquire():
        raise AgentError(f"an agent runs on this node and does not answer: {reason}")
    logging.getLogger("migplugin").setLevel(logging.CRITICAL)  # what it would log is what is printed
    try:
        file = HealthFile(_state_dir(settings), settings.proc_root)
        found = file.load(time.monotonic())
        if file.unreadable:
            reason = f"{file.path} cannot be read: {file.unreadable}"
            raise AgentError(f"{reason}; the next agent will take everybody for healthy")
        cleared = clear(found, ids)
        try:
            if cleared.health != found:
                file.write(cleared.health)
        except OSError as exc:
            reason = f"{file.path}: {(exc.strerror or str(exc)).lower()}"
            raise AgentError(f"{reason}; nobody is cleared until it can be written") from exc
    finally:
        lock.release()
    told = _tell_cleared([(id_, sickness.cause) for id_, sickness in cleared.sick.items()], cleared.notes)
    return [*told, f"no agent runs here: cleared in {file.path}, which the next one reads"]


def _tell_cleared(sick: Iterable[tuple[str, str]], notes: Iterable[str]) -> list[str]:
    told = [f"{id_} is taken for well; it had {cause}" for id_, cause in sick]
    return [*(told or ["nobody was sick of a fault"]), *notes]


async def _look(settings: Settings) -> "Status":
    """What this node looks like from outside the agent: opens NVML itself and decides once."""
    from migplugin.core.status import status as describe  # noqa: PLC0415

    with roots(settings) as where:
        driver = _driver(settings, where)
        logging.getLogger("migplugin").setLevel(logging.CRITICAL)  # what it would log is what is printed
        reconciler = Reconciler(driver, _usage(settings), options(settings), Pace())
        remembered = HealthFile(_state_dir(settings), where.proc).load(reconciler.world.now)
        reconciler.world = replace(reconciler.world, memory=Memory(health=remembered))
        try:
            await reconciler.first()
        finally:
            await driver.close()
        assert reconciler.outcome is not None
        return describe(reconciler.world, reconciler.outcome, node=socket.gethostname())


def _driver(
    settings: Settings,
    where: Roots,
    *,
    on_geometry: Callable[[], None] = lambda: None,
    on_fault: Callable[[], None] = lambda: None,
    on_news: Callable[[], None] = lambda: None,
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
        on_news=on_news,
    )


def _state_dir(settings: Settings) -> Path:
    return Path(settings.state_dir) if settings.state_dir else settings.kubelet_socket.parent / "migplugin"


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
    _, words = parse_checks(settings.disable_healthchecks, settings.enable_healthchecks)
    if words:
        found.append(
            f"DP_DISABLE_HEALTHCHECKS, DP_ENABLE_HEALTHCHECKS: {', '.join(words)}: left out, since each must "
            "be all, xids or the number of an XID"
        )
    if settings.cdi_feature_flags:
        found.append("--cdi-feature-flags has no effect: they set how NVIDIA's library looks for files")
    return found


def options(settings: Settings, host_dev: str = "/") -> Options:
    """What the decision is to go by. Raises InputError where a section of the file does not make sense."""
    features = {
        "GDRCOPY": settings.gdrcopy_enabled,
        "GDS": settings.gds_enabled,
        "MOFED": settings.mofed_enabled,
    }
    edits = EditOptions(
        frozenset(settings.device_list_strategy),
        settings.pass_device_specs,
        host_dev,
        settings.device_id_strategy,
        settings.cdi_annotation_prefix,
        tuple(name for name, enabled in features.items() if enabled),
    )
    checks, _ = parse_checks(settings.disable_healthchecks, settings.enable_healthchecks)
    document, domain = settings.document, settings.resource_domain
    try:
        names = naming(document.resources, domain)
        sharing = time_slicing(document.sharing.get("timeSlicing") or {}, domain)
    except InputError as exc:
        raise InputError(f"{document.source}: {exc}") from exc
    return Options(
        Strategy(settings.mig_strategy),
        settings.removal_delay,
        settings.driver_grace,
        settings.health_recovery_after,
        edits,
        checks,
        names,
        sharing,
        settings.shared_devices_allocation_policy,
    )


def _tell_honoured(chosen: Options) -> None:
    """One line for each thing of the file that NVIDIA's plugin would discard (docs/migrate.md)."""
    for kind, rules in (("gpus", chosen.naming.gpus), ("mig", chosen.naming.mig)):
        for rule in rules:
            log.info("naming", extra={"of": kind, "pattern": rule.pattern, "resource": rule.name})
    for shared in chosen.sharing.resources:
        if shared.rename is not None or shared.devices != ALL:
            fields = {"resource": shared.name, "rename": shared.rename, "devices": shared.devices}
            log.info("sharing", extra=fields)


def _preparations(settings: Settings, where: Roots) -> tuple[Preparation, ...]:
    """What must be done before a device is offered. Nodes first: they take less."""
    nodes = CapabilityNodes(
        dev_root=where.node_dev,
        is_host=where.is_host,
        proc_root=where.proc,
        driver_root=settings.driver_root_ctr_path,
        make=where.make_nodes,
    )
    files = DriverFiles(settings.driver_root_ctr_path, where.proc, where.sysfs)
    file = CdiFile(settings.cdi_root, cdi.FILE_NAME)
    return Nodes(nodes), Publication(files, file, _cdi_options(settings, where, files))


def _cdi_options(settings: Settings, where: Roots, files: DriverFiles) -> cdi.Options:
    hook = settings.nvidia_cdi_hook_path
    if settings.sources["nvidia_cdi_hook_path"] == DEFAULT and not files.has(hook):
        hook = ""  # nobody said that it is there, and without it no container would start
    return cdi.Options(
        driver_root=settings.driver_root or "/",
        dev_root=where.host_dev or "/",
        hook=hook,
        disabled_hooks=frozenset(settings.cdi_disable_hooks),
        by_index=settings.device_id_strategy == "index",
        simulated=where.library is not None,
    )


async def cdi_document(settings: Settings) -> Mapping[str, Any] | None:
    """The CDI document for this node, None where it has no device: opens NVML itself, and writes nothing.

    Raises InputError or SimulatorError for a simulation that cannot be made, DriverError.
    """
    with roots(settings) as where:
        driver = _driver(settings, where)
        logging.getLogger("migplugin").setLevel(logging.CRITICAL)  # stderr is for what is wrong with it
        try:
            inventory = await driver.look()
        finally:
            await driver.close()
        files = DriverFiles(settings.driver_root_ctr_path, where.proc, where.sysfs)
        return cdi.document(inventory, files.facts(inventory), _cdi_options(settings, where, files))


async def cdi_differences(settings: Settings) -> list[str]:
    """Where NVIDIA's generator and we would write different documents, a sentence each.

    Raises CdiError where there is no nvidia-ctk to ask, and what `cdi_document` raises.
    """
    from migplugin.core import cdi_diff  # noqa: PLC0415
    from migplugin.kubelet.nvidia_ctk import generate  # noqa: PLC0415

    theirs = await generate(settings.driver_root, settings.dev_root, cdi.VENDOR, cdi.CLASS)
    return cdi_diff.differences(await cdi_document(settings) or {}, theirs)


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

    # Asking for a reload before there is anything to reload must not be the end.
    loop.add_signal_handler(signal.SIGHUP, log.debug, "nothing to reload yet")
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
