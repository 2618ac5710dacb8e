"""The thread that waits for the driver to say something.

It blocks in nvmlEventSetWait, a second at a time, because a session must not end under a
thread that waits in it; and shorter for a moment after each event, since what an event tells of may be a
reason to end the session. It carries and does not decide: a change of geometry becomes a wake-up, an
XID becomes a Fault in a mailbox that merges by scope, a double-bit error is a reason to ask for the driver's
counts. An error of the wait itself (a lost GPU repeats it
at once, for ever) is a reason to look, and then to wait longer each time: never a spin. The patience for
that outlives the session: a look may open a new one, whose first wait fails like the last of the old.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from migplugin.aio import Mailbox
from migplugin.core.inventory import GpuUuid
from migplugin.core.sickness import Fault
from migplugin.errors import DriverError, LibraryOutdated
from migplugin.nvml import binding
from migplugin.nvml.binding import DOUBLE_BIT_ECC, MIG_CONFIG_CHANGE, XID_CRITICAL, Handle
from migplugin.nvml.codes import Code

log = logging.getLogger(__name__)

WAIT_MS = 1000
LIVELY_WAIT_MS, LIVELY_FOR = 50, 1.0
HUNG_AFTER = 1.0
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
GIVE_UP_AFTER = 2.0
MOST_LEFT_OVER = 10_000

Scope = tuple[GpuUuid, int | None, int | None, int]


def merge(old: Fault, new: Fault) -> Fault:
    return replace(old, count=old.count + new.count, last=new.last)


class Patience:
    """How long to pause after a wait that failed: longer each time, until one works."""

    def __init__(self) -> None:
        self.pause = 0.0

    def failed(self) -> bool:
        """Whether this is the first failure since a wait worked, in whatever session."""
        first = not self.pause
        self.pause = min(max(2 * self.pause, SHORTEST_PAUSE), LONGEST_PAUSE)
        return first

    def worked(self) -> None:
        self.pause = 0.0


class Registration:
    """One event set, and which GPUs send what into it. Made and freed on the thread that owns NVML."""

    def __init__(self) -> None:
        self.events: Handle = binding.new_event_set()
        self.gpus: dict[int, GpuUuid] = {}
        self._spoilt = False
        self._geometry: set[GpuUuid] = set()

    def add(self, handle: Handle, uuid: GpuUuid) -> bool:
        """Registers what is not registered yet; call it again when a GPU may have more to say.

        Whether there is now more to be heard than before.
        """
        more = False
        if not self.hears(uuid):
            more = self._register(handle, XID_CRITICAL)
            self._register(handle, DOUBLE_BIT_ECC)
            self.gpus[binding.address(handle)] = uuid
        if uuid not in self._geometry and self._register(handle, MIG_CONFIG_CHANGE):
            self._geometry.add(uuid)
            more = True
        return more

    def _register(self, handle: Handle, kind: int) -> bool:
        try:
            return binding.register(handle, kind, self.events)
        except DriverError as exc:
            if exc.call == "nvmlDeviceRegisterEvents" and exc.code == Code.UNKNOWN:
                self._spoilt = True
            raise

    def is_spoilt(self) -> bool:
        """Whether the set is in an undefined state and must be freed (nvml.h on UNKNOWN)."""
        return self._spoilt

    def hears(self, gpu: GpuUuid) -> bool:
        return gpu in self.gpus.values()

    def tells_geometry_of(self, gpus: AbstractSet[GpuUuid]) -> bool:
        return gpus <= self._geometry

    def free(self) -> None:
        binding.free_event_set(self.events)


class EventThread:
    """Waits on one registration until stopped."""

    def __init__(
        self,
        registration: Registration,
        patience: Patience,
        faults: Mailbox[Scope, Fault],
        on_geometry: Callable[[], None],
        on_fault: Callable[[], None],
        on_news: Callable[[], None],
    ) -> None:
        self._events = registration.events
        self._gpus: Mapping[int, GpuUuid] = registration.gpus
        self._strangers: dict[int, GpuUuid] = {}
        self._patience = patience
        self._faults = faults
        self._on_geometry = on_geometry
        self._on_fault = on_fault
        self._on_news = on_news
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml-events", daemon=True)
        self._entered: float | None = None
        self.failing = False
        self.outdated: LibraryOutdated | None = None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def works(self) -> bool:
        """Whether what the driver says would be heard."""
        return self.alive and not self.failing and not self._stop.is_set()

    def overdue_at(self, deadline: float) -> float | None:
        """When the present wait will have lasted `deadline` longer than it should; None between two waits."""
        entered = self._entered
        return None if entered is None or not self.alive else entered + WAIT_MS / 1000 + deadline

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        self._stop.set()

    def stop(self, timeout: float | None = None) -> bool:
        """Whether the thread has left NVML; where not, the session must not be ended."""
        self._stop.set()
        self._thread.join(GIVE_UP_AFTER if timeout is None else timeout)
        return not self.alive

    def carry_rest(self) -> None:
        """What came after the thread had left and before the set is freed: an XID is told only once."""
        try:
            for _ in range(MOST_LEFT_OVER):
                event = binding.wait(self._events, 0)
                if event is None:
                    return
                self._carry(event)
        except DriverError as exc:
            log.debug("what was left of the events is lost", extra={"reason": str(exc)})

    def _run(self) -> None:
        pause = lively_until = 0.0
        while not self._stop.wait(pause):
            lively = time.monotonic() < lively_until
            try:
                event = self._wait(min(LIVELY_WAIT_MS, WAIT_MS) if lively else WAIT_MS)
            except DriverError as exc:
                if self._stop.is_set():
                    return
                self.failing = True
                if isinstance(exc, LibraryOutdated):
                    self.outdated = exc
                if self._patience.failed():
                    log.warning("waiting for events failed, will try again", extra={"reason": str(exc)})
                    self._on_geometry()
                pause = self._patience.pause
                continue
            self.failing = False
            self._patience.worked()
            pause = 0.0
            if event is not None:
                lively_until = time.monotonic() + LIVELY_FOR
                self._carry(event)

    def _wait(self, wait_ms: int) -> binding.Event | None:
        self._entered = began = time.monotonic()
        try:
            return binding.wait(self._events, wait_ms)
        finally:
            self._entered = None
            if time.monotonic() > began + WAIT_MS / 1000 + HUNG_AFTER:
                self._on_news()  # who takes the driver for dead by now would not ask again for a while

    def _carry(self, event: binding.Event) -> None:
        if event.kind == MIG_CONFIG_CHANGE:
            self._on_geometry()
            return
        if event.kind == DOUBLE_BIT_ECC:
            self._on_news()
            return
        if event.kind != XID_CRITICAL:
            log.debug("an event that we did not ask for", extra={"kind": event.kind, "data": event.data})
            return
        uuid = self._gpu_of(event)
        if uuid is None:
            return
        now = time.monotonic()
        fault = Fault(uuid, event.gi, event.ci, event.data, 1, now, now)
        self._faults.put((uuid, event.gi, event.ci, event.data), fault)
        self._on_fault()

    def _gpu_of(self, event: binding.Event) -> GpuUuid | None:
        """Whose event it is. A driver need not name a GPU by the handle it gave us: one unknown is asked."""
        known = self._gpus.get(event.device) or self._strangers.get(event.device)
        if known is None:
            try:
                known = self._strangers[event.device] = GpuUuid(binding.uuid_at(event.device))
            except DriverError as exc:
                log.warning("xid of a GPU that cannot be told", extra={"xid": event.data, "reason": str(exc)})
        return known
