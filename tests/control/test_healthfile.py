"""Who is sick outlives the agent, and not the machine."""

import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migplugin.control.healthfile import HealthFile
from migplugin.core.health import Health
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.sickness import Instance, Recovery, Sickness

GPU = GpuUuid("GPU-0")
ONE = Sickness(GPU, Instance(DeviceId("MIG-a"), 3, 0, "1g.5gb"), (94, 48), 5.0, 8.0)
WHOLE = Sickness(GPU, None, (79,), 7.0, 7.0, stays=True)
HEALTH = Health(
    {DeviceId("MIG-a"): ONE, GPU: WHOLE},
    {DeviceId("MIG-a"): Recovery(2.0, ONE)},
    driver="580.95.05",
    module=4711,
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    (root / "sys/kernel/random").mkdir(parents=True)
    (root / "sys/kernel/random/boot_id").write_text("one\n")
    return root


def saved(tmp_path: Path, proc: Path) -> Path:
    HealthFile(tmp_path / "state", proc).save(HEALTH)
    return tmp_path / "state"


def test_what_was_saved_is_loaded_by_the_next_agent_and_said(
    tmp_path: Path, proc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = saved(tmp_path, proc)
    assert HealthFile(state, proc).load(10.0) == HEALTH
    assert [record.message for record in caplog.records] == ["still sick", "still sick"]


def test_after_a_new_boot_it_is_history(tmp_path: Path, proc: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = saved(tmp_path, proc)
    (proc / "sys/kernel/random/boot_id").write_text("two\n")
    found = HealthFile(state, proc).load(10.0)
    assert found == Health(history=found.history)
    assert [(past.id, past.ended) for past in found.history] == [
        ("MIG-a", "the machine was started anew"),
        (GPU, "the machine was started anew"),
    ]
    HealthFile(state, proc).save(found)
    assert HealthFile(state, proc).load(10.0) == found, "shown until there is newer"
    assert {record.message for record in caplog.records} == {"was sick before the machine was started anew"}


def test_a_file_that_is_not_there_is_a_clean_start(
    tmp_path: Path, proc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert HealthFile(tmp_path, proc).load(10.0) == Health()
    assert [record.levelname for record in caplog.records] == ["INFO"]


WRONG: tuple[dict[str, object], ...] = (
    {"xids": []},
    {"xids": ["x"]},
    {"since": None},
    {"device": "MIG-a"},
    {"device": {}},
)


def broken() -> list[str]:
    good = {"gpu": "GPU-0", "device": None, "xids": [79], "since": 1.0, "last": 1.0, "stays": False}
    whole = {"version": 1, "driver": "580", "module": None, "sick": [], "recovered": []}
    return [
        "",
        "{",
        "[]",
        "null",
        '{"health": null}',
        '{"health": {"version": 2}}',
        *(json.dumps({"health": {**whole, key: 3.5}}) for key in ("version", "sick", "recovered")),
        json.dumps({"health": {**whole, "module": "x"}}),
        json.dumps({"health": {**whole, "errors": [1]}}),
        json.dumps({"health": whole}).replace("null", "1e999"),
        "[" * 100_000,
        *(json.dumps({"health": {**whole, "sick": [{**good, **wrong}]}}) for wrong in WRONG),
    ]


@pytest.mark.parametrize("text", broken())
def test_a_corrupt_file_is_a_clean_start_with_a_warning(
    tmp_path: Path, proc: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "health.json").write_text(text)
    assert HealthFile(tmp_path, proc).load(10.0) == Health()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_times_from_the_future_are_now(tmp_path: Path, proc: Path) -> None:
    found = HealthFile(saved(tmp_path, proc), proc).load(1.0)
    assert {(s.since, s.last) for s in found.sick.values()} == {(1.0, 1.0)}


def test_an_unchanged_state_is_not_written_again(tmp_path: Path, proc: Path) -> None:
    file = HealthFile(tmp_path, proc)
    file.save(HEALTH)
    (tmp_path / "health.json").unlink()
    file.save(HEALTH)
    assert not (tmp_path / "health.json").exists()
    file.save(Health())
    assert json.loads((tmp_path / "health.json").read_text())["health"]["sick"] == []


def test_a_directory_that_cannot_be_made_is_said_once(
    tmp_path: Path, proc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("in the way")
    file = HealthFile(tmp_path / "state", proc)
    file.save(HEALTH)
    file.save(Health())
    assert len(caplog.records) == 1


WRITER = """
import sys
from pathlib import Path
from migplugin.control.healthfile import HealthFile
from tests.control.test_healthfile import HEALTH
from migplugin.core.health import Health
file = HealthFile(Path(sys.argv[1]), Path(sys.argv[2]))
file.save(HEALTH)
print("saved", flush=True)
while True:
    file.save(Health(driver="580.95.05"))
    file.save(HEALTH)
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_file(
    tmp_path: Path, proc: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(__file__).parents[2]
    for attempt in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(proc)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.Random(attempt).uniform(0.0, 0.01))  # when it dies is the point
            writer.kill()
        assert HealthFile(tmp_path, proc).load(10.0) in (HEALTH, Health(driver="580.95.05"))
    assert {record.message for record in caplog.records} <= {"still sick"}
