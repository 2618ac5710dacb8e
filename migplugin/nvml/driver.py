"""The driver, owned: one thread for every NVML call, one session, and doubts about that session.

A long-lived session may go on listing what was destroyed and not see what is new (nvml.md 3.2). So each
look is compared with the driver's files, and where they disagree, or where an event said that something
changed and nothing did, the session is ended, opened anew and read again: once. What a fresh session
says is the truth, so a disagreement that stays is remembered and not asked about again. Where neither
files nor events would tell that a session is stale, or a GPU is broken in it, it is trusted for a minute.

The session never ends under the event thread: that is stopped first, and if it does not come back from
NVML the old session is kept, since ending it then is undefined. Events are a help and no condition: a
driver without them is looked at more often.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

from migplugin.aio import Bell, Mailbox, OwnerThread
from migplugin.core.inventory import GpuUuid, Inventory
from migplugin.core.sickness import Fault
from migplugin.errors import DriverError, DriverTimeout, LibraryOutdated
from migplugin.nvml import binding
from migplugin.nvml.events import EventThread, Patience, Registration, Scope, merge
from migplugin.nvml.library import Successor
from migplugin.nvml.snapshot import Look, Snapshots

log = logging.getLogger(__name__)

UNSEEN_SESSION_TRUSTED = 60.0
CLOSE_WITHIN, END_WITHIN = 1.0, 0.1


class Driver:
    """Looks at the driver from one event loop, on which it calls `on_geometry`, `on_fault` and `on_news`: of
    what the next look will show.
    """

    def __init__(
        self,
        *,
        library: Callable[[], object] | None,
        search: Path,
        proc_root: Path,
        sysfs_root: Path,
        dev_root: Path,
        deadline: float,
        on_geometry: Callable[[], None],
        on_fault: Callable[[], None],
        on_news: Callable[[], None],
    ) -> None:
        self._library = library
        self._search = search
        self._deadline = deadline
        self._geometry_bell = Bell(on_geometry)
        self._fault_bell = Bell(on_fault)
        self._news_bell = Bell(on_news)
        self._faults: Mailbox[Scope, Fault] = Mailbox(merge)
        self._owner = OwnerThread("nvml")
        self._ended = False
        self._told_lost = 0
        # From here on everything belongs to the owner thread.
        self._snapshots = Snapshots(proc_root, sysfs_root, dev_root)
        self._successor: Successor | None = None
        self._opened_at: float | None = None
        self._registration: Registration | None = None
        self._events: EventThread | None = None
        self._patience = Patience()
        self._mute: set[GpuUuid] = set()
        self._last: Inventory | None = None
        self._known: frozenset[tuple[GpuUuid, int, int]] = frozenset()
        self._tells_geometry = False
        self._given_up = False
        self._told_deaf = False

    @property
    def events_work(self) -> bool:
        """Whether the driver tells of every change of geometry on every GPU that has MIG, and no GPU is
        broken: such a one tells nothing, not even that it is back.
        """
        events = self._events
        return self._tells_geometry and events is not None and events.works

    @property
    def overdue_at(self) -> float | None:
        """When the driver counts as hung if it still waits for events then; None where it does not wait."""
        events = self._events
        return None if events is None else events.overdue_at(self._deadline)

    def faults(self) -> tuple[Fault, ...]:
        """The XIDs since the last call, merged by scope, oldest first."""
        if (lost := self._faults.dropped) > self._told_lost:
            log.warning("too many XIDs at once, the oldest are lost", extra={"lost": lost - self._told_lost})
            self._told_lost = lost
        return self._faults.take()

    async def look(self, *, suspect: bool = False, processes_of: AbstractSet[str] = frozenset()) -> Inventory:
        """Everything the driver says now; `suspect` where an event said that something changed. Whether
        something runs on them is asked of those ids alone.

        Raises LibraryMissing, DriverNotReady or another DriverError where the driver as a whole does
        not answer, DriverTimeout where a call does not come back before the deadline, LibraryOutdated
        where no later look of this process can succeed.
        """
        if self._ended:
            raise DriverError("the driver was closed, nobody looks at it any more")
        for bell in (self._geometry_bell, self._fault_bell, self._news_bell):
            bell.loop = asyncio.get_running_loop()
        try:
            return await self._owner.call(lambda: self._look(processes_of, suspect=suspect), self._deadline)
        except TimeoutError as exc:
            raise DriverTimeout(f"no answer from NVML within {self._deadline:g} s") from exc

    async def close(self) -> None:
        """Ends the session, or leaves it to the end of the process; within a second, whatever hangs."""
        if self._ended:
            return
        self._ended = True
        if self._events is not None:
            self._events.ask_to_stop()
        if self._successor is not None:
            self._successor.close()
        try:
            await self._owner.call(self._end, CLOSE_WITHIN)
        except (TimeoutError, DriverError) as exc:
            log.debug("the NVML session was not ended", extra={"reason": str(exc)})
        self._owner.close()

    def _look(self, processes_of: AbstractSet[str], *, suspect: bool) -> Inventory:
        complete, began = False, time.monotonic()
        try:
            self._snapshots.processes_of = processes_of
            inventory = self._read(suspect=suspect)
            complete = not self._ended
        finally:
            # Whatever is wrong with the driver as a whole, the next look begins with a new session. And a
            # look that hung until after the end has nobody left who would end its session.
            if not complete:
                self._close()
            if time.monotonic() >= began + self._deadline:
                self._news_bell()  # who asked has given up by now, and would not ask again for a while
        return inventory

    def _read(self, *, suspect: bool) -> Inventory:
        self._check()
        opened = self._opened_at is None
        if opened:
            self._open()
        look = self._snapshots.take()
        if not opened and (why := self._doubt(look, suspect=suspect)) and self._close():
            log.debug("NVML session opened anew", extra={"reason": why})
            self._last = look.inventory
            self._open()
            look = self._snapshots.take()
            opened = True
        if opened:
            self._known = look.disagreements
        if self._register(look.inventory):
            # What happened between that look and now was told to nobody.
            look = self._snapshots.take()
        self._known &= look.disagreements
        self._last = look.inventory
        return look.inventory

    def _check(self) -> None:
        """Raises LibraryOutdated or DriverTimeout where asking would be in vain."""
        if self._successor is not None and self._successor.works():
            raise LibraryOutdated("another NVML library has taken the place of the one that we loaded")
        events = self._events
        if events is not None and events.outdated is not None:
            raise events.outdated
        overdue = self.overdue_at
        if overdue is not None and time.monotonic() >= overdue:
            raise DriverTimeout(f"nvmlEventSetWait has not come back for more than {self._deadline:g} s")

    def _doubt(self, look: Look, *, suspect: bool) -> str:
        """Why the session may be telling old news, or ""."""
        events = self._events
        if events is not None and not events.alive:
            return "its event thread had to be given up"
        if self._given_up:
            return ""
        if look.disagreements - self._known:
            return "what is listed and the files disagree"
        # Who is listed, and nothing else: a stale session may tell the past's devices the present's places.
        if suspect and self._last is not None and _devices(look.inventory) == _devices(self._last):
            return "an event told of a change that this session does not show"
        broken = {gpu.uuid for gpu in look.inventory.broken if gpu.uuid is not None}
        registered = self._registration
        if registered is not None and registered.is_spoilt():
            return "its event set is spoilt"
        heard = registered is not None and any(registered.hears(gpu) for gpu in broken)
        if heard and events is not None and events.failing:
            return "a broken GPU keeps the events of the others away"
        age = time.monotonic() - (self._opened_at or 0.0)
        mig = any(gpu.mig_enabled for gpu in look.inventory.gpus)
        unsure = look.hidden or bool(look.inventory.broken) or (mig and not self.events_work)
        if unsure and not suspect and age > UNSEEN_SESSION_TRUSTED:
            return "nothing would tell that it is stale"
        return ""

    def _open(self) -> None:
        if self._successor is None:
            library = None if self._library is None else self._library()
            self._successor = Successor(binding.load(library, search=self._search), self._news_bell)
        binding.init()
        self._opened_at = time.monotonic()
        self._snapshots.forget()
        self._mute.clear()
        # Before the first look: an event in between costs a second look, never a miss.
        try:
            self._registration = self._registered()
            while self._registration.is_spoilt():
                spoilt, self._registration = self._registration, None
                spoilt.free()
                self._registration = self._registered()
        except DriverError as exc:
            if exc.call == "nvmlDeviceGetCount" or isinstance(exc, LibraryOutdated):
                raise
            if not self._told_deaf:
                self._told_deaf = True
                log.warning("the driver has no events, looking now and then", extra={"reason": str(exc)})
            return
        self._events = EventThread(
            self._registration,
            self._patience,
            self._faults,
            self._geometry_bell,
            self._fault_bell,
            self._news_bell,
        )
        self._events.start()

    def _registered(self) -> Registration:
        """Everything that GPUs can tell. Where the set is spoilt, the one to blame is mute the next time."""
        count = binding.gpu_count()
        registration = Registration()
        # A broken GPU can make every wait fail, also for the others: it is added when it answers again.
        broken = {gpu.index for gpu in self._last.broken} if self._last is not None else set()
        for index in range(count):
            if index not in broken:
                self._add(registration, index)
        return registration

    def _add(self, registration: Registration, index: int) -> bool:
        """Whether there is more to be heard now. Nothing is added to a spoilt set."""
        if registration.is_spoilt():
            return False
        try:
            handle = binding.gpu(index)
            uuid = GpuUuid(binding.uuid(handle))
            return uuid not in self._mute and registration.add(handle, uuid)
        except LibraryOutdated:
            raise
        except DriverError as exc:
            log.debug("no events of this GPU", extra={"gpu": index, "reason": str(exc)})
            if registration.is_spoilt():
                self._mute.add(uuid)
            return False

    def _register(self, inventory: Inventory) -> bool:
        """Some drivers send changes of geometry only once MIG is on, and some GPUs come back: ask again.

        Whether there is more to be heard now.
        """
        registration = self._registration
        if registration is None:
            self._tells_geometry = False
            return False
        more = False
        for gpu in inventory.gpus:
            complete = gpu.mig_enabled is None or registration.tells_geometry_of({gpu.uuid})
            if not (complete and registration.hears(gpu.uuid)):
                more = self._add(registration, gpu.index) or more
        capable = {gpu.uuid for gpu in inventory.gpus if gpu.mig_enabled is not None}
        self._tells_geometry = registration.tells_geometry_of(capable) and not inventory.broken
        return more

    def _end(self) -> None:
        """As `_close`, but does not wait for a thread that waits for events: the process ends now."""
        if self._events is None or self._events.stop(END_WITHIN):
            self._close()

    def _close(self) -> bool:
        """Whether there is no session any more."""
        events = self._events
        # One that did not come back the last time is not waited for again.
        if events is not None and events.alive and (self._given_up or not events.stop()):
            if not self._given_up:
                log.warning("the event thread does not come back from NVML, the session stays as it is")
            self._given_up = True
            return False
        if events is not None:
            events.carry_rest()
        self._given_up = False
        self._events = None
        for end in (self._registration.free if self._registration else None, binding.shutdown):
            if end is not None and self._opened_at is not None:
                try:
                    end()
                except DriverError as exc:
                    log.debug("ending the session", extra={"reason": str(exc)})
        self._registration = None
        self._opened_at = None
        return True


def _devices(inventory: Inventory) -> frozenset[tuple[str, int, int]]:
    return frozenset((device.uuid, device.gi, device.ci) for _, device in inventory.devices())
