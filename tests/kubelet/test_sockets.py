"""The device-plugin directory: the lock, our sockets, and what is said about what is wrong."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.errors import KubeletError
from migplugin.kubelet import sockets
from migplugin.kubelet.sockets import NodeLock, new_socket_path, other_plugin, remove_stale
from tests.fakes.sockets import left_behind, listening


def test_only_one_holds_the_node_lock_and_its_end_frees_it(short: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from migplugin.kubelet.sockets import NodeLock\n"
            "lock = NodeLock(Path(sys.argv[1])); print(lock.try_acquire(), flush=True); sys.stdin.read()",
            str(short),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    lock = NodeLock(short)
    assert not lock.try_acquire()
    holder.kill()
    holder.communicate()
    assert lock.try_acquire()
    assert not NodeLock(short).try_acquire()
    lock.release()
    assert NodeLock(short).try_acquire()


async def test_the_second_agent_waits_with_one_line_and_takes_over(
    short: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LOCK_RETRY", 0.01)
    first, second = NodeLock(short), NodeLock(short)
    assert first.try_acquire()
    waiting = asyncio.ensure_future(second.acquire())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert caplog.text.count("waiting for the node lock") == 1
    first.release()
    await asyncio.wait_for(waiting, 5.0)


def test_a_lock_in_a_missing_directory_says_which(tmp_path: Path) -> None:
    with pytest.raises(KubeletError, match="must be the kubelet's device-plugin directory"):
        NodeLock(tmp_path / "nowhere").try_acquire()


def test_a_lock_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "migplugin.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KubeletError):
        NodeLock(tmp_path).try_acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_every_server_gets_a_new_name_that_fits(short: Path) -> None:
    names = {new_socket_path(short, "nvidia.com/mig-1g.5gb.me").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("migplugin-mig-1g.5gb.me-") for name in names)


def test_a_path_too_long_for_a_socket_is_refused_before_it_is_bound() -> None:
    def refusal() -> str:
        with pytest.raises(KubeletError, match="too long for a socket, at most 107") as caught:
            new_socket_path(Path("/tmp") / ("x" * 90), "nvidia.com/gpu")
        return str(caught.value)

    assert refusal() == refusal(), "a reason that differs each time is logged each time"


def test_only_our_sockets_that_nobody_serves_are_removed(short: Path) -> None:
    stale = short / "migplugin-gpu-abcdef.sock"
    left_behind(stale)
    left_behind(short / "nvidia-gpu.sock")
    left_behind(short / "migplugin-gpu-1.sock")
    (short / "migplugin-gpu-123456.sock").touch()
    with listening(short / "migplugin-gpu-fedcba.sock"):
        assert remove_stale(short) == 1
    assert not stale.exists()
    assert len(list(short.iterdir())) == 4


def test_nvidia_s_plugin_counts_only_while_it_serves_that_very_resource(short: Path) -> None:
    left_behind(short / "nvidia-gpu.sock")
    assert other_plugin(short, "nvidia.com/gpu") is None
    with listening(short / "nvidia-mig-1g.5gb.sock"), listening(short / "kubelet.sock"):
        assert other_plugin(short, "nvidia.com/mig-1g.5gb") == short / "nvidia-mig-1g.5gb.sock"
        assert other_plugin(short, "nvidia.com/gpu") is None
        assert other_plugin(short, "nvidia.com/mig-2g.10gb") is None
