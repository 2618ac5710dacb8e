"""Admission, preferred allocation, Allocate and container starts (kubelet.md 1.6, 1.7)."""

import asyncio
import json

import grpc
import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2
from migplugin.errors import KubeletError
from migplugin.sim.kubelet import Container, DeviceNode, Kubelet, Mount, Pod, PodStatus, StartFailed
from tests.fakes.plugin import Plugin, answer_with_env, device
from tests.sim.kubelet_fixtures import R, list_pods, listed, pod, running

R2 = "nvidia.com/mig-2g.10gb"


def refused(message: str) -> PodStatus:
    return PodStatus(
        "Failed", "UnexpectedAdmissionError", f"Allocate failed due to {message}, which is unexpected"
    )


def devices(count: int, prefix: str = "d") -> list[api_pb2.Device]:
    return [device(f"{prefix}{number}") for number in range(count)]


def held(kubelet: Kubelet, of: Pod, container: str = "main", resource: str = R) -> list[str]:
    return kubelet.status(of).containers[container].device_ids.get(resource, [])


def empty_answer(_ids: list[str]) -> api_pb2.AllocateResponse:
    return api_pb2.AllocateResponse()


async def test_a_pod_gets_what_the_plugin_answers() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        plugin.answer = lambda ids: api_pb2.AllocateResponse(
            container_responses=[
                api_pb2.ContainerAllocateResponse(
                    envs={"NVIDIA_VISIBLE_DEVICES": ids[0]},
                    mounts=[api_pb2.Mount(container_path="/c", host_path="/h", read_only=True)],
                    devices=[
                        api_pb2.DeviceSpec(container_path="/dev/c", host_path="/dev/h", permissions="rw")
                    ],
                    annotations={"note": "x"},
                    cdi_devices=[api_pb2.CDIDevice(name="nvidia.com/gpu=0:1")],
                )
            ]
        )
        status = await kubelet.admit(pod())
        assert (status.phase, status.reason, status.message) == ("Running", "", "")
        edits = status.containers["main"]
        assert edits.envs == {"NVIDIA_VISIBLE_DEVICES": "a"}
        assert edits.mounts == (Mount("/c", "/h", read_only=True),)
        assert edits.devices == (DeviceNode("/dev/c", "/dev/h", "rw"),)
        assert edits.annotations == {"note": "x"}
        assert edits.cdi_devices == ("nvidia.com/gpu=0:1",)
        assert edits.device_ids == {R: ["a"]}


async def test_one_call_for_each_resource_of_a_container_without_deadline() -> None:
    async with (
        running() as kubelet,
        Plugin(kubelet.socket, R, devices(3)) as first,
        Plugin(kubelet.socket, R2, devices(1)) as second,
    ):
        await kubelet.until(lambda k: k.allocatable(R) == 3 and k.allocatable(R2) == 1)
        await kubelet.admit(Pod("a", (Container("x", {R: 2, R2: 1}), Container("y", {R: 1}), Container("z"))))
        assert [len(ids) for ids in first.allocated] == [2, 1]
        assert [len(ids) for ids in second.allocated] == [1]
        assert first.deadlines["Allocate"] is None


async def test_ids_come_in_no_order_and_the_seed_decides_which() -> None:
    orders = []
    for seed in (1, 1, 2):
        async with running(seed=seed) as kubelet, Plugin(kubelet.socket, R, devices(9)) as plugin:
            await listed(kubelet, 9)
            await kubelet.admit(pod(count=9))
            orders.append(plugin.allocated[0])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


async def test_pods_are_admitted_one_at_a_time_even_those_that_ask_for_nothing() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(2)) as plugin:
        await listed(kubelet, 2)
        plugin.gates["Allocate"] = asyncio.Event()
        first = asyncio.create_task(kubelet.admit(pod("a")))
        await plugin.called("Allocate")
        second = asyncio.create_task(kubelet.admit(pod("b")))
        third = asyncio.create_task(kubelet.admit(Pod("c", (Container("main"),))))
        done, _ = await asyncio.wait((first, second, third), timeout=0.05)
        assert not done
        assert plugin.calls["Allocate"] == 1
        plugin.gates["Allocate"].set()
        assert [(await task).phase for task in (first, second, third)] == ["Running"] * 3


async def test_an_allocate_error_fails_the_pod_for_good_with_its_text() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.failures["Allocate"] = grpc.StatusCode.INTERNAL, "boom: it broke"
        unlucky = pod()
        failed = refused("rpc error: code = Internal desc = boom: it broke")
        assert await kubelet.admit(unlucky) == failed
        plugin.failures.clear()
        assert await kubelet.admit(unlucky) == failed
        assert plugin.calls["Allocate"] == 1
        # And the device is not lost.
        assert (await kubelet.admit(pod("b"))).phase == "Running"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "FailedPrecondition"),
        (grpc.StatusCode.CANCELLED, "Canceled"),
        (grpc.StatusCode.INVALID_ARGUMENT, "InvalidArgument"),
        (grpc.StatusCode.UNKNOWN, "Unknown"),
    ],
)
async def test_codes_are_spelt_as_go_spells_them(code: grpc.StatusCode, name: str) -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.failures["Allocate"] = code, "x"
        assert await kubelet.admit(pod()) == refused(f"rpc error: code = {name} desc = x")


async def test_too_few_devices_fail_the_pod_without_asking_the_plugin() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        await kubelet.admit(pod("a"))
        assert await kubelet.admit(pod("b")) == refused(
            f"requested number of devices unavailable for {R}. Requested: 1, Available: 0"
        )
        assert plugin.calls["Allocate"] == 1


async def test_a_resource_that_nobody_registered_fails_the_pod() -> None:
    async with running() as kubelet:
        assert await kubelet.admit(pod()) == refused(f"cannot allocate unregistered device {R}")


async def test_what_is_no_device_is_none_of_its_business() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        assert (await kubelet.admit(Pod("a", (Container("main", {"cpu": 4, R: 1, "x/none": 0}),)))).phase == (
            "Running"
        )
        assert plugin.calls["Allocate"] == 1


async def test_a_resource_whose_plugin_is_gone_fails_the_pod_without_a_hang() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, devices(1)):
            await listed(kubelet, 1)
        await listed(kubelet, 0)
        assert await kubelet.admit(pod()) == refused(
            f"no healthy devices present; cannot allocate unhealthy devices {R}"
        )


async def test_unhealthy_devices_are_not_allocated() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a", "Unhealthy"), device("b")]):
        await listed(kubelet, 1)
        fine = pod()
        await kubelet.admit(fine)
        assert held(kubelet, fine) == ["b"]


async def test_an_empty_answer_fails_the_pod_and_leaks_its_devices_until_a_device_pod_ends() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(3)) as plugin:
        await listed(kubelet, 3)
        first = pod("first")
        await kubelet.admit(first)
        plugin.answer = empty_answer
        assert await kubelet.admit(pod("b")) == refused("no containers return in allocation response")
        plugin.answer = answer_with_env
        assert await kubelet.admit(pod("c", 2)) == refused(
            f"requested number of devices unavailable for {R}. Requested: 2, Available: 1"
        )
        # A List frees nothing as long as no pod that held a device has ended.
        await list_pods(kubelet)
        assert (await kubelet.admit(pod("d", 2))).phase == "Failed"
        await kubelet.delete(first)
        assert (await kubelet.admit(pod("e", 3))).phase == "Running"


async def test_devices_of_an_ended_pod_are_free_at_the_next_admission() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)):
        await listed(kubelet, 1)
        for name in "abc":
            running_pod = pod(name)
            assert (await kubelet.admit(running_pod)).phase == "Running"
            await (kubelet.finish(running_pod) if name == "a" else kubelet.delete(running_pod))


async def test_a_succeeded_pod_is_not_admitted_again() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        done = pod()
        await kubelet.admit(done)
        await kubelet.finish(done)
        assert (await kubelet.admit(done)).phase == "Succeeded"
        with pytest.raises(ValueError, match="Succeeded"):
            await kubelet.restart_container(done, "main")
        assert plugin.calls["Allocate"] == 1


async def test_a_failed_container_takes_the_whole_pod_with_it() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(2)):
        await listed(kubelet, 2)
        assert (
            await kubelet.admit(Pod("a", (Container("x", {R: 1}), Container("y", {R: 2}))))
        ).phase == "Failed"
        # What x had is free again with the next admission.
        assert (await kubelet.admit(pod("b", 2))).phase == "Running"


async def test_an_admission_that_its_caller_gives_up_takes_nothing() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(kubelet.admit(pod("a")), 0.05)
        plugin.gates.pop("Allocate").set()
        assert (await kubelet.admit(pod("b"))).phase == "Running"


async def test_a_kill_during_an_admission_is_told_to_its_caller_and_the_pod_may_come_again() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        again = pod()
        admission = asyncio.create_task(kubelet.admit(again))
        await plugin.called("Allocate")
        await kubelet.restart(kill=True)
        with pytest.raises(KubeletError, match="does not run"):
            await admission
        plugin.gates.pop("Allocate").set()
        await plugin.stop()
        async with Plugin(kubelet.socket, R, devices(1)):
            await listed(kubelet, 1)
            assert (await kubelet.admit(again)).phase == "Running"


async def test_the_end_of_the_stream_during_allocate_fails_the_pod() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.gates["Allocate"] = asyncio.Event()
        admission = asyncio.create_task(kubelet.admit(pod()))
        await plugin.called("Allocate")
        await plugin.end_stream()
        assert await admission == refused(
            "rpc error: code = Canceled desc = grpc: the client connection is closing"
        )


async def test_the_preference_is_not_asked_for_where_it_is_not_offered() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(3)) as plugin:
        await listed(kubelet, 3)
        await kubelet.admit(pod())
        assert not plugin.calls["GetPreferredAllocation"]


@pytest.mark.parametrize("policy", ["none", "best-effort"])
async def test_the_preference_is_asked_for_each_time_even_without_a_choice(policy: str) -> None:
    async with (
        running(topology_policy=policy) as kubelet,
        Plugin(kubelet.socket, R, devices(2), preferred=True) as plugin,
    ):
        await listed(kubelet, 2)
        await kubelet.admit(pod("a"))
        await kubelet.admit(pod("b"))
        first, second = plugin.preferences
        assert sorted(first.available_deviceIDs) == ["d0", "d1"]
        assert list(second.available_deviceIDs) == ["d1"]
        assert (second.allocation_size, list(second.must_include_deviceIDs)) == (1, [])
        assert plugin.allocated == [["d0"], ["d1"]]


async def test_unhealthy_and_allocated_devices_are_not_available() -> None:
    async with (
        running() as kubelet,
        Plugin(kubelet.socket, R, [*devices(2), device("sick", "Unhealthy")], preferred=True) as plugin,
    ):
        await listed(kubelet, 2)
        await kubelet.admit(pod("a"))
        await kubelet.admit(pod("b"))
        assert list(plugin.preferences[1].available_deviceIDs) == ["d1"]


async def test_devices_of_an_init_container_must_be_included_and_the_size_is_the_total() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(3), preferred=True) as plugin:
        await listed(kubelet, 3)
        plugin.prefer = lambda wanted: sorted(wanted.available_deviceIDs)[-wanted.allocation_size :]
        both = Pod("a", (Container("app", {R: 2}), Container("i0", {R: 1}, init=True)))
        await kubelet.admit(both)
        wanted = plugin.preferences[1]
        assert list(wanted.must_include_deviceIDs) == ["d2"]
        assert wanted.allocation_size == 2
        assert sorted(wanted.available_deviceIDs) == ["d0", "d1", "d2"]
        assert held(kubelet, both, "i0") == ["d2"]
        assert held(kubelet, both, "app") == ["d1", "d2"]


@pytest.mark.parametrize(
    "preferred", [["unknown"], [], ["d3", "d3"], ["d0", "d1", "d2", "d3", "unknown", "d0"]]
)
async def test_a_preference_is_only_intersected_and_the_rest_is_filled_up(preferred: list[str]) -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(4), preferred=True) as plugin:
        await listed(kubelet, 4)
        plugin.prefer = lambda _: preferred
        lucky = pod(count=2)
        await kubelet.admit(lucky)
        assert len(set(held(kubelet, lucky))) == 2
        if "d3" in preferred and "d0" not in preferred:
            assert "d3" in held(kubelet, lucky)


async def test_an_error_of_the_preference_fails_the_pod() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(2), preferred=True) as plugin:
        await listed(kubelet, 2)
        plugin.failures["GetPreferredAllocation"] = grpc.StatusCode.UNKNOWN, "cannot choose"
        assert await kubelet.admit(pod()) == refused(
            "device plugin GetPreferredAllocation rpc failed with err: "
            "rpc error: code = Unknown desc = cannot choose"
        )
        assert not plugin.calls["Allocate"]


async def test_the_devices_of_an_init_container_are_used_again() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        chain = Pod(
            "a",
            (
                Container("i0", {R: 1}, init=True),
                Container("i1", {R: 1}, init=True),
                Container("app", {R: 1}),
            ),
        )
        assert (await kubelet.admit(chain)).phase == "Running"
        assert plugin.allocated == [["d0"]] * 3


async def test_an_app_container_does_not_give_its_devices_to_the_next() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)):
        await listed(kubelet, 1)
        assert (
            await kubelet.admit(Pod("a", (Container("x", {R: 1}), Container("y", {R: 1}))))
        ).phase == "Failed"


async def test_a_sidecar_takes_the_devices_of_an_init_container_and_keeps_them() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(2)):
        await listed(kubelet, 2)
        mixed = Pod(
            "a",
            (
                Container("c0", {R: 1}),
                Container("i0", {R: 1}, init=True),
                Container("side", {R: 1}, init=True, restartable=True),
            ),
        )
        await kubelet.admit(mixed)
        assert held(kubelet, mixed, "i0") == held(kubelet, mixed, "side")
        assert held(kubelet, mixed, "c0") != held(kubelet, mixed, "side")


async def test_of_two_resources_in_one_container_either_may_set_the_variable_and_cdi_devices_unite() -> None:
    def answer(ids: list[str]) -> api_pb2.AllocateResponse:
        response = api_pb2.ContainerAllocateResponse(
            envs={"V": ids[0]},
            cdi_devices=[
                api_pb2.CDIDevice(name=f"nvidia.com/gpu={ids[0]}"),
                api_pb2.CDIDevice(name="nvidia.com/gpu=x"),
            ],
        )
        return api_pb2.AllocateResponse(container_responses=[response])

    async with (
        running() as kubelet,
        Plugin(kubelet.socket, R, devices(1, "small")) as small,
        Plugin(kubelet.socket, R2, devices(1, "big")) as big,
    ):
        small.answer = big.answer = answer
        await kubelet.until(lambda k: k.allocatable(R) == k.allocatable(R2) == 1)
        both = Pod("a", (Container("main", {R: 1, R2: 1}),))
        await kubelet.admit(both)
        seen = set()
        for _ in range(20):
            edits = await kubelet.restart_container(both, "main")
            seen.add(edits.envs["V"])
            assert sorted(edits.cdi_devices) == [
                "nvidia.com/gpu=big0",
                "nvidia.com/gpu=small0",
                "nvidia.com/gpu=x",
            ]
        assert seen == {"small0", "big0"}


async def test_a_container_restart_uses_the_cached_answer() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        steady = pod()
        before = (await kubelet.admit(steady)).containers["main"]
        assert await kubelet.restart_container(steady, "main") == before
        assert plugin.calls["Allocate"] == 1


async def test_a_container_restarts_within_the_grace_without_its_plugin() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, devices(1)):
            await listed(kubelet, 1)
            steady = pod()
            before = (await kubelet.admit(steady)).containers["main"]
        await listed(kubelet, 0)
        assert await kubelet.restart_container(steady, "main") == before


async def test_a_container_does_not_restart_after_the_grace() -> None:
    async with running(grace=0.05) as kubelet:
        async with Plugin(kubelet.socket, R, devices(1)):
            await listed(kubelet, 1)
            steady = pod()
            await kubelet.admit(steady)
        await kubelet.until(lambda k: k.capacity(R) == 0)
        with pytest.raises(StartFailed, match=f"endpoint not found in cache for a registered resource: {R}"):
            await kubelet.restart_container(steady, "main")
        assert kubelet.status(steady).reason == "CreateContainerConfigError"


async def test_a_plugin_is_called_before_each_start_where_it_asks_for_it() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(2), pre_start=True) as plugin:
        await listed(kubelet, 2)
        steady = pod(count=2)
        await kubelet.admit(steady)
        await kubelet.restart_container(steady, "main")
        assert [sorted(ids) for ids in plugin.pre_started] == [["d0", "d1"]] * 2
        deadline = plugin.deadlines["PreStartContainer"]
        assert deadline is not None
        assert 25 < deadline < 31


async def test_a_start_that_the_plugin_refuses_is_tried_again() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1), pre_start=True) as plugin:
        await listed(kubelet, 1)
        plugin.failures["PreStartContainer"] = grpc.StatusCode.INTERNAL, "not yet"
        slow = pod()
        status = await kubelet.admit(slow)
        assert (status.phase, status.reason) == ("Pending", "CreateContainerConfigError")
        assert status.message == (
            "device plugin PreStartContainer rpc failed with err: rpc error: code = Internal desc = not yet"
        )
        plugin.failures.clear()
        await kubelet.restart_container(slow, "main")
        assert kubelet.status(slow).phase == "Running"


async def test_a_start_that_needs_the_plugin_fails_while_it_is_gone() -> None:
    async with running() as kubelet:
        async with Plugin(kubelet.socket, R, devices(1), pre_start=True):
            await listed(kubelet, 1)
            steady = pod()
            await kubelet.admit(steady)
        await listed(kubelet, 0)
        with pytest.raises(StartFailed, match=f"PreStartContainer rpc failed .* {R} has been stopped"):
            await kubelet.restart_container(steady, "main")


async def test_a_cdi_device_that_is_not_fully_qualified_does_not_start() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("MIG-1")]) as plugin:
        await listed(kubelet, 1)
        plugin.answer = lambda _: api_pb2.AllocateResponse(
            container_responses=[
                api_pb2.ContainerAllocateResponse(cdi_devices=[api_pb2.CDIDevice(name="MIG-1")])
            ]
        )
        status = await kubelet.admit(pod())
        assert (status.phase, status.reason) == ("Pending", "CreateContainerError")
        assert "unresolvable CDI devices MIG-1" in status.message


async def test_the_checkpoint_holds_the_answer_with_its_cdi_devices() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, devices(1)) as plugin:
        await listed(kubelet, 1)
        plugin.answer = lambda _: api_pb2.AllocateResponse(
            container_responses=[
                api_pb2.ContainerAllocateResponse(cdi_devices=[api_pb2.CDIDevice(name="nvidia.com/gpu=d0")])
            ]
        )
        await kubelet.admit(pod())
        (entry,) = json.loads(kubelet.checkpoint_path.read_text())["Data"]["PodDeviceEntries"]
        assert entry["ResourceName"] == R
