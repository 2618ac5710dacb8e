"""The checkpoint file, and what a restart makes of it (kubelet.md 1.8, 4)."""

import asyncio
import base64
import json
from typing import Any

import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2
from migplugin.sim.kubelet import Kubelet, Pod, StartFailed
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, list_pods, listed, pod, running


def data(kubelet: Kubelet) -> Any:
    return json.loads(kubelet.checkpoint_path.read_text())["Data"]


def named(kubelet: Kubelet) -> list[str]:
    return sorted(
        id_
        for entry in data(kubelet)["PodDeviceEntries"] or ()
        for ids in entry["DeviceIDs"].values()
        for id_ in ids
    )


async def test_it_has_the_kubelets_name_and_form() -> None:
    devices = [device("a", nodes=[0, 1]), device("b"), device("c", "Unhealthy"), device("d", nodes=[])]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices):
        await listed(kubelet, 3)
        assert kubelet.checkpoint_path == kubelet.socket.parent / "kubelet_internal_checkpoint"
        holder = pod(count=3)
        await kubelet.admit(holder)
        document = json.loads(kubelet.checkpoint_path.read_text())
        assert list(document) == ["Data", "Checksum"]
        assert isinstance(document["Checksum"], int)
        (entry,) = document["Data"]["PodDeviceEntries"]
        response = api_pb2.ContainerAllocateResponse.FromString(base64.b64decode(entry.pop("AllocResp")))
        assert response.envs == {"DEVICES": "a,b,d"}
        entry["DeviceIDs"]["-1"].sort()
        assert entry == {
            "PodUID": holder.uid,
            "ContainerName": "main",
            "ResourceName": R,
            "DeviceIDs": {"-1": ["b", "d"], "0": ["a"], "1": ["a"]},
        }
        assert {key: sorted(ids) for key, ids in document["Data"]["RegisteredDevices"].items()} == {
            R: ["a", "b", "d"]
        }


async def test_without_an_allocation_it_has_null_for_entries() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]):
        await listed(kubelet, 1)
        assert data(kubelet) == {"PodDeviceEntries": None, "RegisteredDevices": {R: ["a"]}}


async def test_there_is_none_before_the_first_list() -> None:
    async with running() as kubelet:
        assert not kubelet.checkpoint_path.exists()


async def test_it_names_a_device_before_the_pod_runs_and_the_device_of_an_init_container() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")], pre_start=True) as plugin:
        await listed(kubelet, 1)
        plugin.gates["PreStartContainer"] = asyncio.Event()
        admission = asyncio.create_task(kubelet.admit(pod()))
        await plugin.called("PreStartContainer")
        assert named(kubelet) == ["a"]
        plugin.gates["PreStartContainer"].set()
        await admission


async def test_it_goes_on_naming_a_deleted_pod_until_a_list_message_after_a_release() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        gone = pod()
        await kubelet.admit(gone)
        await kubelet.delete(gone)
        assert named(kubelet) == ["a"]
        assert await list_pods(kubelet) == {}
        assert named(kubelet) == ["a"]
        plugin.list(device("a"))
        await kubelet.until(lambda k: len(k.messages(R)) == 2)
        assert named(kubelet) == []


async def test_a_list_message_alone_does_not_free_a_deleted_pod() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        gone = pod()
        await kubelet.admit(gone)
        await kubelet.delete(gone)
        plugin.list(device("a"))
        await kubelet.until(lambda k: len(k.messages(R)) == 2)
        assert named(kubelet) == ["a"]


async def test_an_allocation_rewrites_it_too() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]):
        await listed(kubelet, 2)
        gone = pod()
        await kubelet.admit(gone)
        await kubelet.delete(gone)
        after = pod("after", 2)
        await kubelet.admit(after)
        assert [entry["PodUID"] for entry in data(kubelet)["PodDeviceEntries"]] == [after.uid]


async def test_a_pod_that_is_refused_does_not_rewrite_it() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]):
        await listed(kubelet, 1)
        gone = pod()
        await kubelet.admit(gone)
        await kubelet.delete(gone)
        assert (await kubelet.admit(pod("b", 2))).phase == "Failed"
        assert named(kubelet) == ["a"]


async def restarted(kubelet: Kubelet) -> Pod:
    """A pod that holds "a"; the kubelet was restarted and no plugin is back."""
    async with Plugin(kubelet.socket, R, [device("a"), device("b")]):
        await listed(kubelet, 2)
        holder = pod("holder")
        await kubelet.admit(holder)
        (held,) = kubelet.status(holder).containers["main"].device_ids[R]
        if held != "a":
            await kubelet.delete(holder)
            return await restarted(kubelet)
    await kubelet.restart(kill=True)
    return holder


async def test_after_a_restart_capacity_is_zero_until_the_plugin_is_back() -> None:
    async with running() as kubelet:
        holder = await restarted(kubelet)
        assert kubelet.node() == {"capacity": {R: 0}, "allocatable": {R: 0}}
        assert kubelet.status(holder).phase == "Running"
        async with Plugin(kubelet.socket, R, [device("a"), device("b")]) as plugin:
            await listed(kubelet, 2)
            assert not plugin.calls["Allocate"]
            # Its device is still its own.
            other = pod("other")
            await kubelet.admit(other)
            assert kubelet.status(other).containers["main"].device_ids == {R: ["b"]}


async def test_a_pod_that_comes_before_its_plugin_is_back_fails() -> None:
    async with running() as kubelet:
        await restarted(kubelet)
        assert (await kubelet.admit(pod("early"))).message == (
            f"Allocate failed due to no healthy devices present; cannot allocate unhealthy devices {R}, "
            "which is unexpected"
        )


async def test_a_container_restarts_from_the_checkpoint_before_the_plugin_is_back() -> None:
    async with running() as kubelet:
        holder = await restarted(kubelet)
        edits = await kubelet.restart_container(holder, "main")
        assert edits.envs == {"DEVICES": "a"}


async def test_a_plugin_that_never_comes_back_is_forgotten_after_the_grace() -> None:
    async with running(grace=0.1) as kubelet:
        holder = await restarted(kubelet)
        await kubelet.until(lambda k: R not in data(k)["RegisteredDevices"])
        with pytest.raises(StartFailed, match="endpoint not found in cache"):
            await kubelet.restart_container(holder, "main")
        assert named(kubelet) == ["a"]
        assert (await kubelet.admit(pod("late"))).message == (
            f"Allocate failed due to cannot allocate unregistered device {R}, which is unexpected"
        )


async def test_without_the_file_extended_resources_are_zero_and_allocations_forgotten() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
            await kubelet.admit(pod())
        await kubelet.stop()
        kubelet.checkpoint_path.unlink()
        await kubelet.start()
        assert kubelet.node() == {"capacity": {R: 0}, "allocatable": {R: 0}}
        async with Plugin(kubelet.socket, R, [device("other")]):
            await listed(kubelet, 1)


@pytest.mark.parametrize("damage", ["", "{", '{"Data":{},"Checksum":1}', "[]", "\x00"])
async def test_a_damaged_file_is_as_good_as_none(damage: str) -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
        await kubelet.stop()
        kubelet.checkpoint_path.write_text(damage)
        await kubelet.start()
        async with Plugin(kubelet.socket, R, [device("other")]):
            await listed(kubelet, 1)


async def test_a_container_whose_allocation_is_forgotten_is_allocated_anew_at_its_next_start() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
            holder = pod()
            await kubelet.admit(holder)
        await kubelet.stop()
        kubelet.checkpoint_path.unlink()
        await kubelet.start()
        async with Plugin(kubelet.socket, R, [device("a")]) as plugin:
            await listed(kubelet, 1)
            await kubelet.restart_container(holder, "main")
            assert plugin.allocated == [["a"]]


async def test_another_process_finds_the_pods_and_what_they_hold() -> None:
    async with running() as first:
        async with Plugin(first.socket, R, [device("a")]):
            await listed(first, 1)
            holder = pod("holder")
            before = await first.admit(holder)
        await first.kill()
        async with Kubelet(first.root) as second:
            assert second.pods() == [holder]
            assert second.status(holder) == before
            assert second.capacity(R) == 0
            assert await list_pods(second) == {"holder": {"main": ["a"]}}
