"""Asyncio helpers that know no domain: a value to follow, a mailbox, an owner thread, a directory watch.

Three ways to travel (DESIGN 3): a `Cell` holds the latest value for many readers, a `Mailbox` carries
what must not be lost between threads and is bounded by its keys, and a wake-up carries nothing.
Threads carry, they never decide: whatever they find is handed to the one loop.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

POLL_EVERY, WATCHED_POLL_EVERY = 1.0, 5.0

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Cell(Generic[T]):
    """The latest value of something, and its version: a number that grows with every change."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        return self._value

    @property
    def version(self) -> int:
        return self._version

    def set(self, value: T) -> bool:
        """Whether `value` differs from the last one; only then are the readers woken."""
        if value == self._value:
            return False
        self._value = value
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return True

    def amend(self, value: T) -> None:
        """The value is `value`, which differs in nothing that a reader waits for: nobody is woken."""
        self._value = value

    async def after(self, version: int) -> tuple[int, T]:
        """The version and value once the version is not `version`. Values in between may be skipped."""
        while self._version == version:
            await self._changed.wait()
        return self._version, self._value


class Mailbox(Generic[K, T]):
    """Values by key, merged where a key comes again: nothing is lost and the size is bounded by the keys.

    Any thread may put; `limit` keys are kept, and beyond that the oldest key gives way, counted in
    `dropped` (a bound against a driver gone mad, not a working state).
    """

    def __init__(self, merge: Callable[[T, T], T], limit: int = 1 << 16) -> None:
        self._merge = merge
        self._limit = limit
        self._items: dict[K, T] = {}
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, key: K, value: T) -> None:
        with self._lock:
            if key in self._items:
                value = self._merge(self._items.pop(key), value)
            elif len(self._items) >= self._limit:
                del self._items[next(iter(self._items))]
                self.dropped += 1
            self._items[key] = value

    def take(self) -> tuple[T, ...]:
        """Everything that was put since the last call, oldest first."""
        with self._lock:
            items, self._items = self._items, {}
        return tuple(items.values())


class Bell:
    """Calls `callback` on the loop, once for all rings that come before it gets there. Any thread rings."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._rung = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self) -> None:
        if self._rung or self.loop is None:
            return
        self._rung = True
        _post(self.loop, self._answer)

    def _answer(self) -> None:
        # First: a ring from now on may be about something that the callback does not see any more.
        self._rung = False
        self._callback()


class OwnerThread:
    """A named daemon thread that runs one call at a time, for an owner on the event loop.

    A call that does not come back in time is given up, not killed: the thread stays in it, and later
    calls wait for it within their own deadline. Nothing queues behind it, and since the thread is a
    daemon it holds no process back from its exit (asyncio.to_thread would, for as long as it hangs).
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._turn = asyncio.Lock()
        self._running: asyncio.Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def stuck(self) -> bool:
        """Whether a call is still running that its caller may have given up."""
        return self._running is not None and not self._running.done()

    async def call(self, function: Callable[[], T], deadline: float) -> T:
        """What `function` returns or raises, when run in the thread.

        Raises TimeoutError when it, or an earlier call that still runs, takes longer than `deadline` seconds.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(deadline), self._turn:
            if self._running is not None and not self._running.done():
                await asyncio.wait((self._running,))
            answer: asyncio.Future[T] = loop.create_future()
            self._running = answer
            self._calls.put(lambda: _answer(loop, answer, function))
            await asyncio.wait((answer,))
        return answer.result()

    def close(self) -> None:
        """The thread ends after what it is doing; nobody waits for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _answer(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], function: Callable[[], T]) -> None:
    result: T
    try:
        result = function()
    except BaseException as exc:  # noqa: BLE001  the caller gets it, whatever it is
        _post(loop, _fail, answer, exc)
    else:
        _post(loop, answer.set_result, result)


def _fail(answer: asyncio.Future[Any], exc: BaseException) -> None:
    answer.set_exception(exc)
    answer.exception()  # seen, even when the caller has given up: no "never retrieved" in the log


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    # The loop may be closed by now: a call that hung until after the end has nobody left to tell.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)


async def first_of(*waits: Coroutine[Any, Any, Any], timeout: float | None = None) -> None:  # noqa: ASYNC109
    """Returns when one of `waits` has, or after `timeout` seconds; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def keep_running(name: str, run: Callable[[], Awaitable[None]], *, longest: float = 30.0) -> None:
    """Runs `run` again whenever it fails unforeseen, with growing pauses.

    One loop's bug is not the others' end.
    """
    pause = 0.5
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        try:
            await run()
        except Exception:
            if loop.time() - began > 2 * longest:
                pause = 0.5
            log.exception("unexpected failure, will run again", extra={"task": name, "retry_in": pause})
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        else:
            return


class DirectoryWatch:
    """Calls `wake` on the loop when a name in `directory` comes, goes or changes.

    By inotify (watchdog's thread) where an instance is left, else once a second whatever happened. A
    directory that is not there yet is looked for once a second, one that was replaced every five.
    """

    def __init__(self, directory: Path, wake: Callable[[], None]) -> None:
        self._directory = directory
        self._wake = wake
        self._polling = False

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            seen = _identity(self._directory)
            observer = self._observe() if seen is not None else None
            try:
                # What happened before the watch stood is found by looking once, now.
                self._wake()
                while _identity(self._directory) == seen:
                    # With a watch, only a directory that was replaced is found this way.
                    await asyncio.sleep(POLL_EVERY if observer is None else WATCHED_POLL_EVERY)
                    if observer is None:
                        self._wake()
            finally:
                if observer is not None:
                    observer.stop()

    def _observe(self) -> Any:
        from watchdog.events import FileSystemEvent, FileSystemEventHandler  # noqa: PLC0415  not needed to serve
        from watchdog.observers import Observer  # noqa: PLC0415

        # Files may change faster than the loop turns.
        wake = Bell(self._wake)
        wake.loop = asyncio.get_running_loop()

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                # Opening and closing are our own reads of the kubelet's checkpoint.
                if event.event_type in {"created", "deleted", "moved", "modified"}:
                    wake()

        observer = None
        try:
            # Also making it takes an inotify instance.
            observer = Observer()
            observer.daemon = True
            observer.name = "fswatch"
            observer.schedule(Handler(), str(self._directory))
            observer.start()
        except OSError as exc:
            if observer is not None:
                observer.stop()
            if not self._polling:
                self._polling = True
                log.warning(
                    "no inotify watch, looking once a second instead",
                    extra={"directory": str(self._directory), "reason": str(exc)},
                )
            return None
        return observer


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
