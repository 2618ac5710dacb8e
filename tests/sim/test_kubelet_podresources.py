"""The stand-in kubelet's pod-resources API (kubelet.md 2, 4)."""

import asyncio

import grpc
import grpc.aio
import pytest

from migplugin._proto.podresources.v1 import api_pb2
from migplugin.sim.kubelet import Container, Kubelet, Pod
from migplugin.sim.kubelet.podresources import RateLimit
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, list_pods, listed, pod, pod_resources, running


async def allocatable(kubelet: Kubelet) -> list[tuple[str, list[int]]]:
    async with pod_resources(kubelet) as stub:
        answer = await stub.GetAllocatableResources(api_pb2.AllocatableResourcesRequest())
    return sorted(
        (devices.device_ids[0], [node.ID for node in devices.topology.nodes]) for devices in answer.devices
    )


async def test_list_shows_exactly_the_ids_of_running_pods() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b"), device("c")]):
        await listed(kubelet, 3)
        two = pod("two", 2)
        status = await kubelet.admit(two)
        await kubelet.admit(Pod("none", (Container("main"),), "system"))
        assert await list_pods(kubelet) == {
            "two": {"main": status.containers["main"].device_ids[R]},
            "none": {"main": []},
        }
        async with pod_resources(kubelet) as stub:
            answer = await stub.List(api_pb2.ListPodResourcesRequest())
        assert [entry.namespace for entry in answer.pod_resources] == ["default", "system"]
        assert {devices.resource_name for devices in answer.pod_resources[0].containers[0].devices} == {R}


async def test_one_entry_for_each_device_and_numa_node() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a", nodes=[0, 1])]):
        await listed(kubelet, 1)
        await kubelet.admit(pod())
        assert await list_pods(kubelet) == {"a": {"main": ["a", "a"]}}
        assert await allocatable(kubelet) == [("a", [0]), ("a", [1])]


async def test_a_device_without_topology_has_none() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]):
        await listed(kubelet, 1)
        await kubelet.admit(pod())
        async with pod_resources(kubelet) as stub:
            answer = await stub.List(api_pb2.ListPodResourcesRequest())
        (devices,) = answer.pod_resources[0].containers[0].devices
        assert not devices.HasField("topology")


async def test_ordinary_init_containers_are_missing_and_sidecars_are_not() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]):
        await listed(kubelet, 2)
        await kubelet.admit(
            Pod(
                "a",
                (
                    Container("init", {R: 2}, init=True),
                    Container("side", {R: 1}, restartable=True),
                    Container("app"),
                ),
            )
        )
        found = await list_pods(kubelet)
        assert list(found["a"]) == ["side", "app"]
        assert len(found["a"]["side"]) == 1


async def test_a_pod_in_admission_is_not_listed() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        admission = asyncio.create_task(kubelet.admit(pod()))
        await plugin.called("Allocate")
        assert await list_pods(kubelet) == {}
        plugin.gates["Allocate"].set()
        assert (await admission).phase == "Running"
        assert await list_pods(kubelet) == {"a": {"main": ["a"]}}


async def test_ended_failed_and_deleted_pods_are_not_listed() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]):
        await listed(kubelet, 2)
        done, gone = pod("done"), pod("gone")
        for each in (done, gone, pod("refused")):
            await kubelet.admit(each)
        await kubelet.finish(done)
        await kubelet.delete(gone)
        assert await list_pods(kubelet) == {}


async def test_a_list_frees_what_dead_pods_held() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")], preferred=True) as plugin:
        await listed(kubelet, 1)
        gone = pod("gone")
        await kubelet.admit(gone)
        await kubelet.delete(gone)
        await list_pods(kubelet)
        assert kubelet._alive().manager.ledger.pods == {}
        assert (await kubelet.admit(pod("next"))).phase == "Running"
        assert list(plugin.preferences[1].available_deviceIDs) == ["a"]


async def test_get_finds_one_pod() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]):
        await listed(kubelet, 1)
        await kubelet.admit(pod("here"))
        async with pod_resources(kubelet) as stub:
            request = api_pb2.GetPodResourcesRequest(pod_name="here", pod_namespace="default")
            answer = await stub.Get(request)
        assert answer.pod_resources.name == "here"
        assert list(answer.pod_resources.containers[0].devices[0].device_ids) == ["a"]


async def test_get_of_an_unknown_pod_is_unknown() -> None:
    async with running() as kubelet, pod_resources(kubelet) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Get(api_pb2.GetPodResourcesRequest(pod_name="x", pod_namespace="y"))
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert caught.value.details() == "pod x in namespace y not found"


async def test_allocatable_are_the_healthy_devices_allocated_or_not() -> None:
    devices = [device("a"), device("b", nodes=[1]), device("sick", "Unhealthy")]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices):
        await listed(kubelet, 2)
        await kubelet.admit(pod())
        assert await allocatable(kubelet) == [("a", []), ("b", [1])]


async def test_an_empty_topology_makes_a_device_disappear_from_the_allocatable_ones() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a", nodes=[]), device("b")]):
        await listed(kubelet, 2)
        assert await allocatable(kubelet) == [("b", [])]
        await kubelet.admit(pod(count=2))
        assert await list_pods(kubelet) == {"a": {"main": ["a", "b"]}}


async def test_after_a_restart_it_is_empty_with_success_until_the_api_server_answers() -> None:
    async with running(pod_resources_synced=False) as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
            holder = pod("holder")
            await kubelet.admit(holder)
            assert await list_pods(kubelet) == {"holder": {"main": ["a"]}}
        await kubelet.restart(kill=True)
        assert await list_pods(kubelet) == {}
        assert "PodUID" in kubelet.checkpoint_path.read_text()
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
            # Nothing is freed either: the list would have done it.
            assert await list_pods(kubelet) == {}
            assert "PodUID" in kubelet.checkpoint_path.read_text()
            kubelet.sync()
            assert await list_pods(kubelet) == {"holder": {"main": ["a"]}}


async def test_whether_the_api_server_answers_can_be_said_before_each_restart() -> None:
    async with running() as kubelet:
        await kubelet.admit(Pod("p", (Container("main"),)))
        await kubelet.restart()
        assert list(await list_pods(kubelet)) == ["p"]
        kubelet.pod_resources_synced = False
        await kubelet.restart()
        assert await list_pods(kubelet) == {}


async def test_a_tight_loop_is_rejected_by_the_rate_limit() -> None:
    async with running() as kubelet, pod_resources(kubelet) as stub:
        answers = await asyncio.gather(
            *(stub.List(api_pb2.ListPodResourcesRequest()) for _ in range(100)), return_exceptions=True
        )
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(answers) - len(refused) >= 10
    assert refused
    assert {(error.code(), error.details()) for error in refused} == {
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")
    }


def test_the_limit_is_a_bucket_of_ten_that_fills_with_a_hundred_a_second() -> None:
    now = 0.0
    limit = RateLimit(100.0, 10, lambda: now)
    assert [limit.allows() for _ in range(12)] == [True] * 10 + [False] * 2
    now = 0.025
    assert [limit.allows() for _ in range(3)] == [True, True, False]
    now = 100.0
    assert [limit.allows() for _ in range(11)] == [True] * 10 + [False]


async def test_all_methods_and_clients_share_the_limit() -> None:
    async with running() as kubelet, pod_resources(kubelet) as one, pod_resources(kubelet) as other:
        answers = await asyncio.gather(
            *(one.List(api_pb2.ListPodResourcesRequest()) for _ in range(40)),
            *(other.GetAllocatableResources(api_pb2.AllocatableResourcesRequest()) for _ in range(40)),
            return_exceptions=True,
        )
    assert sum(not isinstance(answer, BaseException) for answer in answers) < 40
