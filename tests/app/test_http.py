"""Probes of the whole agent, and the refusal to paint GPUs on a node that has real ones."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.app.conftest import PATIENCE, Agent, Machine, Start

LISTEN = "--http-listen=127.0.0.1:0"


async def probe(agent: Agent, path: str) -> tuple[int, dict[str, Any]]:
    port = (await agent.until_said("probes"))["port"]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def until_probe(agent: Agent, path: str, status: int) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE):
        while (answer := await probe(agent, path))[0] != status:
            pass
    return answer[1]


async def test_ready_only_after_the_kubelet_has_taken_every_list_and_not_when_it_was_killed(
    machine: Start,
) -> None:
    node = await machine(running=False)
    agent = await node.serve(LISTEN)
    await agent.until_said("no kubelet, waiting for it")
    status, body = await probe(agent, "/readyz")
    assert status == 503
    assert body["reason"] == (
        "the kubelet has not taken the list of "
        "nvidia.com/mig-1g.5gb, nvidia.com/mig-2g.10gb, nvidia.com/mig-3g.20gb"
    )
    assert (await probe(agent, "/healthz"))[0] == 200, "a kubelet that is away is nothing a restart heals"
    await node.kubelet.start()
    body = await until_probe(agent, "/readyz", 200)
    assert body == {
        "ok": True,
        "reason": "the kubelet has nvidia.com/mig-1g.5gb, nvidia.com/mig-2g.10gb, nvidia.com/mig-3g.20gb",
    }
    assert node.allocatable("1g.5gb") == 9, "ready means that the node shows it"
    await node.kubelet.kill()
    await until_probe(agent, "/readyz", 503)
    assert (await probe(agent, "/healthz"))[0] == 200
    await node.kubelet.start()
    await until_probe(agent, "/readyz", 200)
    assert await agent.end() == 0


async def test_a_driver_that_hangs_is_alive_and_stays_ready(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    agent = await node.serve(LISTEN, "--nvml-timeout=300ms", "--poll-interval=200ms")
    await until_probe(agent, "/readyz", 200)
    node.change(lambda made: setattr(made.switches, "hang", ["*"]))
    await agent.until_said("the driver does not answer, will try again")
    assert (await probe(agent, "/healthz"))[0] == 200
    assert (await probe(agent, "/readyz"))[0] == 200


async def test_a_node_with_nothing_to_serve_is_ready(machine: Start) -> None:
    node = await machine("1xa100-40gb=")
    agent = await node.serve(LISTEN)
    assert (await until_probe(agent, "/readyz", 200))["ok"]


async def test_a_second_agent_that_waits_for_the_lock_is_alive_but_not_ready(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 1)
    second = await node.serve(LISTEN)
    await second.until_said("waiting for the node lock")
    assert await probe(second, "/readyz") == (503, {"ok": False, "reason": "waiting for the node lock"})
    assert (await probe(second, "/healthz"))[0] == 200


async def test_two_agents_at_one_address_both_serve(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    first = await node.serve(LISTEN)
    port = (await first.until_said("probes"))["port"]
    second = await node.serve(f"--http-listen=127.0.0.1:{port}")
    warning = await second.until_said("no address for the probes, will try again")
    assert "Address already in use" in warning["reason"]
    assert await first.end() == 0
    await node.until(lambda k: len(k.registrations) == 2)


async def refused(node: Machine, *flags: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migplugin", "serve", f"--simulate={node.state}", *flags),
        f"--kubelet-socket={node.kubelet.socket}",
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE)
    return process.returncode, said.decode()


async def test_a_simulation_refuses_a_node_with_a_real_driver_unless_forced(
    machine: Start, root: Path
) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    version = root / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module\n")
    code, said = await refused(node, f"--proc-root={root}/proc")
    assert code == 2
    assert said.splitlines() == [
        f"migplugin: --simulate: {version} says that a real driver is loaded here, and pods would be given "
        "GPUs that do not exist; --force-simulate if that is meant"
    ]
    await node.serve(f"--proc-root={root}/proc")  # with --force-simulate, as every test
    await node.until(lambda _: node.allocatable("1g.5gb") == 1)
