"""What is found below a driver root, /proc and /sys, and that damage is the same as absence."""

from pathlib import Path

import pytest

from migplugin.core.cdi import Facts
from migplugin.core.inventory import Inventory
from migplugin.nvml.driverfiles import DriverFiles, caps_major
from tests.core.examples import SEVENTHS

VERSION = "590.48.01"
NODE = Inventory(VERSION, (SEVENTHS,))
DEVICES = "Character devices:\n  1 mem\n195 nvidia\n{line}\n\nBlock devices:\n 12 nvidia-caps\n"


def put(root: Path, *paths: str, mode: int = 0o644) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")
        (root / path).chmod(mode)


def facts(root: Path) -> Facts:
    return DriverFiles(root, root / "proc", root / "sys").facts(NODE)


def test_libraries_are_those_of_the_driver_s_version_each_once(tmp_path: Path) -> None:
    lib = "usr/lib/x86_64-linux-gnu"
    put(tmp_path, f"{lib}/libcuda.so.{VERSION}", f"{lib}/libcuda.so.1", f"{lib}/libcuda.so.580.95.05")
    put(tmp_path, f"{lib}/vdpau/libvdpau_nvidia.so.{VERSION}", f"usr/lib/libcuda.so.{VERSION}")
    (tmp_path / "lib").symlink_to("usr/lib")
    assert facts(tmp_path).libraries == (
        f"/{lib}/libcuda.so.{VERSION}",
        f"/{lib}/vdpau/libvdpau_nvidia.so.{VERSION}",
    )


def test_a_directory_that_may_hold_libraries_of_32_bits_is_the_last_resort(tmp_path: Path) -> None:
    put(tmp_path, f"usr/lib/libcuda.so.{VERSION}")
    assert facts(tmp_path).libraries == (f"/usr/lib/libcuda.so.{VERSION}",)


def test_programs_sockets_and_firmware_are_found_where_they_are(tmp_path: Path) -> None:
    put(tmp_path, "usr/bin/nvidia-smi", "usr/sbin/nvidia-imex", mode=0o755)
    put(tmp_path, "usr/bin/nvidia-debugdump", "run/nvidia-persistenced/socket")
    put(tmp_path, *(f"lib/firmware/nvidia/{VERSION}/{name}" for name in ("gsp_ga10x.bin", "other.bin")))
    found = facts(tmp_path)
    assert found.binaries == ("/usr/bin/nvidia-smi", "/usr/sbin/nvidia-imex")
    assert found.sockets == ("/run/nvidia-persistenced/socket",)
    assert found.firmware == (f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin",)


def test_drm_nodes_are_those_of_the_gpu(tmp_path: Path) -> None:
    drm = tmp_path / "sys/bus/pci/devices" / SEVENTHS.pci_address / "drm"
    for name in ("renderD128", "card1", "controlD64", "card1-HDMI-A-1"):
        (drm / name).mkdir(parents=True)
    assert facts(tmp_path).drm == {SEVENTHS.pci_address: ("/dev/dri/card1", "/dev/dri/renderD128")}


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert facts(tmp_path / "nowhere") == Facts()


def test_a_driver_that_is_installed_later_is_found_and_then_not_searched_again(tmp_path: Path) -> None:
    files = DriverFiles(tmp_path, tmp_path / "proc", tmp_path / "sys")
    assert files.facts(NODE).libraries == ()
    put(tmp_path, f"usr/lib64/libcuda.so.{VERSION}")
    assert len(files.facts(NODE).libraries) == 1
    put(tmp_path, f"usr/lib64/libnvidia-ml.so.{VERSION}", "usr/lib64/libcuda.so.600")
    assert len(files.facts(NODE).libraries) == 1
    assert files.facts(Inventory("600", ())).libraries == ("/usr/lib64/libcuda.so.600",)


@pytest.mark.parametrize(
    ("line", "major"),
    [
        ("234 nvidia-caps", 234),
        ("  9 nvidia-caps", 9),
        ("234 nvidia-caps-imex-channels", None),
        ("234 nvidia-caps\n235 nvidia-caps-imex-channels", 234),
        ("nvidia-caps", None),
        ("0 nvidia-caps", None),
        ("-1 nvidia-caps", None),
        ("99999999999999999999 nvidia-caps", None),
        ("4096 nvidia-caps", None),
        ("x34 nvidia-caps", None),
    ],
)
def test_the_major_number_is_the_line_of_a_character_device(
    tmp_path: Path, line: str, major: int | None
) -> None:
    (tmp_path / "devices").write_text(DEVICES.format(line=line))
    assert caps_major(tmp_path) == major


def test_bytes_that_are_no_text_have_no_major_number(tmp_path: Path) -> None:
    assert caps_major(tmp_path) is None
    (tmp_path / "devices").write_bytes(b"\xff\xfe\x00" * 100)
    assert caps_major(tmp_path) is None
