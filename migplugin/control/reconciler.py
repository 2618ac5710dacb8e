"""The one loop: look at what may have changed, make ready what containers need of it, decide, publish.

Events wake it and carry nothing; what is true is read anew. A change of geometry comes as a burst
of events, one for each instance, so the first look waits until the burst is over, and at most 200 ms; not
while somebody is sick who gets well by being gone, if only for a moment.
Where events do not work, and against the day when one is lost, it looks by itself now and then.
An XID is judged by the inventory in force when it came, so all that came are, before a new one is.

Grants are written here by Allocate, directly and at once: the next decision finds them as leases.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from migplugin.aio import Cell, first_of
from migplugin.control.ports import Driver, HealthRecord, Preparation, UsageSource
from migplugin.core.allocation import Offers, granted
from migplugin.core.decide import (
    LEASE_CERTAIN_AFTER,
    USAGE_SOONEST,
    Key,
    Memory,
    Options,
    Outcome,
    Usage,
    World,
    decide,
)
from migplugin.core.health import Cleared, Health, clear, suspects
from migplugin.core.inventory import DeviceId, Inventory
from migplugin.core.resource import ResourceName
from migplugin.core.sickness import Fault
from migplugin.core.xid import xid
from migplugin.errors import DriverError, LibraryOutdated

log = logging.getLogger(__name__)

DEBOUNCE, DEBOUNCE_LATEST = 0.05, 0.2
RETRY_SHORTEST, RETRY_LONGEST = 0.5, 15.0
FAULTS_AGAIN = 0.5
USAGE_WITHIN = 0.25
PREPARE_AGAIN = 2.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to look without being told, in seconds; `poll` None: 60 where events work, 5 where not."""

    poll: float | None = None

    def interval(self, *, events_work: bool) -> float:
        if self.poll is not None:
            return self.poll
        return 60.0 if events_work else 5.0


class Reconciler:
    """Keeps `offers` true. `world` is what is known, `decided` what the last decision was made of and
    `outcome` what it said.

    `on_outdated` is called with the reason when no later look of this process can succeed.
    """

    def __init__(
        self,
        driver: Driver,
        usage: UsageSource,
        options: Options,
        pace: Pace,
        *,
        preparations: Sequence[Preparation] = (),
        record: HealthRecord | None = None,
        on_outdated: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.offers: Cell[Offers] = Cell(Offers())
        memory = Memory(health=record.load(clock())) if record is not None else Memory()
        self.world = World(clock(), memory=memory, options=options)
        self.decided = self.world
        self.outcome: Outcome | None = None
        self._driver = driver
        self._usage = usage
        self._pace = pace
        self._preparations = preparations
        self._record = record
        self._on_outdated = on_outdated
        self._clock = clock
        self._recorded = True
        self._leases: dict[Key, float] = {}
        self._wake = asyncio.Event()
        self._changed_at: float | None = None
        self._usage_wanted = True
        self._look_at = clock()
        self._retry = RETRY_SHORTEST
        self._prepare_at: float | None = None
        self._faults_at: float | None = None
        self._faults_soonest = clock()
        self._news_at: float | None = None
        self._news_soonest = clock()
        self._reading: asyncio.Future[Usage] | None = None
        self._leases_looked_for: asyncio.TimerHandle | None = None

    def grant(self, resource: ResourceName, ids: Collection[DeviceId]) -> None:
        """Remembers that Allocate has just handed out `ids`. There is no await between its check and this."""
        now = self._clock()
        known = self.outcome.memory.named if self.outcome is not None else frozenset()
        new = [id_ for id_ in ids if (resource, id_) not in known and (resource, id_) not in self._leases]
        self._leases.update(((resource, id_), now) for id_ in ids)
        if new:
            # What is in use matters to the next choice, and to no list: a list need not be looked at again.
            self.offers.amend(granted(self.offers.value, resource, new))
        if self._leases_looked_for is None:
            loop = asyncio.get_running_loop()
            self._leases_looked_for = loop.call_later(LEASE_CERTAIN_AFTER, self._look_for_leases)

    def _look_for_leases(self) -> None:
        """Who holds what is read once the first of new leases can be seen; decisions ask for the others."""
        self._leases_looked_for = None
        self._usage_wanted = True
        self._wake.set()

    def reconfigure(self, options: Options, pace: Pace) -> None:
        """From the next decision on, which is made at once, everything goes by `options` and `pace`."""
        self.world = replace(self.world, options=options)
        if pace != self._pace:
            self._pace = pace
            self._news_at = self._clock()
        self._wake.set()

    async def seen(self, within: float) -> tuple[World, Outcome]:
        """What was decided last and of what, for a person: with the time and the leases of now.

        Decisions read who holds what only when they need it, so it is read first, at most every 2 s and
        for no longer than `within`. The driver is not asked.
        """
        now = self._clock()
        if self._reading is None and now >= self.world.usage.began + USAGE_SOONEST:
            self._usage_wanted = True
            await self._read_usage(now, within=within)
            self._decide()
        assert self.outcome is not None, "there is nothing to see before the first decision"
        leases = MappingProxyType(dict(self._leases))
        return replace(self.decided, now=self._clock(), leases=leases), self.outcome

    def clear_health(self, ids: Collection[str] | None) -> Cleared:
        """A person takes `ids`, or all that is sick, for well: offered again when this returns.

        What came before they asked is cleared too. Raises InputError as `health.clear` does.
        """
        assert self.outcome is not None, "nobody can be sick before the first decision"
        self._judge_faults()
        cleared = clear(self.outcome.memory.health, ids)
        self.outcome = replace(self.outcome, memory=replace(self.outcome.memory, health=cleared.health))
        for id_, sickness in cleared.sick.items():
            log.info(
                "cleared by a person", extra={"device": id_, "gpu": sickness.gpu, "was": sickness.reason}
            )
        self._decide()
        self._wake.set()
        if self._recorded:
            return cleared
        return replace(cleared, notes=(*cleared.notes, "not recorded: a restart of the agent brings it back"))

    def look_soon(self) -> None:
        """An event says that the driver has news, of another kind than geometry; in a storm, now and then."""
        if self._news_at is None:
            self._news_at = max(self._news_soonest, self._clock())
            self._wake.set()

    def geometry_changed(self) -> None:
        """An event says that instances came or went."""
        if self._changed_at is None:
            self._changed_at = self._clock()
        self._wake.set()

    def fault_arrived(self) -> None:
        """An XID came. The first is told at once; in a storm they merge where they are for half a second."""
        if self._faults_at is None:
            self._faults_at = max(self._faults_soonest, self._clock())
            self._wake.set()

    def kubelet_changed(self) -> None:
        """A new kubelet: who holds what is to be read again."""
        self._usage_wanted = True
        self._wake.set()

    async def first(self) -> None:
        """The first decision: after it `offers` is what the kubelet may be shown."""
        await self._step(usage_within=None)

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                await self._wait()
                await self._step(usage_within=USAGE_WITHIN)
        finally:
            if self._leases_looked_for is not None:
                self._leases_looked_for.cancel()
                self._leases_looked_for = None
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

    async def _step(self, *, usage_within: float | None) -> None:
        now = self._clock()
        suspect = self._changed_at is not None
        self._judge_due_faults()
        found: dict[str, Any] = {}
        if suspect or any(now >= moment for moment in self._looks()):
            self._changed_at = self._news_at = None
            found = await self._look(suspect=suspect)
        unready = await self._prepare(found.get("inventory", self.world.inventory))
        # Together, for others decide while we wait: a device is never known without what it lacks.
        self.world = replace(self.world, **found, unready=MappingProxyType(unready))
        await self._read_usage(now, within=usage_within)
        self._decide()

    def _looks(self) -> list[float]:
        """When to look at the driver: by itself, on news, and where it does not come back to us."""
        overdue = self._driver.overdue_at if self.world.driver_failed is None else None
        return [moment for moment in (self._look_at, self._news_at, overdue) if moment is not None]

    async def _read_usage(self, now: float, *, within: float | None) -> None:
        """A kubelet that does not say who holds what is waited for no longer than `within`."""
        self._note_usage()
        if self._reading is None and (self._usage_wanted or _is_due(self.outcome, now)):
            self._usage_wanted = False
            self._reading = asyncio.ensure_future(self._usage.read(self._clock()))
            try:
                await asyncio.wait((self._reading,), timeout=within)
            finally:
                # Also where who asked is gone: nobody else would take note of the answer.
                self._note_usage()
                if self._reading is not None:
                    self._reading.add_done_callback(lambda _: self._wake.set())

    def _note_usage(self) -> None:
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            self.world = replace(self.world, usage=reading.result())

    def _judge_due_faults(self) -> None:
        if self._faults_at is not None and self._clock() >= self._faults_at:
            self._judge_faults()

    def _judge_faults(self) -> None:
        """Before there is an inventory there is nobody to be concerned: they wait for the first."""
        if self.world.inventory is None:
            return
        self._faults_at, self._faults_soonest = None, self._clock() + FAULTS_AGAIN
        if faults := self._driver.faults():
            _tell_faults(faults)
            self._decide(faults)

    def _decide(self, faults: tuple[Fault, ...] = ()) -> None:
        # From here to the published offers there is no await: Allocate sees the old world or the new one.
        world = replace(
            self.world,
            now=self._clock(),
            leases=MappingProxyType(dict(self._leases)),
            faults=faults,
            memory=self.outcome.memory if self.outcome is not None else self.world.memory,
        )
        outcome = decide(world)
        for key, answered in outcome.ended_leases:
            if self._leases.get(key) == answered:
                del self._leases[key]
        _tell(self.outcome, outcome)
        self.world, self.decided, self.outcome = world, world, outcome
        if self._record is not None:
            self._recorded = self._record.save(outcome.memory.health)
        if outcome.look_at is not None:
            self._look_at = min(self._look_at, outcome.look_at)
        self.offers.set(outcome.offers)

    async def _look(self, *, suspect: bool) -> dict[str, Any]:
        """What it changes of the world."""
        before, began = self.world.inventory, self._clock()
        self._news_soonest = began + FAULTS_AGAIN
        try:
            inventory = await self._look_and_judge(suspect=suspect)
        except DriverError as exc:
            if isinstance(exc, LibraryOutdated):
                self._on_outdated(str(exc))
            elif self.world.driver_failed is None or str(exc) != self.world.driver_error:
                log.warning("the driver does not answer, will try again", extra={"reason": str(exc)})
            failed = self.world.driver_failed if self.world.driver_failed is not None else began
            self._look_at = self._clock() + self._retry
            self._retry = min(2 * self._retry, RETRY_LONGEST)
            return {"driver_failed": failed, "driver_error": str(exc)}
        if self.world.driver_failed is not None:
            log.info("the driver answers")
        self._look_at = self._clock() + self._pace.interval(events_work=self._driver.events_work)
        self._retry = RETRY_SHORTEST
        _tell_geometry(before, inventory)
        return {"inventory": inventory, "looked": began, "driver_failed": None, "driver_error": ""}

    async def _look_and_judge(self, *, suspect: bool) -> Inventory:
        """What the driver says. A driver that is slow to say it holds back no XID."""
        asked = suspects(self.outcome.memory.health if self.outcome is not None else self.world.memory.health)
        looking = asyncio.ensure_future(self._driver.look(suspect=suspect, processes_of=asked))
        try:
            while not looking.done():
                await asyncio.wait((looking,), timeout=FAULTS_AGAIN)
                self._judge_due_faults()
        finally:
            looking.cancel()
        inventory = looking.result()
        self._judge_faults()
        return inventory

    async def _prepare(self, inventory: Inventory | None) -> dict[DeviceId, str]:
        """Before a device is offered, all that a container will need of it is there, or it is unready."""
        self._prepare_at = None
        unready: dict[DeviceId, str] = {}
        for preparation in self._preparations if inventory is not None else ():
            assert inventory is not None
            readiness = await preparation.prepare(inventory, self.world.options.edits)
            unready |= readiness.unready
            if not readiness.complete:
                self._prepare_at = self._clock() + PREPARE_AGAIN
        return unready

    def _is_curious(self) -> bool:
        """Whether somebody is sick who is well once seen to be gone: before it is made anew, if it is."""
        health = self.outcome.memory.health if self.outcome is not None else Health()
        return any(sickness.device is not None for sickness in health.sick.values())

    async def _wait(self) -> None:
        """Until there is something to do."""
        outcome, moments = self.outcome, self._looks()
        faults_at = self._faults_at if self.world.inventory is not None else None
        moments += [moment for moment in (self._prepare_at, faults_at) if moment is not None]
        if outcome is not None:
            usage_at = outcome.usage_at if self._reading is None else None
            moments += [moment for moment in (outcome.wake_at, usage_at) if moment is not None]
        await first_of(self._wake.wait(), timeout=max(min(moments) - self._clock(), 0.0))
        self._wake.clear()
        latest = (
            None if self._changed_at is None or self._is_curious() else self._changed_at + DEBOUNCE_LATEST
        )
        while latest is not None and (left := latest - self._clock()) > 0:
            await first_of(self._wake.wait(), timeout=min(DEBOUNCE, left))
            if not self._wake.is_set():
                break
            self._wake.clear()


def _is_due(outcome: Outcome | None, now: float) -> bool:
    return outcome is not None and outcome.usage_at is not None and now >= outcome.usage_at


def _tell_faults(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        told = xid(fault.xid)
        log.warning(
            "xid",
            extra={
                "xid": fault.xid,
                "mnemonic": told.mnemonic or None,
                "action": told.action or None,
                "gpu": fault.gpu,
                "gi": fault.gi,
                "ci": fault.ci,
                "count": fault.count,
            },
        )


def _tell_geometry(before: Inventory | None, after: Inventory) -> None:
    old = {} if before is None else {device.uuid: (gpu, device) for gpu, device in before.devices()}
    new = {device.uuid: (gpu, device) for gpu, device in after.devices()}
    if before is None:
        log.info(
            "inventory",
            extra={"driver": after.driver_version, "gpus": len(after.gpus), "mig_devices": len(new)},
        )
        return
    for found, phrase, other in ((old, "mig device gone", new), (new, "mig device appeared", old)):
        for id_, (gpu, device) in found.items():
            if id_ not in other:
                log.info(phrase, extra={"device": id_, "gpu": gpu.index, "profile": device.profile})


def _tell(before: Outcome | None, after: Outcome) -> None:
    """One line for each warning that is new, each change of health, each resource whose numbers changed."""
    old: Mapping[ResourceName, tuple[int, int]] = _counts(before)
    new = _counts(after)
    for warning in after.warnings:
        if before is None or warning not in before.warnings:
            log.warning("attention", extra={"reason": warning})
    for change in after.health_changes:
        level, phrase = (logging.WARNING, "fell sick") if change.sick else (logging.INFO, "no longer sick")
        log.log(level, phrase, extra={"device": change.subject, "gpu": change.gpu, "reason": change.reason})
    for resource in sorted(old.keys() | new.keys()):
        if old.get(resource) != new.get(resource):
            healthy, unhealthy = new.get(resource, (0, 0))
            log.info("offer", extra={"resource": resource, "healthy": healthy, "unhealthy": unhealthy})


def _counts(outcome: Outcome | None) -> dict[ResourceName, tuple[int, int]]:
    if outcome is None:
        return {}
    counts = {}
    for resource, offer in outcome.offers.resources.items():
        healthy = sum(device.healthy for device in offer.devices.values())
        counts[resource] = (healthy, len(offer.devices) - healthy)
    return counts
