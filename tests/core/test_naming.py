"""What resources are called by the `resources` section, and which of its values are refused."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from migplugin.core.assignment import assign
from migplugin.core.naming import Naming, Rule, naming
from migplugin.core.resource import ResourceName, Strategy, is_valid
from migplugin.errors import InputError
from tests.core.examples import A100_40GB, ASSORTED, SEVENTHS, gpu, inventory

OFF = gpu(2, mig=False)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("*", "", True),
        ("*", "1g.5gb", True),
        ("1g.5gb", "1g.5gb", True),
        ("1g.5gb", "1g.5gb+me", False),
        ("1g.5gb", "11g.5gb", False),
        ("1g*", "1g.5gb+me", True),
        ("*gb", "1g.5gb+me", False),
        ("1g*me", "1g.5gb+me", True),
        ("1g.5gb*5gb+me", "1g.5gb+me", False),
        ("*A100*40GB", "NVIDIA A100-SXM4-40GB", True),
        ("*a100*", "NVIDIA A100-SXM4-40GB", False),
        ("**5**", "1g.5gb", True),
        ("*x*", "1g.5gb", False),
        ("1g.5g?", "1g.5gb", False),
    ],
)
def test_a_star_stands_for_any_text_and_nothing_else_for_anything(
    pattern: str, text: str, matches: bool
) -> None:
    assert Rule(pattern, ResourceName("x")).matches(text) is matches


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    assert not Rule("*a" * 5000 + "b", ResourceName("x")).matches("a" * 9999)


def counts(rules: Naming, strategy: Strategy) -> dict[str, int]:
    found = assign(inventory(SEVENTHS, ASSORTED, OFF), strategy, rules).resources
    return {str(name): len(ids) for name, ids in found.items()}


SMALL = naming(
    {
        "gpus": [{"pattern": "*H100*", "name": "h100"}, {"pattern": f"*{A100_40GB[-8:]}", "name": "a100"}],
        "mig": [{"pattern": "1g.*", "name": "small"}, {"pattern": "*", "name": "nvidia.com/large"}],
    }
)


@pytest.mark.parametrize(
    ("rules", "strategy", "expected"),
    [
        (SMALL, Strategy.MIXED, {"nvidia.com/small": 9, "nvidia.com/large": 2, "nvidia.com/a100": 1}),
        (SMALL, Strategy.SINGLE, {"nvidia.com/small": 9}),
        (SMALL, Strategy.NONE, {"nvidia.com/a100": 1}),
        (
            naming({}, "example.com"),
            Strategy.MIXED,
            {
                "example.com/mig-1g.5gb": 9,
                "example.com/mig-2g.10gb": 1,
                "example.com/mig-3g.20gb": 1,
                "example.com/gpu": 1,
            },
        ),
        (naming({}, "example.com"), Strategy.SINGLE, {"example.com/gpu": 9}),
        (naming({"gpus": [], "mig": None}), Strategy.NONE, {"nvidia.com/gpu": 1}),
    ],
)
def test_the_first_rule_that_matches_names_a_device_and_else_it_has_the_usual_name(
    rules: Naming, strategy: Strategy, expected: dict[str, int]
) -> None:
    assert counts(rules, strategy) == expected


@pytest.mark.parametrize(
    ("given", "domain", "name"),
    [
        ("gpu", "nvidia.com", "nvidia.com/gpu"),
        ("nvidia.com/gpu", "nvidia.com", "nvidia.com/gpu"),
        ("nvidia.com/gpu", "example.com", "example.com/gpu"),
        ("example.com/gpu", "example.com", "example.com/gpu"),
        ("m" * 63, "nvidia.com", "nvidia.com/" + "m" * 63),
    ],
)
def test_a_name_has_our_domain(given: str, domain: str, name: str) -> None:
    (rule,) = naming({"gpus": [{"pattern": "*", "name": given}]}, domain).gpus
    assert rule.name == name


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            {"pattern": "*", "name": "mig-1g.5gb+me"},
            "resources.mig[1].name: 'mig-1g.5gb+me': the kubelet would",
        ),
        ({"pattern": "*", "name": "m" * 64}, "resources.mig[1].name: 'mmmm"),
        (
            {"pattern": "*", "name": "example.com/x"},
            "resources.mig[1].name: 'example.com/x': the kubelet would",
        ),
        ({"pattern": "*", "name": ""}, "resources.mig[1].name: '': expected a resource name"),
        ({"pattern": "*", "name": 5}, "resources.mig[1].name: 5: expected a resource name"),
        ({"pattern": "*"}, "resources.mig[1].name: None: expected a resource name"),
        ({"name": "x"}, "resources.mig[1].pattern: None: expected a profile such as 1g.5gb"),
        ({"pattern": "", "name": "x"}, "resources.mig[1].pattern: '': expected"),
        ({"pattern": ["*"], "name": "x"}, "resources.mig[1].pattern: ['*']: expected"),
        (None, "resources.mig[1].pattern: None: expected"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_path(rule: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        naming({"mig": [{"pattern": "1g.5gb", "name": "x"}, rule]})
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("domain", ["", "NVIDIA.com", "kubernetes.io", "a_b.com", "nvidia.com/", "x" * 300])
def test_what_is_no_domain_is_refused(domain: str) -> None:
    with pytest.raises(InputError, match="--resource-domain="):
        naming({}, domain)


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)
RULES = st.lists(st.none() | st.fixed_dictionaries({}, optional={"pattern": ODD, "name": ODD}), max_size=3)


@given(document=st.fixed_dictionaries({}, optional={"gpus": st.none() | RULES, "mig": st.none() | RULES}))
def test_whatever_stands_there_is_understood_or_refused(document: dict[str, Any]) -> None:
    try:
        found = naming(document)
    except InputError as exc:
        refused = str(exc)
    else:
        refused = ""
    if refused:
        assert refused.startswith("resources.")
        return
    assert all(is_valid(rule.name) for rule in (*found.gpus, *found.mig))
    assign(inventory(SEVENTHS, OFF), Strategy.MIXED, found)
