"""What Allocate grants and refuses, and which devices we would rather see taken."""

from dataclasses import replace
from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

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
    prefer,
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


# Which devices we would rather see taken.

IDS = st.lists(st.sampled_from([f"MIG-{n}" for n in range(8)]), max_size=12)


def spread(gpus: list[int]) -> Offer:
    """MIG-0, MIG-1 and so on, each on the GPU that `gpus` says."""
    return Offer({DeviceId(f"MIG-{n}"): OfferedDevice(device(f"MIG-{n}", gpu)) for n, gpu in enumerate(gpus)})


@given(
    available=st.lists(st.text(max_size=8) | st.sampled_from(["MIG-0", "MIG-1"])),
    must=st.lists(st.text(max_size=8) | st.sampled_from(["MIG-0", "MIG-5"])),
    size=st.integers(-5, 1 << 40),
    gpus=st.none() | st.lists(st.integers(0, 3), max_size=3),
)
def test_a_preference_never_fails(
    available: list[str], must: list[str], size: int, gpus: list[int] | None
) -> None:
    offer = None if gpus is None else spread(gpus)
    chosen = prefer(available, must, size, offer)
    assert len(set(chosen)) == len(chosen)
    assert set(must) <= set(chosen) <= set(available) | set(must)
    assert len(chosen) == max(len(set(must)), min(size, len(set(available) | set(must))))


@given(
    gpus=st.lists(st.integers(0, 3), min_size=8, max_size=8), available=IDS, must=IDS, size=st.integers(0, 8)
)
@settings(max_examples=200)
def test_a_preference_takes_the_fewest_gpus(
    gpus: list[int], available: list[str], must: list[str], size: int
) -> None:
    offer = spread(gpus)

    def used(ids: tuple[str, ...]) -> int:
        return len({offer.devices[DeviceId(id_)].device.gpu for id_ in ids})

    needed = tuple(dict.fromkeys(must))
    others = sorted(set(available) - set(must))
    missing = max(min(size - len(needed), len(others)), 0)
    fewest = min(used(needed + more) for more in combinations(others, missing))
    assert used(prefer(available, must, size, offer)) == fewest


@given(
    data=st.data(),
    gpus=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    available=IDS,
    size=st.integers(0, 8),
)
def test_a_preference_does_not_depend_on_the_order_of_the_question(
    data: st.DataObject, gpus: list[int], available: list[str], size: int
) -> None:
    shuffled = data.draw(st.permutations(available))
    assert prefer(shuffled, (), size, spread(gpus)) == prefer(available, (), size, spread(gpus))


def test_a_preference_leaves_whole_gpus_free_for_larger_requests() -> None:
    offer = spread([0, 0, 0, 1, 1, 2])
    everything = [f"MIG-{n}" for n in range(6)]
    assert prefer(everything, (), 1, offer) == ("MIG-5",)
    assert prefer(everything, (), 2, offer) == ("MIG-3", "MIG-4")
    assert prefer(everything, ("MIG-1",), 2, offer) == ("MIG-1", "MIG-0")
    assert prefer(everything, (), 4, offer) == ("MIG-0", "MIG-1", "MIG-2", "MIG-5")


def test_a_preference_takes_what_it_does_not_know_last() -> None:
    assert prefer(["A-unknown", "MIG-0"], (), 1, spread([0])) == ("MIG-0",)
    assert prefer(["A-unknown", "MIG-0"], (), 2, spread([0])) == ("MIG-0", "A-unknown")
