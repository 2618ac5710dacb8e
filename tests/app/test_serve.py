"""The main job, end to end: register, list, allocate, follow, survive, stop."""

import asyncio
import signal

import pytest

from migplugin.sim.kubelet import Container, Pod
from tests.app.conftest import Start

MIG = "nvidia.com/mig-1g.5gb"


def pod(name: str, resource: str = MIG, count: int = 1) -> Pod:
    return Pod(name, (Container("main", {resource: count}),))


async def test_every_profile_becomes_a_resource_with_its_devices(machine: Start) -> None:
    node = await machine()
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    await node.until(lambda _: (node.allocatable("2g.10gb"), node.allocatable("3g.20gb")) == (1, 1))
    assert set(node.kubelet.node()["capacity"]) == {MIG, "nvidia.com/mig-2g.10gb", "nvidia.com/mig-3g.20gb"}


async def test_a_pod_gets_the_environment_and_nodes_of_the_device_that_the_kubelet_chose(
    machine: Start,
) -> None:
    node = await machine("1xa100-40gb,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2")
    node.change(lambda made: setattr(made.switches, "minors", [6, 3]))
    await node.serve("--pass-device-specs")
    await node.until(lambda _: node.allocatable("2g.10gb") == 1)
    status = await node.kubelet.admit(pod("p", "nvidia.com/mig-2g.10gb"))
    assert status.phase == "Running", status
    edits = status.containers["main"]
    (held,) = edits.device_ids["nvidia.com/mig-2g.10gb"]
    gpu = node.store.read().gpus[1]
    ((gi, ci),) = [(gi, ci) for gi, ci in gpu.mig_devices() if ci.uuid == held]
    first = 3 + 135 * 3 + 9 * gi.id
    assert edits.envs == {"NVIDIA_VISIBLE_DEVICES": held}
    assert [n.container_path for n in edits.devices][-3:] == [
        "/dev/nvidia3",
        f"/dev/nvidia-caps/nvidia-cap{first}",
        f"/dev/nvidia-caps/nvidia-cap{first + 1 + ci.id}",
    ]


async def test_a_device_that_is_destroyed_turns_unhealthy_and_leaves_when_nobody_holds_it(
    machine: Start,
) -> None:
    node = await machine()
    agent = await node.serve("--removal-delay=1s")
    await node.until(lambda _: node.allocatable("3g.20gb") == 1)
    (gone,) = node.kubelet.devices("nvidia.com/mig-3g.20gb")
    gi = next(gi.id for gi, ci in node.store.read().gpus[1].mig_devices() if ci.uuid == gone)
    node.change(lambda made: made.gpus[1].destroy(gi))
    await node.until(lambda k: k.devices("nvidia.com/mig-3g.20gb").get(gone) == "Unhealthy")
    await node.until(lambda k: k.devices("nvidia.com/mig-3g.20gb") == {})
    assert node.kubelet.capacity("nvidia.com/mig-3g.20gb") == 0, "capacity falls at once, by an empty list"
    await agent.until_said("mig device gone", device=gone)
    assert node.allocatable("1g.5gb") == 9, "others are not disturbed"
    assert len([r for r in node.kubelet.registrations if r[0] == MIG]) == 1


async def test_a_device_that_a_pod_holds_stays_listed_until_the_pod_ends(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    await node.serve("--removal-delay=1s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    first = pod("first")
    status = await node.kubelet.admit(first)
    (held,) = status.containers["main"].device_ids[MIG]
    gi = next(gi.id for gi, ci in node.store.read().gpus[0].mig_devices() if ci.uuid == held)
    node.change(lambda made: made.gpus[0].destroy(gi))
    await node.until(lambda k: k.devices(MIG).get(held) == "Unhealthy")
    with pytest.raises(AssertionError):
        await node.until(lambda k: held not in k.devices(MIG), timeout=4.0)
    await node.kubelet.delete(first)
    await node.until(lambda k: held not in k.devices(MIG))


async def test_a_new_profile_is_registered_while_the_agent_runs(machine: Start) -> None:
    node = await machine("1xa100-40gb=")
    await node.serve()
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    await node.until(lambda _: node.allocatable("2g.10gb") == 1)
    node.change(lambda made: made.gpus[0].create("1g.5gb+me"))
    await node.until(lambda k: k.allocatable("nvidia.com/mig-1g.5gb.me") == 1)


async def test_after_a_kubelet_restart_everything_is_back_within_a_second(machine: Start) -> None:
    node = await machine()
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    running = pod("keeps")
    status = await node.kubelet.admit(running)
    for kill in (True, False):
        await node.kubelet.restart(kill=kill)
        await node.until(lambda _: node.allocatable("1g.5gb") == 9, timeout=1.0)
        await node.until(lambda _: node.allocatable("3g.20gb") == 1, timeout=1.0)
    assert (await node.kubelet.restart_container(running, "main")).envs == status.containers["main"].envs


async def test_a_kubelet_that_starts_late_is_waited_for(machine: Start) -> None:
    node = await machine(running=False)
    agent = await node.serve()
    await agent.until_said("no kubelet, waiting for it")
    await node.kubelet.start()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9, timeout=3.0)
    assert len(agent.said("no kubelet, waiting for it")) <= 2


async def test_an_agent_that_restarts_lists_first_what_pods_hold_though_it_is_gone(machine: Start) -> None:
    node = await machine("1xa100-40gb=3g.20gb:1g.5gb*2")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("3g.20gb") == 1)
    status = await node.kubelet.admit(pod("holder", "nvidia.com/mig-3g.20gb"))
    (held,) = status.containers["main"].device_ids["nvidia.com/mig-3g.20gb"]
    assert await agent.end() == 0
    gi = next(gi.id for gi, ci in node.store.read().gpus[0].mig_devices() if ci.uuid == held)
    node.change(lambda made: made.gpus[0].destroy(gi))
    await node.serve()
    await node.until(lambda k: k.devices("nvidia.com/mig-3g.20gb") == {held: "Unhealthy"})
    await node.kubelet.restart(kill=True)
    await node.until(lambda k: k.devices("nvidia.com/mig-3g.20gb") == {held: "Unhealthy"})
    assert node.kubelet.panic is None


async def test_an_agent_that_was_killed_leaves_nothing_that_stops_the_next(machine: Start) -> None:
    node = await machine()
    first = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    await first.kill()
    left = list(node.kubelet.socket.parent.glob("migplugin-*.sock"))
    assert left
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    second = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    await second.until_said("removed stale sockets of ours", count=len(left))
    assert not [path for path in left if path.exists()]


async def test_the_second_agent_of_a_node_waits_and_takes_over(machine: Start) -> None:
    node = await machine()
    first = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    second = await node.serve()
    await second.until_said("waiting for the node lock")
    assert await first.end() == 0
    await second.until_said("node lock taken over")
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_ends_the_streams_and_removes_the_sockets_within_two_seconds(
    machine: Start, number: int, code: int
) -> None:
    node = await machine()
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    assert await asyncio.wait_for(agent.end(number), 2.0) == code
    assert not list(node.kubelet.socket.parent.glob("migplugin-*.sock"))
    assert not agent.stray
    assert node.kubelet.capacity(MIG) == 9, "ending is no reason to take devices away"


async def test_the_end_of_a_simulation_is_no_failure_of_its_driver(machine: Start) -> None:
    node = await machine("1xa30")
    agent = await node.serve("--simulate=1xa30=1g.6gb")
    await node.until(lambda _: node.allocatable("1g.6gb") == 1)
    await agent.until_said("registered")
    assert await agent.end() == 0
    assert agent.lines[-1]["message"] == "stopped"


async def test_nvidia_s_plugin_keeps_what_it_serves_until_it_is_gone(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2:3g.20gb")
    server = await asyncio.start_unix_server(
        lambda _, writer: writer.close(), node.kubelet.socket.parent / "nvidia-mig-1g.5gb.sock"
    )
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("3g.20gb") == 1)
    line = await agent.until_said("not registered, will try again", resource=MIG)
    assert "nvidia-mig-1g.5gb.sock" in line["reason"]
    assert "nvidia-device-plugin-daemonset" in line["reason"]
    assert node.kubelet.capacity(MIG) is None
    server.close()
    await server.wait_closed()
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)


async def test_each_pod_gets_its_own_device_until_there_is_none(machine: Start) -> None:
    node = await machine("2xa100-40gb=1g.5gb*3")
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 6)
    held: list[str] = []
    for number in range(6):
        status = await node.kubelet.admit(pod(f"p{number}"))
        assert status.phase == "Running", status
        held += status.containers["main"].device_ids[MIG]
    assert sorted(held) == sorted(node.kubelet.devices(MIG))
    last = await node.kubelet.admit(pod("one-too-many"))
    assert last.phase == "Failed"


async def test_devices_of_one_pod_are_packed_on_one_gpu(machine: Start) -> None:
    node = await machine("2xa100-40gb=1g.5gb*3")
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 6)
    status = await node.kubelet.admit(pod("pair", count=3))
    held = set(status.containers["main"].device_ids[MIG])
    on = [{ci.uuid for _, ci in gpu.mig_devices()} for gpu in node.store.read().gpus]
    assert held in on


async def test_whole_gpus_of_one_pod_are_those_with_links_between_them(machine: Start) -> None:
    # With any other policy the kubelet asks only about the GPUs of the NUMA node that it chose.
    node = await machine("4xa100-40gb", topology_policy="none")
    node.change(lambda made: setattr(made.switches, "nvlinks", [(0, 3, 4), (1, 2, 4)]))
    await node.serve()
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 4)
    uuids = [gpu.uuid for gpu in node.store.read().gpus]
    held = []
    for name in ("one", "other"):
        status = await node.kubelet.admit(pod(name, "nvidia.com/gpu", 2))
        held.append({uuids.index(id_) for id_ in status.containers["main"].device_ids["nvidia.com/gpu"]})
    assert held == [{0, 3}, {1, 2}]


@pytest.mark.parametrize("strategy", ["none", "single"])
async def test_strategies_decide_what_nvidia_com_gpu_is(machine: Start, strategy: str) -> None:
    node = await machine("1xa100-40gb,1xa100-40gb=1g.5gb*7")
    agent = await node.serve(MIG_STRATEGY=strategy)
    expected = 1 if strategy == "none" else 7
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == expected)
    assert MIG not in node.kubelet.node()["capacity"]
    assert agent.said("attention"), "what is left out is said"
