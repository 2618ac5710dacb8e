"""The driver's rules about room: every product's table, and every published creation log."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from migplugin.sim import placement, profiles, spec
from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu, Refusal
from migplugin.sim.profiles import CiProfile, GiProfile, Product
from migplugin.sim.records import GiRecord, Switches

PRODUCTS = profiles.table().products
EVERY_PROFILE = [(product, profile) for product in PRODUCTS for profile in product.profiles]


def _named(pair: tuple[Product, GiProfile]) -> str:
    return f"{pair[0].cli_name} {pair[1].name}"


def _gpu(cli_name: str, **switches: object) -> Gpu:
    return spec.build(f"1x{cli_name}=", switches=Switches(**switches)).gpus[0]  # type: ignore[arg-type]


def _starts(gpu: Gpu, wanted: list[str]) -> list[int | None]:
    """Where the driver puts each profile in turn; None where it refuses."""
    return [None if gi is None else gi.start for gi in (_room(gpu.create, name) for name in wanted)]


def _room(make: Callable[[Any], GiRecord], profile: str | int) -> GiRecord | None:
    try:
        return make(profile)
    except Refusal as exc:
        if exc.code is not Code.INSUFFICIENT_RESOURCES:
            raise
        return None


@pytest.mark.parametrize(
    ("product", "wanted", "starts"),
    [
        ("a100-40gb", ["1g.5gb", "2g.10gb", "4g.20gb"], [6, 4, 0]),
        ("a100-40gb", ["3g.20gb", "3g.20gb"], [4, 0]),
        ("a100-40gb", ["1g.5gb", "1g.5gb", "2g.10gb", "3g.20gb"], [6, 4, 0, None]),
        ("a100-40gb", ["3g.20gb", "1g.5gb", "2g.10gb", "1g.5gb"], [4, 0, 2, 1]),
        ("a100-40gb", ["2g.10gb", *["1g.5gb"] * 5], [4, 6, 0, 1, 2, 3]),
        ("a100-40gb", ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"], [4, 0, 2, 3]),
        ("a100-40gb", ["1g.5gb"] * 7, [6, 4, 5, 0, 1, 2, 3]),
        ("h100-80gb", ["1g.10gb"] * 7, [6, 4, 5, 0, 1, 2, 3]),
        ("a100-80gb", ["3g.40gb", "4g.40gb"], [4, 0]),
        ("h100-80gb", ["3g.40gb", "2g.20gb"], [4, 0]),
        ("a30", ["1g.6gb", "1g.6gb", "2g.12gb"], [0, 1, 2]),
        ("rtxpro6000", ["1g.24gb"] * 4, [0, 3, 6, 9]),
    ],
)
def test_published_creation_log_comes_back(product: str, wanted: list[str], starts: list[int | None]) -> None:
    assert _starts(_gpu(product), wanted) == starts


@pytest.mark.parametrize(
    ("product", "ids", "gis"),
    [
        ("a100-40gb", [19] * 7, [13, 11, 12, 7, 8, 9, 10]),
        ("a100-40gb", [9, 9], [2, 1]),
        ("a100-40gb", [19, 14, 5], [13, 5, 1]),
        ("a100-40gb", [9, 19, 14, 19], [2, 7, 4, 8]),
        ("a100-40gb", [14, 19, 19, 19, 19, 19], [5, 13, 7, 8, 9, 10]),
        ("a100-40gb", [19, 19, 14, 9], [13, 11, 3, None]),
        ("rtxpro6000", [14, 14, 14, 14], [3, 4, 5, 6]),
    ],
)
def test_published_gpu_instance_ids_come_back(product: str, ids: list[int], gis: list[int | None]) -> None:
    gpu = _gpu(product)
    found = [_room(gpu.create_gi, profile_id) for profile_id in ids]
    assert [None if gi is None else gi.id for gi in found] == gis


@pytest.mark.parametrize(
    ("start", "size", "gi"),
    [(4, 4, 1), (0, 4, 2), (0, 1, 11), (1, 1, 12), (2, 2, 6), (0, 8, 0)],
)
def test_swapped_halves_are_numbered_as_on_those_a100s(start: int, size: int, gi: int) -> None:
    assert placement.gi_id(profiles.product("a100-40gb"), start, size, swapped=True) == gi


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.cli_name)
def test_gpu_instance_ids_are_unique_over_all_placements(product: Product, swapped: bool) -> None:
    places = {(start, profile.placement_size) for profile in product.profiles for start in profile.placements}
    ids = [placement.gi_id(product, start, size, swapped=swapped) for start, size in places]
    assert len(set(ids)) == len(places)
    assert set(ids) <= set(range(15))


@pytest.mark.parametrize("pair", EVERY_PROFILE, ids=_named)
def test_each_profile_fills_up_to_its_maximum_and_no_further(pair: tuple[Product, GiProfile]) -> None:
    product, profile = pair
    gpu = _gpu(product.cli_name)
    for left in range(profile.max_instances, 0, -1):
        assert placement.remaining(product, profile, gpu.held) == left
        gpu.create(profile.name)
    assert placement.remaining(product, profile, gpu.held) == 0
    with pytest.raises(Refusal) as refusal:
        gpu.create(profile.name)
    assert refusal.value.code is Code.INSUFFICIENT_RESOURCES


@pytest.mark.parametrize("pair", EVERY_PROFILE, ids=_named)
def test_each_placement_can_be_asked_for_and_no_other(pair: tuple[Product, GiProfile]) -> None:
    product, profile = pair
    for start in range(product.memory_slots):
        gpu = _gpu(product.cli_name)
        if start in profile.placements:
            assert gpu.create(profile.name, start).start == start
            continue
        with pytest.raises(Refusal) as refusal:
            gpu.create(profile.name, start)
        assert refusal.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("pair", EVERY_PROFILE, ids=_named)
def test_placements_of_one_profile_never_overlap(pair: tuple[Product, GiProfile]) -> None:
    """Counting free starts as remaining capacity rests on this."""
    profile = pair[1]
    assert all(b - a >= profile.placement_size for a, b in itertools.pairwise(profile.placements))


@pytest.mark.parametrize("pair", EVERY_PROFILE, ids=_named)
def test_each_compute_profile_fills_up_to_its_maximum(pair: tuple[Product, GiProfile]) -> None:
    product, profile = pair
    for ci in profile.ci_profiles:
        gpu = _gpu(product.cli_name)
        gi = gpu.create(profile.name, compute=False)
        taken: list[tuple[int, int]] = []
        for left in range(ci.max_instances, 0, -1):
            assert placement.ci_remaining(profile, ci, taken) == left
            made = gpu.create_ci(gi.id, ci.id)
            taken.append((made.start, made.size))
        with pytest.raises(Refusal) as refusal:
            gpu.create_ci(gi.id, ci.id)
        assert refusal.value.code is Code.INSUFFICIENT_RESOURCES


def test_compute_instances_lie_from_the_first_slice_on_as_listed_by_nvidia_smi() -> None:
    gpu = _gpu("a100-40gb")
    gi = gpu.create("3g.20gb", compute=False)
    assert [(ci.id, ci.start) for ci in (gpu.create_ci(gi.id, 0) for _ in range(3))] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


def test_a_small_compute_instance_leaves_room_for_a_larger_one() -> None:
    gpu = _gpu("a100-40gb")
    gi = gpu.create("3g.20gb", compute=False)
    gpu.create_ci(gi.id, 0)
    assert gpu.create_ci(gi.id, 1).size == 2


def test_three_slices_take_four_of_memory_so_nothing_fits_beside_two_of_them() -> None:
    gpu = _gpu("a100-40gb")
    gpu.create("3g.20gb")
    gpu.create("3g.20gb")
    assert [placement.remaining(gpu.product, p, gpu.held) for p in gpu.product.profiles] == [0] * 7


def test_media_engines_limit_where_they_are_known() -> None:
    """All of them in one instance: beside it only instances without media engines fit."""
    gpu = _gpu("rtxpro6000")
    gpu.create("2g.48gb+me.all")
    left = {p.name: placement.remaining(gpu.product, p, gpu.held) for p in gpu.product.profiles}
    assert {name for name, count in left.items() if count} == {"1g.24gb-me", "2g.48gb-me"}


def test_assumed_media_engines_limit_nothing() -> None:
    assert not profiles.product("b200").engines_known
    gpu = _gpu("b200")
    gpu.create("1g.23gb+me")
    assert placement.remaining(gpu.product, gpu.product.profiles[0], gpu.held) == 6


def test_name_of_a_full_compute_instance_is_the_gpu_instances_own() -> None:
    profile = profiles.product("a100-40gb").by_id(9)
    assert profile is not None
    assert [profile.ci_name(ci) for ci in profile.ci_profiles] == ["1c.3g.20gb", "2c.3g.20gb", "3g.20gb"]
    assert profile.whole == CiProfile(3, 1, 2, 2, 42)


def test_every_name_comes_back_from_the_published_formula() -> None:
    for product, profile in EVERY_PROFILE:
        total = product.memory_total_mib
        eighths = -(-8 * profile.memory_mib // total)
        gigabytes = int(eighths / 8 * -(-total // 1024) + 0.5)
        assert profile.name.startswith(f"{profile.slices}g.{gigabytes}gb"), product.cli_name
