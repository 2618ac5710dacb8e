"""Random life on a node: instances come and go, pods come and go, the kubelet dies, and no answer is wrong.

After each step the kubelet's view must become what the driver has: every live device Healthy under exactly
its resource, every other listed id Unhealthy, and no id that a pod holds missing. The stand-in kubelet
panics, and the test with it, where a plugin drops an id that it must not.

MIGPLUGIN_TEST_STEPS and MIGPLUGIN_TEST_SEED make it longer, or another one.
"""

import os
import random
from functools import partial

from migplugin.sim.kubelet import Container, Kubelet, Pod
from migplugin.sim.model import Node, Refusal
from tests.app.conftest import Machine, Start

STEPS = int(os.environ.get("MIGPLUGIN_TEST_STEPS", "60"))
SEED = int(os.environ.get("MIGPLUGIN_TEST_SEED", "1"))
PROFILES = ("1g.5gb", "1g.5gb+me", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "1c.3g.20gb")


def live(node: Machine) -> dict[str, str]:
    """The resource of every device that the driver has."""
    found = {}
    for gpu in node.store.read().gpus:
        for gi, ci in gpu.mig_devices():
            found[ci.uuid] = "nvidia.com/mig-" + gpu.ci_name(gi, ci).replace("+", ".")
    return found


def wrong(kubelet: Kubelet, devices: dict[str, str], held: dict[str, tuple[str, str]]) -> str:
    """What the kubelet's lists say that is not so, or ""."""
    listed = {name: kubelet.devices(name) for name in {*kubelet.node()["capacity"], *devices.values()}}
    held_as = dict(held.values())
    for id_, resource in devices.items():
        health = listed[resource].get(id_)
        expected = "Healthy" if held_as.get(id_, resource) == resource else "Unhealthy"
        if health != expected:
            return f"{id_} is {health} under {resource}, not {expected}"
    for resource, ids in listed.items():
        for id_, health in ids.items():
            if health == "Healthy" and devices.get(id_) != resource:
                return f"{id_} is Healthy under {resource} and should not"
    for id_, resource in held.values():
        if id_ not in listed.get(resource, {}):
            return f"{id_} is held as {resource} and not listed"
    return ""


def is_right(devices: dict[str, str], held: dict[str, tuple[str, str]], kubelet: Kubelet) -> bool:
    return not wrong(kubelet, devices, held)


def create(gpu: int, profile: str, made: Node) -> None:
    made.gpus[gpu].create(profile)


def destroy(gpu: int, gi: int, made: Node) -> None:
    made.gpus[gpu].destroy(gi)


async def test_no_step_of_a_random_life_is_answered_wrongly(machine: Start) -> None:
    chance = random.Random(SEED)
    node = await machine("3xa100-40gb=1g.5gb*2:2g.10gb")
    await node.serve("--removal-delay=500ms", "--pass-device-specs")
    kubelet = node.kubelet
    held: dict[str, tuple[str, str]] = {}
    pods: dict[str, Pod] = {}
    for step in range(STEPS):
        what = chance.choices(("create", "destroy", "admit", "end", "restart"), (4, 4, 4, 2, 0.3))[0]
        gpu = chance.randrange(3)
        if what == "create":
            try:
                node.change(partial(create, gpu, chance.choice(PROFILES)))
            except Refusal:
                continue
        elif what == "destroy":
            there = node.store.read().gpus[gpu].instances
            if not there:
                continue
            gi = chance.choice(there).id
            node.change(partial(destroy, gpu, gi))
        elif what == "admit":
            free = [r for r, n in kubelet.node()["allocatable"].items() if n]
            if not free:
                continue
            resource = chance.choice(sorted(free))
            pod = Pod(f"pod-{step}", (Container("main", {resource: 1}),))
            status = await kubelet.admit(pod)
            devices = live(node)
            if status.phase == "Running":
                (id_,) = status.containers["main"].device_ids[resource]
                assert devices.get(id_) == resource, "a device was handed out that is not there"
                assert id_ not in dict(held.values()), "a device was handed out twice"
                held[pod.name], pods[pod.name] = (id_, resource), pod
        elif what == "end":
            if not pods:
                continue
            name = chance.choice(sorted(pods))
            await kubelet.delete(pods.pop(name))
            del held[name]
        else:
            await kubelet.restart(kill=chance.random() < 0.5)
        devices = live(node)
        # A UUID that comes back as another profile waits until nobody can hold it as the old one: a
        # lease that no pod shows any more ends after ten seconds and two looks.
        await node.until(partial(is_right, devices, held), timeout=40.0)
    assert kubelet.panic is None
