"""Who holds what, from a checkpoint that may be missing, damaged or huge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.core.decide import Source
from migplugin.kubelet import podresources
from migplugin.kubelet.podresources import UsageReader

NOWHERE = Path("/nonexistent/pod-resources/kubelet.sock")


def checkpoint(directory: Path, *entries: dict[str, object] | None) -> Path:
    path = directory / "kubelet_internal_checkpoint"
    data = {"PodDeviceEntries": entries or None, "RegisteredDevices": {"nvidia.com/gpu": ["GPU-1"]}}
    path.write_text(json.dumps({"Data": data, "Checksum": 1}))
    return path


def entry(resource: str, **ids: list[str] | None) -> dict[str, object]:
    numa = {key.replace("numa", "").replace("none", "-1"): value for key, value in ids.items()}
    return {
        "PodUID": "u",
        "ContainerName": "c",
        "ResourceName": resource,
        "DeviceIDs": numa,
        "AllocResp": "AA==",
    }


async def test_the_checkpoint_names_devices_of_every_numa_node(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path,
        entry("nvidia.com/mig-1g.5gb", numa0=["MIG-a"], none=["MIG-b"]),
        entry("renamed.example/slice", none=["MIG-c"]),
        entry("vendor.example/nic", none=["eth0"]),
    )
    usage = await UsageReader(path, NOWHERE).read(7.0)
    assert usage.began == 7.0
    assert usage.checkpoint is Source.OK
    assert usage.pod_resources is Source.ABSENT
    assert usage.complete
    assert usage.named == {
        ("nvidia.com/mig-1g.5gb", "MIG-a"),
        ("nvidia.com/mig-1g.5gb", "MIG-b"),
        ("renamed.example/slice", "MIG-c"),
    }


async def test_a_checkpoint_that_is_not_there_yet_names_nothing(tmp_path: Path) -> None:
    usage = await UsageReader(tmp_path / "kubelet_internal_checkpoint", NOWHERE).read(0.0)
    assert usage.checkpoint is Source.OK
    assert not usage.named


async def test_a_directory_that_is_not_there_is_no_answer(tmp_path: Path) -> None:
    usage = await UsageReader(tmp_path / "x" / "kubelet_internal_checkpoint", NOWHERE).read(0.0)
    assert usage.checkpoint is Source.FAILED
    assert not usage.complete


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize("forbidden", ["pod-resources", "."])
def test_a_socket_that_we_may_not_even_look_at_is_mounted_and_silent(short: Path, forbidden: str) -> None:
    socket = short / "pod-resources" / "kubelet.sock"
    socket.parent.mkdir()
    short.chmod(0o755)
    (short / forbidden).chmod(0o700)
    code = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from migplugin.kubelet.podresources import UsageReader\n"
        "os.setuid(65534); reader = UsageReader(Path('/nonexistent'), Path(sys.argv[1]))\n"
        "print(asyncio.run(reader.read(0.0)).pod_resources)"
    )
    command = [sys.executable, "-c", code, str(socket)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout.strip() == Source.FAILED, said.stderr


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"Data": 3}', '{"Data": {"PodDeviceEntries": [3]}}', "\x00\xff"]
)
async def test_a_damaged_checkpoint_is_no_answer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kubelet_internal_checkpoint"
    path.write_text(content)
    assert (await UsageReader(path, NOWHERE).read(0.0)).checkpoint is Source.FAILED


async def test_a_checkpoint_beyond_the_limit_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(podresources, "MAX_BYTES", 100)
    path = checkpoint(tmp_path, entry("nvidia.com/gpu", none=["GPU-" + "x" * 200]))
    assert (await UsageReader(path, NOWHERE).read(0.0)).checkpoint is Source.FAILED


async def test_nulls_in_the_checkpoint_are_empty_lists(tmp_path: Path) -> None:
    usage = await UsageReader(checkpoint(tmp_path, entry("nvidia.com/gpu", none=None)), NOWHERE).read(0.0)
    assert usage.checkpoint is Source.OK
    assert not usage.named
