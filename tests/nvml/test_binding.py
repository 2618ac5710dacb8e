"""Where the library comes from, and what pynvml's answers and errors become."""

import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from migplugin.errors import DriverError, DriverNotReady, LibraryMissing, LibraryOutdated
from migplugin.nvml import binding, capabilities
from migplugin.nvml.codes import Code, describe
from migplugin.nvml.library import LIBRARY_DIRECTORIES, SONAME
from tests.fakes.nvml_library import compile_library, needs_cc
from tests.nvml.machine import SEVEN, Machine, machine


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    yield
    binding.load(object())


@pytest.fixture
def unknown_to_the_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that has a driver."""
    honest = ctypes.CDLL

    def without(name: str, *arguments: Any) -> ctypes.CDLL:
        if name == SONAME:
            raise OSError(f"{SONAME}: cannot open shared object file: No such file or directory")
        return honest(name, *arguments)

    monkeypatch.setattr(ctypes, "CDLL", without)


@needs_cc
@pytest.mark.parametrize("directory", LIBRARY_DIRECTORIES)
def test_the_library_is_found_in_every_directory_of_the_driver_root(tmp_path: Path, directory: str) -> None:
    compile_library(tmp_path, directory, directory.replace("/", "."))
    binding.load(search=tmp_path)
    binding.init()
    assert binding.driver_version() == directory.replace("/", ".")
    binding.shutdown()


@needs_cc
def test_the_first_directory_that_has_one_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for directory in ("lib64", "usr/lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"):
        compile_library(tmp_path, directory, directory)
    caplog.set_level(logging.INFO)
    binding.load(search=tmp_path)
    assert binding.driver_version() == "usr/lib/x86_64-linux-gnu"
    (record,) = caplog.records
    assert vars(record)["path"] == str(tmp_path / "usr/lib/x86_64-linux-gnu" / SONAME)


@needs_cc
def test_a_library_that_cannot_be_loaded_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "usr/lib64").mkdir(parents=True)
    (tmp_path / "usr/lib64" / SONAME).write_bytes(b"of another machine" * 100)
    compile_library(tmp_path, "lib64", "535.1")
    binding.load(search=tmp_path)
    assert binding.driver_version() == "535.1"


@needs_cc
def test_functions_of_the_library_before_are_forgotten(tmp_path: Path) -> None:
    for version in ("1.1", "2.2"):
        compile_library(tmp_path / version, "lib64", version)
        binding.load(search=tmp_path / version)
        binding.init()
        assert binding.driver_version() == version


@needs_cc
def test_a_real_library_without_a_function_says_so(tmp_path: Path) -> None:
    compile_library(tmp_path, "lib64")
    binding.load(search=tmp_path)
    with pytest.raises(
        DriverError, match=r"nvmlDeviceGetHandleByIndex: this driver does not have that function \(13\)"
    ):
        binding.gpu(0)


@needs_cc
def test_a_real_library_whose_driver_is_not_loaded_says_so(tmp_path: Path) -> None:
    compile_library(tmp_path, "lib64", code=9)
    binding.load(search=tmp_path)
    with pytest.raises(DriverNotReady, match="kernel driver is not loaded") as error:
        binding.init()
    assert (error.value.call, error.value.code) == ("nvmlInit", 9)


@pytest.mark.usefixtures("unknown_to_the_linker")
@pytest.mark.parametrize("root", ["driver-root", None])
def test_a_library_that_is_nowhere_names_both_remedies(tmp_path: Path, root: str | None) -> None:
    search = None if root is None else tmp_path / root
    with pytest.raises(LibraryMissing) as error:
        binding.load(search=search)
    text = str(error.value)
    assert "runtimeClassName: nvidia" in text
    assert "mount the host's driver root" in text
    assert (str(search) in text) == (root is not None)
    assert "\n" not in text


@pytest.mark.usefixtures("unknown_to_the_linker")
def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "usr/lib64").mkdir(parents=True)
    (tmp_path / "usr/lib64" / SONAME).write_bytes(b"of another machine" * 100)
    with pytest.raises(
        LibraryMissing, match=rf"{tmp_path}/usr/lib64/{SONAME} cannot be loaded .*invalid ELF header"
    ) as error:
        binding.load(search=tmp_path)
    assert "runtimeClassName" in str(error.value)


@pytest.mark.usefixtures("unknown_to_the_linker")
@pytest.mark.parametrize("damage", ["is a directory", "leads in circles", "leads nowhere"])
def test_whatever_lies_in_the_place_of_the_library_is_no_traceback(tmp_path: Path, damage: str) -> None:
    (tmp_path / "lib64").mkdir()
    path = tmp_path / "lib64" / SONAME
    if damage == "is a directory":
        path.mkdir()
    else:
        path.symlink_to(SONAME if damage == "leads in circles" else "/nonexistent/libnvidia-ml.so.580.1")
    with pytest.raises(LibraryMissing):
        binding.load(search=tmp_path)


@pytest.mark.usefixtures("unknown_to_the_linker")
def test_a_link_that_leads_out_of_the_mounted_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / SONAME).symlink_to("/nonexistent/libnvidia-ml.so.580.1")
    with pytest.raises(LibraryMissing, match=f"{tmp_path}/lib64/{SONAME}"):
        binding.load(search=tmp_path)


@pytest.mark.usefixtures("unknown_to_the_linker")
def test_a_driver_root_that_we_may_not_enter_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, **_options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(LibraryMissing, match="Permission denied"):
        binding.load(search=tmp_path)


@pytest.mark.parametrize("code", [*Code, 2718])
def test_every_code_becomes_one_error_with_its_call_and_number(place: Machine, code: int) -> None:
    with place.session(), place.refusing("nvmlDeviceGetCount_v2", code), pytest.raises(DriverError) as error:
        binding.gpu_count()
    assert (error.value.call, error.value.code) == ("nvmlDeviceGetCount", code)
    assert str(error.value).startswith("nvmlDeviceGetCount: ")
    assert str(int(code)) in str(error.value)
    assert isinstance(error.value, DriverNotReady) == (code == 9)
    assert isinstance(error.value, LibraryOutdated) == (code == 18)


def test_numbers_without_a_meaning_stay_numbers() -> None:
    assert describe(2718) == "NVML error 2718"
    assert describe(999) == "unknown error inside the driver (999)"


def test_a_mismatched_library_is_a_missing_function(place: Machine) -> None:
    """pynvml has an error for it that is none of its NVMLErrors."""
    place.switch(missing_symbols=["nvmlDeviceGetComputeRunningProcesses_v3"])
    with place.session(), pytest.raises(DriverError) as error:
        binding.call("nvmlDeviceGetComputeRunningProcesses", binding.gpu(0))
    assert error.value.code == Code.FUNCTION_NOT_FOUND


def test_a_function_that_this_pynvml_does_not_have_is_a_missing_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(pynvml, "nvmlDeviceGetAttributes")
    with machine(SEVEN) as place:
        (gpu,) = place.look().inventory.gpus
    assert [device.profile for device in gpu.devices] == ["1g.5gb"] * 7


def test_handles_are_compared_by_what_they_point_to(place: Machine) -> None:
    with place.session():
        one, other = binding.gpu(0), binding.gpu(0)
        assert one != other
        assert binding.address(one) == binding.address(other) != 0


def test_a_pci_address_is_written_as_sysfs_does(place: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        busId = "00000002:AF:00.0"  # noqa: N815

    with place.session():
        assert binding.pci_address(binding.gpu(0)) == "0000:07:00.0"
        monkeypatch.setattr(pynvml, "nvmlDeviceGetPciInfo", lambda _handle: Info)
        assert binding.pci_address(binding.gpu(0)) == "0002:af:00.0"
        Info.busId = "00010000:3B:00.0"
        assert binding.pci_address(binding.gpu(0)) == "10000:3b:00.0"


def test_an_event_kind_that_is_not_supported_leaves_the_others_registered(place: Machine) -> None:
    place.switch(events="no-mig")
    with place.session():
        events = binding.new_event_set()
        gpu = binding.gpu(0)
        assert binding.register(gpu, binding.XID_CRITICAL, events)
        assert not binding.register(gpu, binding.MIG_CONFIG_CHANGE, events)
        place.xid(79)
        event = binding.wait(events, 5000)
        assert event is not None
        assert (event.kind, event.data, event.gi, event.ci) == (binding.XID_CRITICAL, 79, None, None)
        assert event.device == binding.address(gpu)
        assert binding.wait(events, 0) is None
        binding.free_event_set(events)


def test_a_mig_slot_that_is_empty_is_none(place: Machine) -> None:
    place.create("1g.5gb")
    with place.session():
        found = [binding.mig_device(binding.gpu(0), slot) for slot in (0, 1, 6, 7, 99)]
        assert [device is not None for device in found] == [True, False, False, False, False]


def test_the_slices_of_a_compute_instance_come_from_its_own_profile(place: Machine) -> None:
    place.create("2c.3g.20gb")
    with place.session():
        gi = binding.gi(binding.gpu(0), place.node.gpus[0].instances[0].id)
        assert binding.ci_slices(gi, 0) == 2
        place.switch(v2_profile_info=False)
    with place.session():
        gi = binding.gi(binding.gpu(0), place.node.gpus[0].instances[0].id)
        assert binding.ci_slices(gi, 0) == 2


def test_damaged_capability_files_are_files_that_say_nothing(tmp_path: Path) -> None:
    gi = tmp_path / "driver/nvidia/capabilities/gpu0/mig/gi7"
    (gi / "ci0").mkdir(parents=True)
    (gi / "access").write_bytes(b"\xff\xfe DeviceFileMinor 12\n")
    (gi / "ci0/access").write_text("DeviceFileMinor: 67\nDeviceFileMode: 292\n")
    (gi.parent / "gix").mkdir()
    (gi / "cache").write_text("")
    found = capabilities.Capabilities(tmp_path)
    assert found.node(0, 7).minor is None
    assert found.node(0, 7, 0) == capabilities.Capability(67, 0o444)
    assert found.seen(0) == frozenset({(7, 0)})
    assert found.seen(1) is None


def test_the_static_table_is_read_again_for_another_driver(tmp_path: Path) -> None:
    table = tmp_path / "driver/nvidia-caps/mig-minors"
    table.parent.mkdir(parents=True)
    table.write_text("config 1\nmonitor 2\ngpu0/gi7/access 66\ngpu0/gi7/ci0/access 67\nnonsense\n")
    found = capabilities.Capabilities(tmp_path)
    assert (found.node(0, 7).minor, found.node(0, 7, 0).minor, found.node(0, 8).minor) == (66, 67, None)
    table.write_text("gpu0/gi7/access 99\n")
    assert found.node(0, 7).minor == 66
    found.forget()
    assert (found.node(0, 7).minor, found.node(0, 7, 0).minor) == (99, None)


@pytest.mark.parametrize(("text", "node"), [("0\n", 0), ("3", 3), ("-1\n", None), ("", None), ("x\n", None)])
def test_a_numa_node_is_a_number_from_zero_or_none(tmp_path: Path, text: str, node: int | None) -> None:
    device = tmp_path / "bus/pci/devices/0000:07:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(text)
    assert capabilities.numa_node(tmp_path, "0000:07:00.0") == node
    assert capabilities.numa_node(tmp_path, "0000:08:00.0") is None


def test_a_dev_directory_that_we_may_not_enter_has_no_control_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, **_options: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    assert capabilities.control_nodes(tmp_path) == ()
