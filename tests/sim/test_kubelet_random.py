"""A random life of the stand-in kubelet: whatever happens, no device has two owners and none is lost."""

import json
import random

import pytest

from migplugin.sim.kubelet import Container, Kubelet, Pod
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, list_pods, listed, running

IDS = [f"MIG-{number}" for number in range(8)]


def owners(kubelet: Kubelet) -> dict[str, str]:
    """The pod of each held device. Fails where a device has two."""
    found: dict[str, str] = {}
    for pod in kubelet.pods():
        if kubelet.status(pod).phase != "Running":
            continue
        ids = {
            id_ for edits in kubelet.status(pod).containers.values() for id_ in edits.device_ids.get(R, ())
        }
        for id_ in ids:
            assert found.setdefault(id_, pod.uid) == pod.uid
    return found


def in_checkpoint(kubelet: Kubelet) -> set[str]:
    entries = json.loads(kubelet.checkpoint_path.read_text())["Data"]["PodDeviceEntries"] or ()
    return {id_ for entry in entries for ids in entry["DeviceIDs"].values() for id_ in ids}


def random_pod(chance: random.Random, number: int) -> Pod:
    containers = [Container("app", {R: chance.randint(0, 2)}), Container("second", {R: chance.randint(0, 1)})]
    if chance.random() < 0.4:
        sidecar = chance.random() < 0.5
        containers.append(Container("init", {R: chance.randint(1, 2)}, init=True, restartable=sidecar))
    return Pod(f"p{number}", tuple(containers))


@pytest.mark.parametrize("seed", range(3))
async def test_no_device_has_two_owners_and_none_is_lost(seed: int) -> None:
    chance = random.Random(seed)
    sick: set[str] = set()
    async with running(seed=seed) as kubelet:
        plugin = Plugin(kubelet.socket, R, map(device, IDS), preferred=True)
        await plugin.serve()
        await plugin.register()
        await listed(kubelet, len(IDS))
        for step in range(150):
            alive = [pod for pod in kubelet.pods() if kubelet.status(pod).phase == "Running"]
            match chance.choice(
                ["admit", "admit", "admit", "end", "end", "health", "start", "list", "restart"]
            ):
                case "admit":
                    pod = random_pod(chance, step)
                    free = set(IDS) - sick - owners(kubelet).keys()
                    needed = sum(container.requests[R] for container in pod.containers)
                    status = await kubelet.admit(pod)
                    assert status.phase == "Running" or needed > len(free)
                case "end" if alive:
                    pod = chance.choice(alive)
                    await (kubelet.finish(pod) if chance.random() < 0.5 else kubelet.delete(pod))
                case "health":
                    sick = {id_ for id_ in IDS if chance.random() < 0.2}
                    plugin.list(*(device(id_, "Unhealthy" if id_ in sick else "Healthy") for id_ in IDS))
                    await listed(kubelet, len(IDS) - len(sick))
                case "start" if alive:
                    pod = chance.choice(alive)
                    container = chance.choice(pod.containers).name
                    before = kubelet.status(pod).containers[container]
                    assert await kubelet.restart_container(pod, container) == before
                case "list":
                    shown = await list_pods(kubelet)
                    assert {id_ for pods in shown.values() for ids in pods.values() for id_ in ids} <= (
                        owners(kubelet).keys()
                    )
                case "restart":
                    await kubelet.restart(kill=chance.random() < 0.5)
                    await plugin.stop()
                    await plugin.serve()
                    await plugin.register()
                    await listed(kubelet, len(IDS) - len(sick))
            assert owners(kubelet).keys() <= in_checkpoint(kubelet)
        await plugin.stop()
