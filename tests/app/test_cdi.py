"""The CDI document and the host's nodes, by the whole agent: there before a device can be handed out."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migplugin.core.cdi import FILE_NAME
from migplugin.sim.kubelet import Kubelet
from migplugin.sim.model import Node
from tests.app.conftest import Machine, Start
from tests.fakes.cdi import check

MIG = "nvidia.com/mig-1g.5gb"
CDI = ("--device-list-strategy=cdi-cri", "--removal-delay=1s")


def document(node: Machine) -> Any:
    """The document that is on disk now, a valid one, or None."""
    try:
        found = json.loads((node.root / "cdi" / FILE_NAME).read_text())
    except FileNotFoundError:
        return None
    check(found)
    return found


def names(node: Machine) -> set[str]:
    return {device["name"] for device in (document(node) or {"devices": ()})["devices"]}


def healthy(kubelet: Kubelet, resource: str = MIG) -> set[str]:
    return {id_ for id_, health in kubelet.devices(resource).items() if health == "Healthy"}


def cdi(node: Machine, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "migplugin", "cdi", f"--simulate={node.state}", *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": path or os.environ["PATH"]},
    )


def backed(node: Machine, condition: Callable[[Kubelet], bool]) -> Callable[[Kubelet], bool]:
    """`condition`, and each list on the way to it offers only what is on disk."""

    def holds(kubelet: Kubelet) -> bool:
        there = names(node)
        for resource in kubelet.node()["capacity"]:
            if resource.startswith("nvidia.com/"):
                assert healthy(kubelet, resource) <= there, (
                    f"offered before it was in the document: {resource}"
                )
        return condition(kubelet)

    return holds


async def test_a_device_is_in_the_document_before_it_is_offered(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3,1xa100-40gb")
    agent = await node.serve(*CDI, f"--cdi-root={node.root}/cdi")
    await node.until(backed(node, lambda k: len(healthy(k)) == 3))
    for count in (4, 5, 6):
        node.change(lambda made: made.gpus[0].create("1g.5gb"))
        await node.until(backed(node, lambda k, count=count: len(healthy(k)) == count))  # type: ignore[misc]
    node.change(lambda made: made.gpus[1].set_mig_mode(on=True))
    node.change(lambda made: made.gpus[1].create("3g.20gb"))
    await node.until(backed(node, lambda _: node.allocatable("3g.20gb") == 1))
    assert names(node) == {ci.uuid for gpu in node.store.read().gpus for _, ci in gpu.mig_devices()}
    printed = cdi(node)
    assert json.loads(printed.stdout) == document(node), printed.stderr
    assert await agent.end() == 0
    assert document(node) is not None, "it stays when the agent stops"


async def test_with_the_last_device_goes_the_file_and_it_is_back_before_the_next(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    agent = await node.serve(*CDI, f"--cdi-root={node.root}/cdi")
    await node.until(backed(node, lambda k: len(healthy(k)) == 1))
    node.change(lambda made: made.gpus[0].destroy(made.gpus[0].instances[0].id))
    await node.until(lambda k: not healthy(k))
    await agent.until_said(
        "cdi document removed: no device is left, and one without devices would be invalid"
    )
    assert document(node) is None
    printed = cdi(node)
    assert (printed.returncode, printed.stdout) == (0, "")
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    await node.until(backed(node, lambda _: node.allocatable("2g.10gb") == 1))


async def test_nvidia_s_stale_document_is_replaced_at_once(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    (node.root / "cdi").mkdir()
    stale = {
        "cdiVersion": "0.5.0",
        "kind": "k8s.device-plugin.nvidia.com/gpu",
        "devices": [{"name": "MIG-old"}],
    }
    (node.root / "cdi" / FILE_NAME).write_text(json.dumps(stale))
    await node.serve(*CDI, f"--cdi-root={node.root}/cdi")
    await node.until(lambda k: len(healthy(k)) == 2)
    assert names(node) == healthy(node.kubelet)


async def test_by_cdi_alone_devices_wait_for_a_document_that_cannot_be_written(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    blocker = node.root / "cdi"
    blocker.write_text("not a directory")
    agent = await node.serve(*CDI, f"--cdi-root={blocker}")
    await node.until(lambda k: list(k.devices(MIG).values()) == ["Unhealthy"] * 2)
    await agent.until_said(
        "the cdi document is not written, will try again; "
        "containers that are told their devices by CDI alone will not start"
    )
    blocker.unlink()
    await node.until(backed(node, lambda k: len(healthy(k)) == 2))


async def test_with_another_strategy_beside_it_devices_are_offered_all_the_same(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    (node.root / "cdi").write_text("not a directory")
    agent = await node.serve("--device-list-strategy=envvar,cdi-cri", f"--cdi-root={node.root}/cdi")
    await node.until(lambda k: len(healthy(k)) == 2)
    assert [line["level"] for line in agent.lines if "cdi document is not" in line["message"]] == ["warning"]


async def test_a_gpu_that_is_lost_takes_nothing_from_the_document(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2,1xa100-40gb=2g.10gb")
    agent = await node.serve(*CDI, f"--cdi-root={node.root}/cdi", "--poll-interval=100ms")
    await node.until(lambda k: len(healthy(k)) == 2)
    before = names(node)
    node.change(lambda made: setattr(made.gpus[0].record, "lost", True))
    await node.until(lambda k: not healthy(k))
    assert names(node) == before
    assert await agent.end() == 0


async def test_without_a_cdi_strategy_no_document_is_written(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    await node.serve(f"--cdi-root={node.root}/cdi")
    await node.until(lambda k: len(healthy(k)) == 1)
    assert not (node.root / "cdi").exists()


def host_nodes(node: Machine, gpu: int = 0) -> list[Path]:
    caps = node.state / "host/dev/nvidia-caps"
    base = [(3 + 135 * gpu + 9 * gi.id, ci.id) for gi, ci in node.store.read().gpus[gpu].mig_devices()]
    return [caps / f"nvidia-cap{minor}" for gi, ci in base for minor in (gi, gi + 1 + ci)]


def late(made: Node) -> None:
    made.switches.capability_nodes = "late"


async def test_nodes_that_are_late_are_made_before_the_device_is_offered(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    node.change(late)
    agent = await node.serve("--pass-device-specs")
    await node.until(lambda k: len(healthy(k)) == 1)
    node.change(lambda made: made.gpus[0].create("1g.5gb"))

    def offered(kubelet: Kubelet) -> bool:
        there = [path.exists() for path in host_nodes(node)]
        assert "Unhealthy" not in kubelet.devices(MIG).values()
        assert len(healthy(kubelet)) < 2 or there == [True] * 4, "offered before its nodes were there"
        return len(healthy(kubelet)) == 2

    await node.until(offered)
    await agent.until_said("capability nodes made", nodes=2)


async def test_who_may_not_make_nodes_says_the_command_and_waits_for_them(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    node.change(late)
    node.change(lambda made: setattr(made.switches, "privilege", "none"))
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    agent = await node.serve("--pass-device-specs")
    await node.until(lambda k: len(healthy(k)) == 1)
    await node.until(lambda k: list(k.devices("nvidia.com/mig-2g.10gb").values()) == ["Unhealthy"])
    said = await agent.until_said(
        "capability nodes are missing, their devices stay unhealthy until they are there", nodes=2
    )
    assert said["command"].startswith("nvidia-modprobe -f /proc/driver/nvidia/capabilities/gpu0/mig/gi")
    node.change(Node.make_nodes)
    await node.until(lambda k: len(healthy(k, "nvidia.com/mig-2g.10gb")) == 1)


async def test_without_device_specs_nobody_needs_nodes_on_the_host(machine: Start) -> None:
    node = await machine("1xa100-40gb=")
    node.change(late)
    await node.serve()
    node.change(lambda made: made.gpus[0].create("1g.5gb"))
    await node.until(lambda k: len(healthy(k)) == 1)
    assert not any(path.exists() for path in host_nodes(node))


async def test_the_document_is_compared_with_what_nvidia_s_generator_prints(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2", running=False)
    alone = await asyncio.to_thread(cdi, node, "diff", path="/nonexistent")
    assert alone.returncode == 1
    assert "nvidia-ctk is not on PATH" in alone.stderr
    tools = node.root / "bin"
    tools.mkdir()
    (node.root / "theirs.json").write_text(cdi(node).stdout)
    program = tools / "nvidia-ctk"
    program.write_text(f'#!/bin/sh\necho "$@" > {node.root}/asked\n/bin/cat {node.root}/theirs.json\n')
    program.chmod(0o755)
    same = cdi(node, "diff", path=str(tools))
    assert (same.returncode, same.stdout) == (0, ""), same.stderr
    assert (
        (node.root / "asked").read_text().startswith("cdi generate --format=json --device-name-strategy=uuid")
    )
    (gi, _), *_ = node.store.read().gpus[0].mig_devices()
    node.change(lambda made: made.gpus[0].destroy(gi.id))
    other = cdi(node, "diff", path=str(tools))
    assert other.returncode == 1
    assert "only in nvidia-ctk's" in other.stdout
    program.write_text("#!/bin/sh\necho broken >&2; exit 2\n")
    assert "ended with 2: broken" in cdi(node, "diff", path=str(tools)).stderr


@pytest.mark.parametrize("line", ["", "nvidia-caps", "x nvidia-caps", "99999 nvidia-caps"])
async def test_a_major_number_that_cannot_be_read_is_said_and_the_runtime_looks_at_the_host(
    machine: Start, line: str
) -> None:
    node = await machine("1xa100-40gb=1g.5gb")
    proc = node.root / "proc"
    proc.mkdir()
    (proc / "driver").symlink_to(node.state / "host/proc/driver")
    (proc / "devices").write_text(f"Character devices:\n  1 mem\n{line}\n")
    agent = await node.serve(*CDI, f"--cdi-root={node.root}/cdi", f"--proc-root={proc}")
    await node.until(backed(node, lambda k: len(healthy(k)) == 1))
    (device,) = document(node)["devices"]
    assert [set(made) for made in device["containerEdits"]["deviceNodes"]] == [{"path", "hostPath"}] * 3
    assert any("nvidia-caps" in said["reason"] for said in agent.said("the cdi document lacks something"))


async def test_the_driver_s_files_are_told_as_the_host_has_them(machine: Start) -> None:
    node = await machine("1xa100-40gb", running=False)
    root = node.root / "driver"
    for path in ("usr/lib64/libcuda.so.580.95.05", "usr/bin/nvidia-smi", "usr/bin/nvidia-ctk"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")
        (root / path).chmod(0o755)
    flags = (f"--driver-root-ctr-path={root}", "--driver-root=/run/nvidia/driver")
    common = json.loads(cdi(node, *flags).stdout)["containerEdits"]
    assert [mount["hostPath"] for mount in common["mounts"]] == [
        "/run/nvidia/driver/usr/lib64/libcuda.so.580.95.05",
        "/run/nvidia/driver/usr/bin/nvidia-smi",
    ]
    assert {hook["path"] for hook in common["hooks"]} == {"/usr/bin/nvidia-ctk"}
    (root / "usr/bin/nvidia-ctk").unlink()
    assert "hooks" not in json.loads(cdi(node, *flags).stdout)["containerEdits"], (
        "nobody said that it is there"
    )
    told = json.loads(cdi(node, *flags, "--nvidia-cdi-hook-path=/opt/nvidia-cdi-hook").stdout)
    assert {hook["path"] for hook in told["containerEdits"]["hooks"]} == {"/opt/nvidia-cdi-hook"}
