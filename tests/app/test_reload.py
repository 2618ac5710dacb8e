"""A changed configuration applies while the agent runs, and only what changed is touched."""

import signal
from pathlib import Path

from migplugin.sim.kubelet import Container, Pod
from tests.app.conftest import Start

MIG = "nvidia.com/mig-1g.5gb"


def swap(directory: Path, text: str) -> None:
    """As the kubelet updates a mounted ConfigMap: a new directory, and a link that is renamed into place."""
    version = directory / f"..{len(list(directory.iterdir()))}"
    version.mkdir()
    (version / "config.yaml").write_text(text)
    (directory / "..new").symlink_to(version.name)
    (directory / "..new").rename(directory / "..data")


async def test_a_swapped_configmap_applies_without_a_gap_for_what_did_not_change(
    machine: Start, tmp_path: Path
) -> None:
    swap(tmp_path, "flags: {migStrategy: mixed}")
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    node = await machine("1xa100-40gb=1g.5gb*2:3g.20gb")
    agent = await node.serve(f"--config-file={tmp_path / 'config.yaml'}")
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    swap(tmp_path, "flags: {plugin: {deviceListStrategy: volume-mounts}}")
    await agent.until_said("configuration taken")
    status = await node.kubelet.admit(Pod("p", (Container("c", {MIG: 1}),)))
    assert status.containers["c"].envs["NVIDIA_VISIBLE_DEVICES"] == "/var/run/nvidia-container-devices"
    assert len([r for r in node.kubelet.registrations if r[0] == MIG]) == 1
    assert len(node.kubelet.messages(MIG)) == 1, "the list did not change"


async def test_a_strategy_that_changes_moves_the_devices_and_keeps_what_is_held(
    machine: Start, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("flags: {migStrategy: mixed}")
    node = await machine("1xa100-40gb=1g.5gb*3")
    await node.serve(f"--config-file={file}", "--removal-delay=500ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    status = await node.kubelet.admit(Pod("p", (Container("c", {MIG: 1}),)))
    (held,) = status.containers["c"].device_ids[MIG]
    file.write_text("flags: {migStrategy: single}")
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 2)
    await node.until(lambda k: k.devices(MIG) == {held: "Unhealthy"})


async def test_a_bad_file_keeps_the_last_good_one_and_says_so_once(machine: Start, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("flags: {migStrategy: mixed}")
    node = await machine("1xa100-40gb=1g.5gb*2")
    agent = await node.serve(f"--config-file={file}")
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    file.write_text("flags: {migStrategy: mixd}")
    line = await agent.until_said("configuration not taken, the last good one stays")
    assert "did you mean mixed?" in line["reason"]
    agent.process.send_signal(signal.SIGHUP)
    file.write_text("flags: {migStrategy: mixed, plugin: {containerDriverRoot: /elsewhere}}")
    await agent.until_said("these settings take effect with a restart")
    assert len(agent.said("configuration not taken, the last good one stays")) == 1
    assert node.allocatable("1g.5gb") == 2


async def test_hangup_without_a_file_changes_nothing(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*2")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    agent.process.send_signal(signal.SIGHUP)
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    await node.until(lambda _: node.allocatable("2g.10gb") == 1)
    assert await agent.end() == 0


async def test_sharing_and_names_of_the_file_are_served_and_change_under_a_pod(
    machine: Start, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    shared = "sharing: {timeSlicing: {resources: [{name: small, replicas: 4}]}}"
    names = 'resources: {mig: [{pattern: "1g.*", name: small}]}'
    small = "nvidia.com/small"
    file.write_text(names)
    node = await machine("1xa100-40gb=1g.5gb*3:3g.20gb")
    agent = await node.serve(f"--config-file={file}", "--removal-delay=500ms")
    await node.until(lambda k: k.allocatable(small) == 3)
    await agent.until_said("naming")
    status = await node.kubelet.admit(Pod("whole", (Container("c", {small: 1}),)))
    (held,) = status.containers["c"].device_ids[small]
    file.write_text(f"{names}\n{shared}")
    await node.until(lambda k: sum("::" in id_ for id_ in k.devices(small)) == 12)
    await node.until(lambda k: k.allocatable(small) == 8)
    await node.until(lambda k: len(k.devices(small)) == 13)
    devices = node.kubelet.devices(small)
    assert {id_ for id_, health in devices.items() if health == "Unhealthy"} == {
        held,
        *(f"{held}::{n}" for n in range(4)),
    }
    shared_by_two = await node.kubelet.admit(Pod("shared", (Container("c", {small: 2}),)))
    ids = shared_by_two.containers["c"].device_ids[small]
    assert shared_by_two.containers["c"].envs["NVIDIA_VISIBLE_DEVICES"].split(",") == [
        id_.partition("::")[0] for id_ in ids
    ]
    assert len({id_.partition("::")[0] for id_ in ids}) == 2, "distributed"
