"""The stand-in kubelet as a program: what it says, what it is told, how it ends."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.fakes.kubelet_process import CommandFailed, kubelet_process
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, directory

POD = {"name": "holder", "containers": [{"name": "main", "requests": {R: 1}}]}


async def registered(plugin: Plugin, *devices: str) -> None:
    await plugin.stop()
    plugin.list(*(device(id_) for id_ in devices))
    await plugin.serve()
    await plugin.register()


async def test_it_admits_pods_and_survives_sigkill_with_them() -> None:
    with directory() as root:
        plugin = Plugin(root / "device-plugins" / "kubelet.sock", R)
        async with kubelet_process(root) as kubelet:
            assert kubelet.ready["socket"] == str(plugin.kubelet_socket)
            await registered(plugin, "MIG-1", "MIG-2")
            await kubelet.allocatable(R, 2)
            status = await kubelet.do("admit", pod=POD)
            assert status["phase"] == "Running"
            kubelet.process.kill()
            await kubelet.process.wait()
        assert plugin.kubelet_socket.is_socket()
        await plugin.called("stream ended")
        async with kubelet_process(root) as kubelet:
            assert await kubelet.do("status", pod="holder") == status
            assert (await kubelet.do("node"))["capacity"] == {R: 0}
            await registered(plugin, "MIG-1", "MIG-2")
            await kubelet.allocatable(R, 2)
            restarted = await kubelet.do("restart_container", pod="holder", container="main")
            assert restarted == status["containers"]["main"]
            assert await kubelet.do("devices", resource=R) == {"MIG-1": "Healthy", "MIG-2": "Healthy"}
            assert (await kubelet.do("finish", pod="holder"))["phase"] == "Succeeded"
            await kubelet.do("delete", pod="holder")
            with pytest.raises(CommandFailed, match="no pod default/holder"):
                await kubelet.do("status", pod="holder")
            with pytest.raises(CommandFailed, match="unknown command 'dance'"):
                await kubelet.do("dance")
            await plugin.stop()
            await kubelet.allocatable(R, 0)
            kubelet.process.send_signal(signal.SIGTERM)
            assert await kubelet.ended() == (0, "")
        assert not plugin.kubelet_socket.exists()


async def test_a_panic_is_one_line_with_the_device_and_status_70() -> None:
    with directory() as root:
        plugin = Plugin(root / "device-plugins" / "kubelet.sock", R)
        async with kubelet_process(root) as kubelet:
            await registered(plugin, "MIG-1")
            await kubelet.allocatable(R, 1)
            plugin.gates["Allocate"] = asyncio.Event()
            admission = asyncio.create_task(kubelet.do("admit", pod=POD))
            await plugin.called("Allocate")
            plugin.list(device("MIG-2"), device("MIG-3"))
            await kubelet.allocatable(R, 2)
            plugin.gates.pop("Allocate").set()
            status, said = await kubelet.ended()
            assert status == 70
            assert said.startswith("panic: ")
            assert "MIG-1" in said
            assert said.count("\n") == 1
            admission.cancel()
        assert plugin.kubelet_socket.is_socket()
        await plugin.stop()


async def test_after_a_kill_it_panics_over_a_list_without_an_allocated_device() -> None:
    with directory() as root:
        plugin = Plugin(root / "device-plugins" / "kubelet.sock", R)
        async with kubelet_process(root) as kubelet:
            await registered(plugin, "MIG-1")
            await kubelet.allocatable(R, 1)
            await kubelet.do("admit", pod=POD)
        async with kubelet_process(root) as kubelet:
            await registered(plugin, "MIG-2")
            status, said = await kubelet.ended()
        assert status == 70
        assert "without MIG-1, which pod holder holds" in said
        await plugin.stop()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--topology-policy", "odd", "/tmp/x"), 2, "'odd' is not one of"),
        (("/proc/nothing/here",), 1, "stand-in kubelet: "),
    ],
)
async def test_what_it_cannot_do_is_told_in_a_line(words: tuple[str, ...], status: int, said: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migplugin.sim.kubelet", *words), stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    assert process.returncode == status
    assert said in err.decode()
    assert "Traceback" not in err.decode()


async def test_a_killed_kubelets_socket_refuses() -> None:
    with directory() as root:
        async with kubelet_process(root) as kubelet:
            path = Path(kubelet.ready["socket"])
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
