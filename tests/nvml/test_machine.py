"""Machines that are not supported say so."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from migplugin.errors import LibraryMissing
from migplugin.nvml import binding
from migplugin.nvml import machine as kind
from tests.nvml.machine import machine


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("proc/sys/kernel/osrelease", "5.15.167.4-microsoft-standard-WSL2\n", kind.WSL),
        ("dev/dxg", "", kind.WSL),
        ("sys/devices/soc0/family", "Tegra\n", kind.TEGRA),
        ("etc/nv_tegra_release", "# R36 (release)\n", kind.TEGRA),
        ("proc/sys/kernel/osrelease", "6.1.0-18-amd64\n", ""),
        ("sys/devices/soc0/family", "i.MX\n", ""),
    ],
)
def test_a_machine_is_known_by_its_files(tmp_path: Path, path: str, text: str, expected: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert kind.unsupported(tmp_path) == expected


@pytest.mark.parametrize("file", ["proc", "proc/sys/kernel/osrelease", "dev"])
def test_whatever_lies_in_the_place_of_these_files_is_no_traceback(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith("osrelease"):
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).touch()
    assert kind.unsupported(tmp_path) == ""


@pytest.fixture
def on_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "unsupported", lambda: kind.WSL)


@pytest.mark.usefixtures("on_wsl")
def test_where_there_can_be_no_driver_the_machine_is_named_and_no_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str, *_: Any) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", without)
    with pytest.raises(LibraryMissing) as error:
        binding.load(search=tmp_path)
    assert str(error.value).endswith(f": {kind.WSL}")
    assert "runtimeClassName" not in str(error.value)


@pytest.mark.usefixtures("on_wsl")
def test_where_there_is_a_library_all_the_same_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())
    binding.load()
    (line,) = [record for record in caplog.records if record.message == "not a machine for MIG"]
    assert vars(line)["reason"] == kind.WSL


def test_a_vgpu_is_named_and_what_is_passed_through_is_not() -> None:
    with machine("2xa100-40gb", virtualization="vgpu") as place:
        look = place.look()
        for gpu, said in zip(look.inventory.gpus, look.inventory.unreadable, strict=True):
            assert said == f"GPU {gpu.uuid} {kind.VGPU}"
    for mode in ("none", "passthrough"):
        with machine("2xa100-40gb", virtualization=mode) as place:
            assert place.look().inventory.unreadable == ()


def test_a_driver_that_cannot_say_what_is_virtual_is_taken_as_it_is() -> None:
    with machine("1xa100-40gb", missing_symbols=["nvmlDeviceGetVirtualizationMode"]) as place:
        assert place.look().inventory.unreadable == ()
