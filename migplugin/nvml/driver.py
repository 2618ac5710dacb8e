"""The driver, owned: one thread for every NVML call, one session, and doubts about that session.

A long-lived session may go on listing what was destroyed and not see what is new (nvml.md 3.2). So each
look is compared with the driver's files, and where they disagree, or where an event said that something
changed and nothing did, the session is ended, opened anew and read again: once. What a fresh session
says is the truth, so a disagreement that stays is remembered and not asked about again. Where the files
cannot be seen at all, a session is trusted for a minute.

The session never ends under the event thread: that is stopped first, and if it does not come back from
NVML the old session is kept, since ending it then is undefined.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from migplugin.aio import Mailbox, OwnerThread
from migplugin.core.decide import Fault
from migplugin.core.inventory import GpuUuid, Inventory
from migplugin.errors import DriverError, DriverTimeout
from migplugin.nvml import binding
from migplugin.nvml.events import EventThread, Registration, Scope, merge
from migplugin.nvml.snapshot import Look, Snapshots

log = logging.getLogger(__name__)

UNSEEN_SESSION_TRUSTED = 60.0
CLOSE_WITHIN = 1.0


class Driver:
    """Looks at the driver from one event loop. `on_geometry` and `on_fault` are called on that loop."""

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
    ) -> None:
        self._library = library
        self._search = search
        self._deadline = deadline
        self._on_geometry = on_geometry
        self._on_fault = on_fault
        self._faults: Mailbox[Scope, Fault] = Mailbox(merge)
        self._owner = OwnerThread("nvml")
        self._loop: asyncio.AbstractEventLoop | None = None
        # From here on everything belongs to the owner thread.
        self._snapshots = Snapshots(proc_root, sysfs_root, dev_root)
        self._loaded = False
        self._opened_at: float | None = None
        self._registration: Registration | None = None
        self._events: EventThread | None = None
        self._last: Inventory | None = None
        self._known: frozenset[tuple[GpuUuid, int, int]] = frozenset()
        self._tells_geometry = False

    @property
    def events_work(self) -> bool:
        """Whether the driver tells of every change of geometry on every GPU that has MIG."""
        return self._tells_geometry

    def faults(self) -> tuple[Fault, ...]:
        """The XIDs since the last call, merged by scope, oldest first."""
        return self._faults.take()

    async def look(self, *, suspect: bool = False) -> Inventory:
        """Everything the driver says now; `suspect` where an event said that something changed.

        Raises LibraryMissing, DriverNotReady or another DriverError where the driver as a whole does
        not answer, DriverTimeout where a call does not come back before the deadline.
        """
        self._loop = asyncio.get_running_loop()
        try:
            return await self._owner.call(lambda: self._look(suspect=suspect), self._deadline)
        except TimeoutError as exc:
            raise DriverTimeout(f"no answer from NVML within {self._deadline:g} s") from exc

    async def close(self) -> None:
        """Ends the session, or gives up on it within a second where the driver hangs."""
        try:
            await self._owner.call(self._close, CLOSE_WITHIN)
        except (TimeoutError, DriverError) as exc:
            log.debug("the NVML session was not ended", extra={"reason": str(exc)})
        self._owner.close()

    def _look(self, *, suspect: bool) -> Inventory:
        opened = self._opened_at is None
        if opened:
            self._open()
        try:
            look = self._snapshots.take()
        except DriverError:
            # Whatever is wrong with the driver as a whole, the next look begins with a new session.
            self._close()
            raise
        if not opened and (why := self._doubt(look, suspect=suspect)) and self._close():
            log.debug("NVML session opened anew", extra={"reason": why})
            self._open()
            look = self._snapshots.take()
            opened = True
        if opened:
            self._known = look.disagreements
        self._known &= look.disagreements
        self._last = look.inventory
        self._register(look.inventory)
        return look.inventory

    def _doubt(self, look: Look, *, suspect: bool) -> str:
        """Why the session may be telling old news, or ""."""
        if look.disagreements - self._known:
            return "the listed MIG devices and their files disagree"
        if suspect and look.inventory == self._last:
            return "an event told of a change that this session does not show"
        age = time.monotonic() - (self._opened_at or 0.0)
        if look.hidden and not suspect and age > UNSEEN_SESSION_TRUSTED:
            return "its MIG devices cannot be checked against files"
        return ""

    def _open(self) -> None:
        if not self._loaded:
            binding.load(None if self._library is None else self._library(), search=self._search)
            self._loaded = True
        binding.init()
        self._opened_at = time.monotonic()
        self._snapshots.forget()
        # Before the first look: an event in between costs a second look, never a miss.
        self._registration = Registration()
        for index in range(binding.gpu_count()):
            self._add(index)
        self._events = EventThread(
            self._registration,
            self._faults,
            lambda: self._tell(self._on_geometry),
            lambda: self._tell(self._on_fault),
        )
        self._events.start()

    def _add(self, index: int) -> None:
        assert self._registration is not None
        try:
            handle = binding.gpu(index)
            self._registration.add(handle, GpuUuid(binding.uuid(handle)))
        except DriverError as exc:
            log.debug("no events of this GPU", extra={"gpu": index, "reason": str(exc)})

    def _register(self, inventory: Inventory) -> None:
        """Some drivers send changes of geometry only once MIG is on; ask again where they did not."""
        assert self._registration is not None
        capable = {gpu.uuid: gpu.index for gpu in inventory.gpus if gpu.mig_enabled is not None}
        for uuid, index in capable.items():
            if not self._registration.tells_geometry_of({uuid}):
                self._add(index)
        self._tells_geometry = self._registration.tells_geometry_of(set(capable))

    def _close(self) -> bool:
        """Whether there is no session any more."""
        if self._events is not None and not self._events.stop():
            log.warning("the event thread does not come back from NVML, the session stays as it is")
            return False
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

    def _tell(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            log.debug("an event came after the end")
