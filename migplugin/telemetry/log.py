"""Log lines: a fixed phrase plus fields, as text for people or JSON for machines, on stderr.

Every module logs with the standard library and puts its fields into `extra`; what a record has
beyond the standard attributes is a field. One line for each change, never for each poll.

A thread of its own formats and writes them: who reads our stderr may stop reading for a while (a full
disk under the container's log), and no allocation must wait for that.
"""

import datetime as dt
import json
import logging
import os
import queue
import threading

log = logging.getLogger(__name__)

STDERR = 2
MOST_WAITING = 10_000
END_WITHIN = 1.0

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(level: str, form: str) -> None:
    """Sends everything from `level` up to stderr, as "text" or "json"."""
    handler = Writer(STDERR)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Others speak of their own plumbing below WARNING.
    for name in ("asyncio", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_farewell)
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it reports its own stopping as an error


class Writer(logging.Handler):
    """Writes to a file descriptor in its thread. What comes while `MOST_WAITING` lines wait, or cannot be
    written, is lost and counted.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._records: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._records.qsize() < MOST_WAITING:
            self._records.put(record)
        else:
            self._lost += 1

    def close(self) -> None:
        """Returns when all is written, or after a second: if nobody reads, the rest is lost."""
        self._records.put(None)
        self._thread.join(END_WITHIN)
        super().close()

    def _run(self) -> None:
        while (record := self._records.get()) is not None:
            # Said once something can be written again: else the line that says so would be the next one lost.
            if self._write(record) and self._lost and self._records.empty():
                lost, self._lost = self._lost, 0
                log.warning("log lines were lost, nobody read them", extra={"lost": lost})

    def _write(self, record: logging.LogRecord) -> bool:
        try:
            line = self.format(record)
        except Exception as exc:  # noqa: BLE001  a line that cannot be put into words is no reason to fall silent
            line = f"a log line cannot be written: {record.msg!r}: {exc!r}"
        rest = line.encode(errors="backslashreplace") + b"\n"
        try:
            # Not by sys.stderr: who is stuck in its buffer when the process ends holds back that end.
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._lost += 1
            return False
        return True


def _is_no_farewell(record: logging.LogRecord) -> bool:
    """A kubelet that goes away while its stream is being ended makes gRPC report it with a traceback."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {
        key: value for key, value in record.__dict__.items() if key not in _STANDARD and value is not None
    }


def _time(record: logging.LogRecord) -> str:
    moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_text(value)}" for key, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "logger": record.name,
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _text(value: object) -> str:
    if isinstance(value, list | tuple | frozenset | set):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n') else text
