"""Which devices we would rather see taken: packed, distributed, and whole GPUs near each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migplugin.core.allocation import Offer, OfferedDevice, Offers
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.preference import DISTRIBUTED, PACKED, prefer
from migplugin.core.resource import Device, ResourceName, device_of, replica

MIG_1G, MIG_2G = ResourceName("nvidia.com/mig-1g.5gb"), ResourceName("nvidia.com/mig-2g.10gb")
GPU_0, GPU_1 = GpuUuid("GPU-0"), GpuUuid("GPU-1")


def device(id_: str, gpu: int = 0) -> Device:
    return Device(DeviceId(id_), GpuUuid(f"GPU-{gpu}"), gpu, "1g.5gb", None, ())


def whole(gpu: int, node: int | None) -> Device:
    return Device(DeviceId(f"GPU-{gpu}"), GpuUuid(f"GPU-{gpu}"), gpu, "", node, ())


def offers(*devices: Device, replicas: int = 0, sick: Sequence[str] = (), policy: str = "") -> Offers:
    """One resource with `devices`, each as many times as `replicas` says."""
    shown: dict[DeviceId, OfferedDevice] = {}
    for one in devices:
        ids = [replica(one.id, n) for n in range(replicas)] if replicas else [one.id]
        shown |= {id_: OfferedDevice(one, "ill" if id_ in sick else "") for id_ in ids}
    return Offers({MIG_1G: Offer(shown)}, policy=policy)


def spread(gpus: Sequence[int], replicas: int = 0, policy: str = "") -> Offers:
    """MIG-0, MIG-1 and so on, each on the GPU that `gpus` says."""
    devices = [device(f"MIG-{n}", gpu) for n, gpu in enumerate(gpus)]
    return offers(*devices, replicas=replicas, policy=policy)


def everything(shown: Offers) -> list[str]:
    return list(shown.resources[MIG_1G].devices)


def gpus_of(ids: Sequence[str], shown: Offers) -> Counter[str]:
    return Counter(shown.resources[MIG_1G].devices[DeviceId(id_)].device.gpu for id_ in ids)


def used(use: Mapping[GpuUuid, int]) -> Mapping[GpuUuid, Mapping[ResourceName, int]]:
    return {gpu: {MIG_2G: count} for gpu, count in use.items()}


IDS = st.lists(st.sampled_from([f"MIG-{n}" for n in range(8)]), max_size=12)
ODD = st.text(max_size=8) | st.sampled_from(
    ["MIG-0", "MIG-5", "MIG-1::0", "MIG-1::1", "MIG-0::9", "::", "MIG-0::"]
)


@given(
    available=st.lists(ODD),
    must=st.lists(ODD),
    size=st.integers(-5, 1 << 40),
    gpus=st.none() | st.lists(st.integers(0, 3), max_size=3),
    replicas=st.integers(0, 3),
    policy=st.sampled_from(["", PACKED, DISTRIBUTED]),
)
@settings(max_examples=300)
def test_a_preference_never_fails(
    available: list[str], must: list[str], size: int, gpus: list[int] | None, replicas: int, policy: str
) -> None:
    shown = Offers() if gpus is None else spread(gpus, replicas, policy)
    chosen = prefer(MIG_1G, available, must, size, shown)
    assert len(set(chosen)) == len(chosen)
    assert set(must) <= set(chosen) <= set(available) | set(must)
    assert len(chosen) == max(len(set(must)), min(size, len(set(available) | set(must))))


@given(
    gpus=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    available=IDS,
    must=IDS,
    size=st.integers(0, 8),
    use=st.dictionaries(st.sampled_from([GpuUuid(f"GPU-{n}") for n in range(4)]), st.integers(0, 3)),
    replicas=st.integers(0, 2),
    policy=st.sampled_from([PACKED, DISTRIBUTED]),
)
@settings(max_examples=400)
def test_packed_takes_the_fewest_gpus_and_distributed_the_most(
    gpus: list[int],
    available: list[str],
    must: list[str],
    size: int,
    use: dict[GpuUuid, int],
    replicas: int,
    policy: str,
) -> None:
    shown = replace(spread(gpus, replicas, policy), use=used(use))
    if replicas:
        available, must = [f"{i}::{replicas - 1}" for i in available], [f"{i}::0" for i in must]
    needed = tuple(dict.fromkeys(must))
    others = sorted(set(available) - set(must))
    missing = max(min(size - len(needed), len(others)), 0)
    numbers = [len(gpus_of(needed + more, shown)) for more in combinations(others, missing)]
    chosen = len(gpus_of(prefer(MIG_1G, available, must, size, shown), shown))
    assert chosen == (min(numbers) if policy == PACKED else max(numbers))


@given(
    data=st.data(),
    gpus=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    available=IDS,
    size=st.integers(0, 8),
    policy=st.sampled_from(["", PACKED, DISTRIBUTED]),
)
def test_a_preference_does_not_depend_on_the_order_of_the_question(
    data: st.DataObject, gpus: list[int], available: list[str], size: int, policy: str
) -> None:
    shuffled = data.draw(st.permutations(available))
    shown = spread(gpus, policy=policy)
    assert prefer(MIG_1G, shuffled, (), size, shown) == prefer(MIG_1G, available, (), size, shown)


def test_packed_leaves_whole_gpus_free_for_larger_requests() -> None:
    shown = spread([0, 0, 0, 1, 1, 2])
    free = everything(shown)
    assert prefer(MIG_1G, free, (), 1, shown) == ("MIG-5",)
    assert prefer(MIG_1G, free, (), 2, shown) == ("MIG-3", "MIG-4")
    assert prefer(MIG_1G, free, ("MIG-1",), 2, shown) == ("MIG-1", "MIG-0")
    assert prefer(MIG_1G, free, (), 4, shown) == ("MIG-0", "MIG-1", "MIG-2", "MIG-5")


@pytest.mark.parametrize(
    ("policy", "use", "size", "expected"),
    [
        ("", {}, 1, {GPU_0: 1}),
        ("", {GPU_1: 1}, 1, {GPU_1: 1}),
        (PACKED, {GPU_0: 1, GPU_1: 2}, 2, {GPU_1: 2}),
        (PACKED, {GPU_1: 3}, 3, {GPU_1: 3}),
        (PACKED, {GPU_1: 3}, 4, {GPU_0: 1, GPU_1: 3}),
        (DISTRIBUTED, {GPU_0: 1}, 1, {GPU_1: 1}),
        (DISTRIBUTED, {GPU_0: 5}, 2, {GPU_0: 1, GPU_1: 1}),
        (DISTRIBUTED, {GPU_0: 5}, 3, {GPU_0: 1, GPU_1: 2}),
    ],
)
def test_what_other_resources_use_of_a_gpu_counts(
    policy: str, use: dict[GpuUuid, int], size: int, expected: dict[GpuUuid, int]
) -> None:
    shown = replace(spread([0, 0, 0, 1, 1, 1], policy=policy), use=used(use))
    assert gpus_of(prefer(MIG_1G, everything(shown), (), size, shown), shown) == expected


@pytest.mark.parametrize(("policy", "gpu"), [(PACKED, GPU_1), (DISTRIBUTED, GPU_0)])
def test_what_is_not_available_of_the_resource_itself_is_in_use(policy: str, gpu: GpuUuid) -> None:
    shown = spread([0, 0, 0, 1, 1, 1], policy=policy)
    shown = replace(shown, use={GPU_0: {MIG_1G: 3}})
    free = [id_ for id_ in everything(shown) if id_ != "MIG-4"]
    assert gpus_of(prefer(MIG_1G, free, (), 1, shown), shown) == {gpu: 1}


def devices_of(ids: Sequence[str]) -> Counter[str]:
    return Counter(map(device_of, ids))


@pytest.mark.parametrize(
    ("policy", "size", "expected"),
    [
        ("", 1, {"MIG-2": 1}),
        ("", 2, {"MIG-1": 1, "MIG-2": 1}),
        ("", 4, {"MIG-0": 1, "MIG-1": 1, "MIG-2": 1, "MIG-3": 1}),
        (PACKED, 1, {"MIG-0": 1}),
        (PACKED, 3, {"MIG-0": 3}),
        (PACKED, 4, {"MIG-1": 4}),
        (PACKED, 5, {"MIG-0": 3, "MIG-1": 2}),
    ],
)
def test_replicas_are_chosen_by_gpu_and_then_by_device(
    policy: str, size: int, expected: dict[str, int]
) -> None:
    """Of MIG-0 one replica is taken, on GPU 0; MIG-2 and MIG-3 are on GPU 1."""
    shown = spread([0, 0, 1, 1], replicas=4, policy=policy)
    free = [id_ for id_ in everything(shown) if id_ != "MIG-0::2"]
    assert devices_of(prefer(MIG_1G, free, (), size, shown)) == expected


def test_a_container_with_replicas_goes_on_where_it_has_none_yet() -> None:
    shown = spread([0, 0, 1], replicas=4)
    chosen = prefer(MIG_1G, everything(shown), ("MIG-2::3",), 3, shown)
    assert chosen[0] == "MIG-2::3"
    assert devices_of(chosen) == {"MIG-2": 1, "MIG-0": 1, "MIG-1": 1}


def test_what_is_unknown_or_sick_is_taken_last() -> None:
    shown = offers(device("MIG-0"), device("MIG-1"), sick=["MIG-0"])
    free = ["A-unknown", "MIG-0", "MIG-1"]
    assert prefer(MIG_1G, free, (), 1, shown) == ("MIG-1",)
    assert prefer(MIG_1G, free, (), 2, shown) == ("MIG-1", "A-unknown")
    assert prefer(MIG_1G, free, (), 9, shown) == ("MIG-1", "A-unknown", "MIG-0")


NODES = [whole(0, 0), whole(1, 0), whole(2, 0), whole(3, 1), whole(4, 1), whole(5, None)]


@pytest.mark.parametrize(
    ("free", "must", "size", "expected"),
    [
        ("012345", "", 1, "5"),
        ("012345", "", 2, "34"),
        ("012345", "", 3, "012"),
        ("012345", "", 4, "0125"),
        ("01234", "4", 2, "43"),
        ("0134", "", 1, "0"),
        ("0134", "", 2, "01"),
        ("012345", "", 9, "012345"),
    ],
)
@pytest.mark.parametrize("policy", ["", PACKED, DISTRIBUTED])
def test_whole_gpus_are_taken_from_one_numa_node(
    free: str, must: str, size: int, expected: str, policy: str
) -> None:
    shown = offers(*NODES, policy=policy)
    chosen = prefer(MIG_1G, [f"GPU-{n}" for n in free], [f"GPU-{n}" for n in must], size, shown)
    assert sorted(chosen) == sorted(f"GPU-{n}" for n in expected)


def test_links_count_more_than_nodes_and_what_is_left_is_kept_together() -> None:
    links = {(GpuUuid(f"GPU-{a}"), GpuUuid(f"GPU-{b}")): 100 * k for a, b, k in [(0, 3, 2), (2, 1, 1)]}
    shown = replace(offers(*NODES[:4]), links=links)
    free = everything(shown)
    assert prefer(MIG_1G, free, (), 2, shown) == ("GPU-0", "GPU-3")
    assert prefer(MIG_1G, free, ("GPU-1",), 2, shown) == ("GPU-1", "GPU-2")
    # GPU 0 or 3 alone would part a better pair.
    assert prefer(MIG_1G, free, (), 1, shown) == ("GPU-1",)


def test_many_linked_gpus_are_chosen_one_by_one() -> None:
    many = [whole(n, n // 8) for n in range(16)]
    links = {(a.gpu, b.gpu): 400 for a, b in combinations(many, 2) if a.gpu_index % 2 == b.gpu_index % 2}
    shown = replace(offers(*many), links=links)
    chosen = prefer(MIG_1G, everything(shown), (), 8, shown)
    assert sorted(chosen) == sorted(f"GPU-{n}" for n in range(0, 16, 2))
    with_must = prefer(MIG_1G, everything(shown), ("GPU-1",), 8, shown)
    assert sorted(with_must) == sorted(f"GPU-{n}" for n in range(1, 16, 2))


def test_many_gpus_whose_links_tell_only_their_nodes_are_taken_from_one_node() -> None:
    many = [whole(n, n // 8) for n in range(16)]
    links = {(a.gpu, b.gpu): 20 if a.numa_node == b.numa_node else 10 for a, b in combinations(many, 2)}
    shown = replace(offers(*many), links=links)
    free = [f"GPU-{n}" for n in range(16) if n not in {1, 3, 5}]
    assert sorted(prefer(MIG_1G, free, (), 6, shown)) == sorted(f"GPU-{n}" for n in range(8, 14))


@given(
    links=st.dictionaries(
        st.tuples(st.sampled_from("012345"), st.sampled_from("012345")), st.integers(-5, 900)
    ),
    free=st.sets(st.sampled_from("0123456")),
    must=st.sets(st.sampled_from("0123456")),
    size=st.integers(0, 8),
)
def test_no_links_make_a_preference_fail(
    links: dict[tuple[str, str], int], free: set[str], must: set[str], size: int
) -> None:
    pairs = {(GpuUuid(f"GPU-{a}"), GpuUuid(f"GPU-{b}")): score for (a, b), score in links.items()}
    shown = replace(offers(*NODES), links=pairs)
    chosen = prefer(MIG_1G, [f"GPU-{n}" for n in free], [f"GPU-{n}" for n in must], size, shown)
    assert len(set(chosen)) == len(chosen) == max(len(must), min(size, len(free | must)))
    assert {f"GPU-{n}" for n in must} <= set(chosen)
