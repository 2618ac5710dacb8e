"""Which devices become which resource, on every kind of node (nvidia-device-plugin.md 2.4)."""

import pytest

from migplugin.core.assignment import Assignment, assign
from migplugin.core.inventory import DeviceId, Gpu
from migplugin.core.resource import GPU, ResourceName, Strategy, is_ours, is_valid, of_profile
from tests.core.examples import ASSORTED, SEVENTHS, gpu, inventory, uuid

HALVES = gpu(0, (1, "3g.20gb", 4, 4), (2, "3g.20gb", 0, 4))
OFF, INCAPABLE, EMPTY = gpu(2, mig=False), gpu(3, mig=None), gpu(4)
WITH_PART = gpu(0, (1, "3g.20gb", 0, 4, ("1c.3g.20gb", "2c.3g.20gb")))
ALL_STRATEGIES = (Strategy.NONE, Strategy.SINGLE, Strategy.MIXED)


def counts(assignment: Assignment) -> dict[str, int]:
    return {name.removeprefix("nvidia.com/"): len(ids) for name, ids in assignment.resources.items()}


@pytest.mark.parametrize(
    ("node", "none", "single", "mixed"),
    [
        ((OFF, INCAPABLE), {"gpu": 2}, {"gpu": 2}, {"gpu": 2}),
        ((SEVENTHS,), {}, {"gpu": 7}, {"mig-1g.5gb": 7}),
        ((HALVES, EMPTY), {}, {"gpu": 2}, {"mig-3g.20gb": 2}),
        ((EMPTY,), {}, {}, {}),
        ((HALVES, OFF), {"gpu": 1}, {"gpu": 2}, {"mig-3g.20gb": 2, "gpu": 1}),
        ((EMPTY, OFF, INCAPABLE), {"gpu": 2}, {}, {"gpu": 2}),
        ((ASSORTED,), {}, {"gpu": 2}, {"mig-3g.20gb": 1, "mig-2g.10gb": 1, "mig-1g.5gb": 2}),
        ((WITH_PART,), {}, {"gpu": 1}, {"mig-1c.3g.20gb": 1, "mig-2c.3g.20gb": 1}),
        ((), {}, {}, {}),
    ],
)
def test_each_strategy_serves_each_kind_of_node(
    node: tuple[Gpu, ...], none: dict[str, int], single: dict[str, int], mixed: dict[str, int]
) -> None:
    found = [counts(assign(inventory(*node), strategy)) for strategy in ALL_STRATEGIES]
    assert found == [none, single, mixed]


@pytest.mark.parametrize(
    ("node", "strategy", "told"),
    [
        ((SEVENTHS,), Strategy.NONE, ["GPU 0 has MIG enabled and strategy none serves whole GPUs only"]),
        ((HALVES, EMPTY), Strategy.SINGLE, ["GPU 4 has MIG enabled and no MIG device"]),
        ((HALVES, OFF), Strategy.SINGLE, ["GPU 2 has MIG disabled: strategy single does not mix"]),
        (
            (ASSORTED,),
            Strategy.SINGLE,
            ["1 MIG device of profile 2g.10gb", "1 MIG device of profile 3g.20gb"],
        ),
        ((SEVENTHS, HALVES), Strategy.SINGLE, ["2 MIG devices of profile 3g.20gb"]),
        ((ASSORTED, OFF), Strategy.MIXED, []),
        ((SEVENTHS,), Strategy.SINGLE, []),
        ((OFF,), Strategy.SINGLE, []),
    ],
)
def test_what_a_strategy_leaves_out_is_named(
    node: tuple[Gpu, ...], strategy: Strategy, told: list[str]
) -> None:
    left_out = assign(inventory(*node), strategy).left_out
    assert len(left_out) == len(told)
    assert all(sentence.startswith(start) for sentence, start in zip(left_out, told, strict=True))


def test_single_serves_the_most_frequent_profile_and_of_equals_the_smaller() -> None:
    assert assign(inventory(ASSORTED), Strategy.SINGLE).served_profile == "1g.5gb"
    assert assign(inventory(SEVENTHS, HALVES), Strategy.SINGLE).served_profile == "1g.5gb"
    two_each = gpu(1, (1, "3g.20gb", 4, 4), (3, "1g.5gb", 0, 1))
    assert assign(inventory(two_each), Strategy.SINGLE).served_profile == "1g.5gb"


def test_single_stays_with_what_it_serves_while_a_device_or_a_pod_has_it() -> None:
    assert assign(inventory(ASSORTED), Strategy.SINGLE, served="3g.20gb").served_profile == "3g.20gb"
    held = {DeviceId("MIG-gone"): "4g.20gb"}
    kept = assign(inventory(ASSORTED), Strategy.SINGLE, served="4g.20gb", held=held)
    assert (kept.served_profile, counts(kept)) == ("4g.20gb", {})
    assert assign(inventory(ASSORTED), Strategy.SINGLE, served="4g.20gb").served_profile == "1g.5gb"


def test_single_begins_with_the_profile_that_pods_hold() -> None:
    held = {DeviceId(uuid(1, 3)): "", DeviceId("MIG-elsewhere"): ""}
    assert assign(inventory(ASSORTED), Strategy.SINGLE, held=held).served_profile == "2g.10gb"


def test_a_device_is_offered_with_its_nodes_its_gpu_and_its_numa_node() -> None:
    device = assign(inventory(ASSORTED), Strategy.MIXED).resources[of_profile("3g.20gb")][
        DeviceId(uuid(1, 2))
    ]
    assert (device.gpu, device.gpu_index, device.profile, device.numa_node) == (uuid(1), 1, "3g.20gb", 0)
    assert device.nodes == ("/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31")
    whole = assign(inventory(OFF), Strategy.MIXED).resources[GPU][DeviceId(uuid(2))]
    assert (whole.profile, whole.nodes) == ("", ("/dev/nvidia2",))


def test_a_profile_that_makes_no_resource_name_is_left_out_and_the_rest_is_served() -> None:
    odd = gpu(0, (1, "3g.20gb", 0, 4, ("new!", "x" * 60)), (9, "1g.5gb", 4, 1))
    found = assign(inventory(odd), Strategy.MIXED)
    assert counts(found) == {"mig-1g.5gb": 1}
    assert [sentence.partition(" ")[0] for sentence in found.left_out] == [uuid(0, 1), uuid(0, 1, 1)]


@pytest.mark.parametrize(
    ("profile", "name"),
    [("1g.5gb+me", "nvidia.com/mig-1g.5gb.me"), ("1g.24gb-me", "nvidia.com/mig-1g.24gb-me")],
)
def test_a_resource_is_named_as_nvidia_names_it(profile: str, name: str) -> None:
    assert of_profile(profile) == name


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("nvidia.com/mig-1g.5gb", True),
        ("nvidia.com/mig-1g.5gb.", False),
        ("nvidia.com/mig-1g.5gb+me", False),
        ("nvidia.com/" + "m" * 63, True),
        ("nvidia.com/" + "m" * 64, False),
        ("nvidia.com/", False),
        ("nvidia.com/a/b", False),
        ("nvidia.com/größe", False),
        ("gpu", False),
        ("kubernetes.io/gpu", False),
        ("node.kubernetes.io/gpu", False),
        ("requests.nvidia.com/gpu", False),
        ("NVIDIA.com/gpu", False),
        ("-x.com/gpu", False),
        ("d" * 244 + "/gpu", True),
        ("d" * 245 + "/gpu", False),
    ],
)
def test_only_names_that_the_kubelet_takes_are_valid(name: str, valid: bool) -> None:
    assert is_valid(name) is valid


@pytest.mark.parametrize(
    ("name", "id_", "domain", "ours"),
    [
        ("nvidia.com/gpu", "", "nvidia.com", True),
        ("nvidia.com/mig-1g.5gb", "", "nvidia.com", True),
        ("nvidia.com/gpu.shared", "", "nvidia.com", True),
        ("nvidia.com/hostdev", "", "nvidia.com", False),
        ("nvidia.com/hostdev", "0000:07:00.0", "nvidia.com", False),
        ("nvidia.com/small", "MIG-1", "nvidia.com", True),
        ("nvidia.com/small", "GPU-1::3", "nvidia.com", True),
        ("x/gpu", "GPU-1", "nvidia.com", False),
        ("x/gpu", "GPU-1", "x", True),
        ("nvidia.com/gpu", "GPU-1", "x", True),
    ],
)
def test_only_our_resources_are_ours(name: str, id_: str, domain: str, ours: bool) -> None:
    assert is_ours(ResourceName(name), id_, domain) is ours
