"""SPEC: what it makes, and what it says when it cannot."""

import pytest

from migplugin.errors import InputError
from migplugin.sim import profiles, spec


def _names(text: str) -> list[list[str]]:
    node = spec.build(text)
    return [[gpu.ci_name(gi, ci) for gi in gpu.instances for ci in gi.compute] for gpu in node.gpus]


def test_demo_node_has_what_its_spec_says() -> None:
    text = "1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2"
    assert _names(text) == [["1g.5gb"] * 7, ["3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb"]]


def test_without_equals_mig_is_off_and_with_nothing_after_it_on_and_empty() -> None:
    node = spec.build("2xa100-40gb,1xh100-80gb=")
    assert [gpu.record.mig_current for gpu in node.gpus] == [False, False, True]
    assert not any(gpu.instances for gpu in node.gpus)


def test_compute_level_profiles_in_a_row_share_a_gpu_instance() -> None:
    node = spec.build("1xa100-40gb=1c.3g.20gb*3:2c.3g.20gb:1c.3g.20gb")
    shared = [[node.gpus[0].ci_name(gi, ci) for ci in gi.compute] for gi in node.gpus[0].instances]
    assert shared == [["1c.3g.20gb"] * 3, ["2c.3g.20gb", "1c.3g.20gb"]]


def test_a_full_instance_is_never_shared() -> None:
    assert len(spec.build("1xa100-40gb=3g.20gb:1c.3g.20gb").gpus[0].instances) == 2


def test_same_spec_and_seed_give_the_same_node_and_another_seed_other_uuids() -> None:
    text = "2xa100-40gb=1g.5gb*2"
    assert spec.build(text).record == spec.build(text).record
    first, second = spec.build(text, seed="a"), spec.build(text, seed="b")
    assert {gpu.uuid for gpu in first.gpus}.isdisjoint({gpu.uuid for gpu in second.gpus})


@pytest.mark.parametrize("product", profiles.table().products, ids=lambda p: p.cli_name)
def test_every_product_can_be_played(product: profiles.Product) -> None:
    smallest = product.profiles[0]
    node = spec.build(f"1x{product.cli_name}={smallest.name}*{smallest.max_instances}")
    assert len(node.gpus[0].mig_devices()) == smallest.max_instances


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "1xa100-40gb=1g.5gb*7"]),
        ("a100-40gb", ["column 1", "<number>x<product>"]),
        ("0xa100-40gb", ["column 1", "'0xa100-40gb'"]),
        ("1xa100-40gb,", ["column 13", "''"]),
        ("1xa100-40g", ["column 3", "did you mean 'a100-40gb'?", "rtxpro6000"]),
        ("1xa30,1xthor", ["column 9", "thor", "cannot be simulated", "only its profile names are published"]),
        ("1xrtxpro5000", ["column 3", "contradict each other"]),
        ("1xa100-40gb=1g.5bg", ["column 13", "'1g.5bg'", "did you mean '1g.5gb'?", "7g.40gb"]),
        ("1xa100-40gb=1g.5gb:", ["column 20", "expected a profile of a100-40gb"]),
        ("1xa100-40gb=1g.5gb*0", ["column 20", "'0' is not a count"]),
        ("1xa100-40gb=1g.5gb*x", ["column 20", "'x' is not a count"]),
        ("1xa100-40gb=1g.5gb*2:3g.20gb*2", ["column 22", "3g.20gb number 2 on GPU 0", "larger ones first"]),
        ("33xa30", ["33 GPUs", "at most 32"]),
    ],
)
def test_a_wrong_spec_says_where_what_and_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        spec.build(text)
    for word in words:
        assert word in str(error.value)
