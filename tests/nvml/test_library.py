"""When a library that lies in the place of the loaded one is a reason to start anew."""

from pathlib import Path

import pytest

from migplugin.nvml import library
from migplugin.nvml.library import Successor, find
from tests.fakes.nvml_library import compile_library, needs_cc

pytestmark = needs_cc


@pytest.fixture(autouse=True)
def _tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRY_EVERY", 0.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    compile_library(tmp_path, "lib64")
    return tmp_path


def test_the_file_that_was_loaded_is_no_successor(root: Path) -> None:
    assert not Successor(find(root)).works()


def test_a_file_that_works_with_the_driver_is_one(root: Path) -> None:
    successor = Successor(find(root))
    compile_library(root, "lib64", "590.1")
    assert successor.works()


def test_a_link_that_is_turned_is_one(tmp_path: Path) -> None:
    for version in ("580.1", "590.1"):
        compile_library(tmp_path / version, "lib64").rename(tmp_path / f"libnvidia-ml.so.{version}")
    link = tmp_path / "lib64" / library.SONAME
    link.parent.mkdir()
    link.symlink_to("../libnvidia-ml.so.580.1")
    successor = Successor(find(tmp_path))
    assert not successor.works()
    link.unlink()
    link.symlink_to("../libnvidia-ml.so.590.1")
    assert successor.works()


@pytest.mark.parametrize("code", [9, 18])
def test_one_that_does_not_get_on_with_the_driver_is_none_until_it_does(root: Path, code: int) -> None:
    """As after an update that waits for a reboot: a new process would be worse off than this one."""
    successor = Successor(find(root))
    compile_library(root, "lib64", "590.1", code=code)
    assert not successor.works()
    compile_library(root, "lib64", "590.1")
    assert successor.works()


def test_a_file_that_is_gone_or_no_library_is_none(root: Path) -> None:
    successor = Successor(find(root))
    (root / "lib64" / library.SONAME).unlink()
    assert not successor.works()
    (root / "lib64" / library.SONAME).write_bytes(b"half of an upda")
    assert not successor.works()


def test_it_is_tried_now_and_then_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "TRY_EVERY", 3600.0)
    successor = Successor(find(root))
    compile_library(root, "lib64", "590.1", code=18)
    assert not successor.works()
    compile_library(root, "lib64", "590.1")
    assert not successor.works()
