"""Capability nodes that are missing on the host: made, or named with the command to run."""

import asyncio
import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from migplugin.core.inventory import Inventory
from migplugin.nvml import nodes
from migplugin.nvml.nodes import CapabilityNodes, is_host_dev
from tests.core.examples import SEVENTHS

DEVICE = replace(SEVENTHS.devices[0], gi_mode=0o440)
NODE = Inventory("590.48.01", (replace(SEVENTHS, devices=(DEVICE,)),))
GI = "/proc/driver/nvidia/capabilities/gpu0/mig/gi7/access"
CI = "/proc/driver/nvidia/capabilities/gpu0/mig/gi7/ci0/access"


def maker(root: Path, *, is_host: bool = True, major: str = "234", driver: str = "none") -> CapabilityNodes:
    (root / "dev").mkdir(exist_ok=True)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/devices").write_text(f"Character devices:\n{major} nvidia-caps\n")
    return CapabilityNodes(dev_root=root, is_host=is_host, proc_root=root / "proc", driver_root=root / driver)


def touch(root: Path) -> None:
    (root / "dev/nvidia-caps").mkdir(exist_ok=True)
    for minor in (30, 31):
        (root / f"dev/nvidia-caps/nvidia-cap{minor}").touch()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What mknod is asked for, by those who may not call it too."""
    asked: list[tuple[str, int, int]] = []

    def mknod(path: Path, mode: int, device: int) -> None:
        assert stat.S_ISCHR(mode)
        asked.append((path.name, os.major(device), os.minor(device)))
        path.touch()

    monkeypatch.setattr(os, "mknod", mknod)
    return asked


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def mknod(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "mknod", mknod)


async def test_missing_nodes_are_made_with_the_driver_s_numbers_and_mode(
    tmp_path: Path, made: list[tuple[str, int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    ours = maker(tmp_path)
    with caplog.at_level(logging.INFO):
        assert await ours.ensure(NODE) == {}
        assert await ours.ensure(NODE) == {}, "and not made again"
    assert made == [(".nvidia-cap30.new", 234, 30), (".nvidia-cap31.new", 234, 31)]
    caps = tmp_path / "dev/nvidia-caps"
    assert sorted(path.name for path in caps.iterdir()) == ["nvidia-cap30", "nvidia-cap31"]
    assert stat.S_IMODE((caps / "nvidia-cap30").stat().st_mode) == 0o440
    assert stat.S_IMODE((caps / "nvidia-cap31").stat().st_mode) == 0o444
    assert [record.getMessage() for record in caplog.records] == ["capability nodes made"]


async def test_real_nodes_are_made_again_when_the_major_number_has_changed(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "try", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this process may not make device nodes")
    assert await maker(tmp_path).ensure(NODE) == {}
    node = tmp_path / "dev/nvidia-caps/nvidia-cap30"
    assert node.stat().st_rdev == os.makedev(234, 30)
    assert await maker(tmp_path, major="240").ensure(NODE) == {}
    assert node.stat().st_rdev == os.makedev(240, 30)


@pytest.mark.usefixtures("forbidden")
async def test_where_nothing_can_make_them_the_device_has_a_reason_until_they_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = maker(tmp_path)
    for _ in range(2):
        unready = await ours.ensure(NODE)
    assert unready == {
        DEVICE.uuid: "/dev/nvidia-caps/nvidia-cap30 is missing on the host, "
        f"and cannot be made: operation not permitted; run there: nvidia-modprobe -f {GI}"
    }
    (record,) = caplog.records
    assert record.__dict__["command"] == f"nvidia-modprobe -f {GI} && nvidia-modprobe -f {CI}"
    touch(tmp_path)
    assert await ours.ensure(NODE) == {}


async def test_nothing_is_made_in_a_container_s_own_dev(
    tmp_path: Path, made: list[tuple[str, int, int]]
) -> None:
    ours = maker(tmp_path, is_host=False)
    assert "the host's /dev is not mounted here" in (await ours.ensure(NODE))[DEVICE.uuid]
    assert not made
    touch(tmp_path)
    assert await ours.ensure(NODE) == {}, "what a privileged container has, the host had at its start"


async def test_a_major_number_that_cannot_be_read_is_the_reason(
    tmp_path: Path, made: list[tuple[str, int, int]]
) -> None:
    assert "has no line nvidia-caps" in (await maker(tmp_path, major="x").ensure(NODE))[DEVICE.uuid]
    assert not made


async def test_a_device_without_capability_needs_no_node(tmp_path: Path) -> None:
    blind = replace(DEVICE, gi_minor=None, ci_minor=None)
    assert await maker(tmp_path).ensure(Inventory("1", (replace(SEVENTHS, devices=(blind,)),))) == {}


@pytest.fixture
def modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """nvidia-modprobe of a driver root, and a chroot that only says what it was asked."""

    def put(script: str) -> Path:
        root = tmp_path / "driver"
        for path, text in (
            (root / "usr/bin/nvidia-modprobe", "#!/bin/sh\n"),
            (tmp_path / "bin/chroot", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n'),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        return tmp_path / "asked"

    return put


async def test_the_driver_s_own_program_makes_them_where_we_may_not(
    tmp_path: Path, modprobe: Callable[[str], Path]
) -> None:
    caps = tmp_path / "dev/nvidia-caps"
    script = f"mkdir -p {caps}; case $4 in */ci0/*) n=31;; *) n=30;; esac; touch {caps}/nvidia-cap$n"
    asked = modprobe(script)
    assert await maker(tmp_path, is_host=False, driver="driver").ensure(NODE) == {}
    root = tmp_path / "driver"
    assert asked.read_text().splitlines() == [
        f"{root} /usr/bin/nvidia-modprobe -f {GI}",
        f"{root} /usr/bin/nvidia-modprobe -f {CI}",
    ]


async def test_a_program_that_fails_is_not_started_again_at_once(
    tmp_path: Path, modprobe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = modprobe("echo no such capability >&2; exit 3")
    ours = maker(tmp_path, is_host=False, driver="driver")
    for _ in range(3):
        unready = await ours.ensure(NODE)
    assert "/usr/bin/nvidia-modprobe ended with 3: no such capability" in unready[DEVICE.uuid]
    assert len(asked.read_text().splitlines()) == 2, "once for each node"
    monkeypatch.setattr(nodes, "MODPROBE_AGAIN", 0.0)
    await ours.ensure(NODE)
    assert len(asked.read_text().splitlines()) == 4


async def test_a_program_that_does_nothing_or_hangs_is_a_reason(
    tmp_path: Path, modprobe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    modprobe("exit 0")
    unready = await maker(tmp_path, is_host=False, driver="driver").ensure(NODE)
    assert "nvidia-modprobe did not make it" in unready[DEVICE.uuid]
    modprobe("exec tail -f /dev/null")
    monkeypatch.setattr(nodes, "MODPROBE_WITHIN", 0.1)
    unready = await maker(tmp_path, is_host=False, driver="driver").ensure(NODE)
    assert "does not end within 0.1 s" in unready[DEVICE.uuid]


async def test_a_program_that_hangs_is_waited_for_once_and_not_for_each_node(
    tmp_path: Path, modprobe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = modprobe("exec tail -f /dev/null")
    monkeypatch.setattr(nodes, "MODPROBE_WITHIN", 0.1)
    ours = maker(tmp_path, is_host=False, driver="driver")
    for _ in range(2):
        assert "does not end within" in (await ours.ensure(NODE))[DEVICE.uuid]
    assert len(asked.read_text().splitlines()) == 1


async def test_a_program_that_cannot_even_be_killed_holds_nothing_back(
    tmp_path: Path, modprobe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    modprobe("exec sleep 3")
    monkeypatch.setattr(nodes, "MODPROBE_WITHIN", 0.1)
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda _: None)
    began = time.monotonic()
    assert "does not end" in (await maker(tmp_path, is_host=False, driver="driver").ensure(NODE))[DEVICE.uuid]
    assert time.monotonic() - began < 2.0
    await asyncio.sleep(max(3.2 - (time.monotonic() - began), 0))  # its end is seen on this loop


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("35 27 0:31 / /dev rw,nosuid - tmpfs tmpfs rw,size=64k", False),
        ("25 1 0:6 / /dev rw,nosuid shared:2 - devtmpfs udev rw,size=1", True),
        ("25 1 0:6 / /dev/shm rw - devtmpfs udev rw", False),
        ("", False),
    ],
)
def test_a_container_s_own_dev_is_told_from_the_host_s(tmp_path: Path, line: str, host: bool) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(line + "\n")
    assert is_host_dev(Path("/"), mounts) is host
    assert is_host_dev(Path("/driver-root"), mounts)
