"""When a library that lies in the place of the loaded one is a reason to start anew."""

import threading
from pathlib import Path

import pytest

from migplugin.nvml import library
from migplugin.nvml.library import Successor, find
from tests.fakes.nvml_library import compile_library, needs_cc

pytestmark = needs_cc


@pytest.fixture(autouse=True)
def _tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRY_EVERY", 0.0)


def found(successor: Successor) -> bool:
    """Whether one was found, once the trial that may be under way is over."""
    successor.works()
    for thread in threading.enumerate():
        if thread.name == "nvml-trial":
            thread.join(5)
    return successor.works()


def watch(root: Path) -> Successor:
    return Successor(find(root), lambda: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    compile_library(tmp_path, "lib64")
    return tmp_path


def test_the_file_that_was_loaded_is_no_successor(root: Path) -> None:
    assert not found(watch(root))


def test_a_file_that_works_with_the_driver_is_one(root: Path) -> None:
    successor = watch(root)
    compile_library(root, "lib64", "590.1")
    assert found(successor)


def test_a_link_that_is_turned_is_one(tmp_path: Path) -> None:
    for version in ("580.1", "590.1"):
        compile_library(tmp_path / version, "lib64").rename(tmp_path / f"libnvidia-ml.so.{version}")
    link = tmp_path / "lib64" / library.SONAME
    link.parent.mkdir()
    link.symlink_to("../libnvidia-ml.so.580.1")
    successor = watch(tmp_path)
    assert not found(successor)
    link.unlink()
    link.symlink_to("../libnvidia-ml.so.590.1")
    assert found(successor)


@pytest.mark.parametrize("code", [9, 18])
def test_one_that_does_not_get_on_with_the_driver_is_none_until_it_does(root: Path, code: int) -> None:
    """As after an update that waits for a reboot: a new process would be worse off than this one."""
    successor = watch(root)
    compile_library(root, "lib64", "590.1", code=code)
    assert not found(successor)
    compile_library(root, "lib64", "590.1")
    assert found(successor)


def test_a_file_that_is_gone_or_no_library_is_none(root: Path) -> None:
    successor = watch(root)
    (root / "lib64" / library.SONAME).unlink()
    assert not found(successor)
    (root / "lib64" / library.SONAME).write_bytes(b"half of an upda")
    assert not found(successor)


def test_it_is_tried_now_and_then_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRY_EVERY", 3600.0)
    successor = watch(root)
    compile_library(root, "lib64", "590.1", code=18)
    assert not found(successor)
    compile_library(root, "lib64", "590.1")
    assert not found(successor)


def test_who_waits_for_it_is_told_and_nobody_waits_for_a_trial_that_hangs(root: Path) -> None:
    told = threading.Event()
    successor = Successor(find(root), told.set)
    compile_library(root, "lib64", "590.1", init="for (;;) sleep(60);")
    assert not successor.works(), "at once"
    (trial,) = (thread for thread in threading.enumerate() if thread.name == "nvml-trial")
    successor.close()
    trial.join(5)
    assert not trial.is_alive(), "its process was killed"
    successor = Successor(find(root), told.set)
    compile_library(root, "lib64", "600.1")
    assert not successor.works()
    assert told.wait(5)
    assert successor.works()


def test_a_trial_that_hangs_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRY_WITHIN", 0.2)
    monkeypatch.setattr(library, "TRY_EVERY", 3600.0)
    successor = watch(root)
    compile_library(root, "lib64", "590.1", init="for (;;) sleep(60);")
    assert not found(successor)
    assert not any(_is_trial(process, root) for process in Path("/proc").glob("[0-9]*"))


def _is_trial(process: Path, root: Path) -> bool:
    try:
        return str(root).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
