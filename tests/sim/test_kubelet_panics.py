"""Two ways for a plugin to crash the kubelet, and what does not (kubelet.md 1.4)."""

import asyncio

import grpc
import pytest

from migplugin.errors import KubeletError
from migplugin.sim.kubelet import Container, Kubelet, Panic, Pod
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, directory, listed, pod, running


async def dropped_during(kubelet: Kubelet, plugin: Plugin, method: str) -> asyncio.Task[object]:
    """An admission whose device has left the list while `method` was being answered."""
    plugin.gates[method] = asyncio.Event()
    admission = asyncio.create_task(kubelet.admit(pod()))
    await plugin.called(method)
    plugin.list(device("other"))
    await kubelet.until(lambda k: "MIG-1" not in k.devices(R))
    plugin.gates[method].set()
    return admission


@pytest.mark.parametrize("method", ["GetPreferredAllocation", "Allocate"])
async def test_dropping_a_device_in_flight_is_a_panic_that_names_it(method: str) -> None:
    with directory() as root:
        kubelet = Kubelet(root)
        await kubelet.start()
        async with Plugin(kubelet.socket, R, [device("MIG-1")], preferred=True) as plugin:
            await listed(kubelet, 1)
            admission = await dropped_during(kubelet, plugin, method)
            with pytest.raises(Panic, match=f"{R} lost MIG-1 from its list while it was being allocated"):
                await admission
            assert "\n" not in str(kubelet.panic)
            await plugin.called("stream ended")
        await kubelet.stop()


async def test_after_a_panic_every_call_raises_it() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        with pytest.raises(Panic):
            await (await dropped_during(kubelet, plugin, "Allocate"))
        with pytest.raises(Panic):
            kubelet.capacity(R)
        with pytest.raises(Panic):
            kubelet.devices(R)
        with pytest.raises(Panic):
            await kubelet.admit(pod("b"))
        with pytest.raises(Panic):
            await kubelet.delete(pod("b"))
        with pytest.raises(Panic):
            await kubelet.until(lambda _: False)
        await kubelet.until(lambda k: k.panic)


async def test_a_panic_leaves_the_sockets_as_a_crash_does() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        with pytest.raises(Panic):
            await (await dropped_during(kubelet, plugin, "Allocate"))
        await kubelet.stop()
        assert kubelet.socket.is_socket()
        with pytest.raises(grpc.aio.AioRpcError):
            await plugin.register(timeout=1.0)


async def test_a_panic_that_nobody_saw_is_raised_at_the_end() -> None:
    async def unseen() -> None:
        async with running() as kubelet:
            await holding(kubelet)
            await kubelet.restart()
            plugin = await again(kubelet, "other")
            await plugin.called("stream ended")
            await plugin.stop()

    with pytest.raises(Panic):
        await unseen()


async def test_a_panicked_kubelet_starts_again_and_is_well_when_the_list_is_right() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        with pytest.raises(Panic):
            await (await dropped_during(kubelet, plugin, "Allocate"))
        await plugin.stop()
        await kubelet.restart()
        assert kubelet.panic is None
        async with Plugin(kubelet.socket, R, [device("MIG-1")]):
            await listed(kubelet, 1)
            plugin.gates.clear()
            assert (await kubelet.admit(pod("b"))).phase == "Running"


async def test_turning_unhealthy_in_flight_is_no_panic() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        admission = asyncio.create_task(kubelet.admit(pod()))
        await plugin.called("Allocate")
        plugin.list(device("MIG-1", "Unhealthy"))
        await listed(kubelet, 0)
        plugin.gates["Allocate"].set()
        assert (await admission).phase == "Running"


async def test_dropping_a_device_in_flight_and_refusing_it_is_no_panic() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        plugin.failures["Allocate"] = grpc.StatusCode.FAILED_PRECONDITION, "gone"
        status = await (await dropped_during(kubelet, plugin, "Allocate"))
        assert kubelet.panic is None
        assert "desc = gone" in str(status)


async def test_dropping_an_allocated_device_later_is_no_panic() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        await kubelet.admit(pod())
        plugin.list()
        await kubelet.until(lambda k: k.capacity(R) == 0)


async def test_dropping_what_an_init_container_left_before_the_next_container_is_a_panic() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        chain = Pod("a", (Container("i", {R: 1}, init=True), Container("app", {R: 1})))
        admission = asyncio.create_task(kubelet.admit(chain))
        await plugin.called("Allocate")
        plugin.gates["Allocate"].set()
        plugin.gates["Allocate"] = asyncio.Event()
        await plugin.called("Allocate", 2)
        plugin.list(device("other"))
        await kubelet.until(lambda k: "MIG-1" not in k.devices(R))
        plugin.gates["Allocate"].set()
        with pytest.raises(Panic, match="MIG-1"):
            await admission


async def again(kubelet: Kubelet, *devices: str, health: str = "Healthy") -> Plugin:
    """A plugin that registers after a restart with this list."""
    plugin = Plugin(kubelet.socket, R, [device(id_, health) for id_ in devices])
    await plugin.serve()
    await plugin.register()
    return plugin


async def holding(kubelet: Kubelet) -> Pod:
    """A pod that holds MIG-1, whose plugin is gone."""
    async with Plugin(kubelet.socket, R, [device("MIG-1")]):
        await listed(kubelet, 1)
        held = pod("holder")
        await kubelet.admit(held)
    return held


@pytest.mark.parametrize("kill", [False, True])
async def test_registering_after_a_restart_without_an_allocated_device_is_a_panic(kill: bool) -> None:
    async with running() as kubelet:
        await holding(kubelet)
        await kubelet.restart(kill=kill)
        plugin = await again(kubelet, "other")
        with pytest.raises(Panic, match=f"{R} was listed without MIG-1, which pod holder holds"):
            await kubelet.until(lambda _: False)
        await plugin.stop()


async def test_an_empty_first_list_after_a_restart_is_one_too() -> None:
    async with running() as kubelet:
        await holding(kubelet)
        await kubelet.restart()
        plugin = await again(kubelet)
        await kubelet.until(lambda k: k.panic)
        await plugin.stop()


async def test_listing_an_allocated_device_as_unhealthy_after_a_restart_is_well() -> None:
    async with running() as kubelet:
        await holding(kubelet)
        await kubelet.restart()
        plugin = await again(kubelet, "MIG-1", health="Unhealthy")
        await kubelet.until(lambda k: k.capacity(R) == 1)
        plugin.list()
        await kubelet.until(lambda k: k.capacity(R) == 0)
        await plugin.stop()


async def test_without_a_topology_policy_it_is_no_panic() -> None:
    async with running(topology_policy="none") as kubelet:
        await holding(kubelet)
        await kubelet.restart()
        plugin = await again(kubelet, "other")
        await listed(kubelet, 1)
        await plugin.stop()


async def test_a_pod_that_has_ended_is_not_admitted_again() -> None:
    async with running() as kubelet:
        await kubelet.finish(await holding(kubelet))
        await kubelet.restart()
        plugin = await again(kubelet, "other")
        await listed(kubelet, 1)
        await plugin.stop()


async def test_a_plugins_own_restart_without_an_allocated_device_is_no_panic() -> None:
    async with running() as kubelet:
        await holding(kubelet)
        plugin = await again(kubelet, "other")
        await listed(kubelet, 1)
        await plugin.stop()


async def test_pods_are_admitted_again_only_once_the_api_server_has_answered() -> None:
    async with running(pod_resources_synced=False) as kubelet:
        await holding(kubelet)
        await kubelet.restart()
        plugin = await again(kubelet, "other")
        await listed(kubelet, 1)
        with pytest.raises(Panic, match="MIG-1"):
            kubelet.sync()
        await plugin.stop()


async def test_a_list_that_is_right_when_the_api_server_answers_is_well() -> None:
    async with running(pod_resources_synced=False) as kubelet:
        await holding(kubelet)
        await kubelet.restart()
        plugin = await again(kubelet, "other")
        await listed(kubelet, 1)
        plugin.list(device("other"), device("MIG-1"))
        await listed(kubelet, 2)
        kubelet.sync()
        await plugin.stop()


async def test_a_stopped_kubelet_answers_no_call() -> None:
    async with running() as kubelet:
        await kubelet.stop()
        with pytest.raises(KubeletError, match="does not run"):
            await kubelet.admit(pod())
