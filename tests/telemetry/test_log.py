"""Log lines: one phrase and its fields, for people and for machines."""

import json
import logging
import subprocess
import sys

from migplugin.telemetry.log import JsonFormatter, TextFormatter


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
