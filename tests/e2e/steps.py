"""What must come true of the shipped manifests in simulated mode, step by step, on any cluster.

The steps know nothing of what is under them: the stand-in kubelet in every test run (standin.py), or a
real cluster (kubectl.py). The manifests are those of the overlay `simulated` as they render.
"""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import yaml

from tests.manifests.render import GOLDEN

Document = dict[str, Any]
Counts = Mapping[str, int]
RESOURCE = "nvidia.com/mig-1g.5gb"
DEVICES = "NVIDIA_VISIBLE_DEVICES"


class Cluster(Protocol):
    """One node that is labelled and tainted for simulated GPUs, and whoever runs pods on it."""

    async def apply(self, manifests: list[Document]) -> None:
        """True after: all is there, and every pod of it runs and is ready."""

    async def restart(self) -> None:
        """True after: the agent's pod has been replaced, and the new one is ready."""

    async def migplugin(self, *words: str) -> str:
        """What `migplugin` prints in the agent's container."""

    async def run(self, name: str, resource: str) -> None:
        """True after: a pod of that name, which asks for one of `resource`, runs."""

    async def delete(self, name: str) -> None:
        """True after: that pod is gone."""

    async def environment(self, name: str) -> Mapping[str, str]:
        """The variables of that pod's container, which runs and was never started anew."""

    async def examples(self) -> list[Mapping[str, str]]:
        """The variables of each pod of the Deployment `example`."""

    async def until_allocatable(self, counts: Mapping[str, int]) -> None:
        """Returns when the node shows exactly so many of each of these resources."""

    async def remove(self, manifests: list[Document]) -> None:
        """True after: nothing of it is left, but the node's simulated driver."""


def manifests() -> list[Document]:
    """The overlay `simulated` as it renders, which tests/manifests compares with the golden file."""
    return [document for document in yaml.safe_load_all((GOLDEN / "simulated.yaml").read_text()) if document]


async def geometry(cluster: Cluster) -> Counts:
    """How many devices of each resource the simulated driver has."""
    node = json.loads(await cluster.migplugin("sim", "show", "--output=json"))
    return Counter(
        f"nvidia.com/mig-{device['profile']}"
        for gpu in node["gpus"]
        for instance in gpu["instances"]
        for device in instance["compute"]
    )


async def story(cluster: Cluster) -> None:
    """Install, use, change, restart, upgrade, remove."""
    shipped = manifests()
    await cluster.apply(shipped)
    counts = await the_node_shows_what_the_driver_has(cluster)
    await every_pod_has_a_device_of_its_own(cluster)
    await the_agent_says_what_it_sees(cluster, counts)
    counts = await the_node_follows_a_change_of_geometry(cluster, counts)
    await a_restarted_agent_takes_nothing_from_a_pod(cluster, counts)
    await an_upgrade_loses_nothing(cluster, counts, shipped)
    await what_a_pod_held_is_free_for_another(cluster, counts)
    await cluster.delete("first")
    await cluster.remove(shipped)


async def the_node_shows_what_the_driver_has(cluster: Cluster) -> Counts:
    counts = await geometry(cluster)
    assert counts == {RESOURCE: 9, "nvidia.com/mig-2g.10gb": 1, "nvidia.com/mig-3g.20gb": 1}
    await cluster.until_allocatable(counts)
    return counts


async def every_pod_has_a_device_of_its_own(cluster: Cluster) -> None:
    await cluster.run("first", RESOURCE)
    given = [await cluster.environment("first"), *await cluster.examples()]
    devices = {variables[DEVICES] for variables in given}
    assert len(devices) == len(given) == 3
    assert all(device.startswith("MIG-") for device in devices)


async def the_agent_says_what_it_sees(cluster: Cluster, counts: Counts) -> None:
    document = json.loads(await cluster.migplugin("status", "--output=json"))
    assert document["seen_by"] == "agent"
    shown = {resource["name"]: resource for resource in document["resources"]}
    assert {name: resource["healthy"] for name, resource in shown.items()} == counts
    assert shown[RESOURCE]["held"] == 3
    assert {resource["registration"] for resource in document["resources"]} == {"registered"}


async def the_node_follows_a_change_of_geometry(cluster: Cluster, counts: Counts) -> Counts:
    node = json.loads(await cluster.migplugin("sim", "show", "--output=json"))
    (uuid,) = [
        device["uuid"]
        for instance in node["gpus"][1]["instances"]
        for device in instance["compute"]
        if device["profile"] == "3g.20gb"
    ]
    await cluster.migplugin("sim", "destroy", f"--uuid={uuid}")
    await cluster.until_allocatable({**counts, "nvidia.com/mig-3g.20gb": 0})
    await cluster.migplugin("sim", "create", "1", "2g.10gb")
    changed = {**counts, "nvidia.com/mig-3g.20gb": 0, "nvidia.com/mig-2g.10gb": 2}
    await cluster.until_allocatable(changed)
    return changed


async def a_restarted_agent_takes_nothing_from_a_pod(cluster: Cluster, counts: Counts) -> None:
    held = (await cluster.environment("first"))[DEVICES]
    await cluster.restart()
    await cluster.until_allocatable(counts)  # the simulated driver outlives the pod
    assert (await cluster.environment("first"))[DEVICES] == held


async def an_upgrade_loses_nothing(cluster: Cluster, counts: Counts, shipped: list[Document]) -> None:
    held = (await cluster.environment("first"))[DEVICES]
    newer = copy.deepcopy(shipped)
    (daemonset,) = [document for document in newer if document["kind"] == "DaemonSet"]
    daemonset["spec"]["template"]["metadata"]["annotations"]["migplugin/e2e"] = "newer"
    await cluster.apply(newer)
    await cluster.until_allocatable(counts)
    assert (await cluster.environment("first"))[DEVICES] == held
    await cluster.run("second", RESOURCE)
    assert (await cluster.environment("second"))[DEVICES] != held


async def what_a_pod_held_is_free_for_another(cluster: Cluster, counts: Counts) -> None:
    await cluster.delete("second")
    others = [variables[DEVICES] for variables in await cluster.examples()]
    names = [f"more-{number}" for number in range(counts[RESOURCE] - 1 - len(others))]
    for name in names:
        await cluster.run(name, RESOURCE)
    devices = [*others, *[(await cluster.environment(name))[DEVICES] for name in ("first", *names)]]
    assert len(set(devices)) == len(devices) == counts[RESOURCE], "every device has one holder"
    for name in names:
        await cluster.delete(name)
