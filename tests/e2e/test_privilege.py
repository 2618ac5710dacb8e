"""What the shipped pod may do, taken away for real: without SYS_ADMIN less is told, and all is served.

The simulated driver judges the agent as the real one does, by its capabilities and by the nodes that
its container has; the manifests give it the view that the NVIDIA runtime gives.
"""

import copy
from pathlib import Path

import pytest

from tests.e2e.standin import Document, StandIn, is_admin, standing_in
from tests.e2e.steps import RESOURCE, geometry, manifests, the_node_follows_a_change_of_geometry

SERVED = {RESOURCE: 9, "nvidia.com/mig-2g.10gb": 1, "nvidia.com/mig-3g.20gb": 1}


def shipped(*capabilities: str) -> list[Document]:
    """The overlay with these capabilities in place of its own."""
    changed = copy.deepcopy(manifests())
    (container,) = of(changed)["spec"]["containers"]
    assert container["securityContext"]["capabilities"]["add"] == ["SYS_ADMIN", "MKNOD"]
    container["securityContext"]["capabilities"]["add"] = list(capabilities)
    return changed


def of(documents: list[Document]) -> Document:
    (template,) = [d["spec"]["template"] for d in documents if d["kind"] == "DaemonSet"]
    assert isinstance(template, dict)
    return template


def security(documents: list[Document]) -> Document:
    (container,) = of(documents)["spec"]["containers"]
    context = container["securityContext"]
    assert isinstance(context, dict)
    return context


def placements(status: Document) -> list[Document | None]:
    return [instance["placement"] for gpu in status["gpus"] for instance in gpu["instances"]]


async def served(cluster: StandIn, documents: list[Document]) -> Document:
    """What status says of a node that serves everything, follows a change, and ends without a complaint."""
    await cluster.apply(documents)
    await cluster.until_allocatable(SERVED)
    status = await cluster.status()
    await the_node_follows_a_change_of_geometry(cluster, await geometry(cluster))
    await cluster.remove(documents)
    return status


@pytest.fixture(autouse=True)
def _confined() -> None:
    if not is_admin(security(shipped("SYS_ADMIN"))) or is_admin(security(shipped("MKNOD"))):
        pytest.skip("capabilities can be given and taken by root with setpriv only")


async def test_with_sys_admin_placements_and_gpu_instances_are_told(root: Path) -> None:
    async with standing_in(root) as cluster:
        status = await served(cluster, shipped("SYS_ADMIN", "MKNOD"))
    assert len(placements(status)) == 11
    assert None not in placements(status)
    assert status["warnings"] == []


@pytest.mark.parametrize("capabilities", [("MKNOD",), ()])
async def test_without_it_the_devices_are_served_and_one_line_says_what_is_missing(
    root: Path, capabilities: tuple[str, ...]
) -> None:
    async with standing_in(root) as cluster:
        status = await served(cluster, shipped(*capabilities))
    assert placements(status) == [None] * 11
    assert "CAP_SYS_ADMIN" in str(status["warnings"])
