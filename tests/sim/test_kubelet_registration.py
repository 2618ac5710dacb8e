"""Registration with the stand-in kubelet, and what it does to its directory (kubelet.md 1.1, 1.2, 1.5)."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import grpc
import grpc.aio
import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.errors import KubeletError
from migplugin.sim.kubelet import Kubelet
from migplugin.sim.kubelet.plugins import is_extended_resource_name
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, directory, listed, running


async def refusal(plugin: Plugin, version: str = "v1beta1") -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plugin.register(version=version)
    return caught.value.code(), caught.value.details()


async def test_the_plugin_is_asked_for_its_options_before_register_is_answered() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R) as plugin:
        await plugin.called("ListAndWatch")
        assert plugin.order == ["GetDevicePluginOptions", "registered", "ListAndWatch"]
        assert kubelet.registrations[0][:2] == (R, plugin.endpoint)


async def test_the_deadline_of_register_reaches_the_options_call_and_no_other() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R) as plugin:
        await plugin.called("ListAndWatch")
        left = plugin.deadlines["GetDevicePluginOptions"]
        assert left is not None
        assert 10 < left < 16
        assert plugin.deadlines["ListAndWatch"] is None


async def test_options_in_the_request_mean_nothing() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, R, [device("a")])
        await plugin.serve()
        async with plugin.kubelet() as channel:
            request = api_pb2.RegisterRequest(
                version="v1beta1",
                endpoint=plugin.endpoint,
                resource_name=R,
                options=api_pb2.DevicePluginOptions(get_preferred_allocation_available=True),
            )
            await api_pb2_grpc.RegistrationStub(channel).Register(request, timeout=5)
        await listed(kubelet, 1)
        assert not plugin.calls["GetPreferredAllocation"]
        await plugin.stop()


async def test_another_version_is_refused_in_the_kubelets_words() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, R)
        await plugin.serve()
        assert await refusal(plugin, version="v1alpha") == (
            grpc.StatusCode.UNKNOWN,
            'requested API version "v1alpha" is not supported by kubelet. Supported version is ["v1beta1"]',
        )
        assert kubelet.refusals[0][0] == R
        assert not plugin.calls
        await plugin.stop()


async def test_a_plus_in_the_name_is_refused_in_the_kubelets_words() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, "nvidia.com/mig-1g.5gb+me")
        assert await refusal(plugin) == (
            grpc.StatusCode.UNKNOWN,
            'the ResourceName "nvidia.com/mig-1g.5gb+me" is invalid',
        )
        assert kubelet.capacity("nvidia.com/mig-1g.5gb+me") is None


@pytest.mark.parametrize(
    "name",
    [
        "nvidia.com/gpu",
        "nvidia.com/mig-1g.5gb.me",
        "nvidia.com/" + "x" * 63,
        "nvidia.com/MIG_1g",
        "x/y",
    ],
)
def test_these_are_names_of_extended_resources(name: str) -> None:
    assert is_extended_resource_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "mig-1g.5gb",
        "kubernetes.io/x",
        "foo.kubernetes.io/x",
        "requests.nvidia.com/gpu",
        "nvidia.com/" + "x" * 64,
        "nvidia.com/mig-1g.5gb+me",
        "nvidia.com/",
        "/gpu",
        "nvidia.com/a/b",
        "nvidia.com/-x",
        "nvidia.com/x.",
        "NVIDIA.com/gpu",
        "nvidia.com/gpu\n",
        "a." * 130 + "com/gpu",
    ],
)
def test_these_are_not(name: str) -> None:
    assert not is_extended_resource_name(name)


async def test_a_missing_endpoint_is_dialled_until_the_timeout() -> None:
    async with running(dial_timeout=0.2) as kubelet:
        assert await refusal(Plugin(kubelet.socket, R)) == (
            grpc.StatusCode.UNKNOWN,
            "failed to dial device plugin: context deadline exceeded",
        )


async def test_a_socket_that_nobody_serves_is_dialled_until_the_timeout() -> None:
    async with running(dial_timeout=0.2) as kubelet:
        plugin = Plugin(kubelet.socket, R)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(plugin.path))
            silent.listen()
            _, text = await refusal(plugin)
        assert text == "failed to dial device plugin: context deadline exceeded"


async def test_a_plugin_dials_ten_seconds_by_default() -> None:
    with directory() as root:
        assert Kubelet(root)._dial_timeout == 10.0


async def test_an_absolute_endpoint_lands_in_the_kubelets_directory_all_the_same() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, R, [device("a")], endpoint="x.sock")
        await plugin.serve()
        plugin.endpoint = "/x.sock"
        await plugin.register()
        await listed(kubelet, 1)
        await plugin.stop()


async def test_an_error_of_the_options_call_fails_the_registration_and_nothing_is_listed() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, R, [device("a")])
        plugin.failures["GetDevicePluginOptions"] = grpc.StatusCode.INTERNAL, "no options today"
        await plugin.serve()
        _, text = await refusal(plugin)
        assert text == (
            "failed to get device plugin options: rpc error: code = Internal desc = no options today"
        )
        assert kubelet.capacity(R) is None
        assert not plugin.calls["ListAndWatch"]
        await plugin.stop()


async def test_a_plugin_that_gives_up_registering_leaves_nothing_behind() -> None:
    async with running() as kubelet:
        plugin = Plugin(kubelet.socket, R)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await plugin.register(timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)


async def test_a_start_deletes_every_socket_at_the_top_level_and_keeps_files() -> None:
    with directory() as root:
        plugins = root / "device-plugins"
        (plugins / "below").mkdir(parents=True)
        for name in ("old.sock", "nvidia-gpu.sock", "below/kept.sock"):
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(plugins / name))
        (plugins / "link.sock").symlink_to("old.sock")
        (plugins / "migplugin.lock").write_text("")
        (plugins / "zz-link.sock").symlink_to("below/kept.sock")
        async with Kubelet(root):
            left = {path.name for path in plugins.iterdir()}
        assert {"below", "kubelet.sock", "migplugin.lock"} == left - {"link.sock"}
        assert (plugins / "below/kept.sock").is_socket()
        assert (plugins / "migplugin.lock").read_text() == ""


async def test_the_directories_are_made_for_root_alone() -> None:
    async with running() as kubelet:
        for path in (kubelet.socket, kubelet.pod_resources_socket):
            assert path.is_socket()
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


async def test_a_graceful_stop_takes_kubelet_sock_away_and_nothing_else() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        await kubelet.stop()
        assert sorted(path.name for path in kubelet.socket.parent.iterdir()) == sorted(
            [plugin.endpoint, kubelet.checkpoint_path.name]
        )


async def test_a_kill_leaves_the_socket_where_it_was_with_nobody_behind_it() -> None:
    async with running() as kubelet:
        before = os.lstat(kubelet.socket)
        await kubelet.kill()
        after = os.lstat(kubelet.socket)
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(str(kubelet.socket))


async def test_a_kill_cuts_the_stream_and_every_call() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        await kubelet.kill()
        await plugin.called("stream ended")


async def test_after_a_restart_the_plugins_server_is_alive_and_unreachable() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        await kubelet.restart(kill=True)
        assert not plugin.path.exists()
        assert kubelet.socket.is_socket()
        assert kubelet.allocatable(R) == 0


async def test_the_end_of_an_old_stream_disconnects_the_new_plugin_of_that_name() -> None:
    async with running() as kubelet:
        old = Plugin(kubelet.socket, R, [device("a")])
        await old.serve()
        await old.register()
        await listed(kubelet, 1)
        async with Plugin(kubelet.socket, R, [device("b"), device("c")]) as new:
            await listed(kubelet, 2)
            await old.stop()
            await listed(kubelet, 0)
            await new.called("stream ended")
            assert kubelet.capacity(R) == 2


async def test_stopping_the_old_plugin_before_the_new_one_registers_is_well() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
        async with Plugin(kubelet.socket, R, [device("b"), device("c")]):
            await listed(kubelet, 2)


async def test_registering_twice_on_one_socket_opens_a_second_stream() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await plugin.called("ListAndWatch")
        await plugin.register()
        await plugin.called("ListAndWatch", 2)
        plugin.list(device("a"), device("b"))
        await listed(kubelet, 2)
        await kubelet.until(lambda k: len(k.messages(R)) == 4)


async def test_a_refused_registration_forgets_the_client_that_was_current() -> None:
    async with running(dial_timeout=0.1) as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        await refusal(Plugin(kubelet.socket, R, endpoint="nobody.sock"))
        await plugin.end_stream()
        await plugin.called("stream ended")
        assert kubelet.allocatable(R) == 1


async def test_a_plugin_that_is_dialled_while_the_old_one_ends_is_taken_and_then_forgotten() -> None:
    async with running() as kubelet:
        old = Plugin(kubelet.socket, R, [device("a")])
        await old.serve()
        await old.register()
        await listed(kubelet, 1)
        new = Plugin(kubelet.socket, R, [device("b"), device("c")])
        with socket.socket(socket.AF_UNIX) as slow:
            slow.bind(str(new.path))
            slow.listen()
            slow.setblocking(False)
            registering = asyncio.create_task(new.register())
            dialling, _ = await asyncio.get_running_loop().sock_accept(slow)
            await old.stop()
            await listed(kubelet, 0)
        dialling.close()
        new.path.unlink()
        await new.serve()
        await registering
        await listed(kubelet, 2)
        await new.end_stream()
        await new.called("stream ended")
        assert kubelet.allocatable(R) == 2
        await new.stop()


async def test_every_start_makes_a_new_socket_though_its_inode_may_be_the_old_one() -> None:
    async with running() as kubelet:
        before = os.lstat(kubelet.socket)
        await kubelet.restart(kill=True)
        after = os.lstat(kubelet.socket)
        assert (before.st_ino, before.st_ctime_ns) != (after.st_ino, after.st_ctime_ns)
        assert before.st_mtime_ns < after.st_mtime_ns


async def test_a_path_too_long_for_a_socket_is_told() -> None:
    with directory() as root:
        kubelet = Kubelet(root / ("x" * 90))
        with pytest.raises(KubeletError, match="too long for a socket"):
            await kubelet.start()


async def test_a_running_kubelet_is_not_started_twice() -> None:
    async with running() as kubelet:
        with pytest.raises(KubeletError, match="running already"):
            await kubelet.start()


async def test_until_tells_the_state_of_the_node_when_it_gives_up() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        with pytest.raises(TimeoutError, match=rf"'{R}': 1.*{plugin.endpoint}"):
            await kubelet.until(lambda k: k.allocatable(R) == 2, timeout=0.01)


def test_it_leaves_nothing_in_the_directory_that_a_real_one_would_not() -> None:
    async def run(root: Path) -> None:
        async with Kubelet(root) as kubelet, Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)

    with directory() as root:
        asyncio.run(run(root))
        assert {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()} == {
            "device-plugins/kubelet_internal_checkpoint",
            "pod-resources/kubelet.sock",
            "pods.json",
        }
