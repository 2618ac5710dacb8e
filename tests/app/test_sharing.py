"""Time-slicing, renaming and container edits by one configuration file, as a pod sees them."""

from pathlib import Path

from migplugin.sim.kubelet import Container, Pod, PodStatus
from tests.app.conftest import Start

FILE = """
flags: {plugin: {deviceListStrategy: [envvar, cdi-cri]}, gdsEnabled: true}
sharing:
  timeSlicing:
    renameByDefault: true
    failRequestsGreaterThanOne: true
    resources: [{name: nvidia.com/mig-1g.5gb, replicas: 3, devices: ["0:1"]}]
resources: {mig: [{pattern: 3g.20gb, name: mig-big}]}
"""
SHARED, PLAIN, BIG = "nvidia.com/mig-1g.5gb.shared", "nvidia.com/mig-1g.5gb", "nvidia.com/mig-big"


async def test_one_file_shares_a_device_renames_a_profile_and_names_devices_twice(
    machine: Start, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FILE)
    node = await machine("1xa100-40gb=3g.20gb:1g.5gb*2")
    await node.serve(f"--config-file={file}", f"--cdi-root={node.root / 'cdi'}")
    expected = {SHARED: 3, PLAIN: 1, BIG: 1}
    await node.until(lambda k: k.node()["allocatable"] == expected)

    async def ask(name: str, resource: str, count: int = 1) -> PodStatus:
        return await node.kubelet.admit(Pod(name, (Container("main", {resource: count}),)))

    greedy = await ask("greedy", SHARED, 2)
    assert greedy.phase == "Failed"
    assert "maximum request size for shared resources is 1; found 2" in greedy.message
    first, second = await ask("first", SHARED), await ask("second", SHARED)
    visible = {status.containers["main"].envs["NVIDIA_VISIBLE_DEVICES"] for status in (first, second)}
    (device,) = visible
    assert "::" not in device, "a container is told the device, not the replica"
    assert first.containers["main"].cdi_devices == (f"k8s.device-plugin.nvidia.com/gpu={device}",)
    assert first.containers["main"].envs["NVIDIA_GDS"] == "enabled"
    big = await ask("big", BIG)
    assert big.containers["main"].envs["NVIDIA_VISIBLE_DEVICES"] not in visible
