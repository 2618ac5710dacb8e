"""What the simulated node shows under /proc, /dev and /sys, in both views."""

import os
import re
import stat
from pathlib import Path

import pytest

from migplugin.errors import InputError, SimulatorError
from migplugin.sim import files
from migplugin.sim.driver import Simulation
from tests.sim.driver_fixtures import driver

NODE = "1xa100-40gb=3g.20gb,1xa100-40gb=1c.3g.20gb*2"
CAPABILITIES = "driver/nvidia/capabilities"


def _access(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"^(\w+): (\d+)$", path.read_text(), re.MULTILINE)}


def _tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


def test_access_files_follow_the_instances() -> None:
    with driver(NODE) as d:
        caps = d.simulation.proc_root / CAPABILITIES
        assert _tree(caps / "gpu0") == {"mig/gi2/access", "mig/gi2/ci0/access"}
        assert _tree(caps / "gpu1") == {"mig/gi2/access", "mig/gi2/ci0/access", "mig/gi2/ci1/access"}
        d.change(lambda node: node.gpus[0].destroy(2))
        assert _tree(caps / "gpu0") == set()
        assert (caps / "gpu0/mig").is_dir(), "the directory is there with or without instances"
        assert not (caps / "gpu0/mig/gi2").exists()
        d.change(lambda node: node.gpus[0].create("1g.5gb", compute=False))
        assert _tree(caps / "gpu0") == {"mig/gi13/access"}


def test_access_file_names_its_minor_and_its_mode_in_decimal() -> None:
    with driver(NODE) as d:
        caps = d.simulation.proc_root / CAPABILITIES
        gi = _access(caps / "gpu1/mig/gi2/access")
        assert gi == {"DeviceFileMinor": 3 + 135 + 18, "DeviceFileMode": 0o444, "DeviceFileModify": 1}
        assert _access(caps / "gpu1/mig/gi2/ci1/access")["DeviceFileMinor"] == 3 + 135 + 18 + 1 + 1
        assert _access(caps / "mig/config") == {
            "DeviceFileMinor": 1,
            "DeviceFileMode": 256,
            "DeviceFileModify": 1,
        }
        assert _access(caps / "mig/monitor")["DeviceFileMode"] == 292
        modes = {name: stat.S_IMODE((caps / "mig" / name).stat().st_mode) for name in ("config", "monitor")}
        assert modes == {"config": 0o400, "monitor": 0o444}


def test_static_table_of_minors_lists_every_instance_that_could_ever_be() -> None:
    with driver() as d:
        lines = (d.simulation.proc_root / "driver/nvidia-caps/mig-minors").read_text().splitlines()
        assert lines[:5] == [
            "config 1",
            "monitor 2",
            "gpu0/gi0/access 3",
            "gpu0/gi0/ci0/access 4",
            "gpu0/gi0/ci1/access 5",
        ]
        assert lines[-1] == "gpu31/gi14/ci7/access 4322"
        assert len(lines) == 4322
        assert (
            d.simulation.proc_root / "driver/nvidia-caps/sys-minors"
        ).read_text() == "fabric-imex-mgmt 4323\n"
        for line in lines[2:]:
            path, minor = line.split()
            gpu, gi, *ci = (int(number) for number in re.findall(r"\d+", path))
            assert int(minor) == files.capability_minor(gpu, gi, ci[0] if ci else None)


def test_device_nodes_are_those_of_the_gpus_and_of_the_live_instances() -> None:
    with driver(NODE, minors=[1, 0]) as d:
        dev = d.simulation.dev_root / "dev"
        control = {"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"}
        gi, ci, other = 3 + 135 + 18, 3 + 135 + 18 + 1, 3 + 18
        caps = {f"nvidia-caps/nvidia-cap{n}" for n in (1, 2, gi, ci, other, other + 1, other + 2)}
        assert _tree(dev) == {*control, *caps, "nvidia0", "nvidia1"}
        d.change(lambda node: node.gpus[0].destroy(2))
        assert not (dev / f"nvidia-caps/nvidia-cap{gi}").exists()


def test_device_node_is_a_harmless_character_device_where_one_can_be_made() -> None:
    with driver() as d:
        node = d.simulation.dev_root / "dev/nvidia0"
        assert stat.S_ISCHR(node.stat().st_mode) or (node.is_file() and node.stat().st_size == 0)
        if stat.S_ISCHR(node.stat().st_mode):
            assert node.stat().st_rdev == os.makedev(1, 3)


def test_without_the_right_to_mknod_an_empty_file_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "mknod", refuse)
    with driver("1xa100-40gb=1g.5gb") as d:
        node = d.simulation.dev_root / "dev/nvidia-caps/nvidia-cap1"
        assert node.is_file()
        assert stat.S_IMODE(node.stat().st_mode) == 0o400


def test_late_capability_nodes_are_missing_until_something_makes_them() -> None:
    with driver("1xa100-40gb=1g.5gb", capability_nodes="late") as d:
        caps = d.simulation.dev_root / "dev/nvidia-caps"
        before = _tree(caps)
        d.change(lambda node: node.gpus[0].create("1g.5gb"))
        assert (d.simulation.proc_root / CAPABILITIES / "gpu0/mig/gi11/ci0/access").exists()
        assert _tree(caps) == before
        d.change(lambda node: node.make_nodes())
        assert _tree(caps) - before == {f"nvidia-cap{3 + 9 * 11}", f"nvidia-cap{3 + 9 * 11 + 1}"}


def test_major_number_of_the_capability_nodes_is_told() -> None:
    with driver() as d:
        devices = (d.simulation.proc_root / "devices").read_text()
        assert re.search(r"^\s*\d+ nvidia-caps$", devices, re.MULTILINE)
        assert re.search(r"^195 nvidia$", devices, re.MULTILINE)


def test_sysfs_gives_the_numa_node_under_the_address_that_nvml_gives() -> None:
    with driver("2xa100-40gb", numa=[1, -1]) as d:
        found = [
            (d.simulation.sysfs_root / "bus/pci/devices" / gpu.pci_address / "numa_node").read_text()
            for gpu in d.node.gpus
        ]
        assert found == ["1\n", "-1\n"]
        d.set(numa=[0, 0], pci_order="descending")
        assert len(list((d.simulation.sysfs_root / "bus/pci/devices").iterdir())) == 2


def test_driver_version_and_gpus_are_in_proc() -> None:
    with driver() as d:
        proc = d.simulation.proc_root / "driver/nvidia"
        assert "580.95.05" in (proc / "version").read_text()
        gpu = d.node.gpus[0]
        assert gpu.uuid in (proc / "gpus" / gpu.pci_address / "information").read_text()


def test_container_view_hides_instances_and_capabilities_but_not_the_static_table() -> None:
    with driver(NODE, runtime_view="container") as d:
        proc, dev = d.simulation.proc_root, d.simulation.dev_root / "dev"
        assert not (proc / CAPABILITIES).exists()
        assert (proc / "driver/nvidia/version").exists()
        assert (proc / "driver/nvidia-caps/mig-minors").exists()
        assert (dev / "nvidia1").exists()
        assert not (dev / "nvidia-caps").exists()
        d.set(container_capabilities="config")
        assert _tree(proc / CAPABILITIES) == {"mig/config", "mig/monitor"}
        assert _tree(dev / "nvidia-caps") == {"nvidia-cap1", "nvidia-cap2"}
        d.set(container_capabilities="none")
        assert not (dev / "nvidia-caps").exists()


def test_view_is_a_switch_and_both_trees_are_always_there() -> None:
    with driver(NODE) as d:
        assert d.simulation.dev_root.name == "host"
        d.set(runtime_view="container")
        assert d.simulation.dev_root.name == "container"
        assert d.simulation.proc_root == d.store.state_dir / "container/proc"
        assert (d.store.state_dir / "host/proc" / CAPABILITIES / "gpu0/mig/gi2/access").exists()


def test_without_the_driver_its_files_are_gone_and_they_come_back_with_it() -> None:
    with driver(NODE) as d:
        before = _tree(d.simulation.view)
        d.set(driver_loaded=False)
        assert not (d.simulation.proc_root / "driver").exists()
        assert _tree(d.simulation.dev_root / "dev") == set()
        assert "nvidia" not in (d.simulation.proc_root / "devices").read_text()
        d.set(driver_loaded=True)
        assert _tree(d.simulation.view) == before


def test_files_that_someone_removed_changed_or_added_are_mended_at_the_next_open() -> None:
    with driver(NODE) as d:
        before = files.present(d.store.state_dir, files.plan(d.node))
        caps = d.simulation.proc_root / CAPABILITIES
        (caps / "gpu0/mig/gi2/access").unlink()
        (caps / "gpu0/mig/gi9").mkdir()
        (caps / "gpu0/mig/gi9/access").write_text("stray")
        (d.simulation.proc_root / "devices").write_text("")
        (d.simulation.dev_root / "dev/nvidia0").unlink()
        with Simulation.open(str(d.store.state_dir)):
            assert files.present(d.store.state_dir, files.plan(d.node)) == before
        assert not (caps / "gpu0/mig/gi9").exists()


def test_state_directory_of_others_stays_and_a_temporary_one_goes() -> None:
    with driver() as d:
        with Simulation.open(str(d.store.state_dir)) as shared:
            assert shared.state_dir == d.store.state_dir
        assert d.store.exists
    with Simulation.open("1xa30") as temporary:
        assert temporary.proc_root.is_dir()
    assert not temporary.state_dir.exists()


def test_what_is_neither_a_spec_nor_a_directory_is_said_so() -> None:
    with pytest.raises(InputError, match="not a directory, and a node spec has no slash"):
        Simulation.open("/nowhere/to/be/found")
    with pytest.raises(InputError, match="column 1"):
        Simulation.open("nonsense")
    with driver() as d, pytest.raises(SimulatorError, match="no simulated driver"):
        Simulation.open(str(d.store.state_dir / "host"))
