"""The CDI document: golden files, what a runtime demands, and what leaves it and what does not.

`GOLDEN=write pytest tests/core/test_cdi.py` writes the golden files anew; then look at them.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migplugin.core import cdi, cdi_diff
from migplugin.core.inventory import BrokenGpu, DeviceId, Inventory
from tests.core.examples import ASSORTED, RTX_PRO, SEVENTHS, gpu, inventory, uuid
from tests.fakes.cdi import check

GOLDEN = Path(__file__).parents[1] / "golden" / "cdi"
VERSION = "590.48.01"
LIB = "/usr/lib/x86_64-linux-gnu"
CONTROL = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")

NAMES = (
    *(f"{name}.so.{VERSION}" for name in ("libGLX_nvidia", "libcuda", "libnvidia-ml")),
    f"vdpau/libvdpau_nvidia.so.{VERSION}",
)
FACTS = cdi.Facts(
    caps_major=511,
    drm={"0000:0b:00.0": ("/dev/dri/card1", "/dev/dri/renderD128")},
    libraries=tuple(f"{LIB}/{name}" for name in NAMES),
    binaries=("/usr/bin/nvidia-smi", "/usr/bin/nvidia-cuda-mps-control"),
    sockets=("/run/nvidia-persistenced/socket",),
    firmware=tuple(f"/lib/firmware/nvidia/{VERSION}/gsp_{chip}.bin" for chip in ("ga10x", "tu10x")),
)
GRAPHICS = gpu(
    1, (1, "1g.24gb+gfx", 0, 3), (2, "2g.48gb", 6, 6, ("1c.2g.48gb", "1c.2g.48gb")), product=RTX_PRO
)
DRIVER_CONTAINER = cdi.Options(
    driver_root="/run/nvidia/driver", dev_root="/run/nvidia/driver", hook="/usr/local/bin/nvidia-cdi-hook"
)


def node_with(*gpus: Any) -> Inventory:
    return Inventory(VERSION, gpus, (), CONTROL)


CASES: dict[str, tuple[Inventory, cdi.Facts, cdi.Options]] = {
    "host": (node_with(gpu(0, mig=False), ASSORTED), FACTS, cdi.Options(hook="/usr/bin/nvidia-ctk")),
    "driver-container": (node_with(gpu(0, mig=None), GRAPHICS), FACTS, DRIVER_CONTAINER),
    "index": (node_with(gpu(0, mig=False), ASSORTED), cdi.Facts(511), cdi.Options(by_index=True)),
    "nothing-known": (inventory(gpu(0, (7, "1g.5gb", 0, 1))), cdi.Facts(), cdi.Options()),
}


def made(found: Inventory, facts: cdi.Facts = FACTS, options: cdi.Options | None = None) -> Any:
    return cdi.document(found, facts, options or cdi.Options())


def names(found: Inventory, options: cdi.Options | None = None) -> list[str]:
    return [device["name"] for device in made(found, options=options)["devices"]]


@pytest.mark.parametrize("case", CASES)
def test_the_document_is_as_in_the_golden_file(case: str) -> None:
    document = cdi.document(*CASES[case])
    assert document is not None
    check(document)
    text = json.dumps(document, indent=1) + "\n"
    path = GOLDEN / f"{case}.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@given(
    st.lists(st.booleans(), max_size=4),
    st.sampled_from([None, 234]),
    st.sampled_from(["/", "/run/nvidia/driver", "/run/nvidia/driver/"]),
    st.booleans(),
    st.sampled_from(["", "/usr/bin/nvidia-ctk"]),
)
def test_every_document_is_one_that_a_runtime_takes(
    carved: list[bool], major: int | None, root: str, by_index: bool, hook: str
) -> None:
    gpus = [gpu(i, (i + 1, "1g.5gb", 0, 1)) if mig else gpu(i, mig=False) for i, mig in enumerate(carved)]
    options = cdi.Options(root, root, hook, by_index=by_index)
    document = made(node_with(*gpus), replace(FACTS, caps_major=major), options)
    if not carved:
        assert document is None
        return
    check(document)
    assert len(document["devices"]) == len(carved)


def test_whole_gpus_and_mig_devices_are_in_it_whatever_is_offered() -> None:
    found = names(node_with(gpu(0, mig=False), ASSORTED, gpu(2, mig=None)))
    assert found == [uuid(0), *(device.uuid for device in ASSORTED.devices), uuid(2)]


def test_without_a_device_there_is_no_document() -> None:
    assert made(inventory(gpu(0), gpu(1))) is None
    assert made(inventory()) is None


def test_capability_nodes_are_written_whether_the_host_has_them_or_not() -> None:
    device = replace(SEVENTHS.devices[0], gi_mode=0o400, ci_mode=None)
    document = made(inventory(replace(SEVENTHS, devices=(device,))))
    assert document["devices"][0]["containerEdits"]["deviceNodes"] == [
        {"path": "/dev/nvidia0"},
        {"path": "/dev/nvidia-caps/nvidia-cap30", "type": "c", "major": 511, "minor": 30, "fileMode": 256},
        {"path": "/dev/nvidia-caps/nvidia-cap31", "type": "c", "major": 511, "minor": 31, "fileMode": 292},
    ]


def test_without_a_major_number_the_runtime_has_to_look_at_the_host() -> None:
    document = made(inventory(SEVENTHS), cdi.Facts(), cdi.Options(dev_root="/host"))
    _, gi, ci = document["devices"][0]["containerEdits"]["deviceNodes"]
    assert gi == {
        "path": "/dev/nvidia-caps/nvidia-cap30",
        "hostPath": "/host/dev/nvidia-caps/nvidia-cap30",
    }
    assert "type" not in ci


def test_a_device_without_capability_is_left_out_with_its_reason_and_the_others_stay() -> None:
    first, second, *_ = SEVENTHS.devices
    blind = replace(first, ci_minor=None)
    found = inventory(replace(SEVENTHS, devices=(blind, second)))
    assert names(found) == [second.uuid]
    assert list(cdi.unresolvable(found, cdi.Options())) == [first.uuid]


def test_an_id_of_old_drivers_cannot_be_a_name_but_its_index_can() -> None:
    old = replace(SEVENTHS.devices[0], uuid=DeviceId(f"MIG-{uuid(0)}/7/0"))
    found = inventory(replace(SEVENTHS, devices=(old,)))
    assert made(found) is None
    assert "cannot be a name" in cdi.unresolvable(found, cdi.Options())[old.uuid]
    assert names(found, cdi.Options(by_index=True)) == ["0:0"]


def test_what_is_on_a_gpu_that_does_not_answer_stays() -> None:
    before = node_with(SEVENTHS, ASSORTED)
    lost = replace(
        before, gpus=(ASSORTED,), broken=(BrokenGpu(0, SEVENTHS.uuid, "lost"),), driver_version="1"
    )
    assert cdi.standing(before, lost) == replace(before, broken=lost.broken, driver_version="1")
    nameless = replace(lost, broken=(BrokenGpu(0, None, "lost"),))
    assert cdi.standing(before, nameless).gpus == before.gpus
    assert cdi.standing(None, lost) == lost
    assert cdi.standing(before, replace(lost, broken=())).gpus == (ASSORTED,), "taken out of the machine"


def test_only_what_differs_from_the_document_on_disk_is_missing_in_it() -> None:
    before, after = node_with(SEVENTHS), node_with(SEVENTHS, ASSORTED)
    missing = cdi.missing(after, cdi.Options(), wanted=made(after), there=made(before))
    assert missing == {device.uuid for device in ASSORTED.devices}
    for nothing in (None, {}, {"devices": "x"}, {"devices": [1, {}]}):
        assert len(cdi.missing(after, cdi.Options(), wanted=made(after), there=nothing)) == 11


@pytest.mark.parametrize(
    ("disabled", "left"),
    [
        (set(), 4),
        ({"update-ldcache"}, 3),
        ({"all"}, 0),
    ],
)
def test_hooks_can_be_left_out_by_name(disabled: set[str], left: int) -> None:
    options = replace(DRIVER_CONTAINER, disabled_hooks=frozenset(disabled))
    hooks = made(node_with(SEVENTHS), options=options)["containerEdits"].get("hooks", [])
    assert len(hooks) == left


def test_the_same_document_has_no_differences_in_any_order() -> None:
    ours = made(node_with(gpu(0, mig=False), ASSORTED), options=DRIVER_CONTAINER)
    theirs = {**ours, "devices": [*reversed(ours["devices"]), {"name": "all"}]}
    assert cdi_diff.differences(ours, theirs) == []


def test_each_difference_is_named() -> None:
    ours = made(node_with(gpu(0, mig=False)), cdi.Facts(511, libraries=("/lib64/libcuda.so.1",)))
    edits = {"deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/x/dev/nvidia0"}]}
    hook = {"hookName": "createContainer", "path": "/h", "args": ["nvidia-ctk", "hook", "chmod", "--mode"]}
    theirs = {
        "devices": [{"name": uuid(0), "containerEdits": edits}, {"name": "GPU-x", "containerEdits": {}}],
        "containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "hooks": [hook]},
    }
    assert cdi_diff.differences(ours, theirs) == [
        "device GPU-x: only in nvidia-ctk's",
        f"device {uuid(0)}: node /dev/nvidia0: /dev/nvidia0 here, /x/dev/nvidia0 in nvidia-ctk's",
        "common: hook chmod --mode: only in nvidia-ctk's",
        "common: mount /lib64/libcuda.so.1: only here",
        "common: node /dev/nvidia-modeset: only here",
        "common: node /dev/nvidia-uvm: only here",
        "common: node /dev/nvidia-uvm-tools: only here",
        "common: node /dev/nvidiactl: only here",
        "common: variable NVIDIA_CTK_LIBCUDA_DIR=/lib64: only here",
    ]


def test_a_simulated_node_names_no_number_that_is_somebody_else_s_on_a_real_one() -> None:
    real, painted = (
        json.dumps(made(node_with(ASSORTED), options=cdi.Options(simulated=simulated)))
        for simulated in (False, True)
    )
    assert '"major": 511' in real
    assert "major" not in painted
    assert "/dev/nvidia-caps/nvidia-cap" in painted
