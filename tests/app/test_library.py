"""A driver that is updated under the running agent: it ends, so that the container is started anew."""

import asyncio
import sys
from pathlib import Path

import pytest

from migplugin.sim.records import Failure
from tests.app.conftest import Agent, Machine, Start
from tests.fakes.nvml_library import compile_library, needs_cc

PHRASE = "the NVML library is outdated, ending to be started anew"


async def serve_compiled(node: Machine, root: Path, *, linked: bool = False) -> Agent:
    """On a library of its own, instead of the simulated one; `linked`: found by the dynamic linker."""
    agent = await node.run(
        *(sys.executable, "-m", "migplugin", "serve", "--log-format=json", "--poll-interval=100ms"),
        f"--kubelet-socket={node.kubelet.socket}",
        f"--driver-root-ctr-path={'/nonexistent' if linked else root}",
        **({"LD_LIBRARY_PATH": f"{root}/lib64"} if linked else {}),
    )
    await agent.until_said("inventory")
    return agent


async def ended(agent: Agent) -> tuple[int, int]:
    """The exit code, and how many lines are errors."""
    await asyncio.wait_for(agent.process.wait(), 10)
    return await agent.end(), [line["level"] for line in agent.lines].count("error")


async def test_a_library_that_no_longer_fits_the_driver_ends_the_agent_with_code_4(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--poll-interval=100ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: made.switches.fail.update(nvmlDeviceGetUUID=Failure(18, 0)))
    line = await agent.until_said(PHRASE)
    assert "different versions" in line["reason"]
    assert await ended(agent) == (4, 1)
    assert not list(node.kubelet.socket.parent.glob("migplugin-*.sock"))


async def test_one_that_does_not_fit_at_the_start_ends_it_too(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: made.switches.fail.update(nvmlInitWithFlags=Failure(18)))
    agent = await node.serve("--fail-on-init-error")
    assert await ended(agent) == (4, 1)


@needs_cc
@pytest.mark.parametrize("linked", [False, True])
async def test_another_library_in_its_place_ends_the_agent_with_code_4(
    machine: Start, root: Path, *, linked: bool
) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    compile_library(root, "lib64", "580.1")
    agent = await serve_compiled(node, root, linked=linked)
    compile_library(root, "lib64", "590.1")
    await agent.until_said(PHRASE)
    assert await ended(agent) == (4, 1)


@needs_cc
async def test_a_library_that_waits_for_a_reboot_ends_nothing(machine: Start, root: Path) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    compile_library(root, "lib64", "580.1")
    agent = await serve_compiled(node, root)
    compile_library(root, "lib64", "590.1", code=18)
    await agent.until_said(
        "another NVML library lies there now and does not fit the driver, the loaded one stays"
    )
    assert await agent.end() == 0
