"""Profile names: as drivers say them, as NVIDIA's formula gives them, as resources spell them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from migplugin.core.profile import (
    Parts,
    computed,
    from_driver,
    of_compute_instance,
    of_gpu_instance,
    parse,
    resource_suffix,
    size_key,
)

# Total MiB of each product, then MiB and profiles of that size (nvml.md 3.3, mig_profiles.json).
TABLES = {
    "A100-40GB": (40960, {
        4864: "1g.5gb 1g.5gb+me", 9856: "1g.10gb 2g.10gb", 19968: "3g.20gb 4g.20gb", 40192: "7g.40gb",
    }),
    "A100-80GB": (81920, {
        9728: "1g.10gb 1g.10gb+me", 19968: "1g.20gb 2g.20gb", 40192: "3g.40gb 4g.40gb", 80640: "7g.80gb",
    }),
    "A30-24GB": (24576, {
        5952: "1g.6gb 1g.6gb+me", 11968: "2g.12gb 2g.12gb+me", 24000: "4g.24gb",
    }),
    "H100-80GB": (81920, {
        9984: "1g.10gb", 20096: "1g.20gb 2g.20gb", 40448: "3g.40gb 4g.40gb", 81152: "7g.80gb",
    }),
    "H100-94GB-NVL": (96256, {
        11008: "1g.12gb", 22144: "1g.24gb 2g.24gb", 47488: "3g.47gb 4g.47gb", 95360: "7g.94gb",
    }),
    "GH200-96GB": (98304, {
        12032: "1g.12gb", 24064: "1g.24gb 2g.24gb", 48128: "3g.48gb 4g.48gb", 96256: "7g.96gb",
    }),
    "GH200-144GB": (147456, {
        17920: "1g.18gb", 36096: "1g.36gb 2g.36gb", 72192: "3g.72gb 4g.72gb", 144384: "7g.144gb",
    }),
    "H200-141GB": (144384, {
        16384: "1g.18gb", 33024: "1g.35gb 2g.35gb", 71168: "3g.71gb 4g.71gb", 141440: "7g.141gb",
    }),
    "B200-180GB": (184320, {
        22528: "1g.23gb", 45312: "1g.45gb 2g.45gb", 90240: "3g.90gb 4g.90gb", 180608: "7g.180gb",
    }),
    "GB200-186GB": (190464, {
        22528: "1g.23gb", 46592: "1g.47gb 2g.47gb", 93312: "3g.93gb 4g.93gb", 186624: "7g.186gb",
    }),
    "GB200-189GB": (193536, {
        20480: "1g.24gb", 46592: "1g.47gb 2g.47gb", 94720: "3g.95gb 4g.95gb", 189568: "7g.189gb",
    }),
    "B300-269GB": (275456, {
        33664: "1g.34gb", 67456: "1g.67gb 2g.67gb", 134912: "3g.135gb 4g.135gb", 269824: "7g.269gb",
    }),
    "GB300-278GB": (284672, {
        34816: "1g.35gb", 69632: "1g.70gb 2g.70gb", 139392: "3g.139gb 4g.139gb", 278912: "7g.278gb",
    }),
    "RTX-PRO-6000": (98304, {
        24192: "1g.24gb 1g.24gb+gfx 1g.24gb+me.all 1g.24gb-me", 48512: "2g.48gb 2g.48gb-me",
        97280: "4g.96gb 4g.96gb+gfx",
    }),
}  # fmt: skip
ROWS = [
    (product, total, name, mib)
    for product, (total, sizes) in TABLES.items()
    for mib, names in sizes.items()
    for name in names.split()
]


@pytest.mark.parametrize(("product", "total_mib", "name", "mib"), ROWS)
def test_the_formula_gives_every_name_of_the_tables(
    product: str, total_mib: int, name: str, mib: int
) -> None:
    parts = parse(name)
    assert parts is not None
    slices = parts.gpu_slices
    assert computed(slices, slices, mib, total_mib << 20, parts.attributes) == name, product


@pytest.mark.parametrize(
    ("total_mib", "mib", "gb"),
    [
        # What NVIDIA's code gives (nvidia-device-plugin.md 2.2).
        (40536, 4864, 5), (40536, 19968, 20), (81920, 9728, 10), (24576, 5952, 6), (81559, 9984, 10),
        (143771, 16384, 18), (183359, 22144, 23), (97887, 24192, 24), (183359, 23040, 45),
        # Halves are rounded up, to an odd number and to an even one: 22.5, 70.5, 46.5, 67.5.
        (184320, 22528, 23), (144384, 71168, 71), (190464, 46592, 47), (276480, 67456, 68),
    ],
)  # fmt: skip
def test_memory_is_rounded_as_nvidia_rounds_it(total_mib: int, mib: int, gb: int) -> None:
    assert computed(1, 1, mib, total_mib << 20) == f"1g.{gb}gb"


def test_a_part_of_an_instance_is_named_after_it() -> None:
    assert computed(3, 1, 19968, 40960 << 20) == "1c.3g.20gb"
    assert computed(1, 1, 4864, 40960 << 20, "+me") == "1g.5gb+me"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("1g.5gb", Parts(1, 1, 5, "")),
        ("7g.141gb", Parts(7, 7, 141, "")),
        ("1c.3g.20gb", Parts(1, 3, 20, "")),
        ("1g.5gb+me", Parts(1, 1, 5, "+me")),
        ("1g.24gb-me", Parts(1, 1, 24, "-me")),
        ("1g.24gb+me.all", Parts(1, 1, 24, "+me.all")),
        ("1g.24gb+gfx+me", Parts(1, 1, 24, "+gfx+me")),
        ("2c.4g.96gb+gfx", Parts(2, 4, 96, "+gfx")),
        ("", None), ("1g", None), ("5gb", None), ("g.gb", None), ("1g.5GB", None), ("1g.5gb ", None),
        ("MIG 1g.5gb", None), ("1g.5gb+", None), ("x1g.5gb", None), ("quarter", None),
    ],
)  # fmt: skip
def test_a_usual_name_has_parts(name: str, parts: Parts | None) -> None:
    assert parse(name) == parts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("MIG 1g.5gb", "1g.5gb"),
        ("NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb", "1c.3g.20gb"),
        ("MIG 1g.24gb+me.all ", "1g.24gb+me.all"),
        ("MIG something new", "something new"),
        ("NVIDIA A100-SXM4-40GB", ""),
        ("MIG", ""),
        ("", ""),
    ],
)
def test_the_profile_is_found_in_what_the_driver_says(text: str, name: str) -> None:
    assert from_driver(text) == name


@pytest.mark.parametrize(
    ("of_gpu", "slices", "name"),
    [
        ("3g.20gb", 1, "1c.3g.20gb"),
        ("3g.20gb", 3, "3g.20gb"),
        ("4g.96gb+gfx", 2, "2c.4g.96gb+gfx"),
        ("something new", 1, "something new"),
        ("3g.20gb", 0, "3g.20gb"),
    ],
)
def test_a_compute_instance_that_fills_its_gpu_instance_has_its_name(
    of_gpu: str, slices: int, name: str
) -> None:
    assert of_compute_instance(of_gpu, slices) == name
    assert of_gpu_instance(name) == of_gpu


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("1g.5gb", "mig-1g.5gb"),
        ("1g.5gb+me", "mig-1g.5gb.me"),
        ("1g.24gb+me.all", "mig-1g.24gb.me.all"),
        ("1g.24gb-me", "mig-1g.24gb-me"),
        ("1c.3g.20gb", "mig-1c.3g.20gb"),
        ("a b/c", "mig-a.b.c"),
    ],
)
def test_a_resource_has_a_dot_where_kubernetes_takes_no_plus(name: str, suffix: str) -> None:
    assert resource_suffix(name) == suffix


def test_names_sort_by_size_and_unknown_ones_come_last() -> None:
    names = ["something new", "7g.40gb", "1g.10gb", "1c.3g.20gb", "1g.5gb+me", "3g.20gb", "1g.5gb", "2g.10gb"]
    assert sorted(names, key=size_key) == [
        "1g.5gb", "1g.5gb+me", "1g.10gb", "2g.10gb", "1c.3g.20gb", "3g.20gb", "7g.40gb", "something new",
    ]  # fmt: skip


@given(st.text())
def test_any_text_is_a_name_that_can_be_read_sorted_and_spelt(text: str) -> None:
    parse(text)
    size_key(text)
    from_driver(text)
    of_gpu_instance(text)
    assert all(char.isascii() and (char.isalnum() or char in "-_.") for char in resource_suffix(text))
