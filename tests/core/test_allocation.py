"""What Allocate grants and refuses."""

from dataclasses import replace

import pytest

from migplugin.core.allocation import (
    ENVVAR,
    MAX_DEVICES_IN_REQUEST,
    VOLUME_MOUNTS,
    DeviceNode,
    EditOptions,
    Mount,
    Offer,
    OfferedDevice,
    Offers,
    check,
    edits,
)
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.resource import Device, ResourceName
from migplugin.errors import AllocationRefused

MIG_1G = ResourceName("nvidia.com/mig-1g.5gb")
CONTROL = ("/dev/nvidiactl", "/dev/nvidia-uvm")


def device(id_: str, gpu: int = 0, minor: int = 30) -> Device:
    nodes = (f"/dev/nvidia{gpu}", f"/dev/nvidia-caps/nvidia-cap{minor}")
    return Device(DeviceId(id_), GpuUuid(f"GPU-{gpu}"), gpu, "1g.5gb", None, nodes)


def offers(*offered: OfferedDevice) -> Offers:
    return Offers({MIG_1G: Offer({one.device.id: one for one in offered})}, CONTROL)


TWO = offers(
    OfferedDevice(device("MIG-a", minor=30)),
    OfferedDevice(device("MIG-b", minor=39)),
    OfferedDevice(device("MIG-c"), "gone: no such device on this node now"),
)


@pytest.mark.parametrize(
    ("resource", "ids", "refusal"),
    [
        (MIG_1G, [], "nvidia.com/mig-1g.5gb: a request without device ids"),
        (MIG_1G, ["MIG-a"] * (MAX_DEVICES_IN_REQUEST + 1),
         "nvidia.com/mig-1g.5gb: 4097 device ids in one request, at most 4096"),
        (ResourceName("nvidia.com/mig-9g"), ["MIG-a"],
         "nvidia.com/mig-9g: not offered on this node any more; delete the pod to schedule it anew"),
        (MIG_1G, ["MIG-a", "MIG-x"],
         "nvidia.com/mig-1g.5gb: unknown device 'MIG-x'; it was never offered or has left this node, "
         "delete the pod to schedule it anew"),
        (MIG_1G, ["\n" + "y" * 200],
         f"nvidia.com/mig-1g.5gb: unknown device '\\n{'y' * 99}'; it was never offered or has left "
         "this node, delete the pod to schedule it anew"),
        (MIG_1G, ["MIG-c"],
         "nvidia.com/mig-1g.5gb: device MIG-c is unhealthy: gone: no such device on this node now; "
         "delete the pod to schedule it anew"),
        (MIG_1G, ["MIG-a", "MIG-a"], "nvidia.com/mig-1g.5gb: device MIG-a is named twice in one request"),
    ],
)  # fmt: skip
def test_what_cannot_be_granted_is_refused_with_the_reason(
    resource: ResourceName, ids: list[str], refusal: str
) -> None:
    for refused in (lambda: check(resource, ids, TWO), lambda: edits(resource, ids, TWO)):
        with pytest.raises(AllocationRefused) as caught:
            refused()
        assert str(caught.value) == refusal


def test_what_is_granted_comes_in_the_order_of_the_request() -> None:
    assert [offered.device.id for offered in check(MIG_1G, ["MIG-b", "MIG-a"], TWO)] == ["MIG-b", "MIG-a"]


def test_the_environment_names_the_devices() -> None:
    granted = edits(MIG_1G, ["MIG-b", "MIG-a"], replace(TWO, edits=EditOptions()))
    assert granted.envs == {"NVIDIA_VISIBLE_DEVICES": "MIG-b,MIG-a"}
    assert (granted.mounts, granted.nodes) == ((), ())


@pytest.mark.parametrize("strategies", [{VOLUME_MOUNTS}, {VOLUME_MOUNTS, ENVVAR}])
def test_mounts_name_the_devices_and_the_environment_names_the_mounts(strategies: set[str]) -> None:
    granted = edits(MIG_1G, ["MIG-a", "MIG-b"], replace(TWO, edits=EditOptions(frozenset(strategies))))
    assert granted.envs == {"NVIDIA_VISIBLE_DEVICES": "/var/run/nvidia-container-devices"}
    assert granted.mounts == (
        Mount("/dev/null", "/var/run/nvidia-container-devices/MIG-a"),
        Mount("/dev/null", "/var/run/nvidia-container-devices/MIG-b"),
    )


def test_nodes_are_named_once_the_control_nodes_first() -> None:
    granted = edits(MIG_1G, ["MIG-b", "MIG-a"], replace(TWO, edits=EditOptions(pass_device_specs=True)))
    assert [node.container_path for node in granted.nodes] == [
        *CONTROL,
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap39",
        "/dev/nvidia-caps/nvidia-cap30",
    ]
    assert granted.nodes[0] == DeviceNode("/dev/nvidiactl", "/dev/nvidiactl", "rw")


@pytest.mark.parametrize(
    ("root", "host"),
    [("/", "/dev/nvidiactl"), ("", "/dev/nvidiactl"), ("/run/nvidia", "/run/nvidia/dev/nvidiactl"),
     ("/run/nvidia/", "/run/nvidia/dev/nvidiactl")],
)  # fmt: skip
def test_nodes_are_looked_for_under_the_host_s_root(root: str, host: str) -> None:
    granted = edits(MIG_1G, ["MIG-a"], replace(TWO, edits=EditOptions(pass_device_specs=True, dev_root=root)))
    assert granted.nodes[0] == DeviceNode(host, "/dev/nvidiactl")
