"""Log lines: one phrase and its fields, for people and for machines."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.telemetry.log import MOST_WAITING, JsonFormatter, TextFormatter


def record(phrase: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"msg": phrase, "levelno": 30, "levelname": "WARNING", "name": "x", "created": 0}
    )
    made.__dict__.update(fields)
    return made


def test_text_shows_the_phrase_and_each_field_and_quotes_what_has_blanks() -> None:
    line = TextFormatter().format(
        record("offer", resource="nvidia.com/gpu", reason="a b", ids=["x", "y"], none=None)
    )
    assert line == '1970-01-01T00:00:00.000Z WARNING offer resource=nvidia.com/gpu reason="a b" ids=x,y'


def test_a_line_stays_one_line_whatever_is_in_a_field() -> None:
    assert "\n" not in TextFormatter().format(record("x", reason="one\ntwo"))


def test_json_is_one_object_a_line() -> None:
    line = json.loads(JsonFormatter().format(record("offer", healthy=3)))
    assert line == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "warning",
        "message": "offer",
        "logger": "x",
        "healthy": 3,
    }


def test_a_failure_carries_its_traceback_in_both_forms() -> None:
    code = (
        "import logging, sys; from migplugin.telemetry.log import configure; configure('info', sys.argv[1])\n"
        "try: 1/0\nexcept ZeroDivisionError: logging.getLogger('m').exception('odd', extra={'task': 't'})"
    )
    for form in ("text", "json"):
        done = subprocess.run([sys.executable, "-c", code, form], capture_output=True, text=True, check=True)
        assert "ZeroDivisionError" in done.stderr
        assert "task" in done.stderr


def test_a_kubelet_that_goes_away_under_an_answer_is_no_failure_of_ours() -> None:
    code = (
        "import logging; from migplugin.telemetry.log import configure; configure('info', 'text')\n"
        "class ExecuteBatchError(Exception): ...\n"
        "log = logging.getLogger('grpc._cython.cygrpc')\n"
        "for exc in (ExecuteBatchError('send'), ValueError('ours')):\n"
        "    try: raise exc\n"
        "    except Exception as e: log.exception('%s raised by servicer method [%s]', type(e).__name__, 'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ExecuteBatchError" not in done.stderr
    assert "ValueError: ours" in done.stderr


def test_a_reader_that_stops_reading_keeps_nobody_waiting() -> None:
    code = (
        "import logging, sys, threading; from migplugin.telemetry.log import MOST_WAITING, configure\n"
        "configure('info', 'json')\n"
        "for n in range(3 * MOST_WAITING): logging.getLogger('m').info('x', extra={'n': n, 'y': 'z' * 100})\n"
        "print('all said', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "all said\n"
        for line in process.stderr:
            told = json.loads(line)
            if told["message"] == "log lines were lost, nobody read them":
                break
            last = told["n"]
        process.communicate("\n")
    assert last + 1 + told["lost"] == 3 * MOST_WAITING
    assert process.returncode == 0


@pytest.mark.parametrize("buffered", [False, True])
def test_a_reader_that_never_reads_holds_back_no_end_and_no_exit_code(*, buffered: bool) -> None:
    code = (
        "import logging, sys; from migplugin.telemetry.log import configure; configure('info', 'text')\n"
        "for n in range(9000): logging.getLogger('m').info('line', extra={'text': 'x' * 100})\n"
        "sys.exit(4)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment(buffered=buffered)
    ) as process:
        assert process.wait(10) == 4


@pytest.mark.parametrize("buffered", [False, True])
def test_a_full_disk_under_the_log_changes_no_exit_code(*, buffered: bool) -> None:
    code = (
        "import logging, sys; from migplugin.telemetry.log import configure; configure('info', 'text')\n"
        "logging.getLogger('m').info('line'); sys.exit(4)"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stderr=full, env=environment(buffered=buffered), check=False
        )
    assert done.returncode == 4


def test_a_stderr_that_takes_nothing_is_not_told_so_for_ever() -> None:
    code = (
        "import logging, os, threading; from migplugin.telemetry.log import configure\n"
        "configure('info', 'text'); tried, failed = [], threading.Event()\n"
        "def fail(*_):\n"
        "    tried.append(1); failed.set(); raise OSError(28, 'No space left on device')\n"
        "os.write = fail\n"
        "logging.getLogger('m').info('line'); failed.wait(5); logging.shutdown(); print(len(tried))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def environment(*, buffered: bool) -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return left if buffered else {**left, "PYTHONUNBUFFERED": "1"}


def test_what_was_said_last_is_written_before_the_end() -> None:
    code = (
        "import logging; from migplugin.telemetry.log import configure; configure('info', 'text')\n"
        "for n in range(2000): logging.getLogger('m').info('line', extra={'n': n})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1].endswith("line n=1999")
