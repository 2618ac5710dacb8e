"""A person asks: `status` and `health` through the running agent, and where there is none."""

import asyncio
import json
import os
import signal
from typing import Any

import grpc.aio
import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.sim.kubelet import Container, Pod
from tests.app.conftest import PATIENCE, Agent, Machine, Start

MIG = "nvidia.com/mig-1g.5gb"


async def serving(node: Machine, *flags: str) -> Agent:
    agent = await node.serve(*flags)
    await agent.until_said("control socket")
    return agent


async def document(node: Machine, *flags: str) -> dict[str, Any]:
    code, out, err = await node.command("status", "--output=json", *flags)
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


async def fall_sick(node: Machine, agent: Agent, code: int = 94) -> str:
    """The id of a device that has just fallen sick, by the command that people have for it."""
    gi, ci = node.store.read().gpus[0].mig_devices()[0]
    words = ("sim", f"--state={node.state}", "xid", "0", str(code), f"--gi={gi.id}", f"--ci={ci.id}")
    before = len(agent.said("fell sick", device=ci.uuid))
    assert (await node.command(*words))[0] == 0
    while len(agent.said("fell sick", device=ci.uuid)) == before:
        await agent.until_next()
    return ci.uuid


async def test_status_and_health_are_what_the_agent_knows(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await serving(node)
    assert (
        node.control_socket.stat().st_mode & 0o777,
        node.control_socket.parent.stat().st_mode & 0o777,
    ) == (
        0o600,
        0o700,
    )
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    await node.kubelet.admit(Pod("p", (Container("c", {MIG: 1}),)))
    sick = await fall_sick(node, agent)
    found = await document(node)
    assert (found["seen_by"], found["resources"][0]["registration"]) == ("agent", "registered")
    assert (found["resources"][0]["healthy"], found["resources"][0]["held"]) == (2, 1)
    (told,) = found["sick"]
    assert (told["id"], told["clearable"], told["profile"]) == (sick, True, "1g.5gb")
    assert told["reason"].startswith("XID 94")
    assert "nobody has held it" in told["until"]
    assert 0 <= told["sick_for"] < 60
    code, out, err = await node.command("health")
    assert (code, err) == (0, "")
    assert "as the agent sees it" in out
    assert all(text in out for text in (sick, "XID 94", "ago", "until it is made anew"))
    code, out, _ = await node.command("status")
    assert "s, until it is made anew" in out
    assert "as the agent sees it" in out


async def refuse(node: Machine) -> None:
    """An allocation that no agent grants, asked as the kubelet asks."""
    (path,) = node.kubelet.socket.parent.glob("migplugin-*.sock")
    request = api_pb2.AllocateRequest(
        container_requests=[api_pb2.ContainerAllocateRequest(devices_ids=["MIG-nobody"])]
    )
    options = (("grpc.default_authority", "localhost"),)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="unknown device"):
            await api_pb2_grpc.DevicePluginStub(channel).Allocate(request, timeout=PATIENCE)


async def test_refused_allocations_are_counted_for_as_long_as_the_agent_lives(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    await serving(node)
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    await refuse(node)
    assert (await document(node))["resources"][0]["refused_allocations"] == 1
    await node.kubelet.restart(kill=True)
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    await refuse(node)
    (resource,) = (await document(node))["resources"]
    assert (resource["refused_allocations"], resource["registration"]) == (2, "registered")
    await node.kubelet.kill()
    (resource,) = (await document(node))["resources"]
    assert resource["registration"] in {"no kubelet", "not registered"}


async def test_while_the_driver_hangs_the_agent_says_so_at_once_and_from_memory(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await serving(node, "--poll-interval=200ms", "--nvml-timeout=60s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "hang", ["*"]))
    sick = await fall_sick(node, agent)
    found = await asyncio.wait_for(document(node), 4.0)
    assert (found["seen_by"], len(found["gpus"])) == ("agent", 1)
    code, _, _ = await asyncio.wait_for(node.command("health", "clear", sick), 4.0)
    assert code == 0
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


async def test_a_device_that_fell_sick_again_stays_so_until_a_person_clears_it(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await serving(node, "--health-recovery-after=300ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    sick = await fall_sick(node, agent)
    await agent.until_said("no longer sick", device=sick)
    await fall_sick(node, agent)
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    assert "until a person acts" in agent.said("fell sick")[-1]["reason"]
    code, out, err = await node.command("health", "clear", f"{sick}::0")
    assert (code, err) == (0, "")
    assert out == f"{sick} is taken for well; it had XID 94 ROBUST_CHANNEL_CONTAINED_ERROR (RESTART_APP)\n"
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    line = await agent.until_said("cleared by a person", device=sick)
    assert "again within an hour" in line["was"]
    code, out, err = await node.command("health", "clear", sick)
    assert (code, out, err) == (2, "", f"migplugin: '{sick}' is not sick; nobody is\n")
    await agent.end()
    agent = await serving(node)
    assert not agent.said("still sick"), "it is recorded"


async def test_without_an_agent_the_record_is_edited_and_said_so(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await serving(node)
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    sick = await fall_sick(node, agent)
    assert await agent.end() == 0
    assert not node.control_socket.exists()
    code, out, _ = await node.command("health", f"--simulate={node.state}")
    assert code == 0
    assert "seen without the agent" in out
    assert sick in out
    code, out, _ = await node.command("health", "clear", "--all")
    assert code == 0
    told, where = out.splitlines()
    assert told.startswith(f"{sick} is taken for well")
    record = node.kubelet.socket.parent / "migplugin/health.json"
    assert where == f"no agent runs here: cleared in {record}, which the next one reads"
    agent = await serving(node)
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    assert not agent.said("still sick")


async def test_an_agent_that_does_not_answer_is_not_worked_around(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await serving(node)
    sick = await fall_sick(node, agent)
    code, out, err = await node.command("health", "clear", sick, "--control-socket=/nonexistent/agent.sock")
    assert (code, out) == (1, "")
    assert err.startswith(
        "migplugin: an agent runs on this node and does not answer: /nonexistent/agent.sock: "
    )
    assert len(err.splitlines()) == 1
    os.kill(agent.process.pid, signal.SIGSTOP)
    try:
        code, _, err = await node.command("health", "clear", "--all")
        assert code == 1
        assert err.endswith(f"does not answer: {node.control_socket}: no answer within 5 s\n")
    finally:
        os.kill(agent.process.pid, signal.SIGCONT)
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)


async def test_status_without_an_agent_looks_for_itself_and_says_so(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    code, out, err = await node.command("status", "--output=json")
    assert code == 0
    assert json.loads(out)["seen_by"] == "command"
    assert err == (
        f"looked without the agent: {node.control_socket}: no such directory; "
        "the agent is not running, or its directory is not mounted here\n"
    )
    code, out, err = await node.command("status", "--control-socket=")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "looked without the agent: --control-socket is empty"


async def test_status_of_a_simulation_asks_no_agent(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    await serving(node)
    assert (await document(node, "--simulate=1xa30=1g.6gb*2"))["seen_by"] == "command"
    assert (await document(node))["seen_by"] == "agent"


async def test_no_place_for_the_socket_is_one_warning_and_the_agent_serves(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    agent = await node.serve("--control-socket=/proc/nothing/agent.sock")
    await agent.until_said("no control socket yet, will try again")
    await node.until(lambda _: node.allocatable("1g.5gb") == 1)
    assert await agent.end() == 0
    none = await node.serve("--control-socket=")
    await node.until(lambda k: len(k.registrations) == 2)
    assert await none.end() == 0
    assert not none.said("control socket")


async def test_what_is_asked_in_no_sensible_way_is_one_line(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    for words in (("health", "clear"), ("health", "clear", "MIG-x", "--all")):
        code, out, err = await node.command(*words)
        assert (code, out) == (2, "")
        assert err.startswith("migplugin: health clear: expected either IDs or --all")
    code, out, _ = await node.command("status", "--schema")
    assert code == 0
    assert json.loads(out)["title"] == "migplugin/status/v1"
