"""One simulated driver for many processes: a versioned JSON file, a lock, and a journal of events beside it.

`state.json` is the truth. Whoever changes it holds `flock` on `lock`, writes a new file and renames it,
so a reader never sees half a state and a writer killed at any point leaves the old one or the new one.
Reading is one stat(2) while nothing changes. The cache key needs care: inode numbers are reused at once
and the kernel's clock ticks every few milliseconds, so a writer stamps each file with a strictly growing
mtime.

Events go to `events.jsonl`, which only grows at its end until it is cut to its younger half. The state
is renamed *first*, carrying the change's events in its `outbox`, and the journal is appended after: a
writer that dies in between loses nothing, because readers look in both places and the next writer
completes the journal. Waiting is inotify on the directory, where the one thing that happens without
noise is that rename. Nothing here ever polls on a timer.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from migplugin.errors import SimulatorError
from migplugin.sim import files
from migplugin.sim.model import Node
from migplugin.sim.records import FORMAT, Event, NodeRecord

JOURNAL_LIMIT = 256 * 1024  # bytes: some 3,000 events


class Store:
    """The state directory of one simulated driver. Safe to share between threads and processes."""

    def __init__(self, state_dir: str | os.PathLike[str]) -> None:
        self.state_dir = Path(state_dir)
        self._state = self.state_dir / "state.json"
        self._journal = self.state_dir / "events.jsonl"
        self._doubt = self.state_dir / "files.changing"
        self._cached: tuple[tuple[int, int, int], Node] | None = None

    @property
    def exists(self) -> bool:
        return self._state.exists()

    def create(self, node: Node, *, replace: bool = False) -> None:
        """Put a new node here, with its files. SimulatorError if one is there, unless it is to be replaced.

        A replaced driver's sessions go on: numbers that must not come back (events, serials) do not.
        """
        try:
            self.state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SimulatorError(f"cannot make the state directory {self.state_dir}: {exc.strerror}") from exc
        with self._locked():
            if self.exists and not replace:
                raise SimulatorError(
                    f"{self.state_dir} already holds a simulated driver; use it as it is, or init --replace"
                )
            node.record.outbox = []
            if not self.exists:
                self._journal.unlink(missing_ok=True)  # of a driver that somebody removed by hand
            else:
                with contextlib.suppress(SimulatorError):  # a damaged state is what one replaces
                    _continue(node.record, self._decode(self._state.read_bytes()))
            wanted = files.plan(node)
            files.apply(wanted, files.present(self.state_dir, wanted), self.state_dir)
            self._write(node.record)
            self._doubt.unlink(missing_ok=True)

    def read(self) -> Node:
        """The node as it is. The same object until something changes it: look, and do not touch."""
        try:
            stat = self._state.stat()
            key = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            cached = self._cached
            if cached is not None and cached[0] == key:
                return cached[1]
            with self._state.open("rb") as file:
                stat = os.fstat(file.fileno())
                node = Node(self._decode(file.read()))
        except FileNotFoundError:
            raise self._absent() from None
        except OSError as exc:
            raise SimulatorError(
                f"the simulator's state {self._state} cannot be read: {exc.strerror}"
            ) from exc
        self._cached = ((stat.st_ino, stat.st_mtime_ns, stat.st_size), node)
        return node

    @contextlib.contextmanager
    def change(self) -> Iterator[Node]:
        """The node, to be changed under the lock. Published when the block ends, dropped if it raises."""
        with self._locked():
            try:
                node = Node(self._decode(self._state.read_bytes()))
            except FileNotFoundError:
                raise self._absent() from None
            self._complete_journal(node.record)
            node.record.outbox = []
            before = msgspec.json.encode(node.record)
            files_before = self._present(node)
            switches = (node.switches.driver_loaded, node.switches.driver_version)
            yield node
            if node.switches.driver_loaded and switches != (True, node.switches.driver_version):
                node.load_driver()
            if msgspec.json.encode(node.record) == before:
                return
            node.record.outbox = node.journal
            # Files first: who is woken by the new state must find them as the state says.
            wanted = files.plan(node)
            if wanted != files_before:
                self._doubt.touch()
                files.apply(wanted, files_before, self.state_dir)
            self._write(node.record)
            self._doubt.unlink(missing_ok=True)
            self._append(node.journal)

    def refresh_files(self) -> None:
        """Derive the files again from the state, whatever lies there: a person may have removed some.

        Who may not write here shares the driver all the same, and leaves the files to those who may.
        """
        self.read()
        if not os.access(self.state_dir, os.W_OK):
            return
        with self._locked():
            node = Node(self._decode(self._state.read_bytes()))
            self._complete_journal(node.record)
            wanted = files.plan(node)
            files.apply(wanted, files.present(self.state_dir, wanted), self.state_dir)
            self._doubt.unlink(missing_ok=True)

    def events_after(self, seq: int) -> list[Event]:
        """Every event younger than `seq` that the journal still holds, oldest first."""
        record = self.read().record
        outbox = record.outbox
        if record.last_seq <= seq or (outbox and outbox[0].seq <= seq + 1):
            return [event for event in outbox if event.seq > seq]
        found = {event.seq: event for event in _parse(self._raw_journal()) if event.seq > seq}
        found |= {event.seq: event for event in outbox if event.seq > seq}
        return [found[key] for key in sorted(found)]

    def _absent(self) -> SimulatorError:
        return SimulatorError(
            f"there is no simulated driver in {self.state_dir}; "
            f"make one with: migplugin sim --state {self.state_dir} init SPEC"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            fd = os.open(self.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise self._absent() from None
        except OSError as exc:
            raise SimulatorError(
                f"cannot lock the simulator's state in {self.state_dir}: {exc.strerror}"
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _present(self, node: Node) -> files.Plan:
        """The files that are there: as the state says, unless a writer died while it changed them."""
        wanted = files.plan(node)
        return files.present(self.state_dir, wanted) if self._doubt.exists() else wanted

    def _write(self, record: NodeRecord) -> None:
        scratch = self.state_dir / "state.json.new"
        stamp = time.time_ns()
        with contextlib.suppress(FileNotFoundError):
            stamp = max(stamp, self._state.stat().st_mtime_ns + 1)
        try:
            scratch.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
            os.utime(scratch, ns=(stamp, stamp))
            scratch.replace(self._state)
        except OSError as exc:
            raise SimulatorError(
                f"the simulator's state {self._state} cannot be written: {exc.strerror}"
            ) from exc

    def _append(self, events: list[Event]) -> None:
        if not events:
            return
        lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        with self._journal.open("ab") as file:
            file.write(lines)
            size = file.tell()
        if size > JOURNAL_LIMIT:
            kept = self._journal.read_bytes()[-JOURNAL_LIMIT // 2 :].partition(b"\n")[2]
            scratch = self.state_dir / "events.jsonl.new"
            scratch.write_bytes(kept)
            scratch.replace(self._journal)

    def _complete_journal(self, record: NodeRecord) -> None:
        """Mend what a killed writer left: a torn last line, or events that only the outbox has."""
        if not record.outbox:
            return
        raw = self._raw_journal()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            with self._journal.open("r+b") as file:
                file.truncate(len(whole))
        last = _parse(whole[whole.rfind(b"\n", 0, -1) + 1 :])
        done = last[0].seq if last else 0
        self._append([event for event in record.outbox if event.seq > done])

    def _raw_journal(self) -> bytes:
        try:
            return self._journal.read_bytes()
        except FileNotFoundError:
            return b""

    def _decode(self, raw: bytes) -> NodeRecord:
        try:
            found = msgspec.json.decode(raw, type=_Versioned).version
            if found != FORMAT:
                raise SimulatorError(
                    f"the simulator's state {self._state} has format {found}, this program reads {FORMAT}; "
                    f"make it anew with: migplugin sim --state {self.state_dir} init --replace SPEC"
                )
            return msgspec.json.decode(raw, type=NodeRecord)
        except msgspec.MsgspecError as exc:
            raise SimulatorError(
                f"the simulator's state {self._state} is damaged ({exc}); "
                f"make it anew with: migplugin sim --state {self.state_dir} init --replace SPEC"
            ) from exc


def _parse(journal: bytes) -> list[Event]:
    """The events of every whole line. A damaged one is passed over: the state is the truth."""
    events = []
    for line in journal.splitlines(keepends=True):
        if line.endswith(b"\n"):
            with contextlib.suppress(msgspec.MsgspecError):
                events.append(msgspec.json.decode(line, type=Event))
    return events


class _Versioned(msgspec.Struct):
    version: int


def _continue(record: NodeRecord, old: NodeRecord) -> None:
    """Number `record` on from where `old` was."""
    record.last_seq += old.last_seq
    record.last_serial += old.last_serial
    for gpu in record.gpus:
        for gi in gpu.instances:
            gi.serial += old.last_serial
            for ci in gi.compute:
                ci.serial += old.last_serial
