"""A container that asks for two MIG profiles: the kubelet keeps one variable, but each mount and CDI name."""

import pytest

from migplugin.sim.kubelet import Container, Pod
from tests.app.conftest import Start

BOTH = {"nvidia.com/mig-1g.5gb": 1, "nvidia.com/mig-3g.20gb": 1}


@pytest.mark.parametrize("strategy", ["cdi-cri", "volume-mounts"])
async def test_both_profiles_reach_the_container(machine: Start, strategy: str) -> None:
    node = await machine("1xa100-40gb=3g.20gb:1g.5gb*2")
    await node.serve(f"--device-list-strategy={strategy}", f"--cdi-root={node.root / 'cdi'}")
    await node.until(lambda _: (node.allocatable("1g.5gb"), node.allocatable("3g.20gb")) == (2, 1))
    status = await node.kubelet.admit(Pod("both", (Container("main", BOTH),)))
    assert status.phase == "Running", status
    edits = status.containers["main"]
    held = sorted(id_ for resource in BOTH for id_ in edits.device_ids[resource])
    assert len(held) == 2
    if strategy == "cdi-cri":
        assert sorted(name.rpartition("=")[2] for name in edits.cdi_devices) == held
    else:
        assert sorted(mount.container_path.rpartition("/")[2] for mount in edits.mounts) == held


async def test_by_environment_alone_a_line_at_start_says_what_happens(machine: Start) -> None:
    node = await machine("1xa100-40gb=3g.20gb:1g.5gb*2")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    said = [line for line in agent.said("attention") if "sees only one of them" in line["reason"]]
    assert len(said) == 1
