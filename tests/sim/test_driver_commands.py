"""`migplugin sim` as a person types it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from migplugin.sim import commands
from migplugin.sim.records import WHOLE
from migplugin.sim.store import Store
from tests.sim.driver_fixtures import directory

DEMO = "1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2"


class Shell:
    """Runs `migplugin sim` commands on one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.store = Store(state)

    def __call__(self, *words: str) -> Result:
        return CliRunner().invoke(commands.sim, ["--state", str(self.state), *words])

    def ok(self, *words: str) -> str:
        result = self(*words)
        assert result.exit_code == 0, result.output
        return result.stdout

    def fails(self, code: int, *words: str) -> str:
        result = self(*words)
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.stderr

    def shown(self) -> Any:
        return json.loads(self.ok("show", "-o", "json"))


@pytest.fixture
def shell() -> Iterator[Shell]:
    with directory() as parent:
        shell = Shell(parent / "node")
        shell.ok("init", DEMO)
        yield shell


def test_a_driver_that_is_there_can_be_kept_and_one_that_cannot_be_read_is_made_anew(shell: Shell) -> None:
    shell.ok("xid", "0", "79")
    before = (shell.state / "state.json").read_bytes()
    assert "stays as it is" in shell.ok("init", "1xa30", "--if-absent")
    assert (shell.state / "state.json").read_bytes() == before
    for damage in ("", "{", json.dumps({"version": 99})):
        (shell.state / "state.json").write_text(damage)
        result = shell("init", "1xa30=1g.6gb", "--if-absent")
        assert result.exit_code == 0, result.output
        assert "it is made anew" in result.stderr
        assert [gpu["product"] for gpu in shell.shown()["gpus"]] == ["a30"]


def test_a_driver_that_is_absent_is_made() -> None:
    with directory() as parent:
        assert "A30" in Shell(parent / "new").ok("init", "1xa30", "--if-absent")


def test_every_command_says_where_the_state_lives(shell: Shell) -> None:
    for words in (["show"], ["xid", "0", "79"], ["switch"]):
        assert shell(*words).stderr == f"state: {shell.state}\n"


def test_show_draws_each_gpu_and_what_lies_in_it(shell: Shell) -> None:
    shell.ok("busy", "1", "3", "--name", "train", "--pid", "77")
    drawn = shell.ok("show")
    assert "[2g.10gb         ][1g.5gb ][1g.5gb ][3g.20gb                           ]" in drawn
    assert "held by train (77)" in drawn
    for device in shell.store.read().gpus[1].mig_devices():
        assert device[1].uuid in drawn


def test_json_tells_the_same_as_the_picture(shell: Shell) -> None:
    shell.ok("busy", "0", "--name", "whole", "--pid", "5")
    node = shell.shown()
    assert [gpu["product"] for gpu in node["gpus"]] == ["a100-40gb"] * 2
    assert [ci["profile"] for gi in node["gpus"][1]["instances"] for ci in gi["compute"]] == [
        "3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb",
    ]  # fmt: skip
    assert node["gpus"][0]["processes"] == [{"pid": 5, "name": "whole", "gi": None, "ci": None}]
    assert node["switches"] == {}


def test_instance_is_destroyed_and_another_created_in_its_place(shell: Shell) -> None:
    shell.ok("destroy", "1", "2")
    assert "no room for 4g.20gb anywhere" in shell.fails(1, "create", "1", "4g.20gb")
    shell.ok("destroy", "1", "--all")
    assert "gi 1 ci 0: 4g.20gb at slot 0" in shell.ok("create", "1", "4g.20gb")
    assert "gi 2 ci 0: 3g.20gb at slot 4" in shell.ok("create", "1", "9", "--start", "4")


def test_instance_is_created_empty_or_with_chosen_compute_instances(shell: Shell) -> None:
    shell.ok("destroy", "--all")
    assert "no MIG device" in shell.ok("create", "0", "1g.5gb", "--empty")
    made = shell.ok("create", "0", "3g.20gb", "--start", "0", "--ci", "1c", "--ci", "2c.3g.20gb")
    assert [line.split(" at ")[0] for line in made.splitlines()] == [
        "GPU 0 gi 1 ci 0: 1c.3g.20gb",
        "GPU 0 gi 1 ci 1: 2c.3g.20gb",
    ]
    shell.ok("create", "1", "1c.3g.20gb")
    assert "gi 2 ci 1: 2c.3g.20gb" in shell.ok("create", "1", "2c.3g.20gb", "--gi", "2")
    assert len(shell.shown()["gpus"][1]["instances"]) == 1


def test_compute_instance_is_destroyed_alone_or_by_uuid_with_its_gpu_instance(shell: Shell) -> None:
    shell.ok("init", "--replace", "1xa100-40gb=1c.3g.20gb*2")
    uuid = shell.shown()["gpus"][0]["instances"][0]["compute"][1]["uuid"]
    shell.ok("destroy", "0", "2/0")
    shell.ok("destroy", "--uuid", uuid)
    assert shell.shown()["gpus"][0]["instances"] == []
    assert "no MIG device has the UUID" in shell.fails(1, "destroy", "--uuid", uuid)


def test_refusal_of_the_driver_is_one_line_and_exit_code_one(shell: Shell) -> None:
    refusal = shell.fails(1, "create", "0", "1g.5gb").splitlines()
    assert refusal[1:] == ["Error: GPU 0 holds all the 1g.5gb it can: count or media engines are used up"]
    assert "there is no GPU 2" in shell.fails(1, "xid", "2", "79")
    assert "no GPU instance 6" in shell.fails(1, "destroy", "1", "6")


def test_busy_instance_is_not_destroyed_unless_forced(shell: Shell) -> None:
    shell.ok("busy", "1", "2")
    assert "is held by python3 (4242)" in shell.fails(1, "destroy", "1", "2")
    shell.ok("busy", "1", "2", "--clear")
    shell.ok("destroy", "1", "2")
    shell.ok("busy", "1", "3", "--leak")
    assert "held by a leaked handle" in shell.ok("show")
    assert "a leaked handle" in shell.fails(1, "destroy", "1", "3")
    shell.ok("destroy", "1", "3", "--force")


def test_each_process_gets_a_pid_of_its_own(shell: Shell) -> None:
    shell.ok("busy", "1", "2")
    shell.ok("busy", "1", "3")
    assert [process["pid"] for process in shell.shown()["gpus"][1]["processes"]] == [4242, 4243]


def test_mode_is_changed_or_pending_and_a_reset_settles_it(shell: Shell) -> None:
    shell.ok("init", "--replace", "1xa100-40gb")
    assert shell.ok("mig-mode", "0", "on") == "GPU 0: MIG is on\n"
    shell.ok("busy", "0")
    assert "pending off: In use by another client" in shell.ok("mig-mode", "0", "off")
    assert "in use by process 4242" in shell.fails(1, "reset", "0")
    shell.ok("busy", "0", "--clear")
    shell.ok("reset", "0")
    assert shell.shown()["gpus"][0]["mig"] == {"current": False, "pending": False}


def test_events_are_posted_with_their_scope(shell: Shell) -> None:
    seen = shell.store.read().record.last_seq
    shell.ok("xid", "0", "79")
    shell.ok("xid", "1", "94", "--gi", "2")
    shell.ok("xid", "1", "94", "--gi", "2", "--ci", "0")
    shell.ok("event", "0", "clock", "--data", "7")
    shell.ok("event", "0", "0x400")
    posted = [(e.type, e.data, e.gi, e.ci) for e in shell.store.events_after(seen)]
    assert posted == [
        (8, 79, WHOLE, WHOLE),
        (8, 94, 2, WHOLE),
        (8, 94, 2, 0),
        (0x10, 7, WHOLE, WHOLE),
        (0x400, 0, WHOLE, WHOLE),
    ]
    assert "there are: single-bit-ecc" in shell.fails(2, "event", "0", "clok")


def test_gpu_is_lost_and_restored(shell: Shell) -> None:
    shell.ok("lost", "0")
    assert "LOST" in shell.ok("show")
    shell.ok("lost", "0", "--restore")
    assert "LOST" not in shell.ok("show")


def test_a_field_is_made_known_and_unknown(shell: Shell) -> None:
    assert shell.ok("field", "0", "230", "1") == "GPU 0: field 230 is 1\n"
    assert shell.store.read().gpus[0].record.fields == {230: 1}
    assert shell.ok("field", "0", "230") == "GPU 0: field 230 is not known\n"
    assert shell.store.read().gpus[0].record.fields == {}


def test_switches_are_set_shown_and_explained(shell: Shell) -> None:
    shell.ok("switch", "stale-sessions", "on")
    assert shell.ok("switch", "stale_sessions").startswith("stale_sessions=true\n    on: a session lists")
    assert "runtime_view=host\n" in shell.ok("switch")
    assert shell.shown()["switches"] == {"stale_sessions": True}
    assert "did you mean 'mig_index'?" in shell.fails(2, "switch", "mig_indx", "sparse")
    assert "no switch is called 'nonsense'" in shell.fails(2, "switch", "nonsense")


def test_late_nodes_are_made_by_command(shell: Shell) -> None:
    shell.ok("switch", "capability_nodes", "late")
    shell.ok("destroy", "1", "2")
    shell.ok("create", "1", "3g.20gb")
    assert shell.ok("nodes") == "2 capability nodes made\n"
    assert shell.ok("nodes") == "0 capability nodes made\n"


def test_init_takes_switches_that_decide_how_instances_are_made(shell: Shell) -> None:
    shell.ok("init", "--replace", "1xa100-40gb=3g.20gb", "--switch", "gi_ids=swapped", "--switch", "minors=4")
    gpu = shell.shown()["gpus"][0]
    assert (gpu["minor"], gpu["instances"][0]["gi"], gpu["instances"][0]["start"]) == (4, 1, 4)


def test_init_refuses_to_overwrite_and_derives_files_of_a_directory_again(shell: Shell) -> None:
    assert "init --replace" in shell.fails(1, "init", "1xa30")
    (shell.state / "host/dev/nvidia0").unlink()
    assert "derived again" in shell.ok("init", str(shell.state))
    assert (shell.state / "host/dev/nvidia0").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["init", "1xthor"], "cannot be simulated"),
        (["init", "1xa30", "--switch", "gi_ids"], "is not NAME=VALUE"),
        (["create", "0", "1g.6gb"], "has no profile '1g.6gb'; there are: 1g.5gb"),
        (["create", "0", "77"], "no profile with id 77"),
        (["create", "1", "3g.20gb", "--ci", "5c"], "has no compute profile '5c'; there are: 1c.3g.20gb"),
        (["destroy", "0"], "say what to destroy"),
        (["destroy", "0", "two"], "write GI or GI/CI"),
        (["xid", "0", "79", "--ci", "0"], "--ci needs --gi"),
        (["busy", "0", "--leak"], "say which GI"),
        (["mig-mode", "0", "maybe"], "'maybe' is not one of 'on', 'off'"),
        (["create", "-1", "1g.5gb"], "No such option"),
        (["crate"], "No such command"),
    ],
)
def test_wrong_input_is_exit_code_two_and_says_what_is_allowed(
    shell: Shell, words: list[str], reason: str
) -> None:
    if words[0] == "create" and "3g.20gb" in words:
        shell.ok("destroy", "--all")
    assert reason in shell.fails(2, *words)


def test_missing_driver_says_how_to_make_one() -> None:
    with directory() as parent:
        assert "init SPEC" in Shell(parent / "none").fails(1, "show")


def test_state_directory_is_the_option_then_the_environment_then_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with directory() as parent:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(parent))
        assert commands.default_state_dir() == parent / "migplugin-sim"
        monkeypatch.setenv("MIGPLUGIN_SIM_STATE", str(parent / "mine"))
        result = CliRunner().invoke(commands.sim, ["init", "1xa30"])
        assert result.stderr == f"state: {parent}/mine\n"
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert commands.default_state_dir().name == f"migplugin-sim-{os.getuid()}"


def test_real_process_makes_a_node_that_this_one_sees() -> None:
    with directory() as parent:
        ran = subprocess.run(
            [sys.executable, "-m", "migplugin.sim.commands", "init", "1xa100-40gb=1g.5gb"],
            env={**os.environ, "MIGPLUGIN_SIM_STATE": str(parent / "node")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "[1g.5gb ]" in ran.stdout
        assert ran.stderr == f"state: {parent}/node\n"
        assert len(Store(parent / "node").read().gpus[0].mig_devices()) == 1


@pytest.mark.parametrize("command", sorted(commands.sim.commands))
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(commands.sim, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 4
