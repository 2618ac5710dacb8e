"""What Allocate grants and refuses."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given as examples

from migplugin.core.allocation import (
    CDI_ANNOTATIONS,
    CDI_CRI,
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
from migplugin.core.resource import GPU, Device, ResourceName
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


REPLICAS = Offers(
    {
        MIG_1G: Offer(
            {DeviceId(f"MIG-{d}::{n}"): OfferedDevice(device(f"MIG-{d}")) for d in "ab" for n in "012"}
        ),
        GPU: Offer(
            {
                DeviceId("GPU-0"): OfferedDevice(device("GPU-0")),
                DeviceId("GPU-1"): OfferedDevice(device("GPU-1")),
            }
        ),
    },
    one_replica_each=True,
)


def test_more_than_one_replica_can_be_refused() -> None:
    assert edits(MIG_1G, ["MIG-a::2"], REPLICAS).envs == {"NVIDIA_VISIBLE_DEVICES": "MIG-a"}
    assert check(GPU, ["GPU-0", "GPU-1"], REPLICAS)
    assert check(MIG_1G, ["MIG-a::0", "MIG-a::1"], replace(REPLICAS, one_replica_each=False))
    with pytest.raises(AllocationRefused) as caught:
        check(MIG_1G, ["MIG-a::0", "MIG-a::1", "MIG-b::0"], REPLICAS)
    assert str(caught.value) == (
        "nvidia.com/mig-1g.5gb: maximum request size for shared resources is 1; found 3; "
        "request one nvidia.com/mig-1g.5gb, or set failRequestsGreaterThanOne to false"
    )


@examples(
    ids=st.lists(
        st.text(max_size=9) | st.sampled_from(["MIG-a::0", "MIG-b::1", "MIG-a", "::", "MIG-a::"]), max_size=5
    ),
    strategies=st.frozensets(st.sampled_from([ENVVAR, VOLUME_MOUNTS, CDI_ANNOTATIONS, CDI_CRI]), min_size=1),
    by=st.sampled_from(["uuid", "index"]),
)
def test_whatever_is_asked_the_answer_is_full_or_a_refusal_on_one_line(
    ids: list[str], strategies: frozenset[str], by: str
) -> None:
    options = EditOptions(strategies, device_id_strategy=by)
    try:
        given = edits(MIG_1G, ids, replace(REPLICAS, one_replica_each=False, edits=options))
    except AllocationRefused as refused:
        told = str(refused)
    else:
        told = ""
        assert given.envs or given.annotations or given.cdi_devices
        assert set(ids) <= REPLICAS.resources[MIG_1G].devices.keys()
    assert told.startswith("nvidia.com/mig-1g.5gb: ") or not told
    assert "\n" not in told
