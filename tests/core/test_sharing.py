"""Time-slicing: which devices become replicas under which name, and which values are refused."""

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from migplugin.core.assignment import Assignment, assign
from migplugin.core.inventory import DeviceId
from migplugin.core.naming import naming
from migplugin.core.resource import Strategy, device_of, is_replica, is_valid
from migplugin.core.sharing import TimeSlicing, time_slicing
from migplugin.errors import InputError
from tests.core.examples import ASSORTED, SEVENTHS, gpu, inventory, uuid

OFF = gpu(2, mig=False)
OTHER = gpu(3, mig=False)
NODE = inventory(SEVENTHS, ASSORTED, OFF, OTHER)


def sharing(*resources: dict[str, Any], **more: bool) -> TimeSlicing:
    return time_slicing({"resources": [{"replicas": 2, **one} for one in resources], **more})


def counts(
    slicing: TimeSlicing, strategy: Strategy = Strategy.MIXED, **past: set[DeviceId]
) -> dict[str, tuple[int, int]]:
    """How many replicas and how many plain devices each resource has."""
    found = assign(
        NODE, strategy, sharing=slicing, shared=past.get("shared", set()), whole=past.get("whole", set())
    )
    return {name.removeprefix("nvidia.com/"): of(ids) for name, ids in found.resources.items()}


def of(ids: Any) -> tuple[int, int]:
    replicas = sum(map(is_replica, ids))
    return replicas, len(ids) - replicas


PLAIN = {"mig-1g.5gb": (0, 9), "mig-2g.10gb": (0, 1), "mig-3g.20gb": (0, 1), "gpu": (0, 2)}
SMALL, GPU = "nvidia.com/mig-1g.5gb", "nvidia.com/gpu"
ONE: dict[str, Any] = {"name": SMALL, "devices": 1}
TWICE: dict[str, Any] = {"name": GPU, "replicas": 2}


@pytest.mark.parametrize(
    ("slicing", "changed"),
    [
        (TimeSlicing(), {}),
        (sharing({"name": SMALL}), {"mig-1g.5gb": (18, 0)}),
        (sharing({"name": "mig-1g.5gb", "replicas": 10}), {"mig-1g.5gb": (90, 0)}),
        (sharing({"name": SMALL, "devices": "all"}), {"mig-1g.5gb": (18, 0)}),
        (sharing({"name": SMALL, "devices": 3}), {"mig-1g.5gb": (6, 6)}),
        (sharing({"name": SMALL, "devices": 300}), {"mig-1g.5gb": (18, 0)}),
        (sharing({"name": SMALL, "devices": ["1"]}), {"mig-1g.5gb": (4, 7)}),
        (sharing({"name": SMALL, "devices": ["0:1", "0:2", 1]}), {"mig-1g.5gb": (8, 5)}),
        (sharing({"name": SMALL, "devices": [uuid(0, 7), f"MIG-{uuid(0)}/8/0"]}), {"mig-1g.5gb": (4, 7)}),
        (sharing({"name": SMALL, "devices": [uuid(0).lower()]}), {"mig-1g.5gb": (14, 2)}),
        (sharing({"name": GPU, "devices": [2]}), {"gpu": (2, 1)}),
        (sharing({"name": GPU, "devices": [uuid(3)]}), {"gpu": (2, 1)}),
        (sharing({"name": GPU}, renameByDefault=True), {"gpu": None, "gpu.shared": (4, 0)}),
        (sharing({"name": GPU, "devices": 1}, renameByDefault=True), {"gpu": (0, 1), "gpu.shared": (2, 0)}),
        (sharing({"name": GPU, "rename": "slice"}, renameByDefault=True), {"gpu": None, "slice": (4, 0)}),
        (sharing({"name": GPU, "rename": "nvidia.com/slice"}), {"gpu": None, "slice": (4, 0)}),
        (
            sharing(ONE, {"name": SMALL, "devices": 2, "replicas": 5, "rename": "x"}),
            {"mig-1g.5gb": (2, 6), "x": (10, 0)},
        ),
        (sharing({"name": SMALL}, {"name": SMALL, "rename": "x"}), {"mig-1g.5gb": (18, 0)}),
        (sharing({"name": "nothing"}), {}),
    ],
)  # fmt: skip
def test_what_is_chosen_becomes_replicas_and_the_rest_stays(
    slicing: TimeSlicing, changed: dict[str, tuple[int, int] | None]
) -> None:
    expected = {name: count for name, count in {**PLAIN, **changed}.items() if count is not None}
    assert counts(slicing) == expected


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [(Strategy.NONE, {"gpu": (4, 0)}), (Strategy.SINGLE, {"gpu": (18, 0)})],
)
def test_sharing_gpus_shares_what_the_strategy_calls_gpu(
    strategy: Strategy, expected: dict[str, tuple[int, int]]
) -> None:
    assert counts(sharing({"name": GPU}), strategy) == expected


def test_replicas_are_their_device() -> None:
    found = assign(NODE, Strategy.MIXED, sharing=sharing({"name": GPU, "replicas": 3})).resources
    devices = {device_of(id_): device for id_, device in found[GPU].items()}  # type: ignore[index]
    assert [str(id_) for id_ in found[GPU]] == [f"{uuid(n)}::{k}" for n in (2, 3) for k in range(3)]  # type: ignore[index]
    assert all(device.id == id_ for id_, device in devices.items())


def test_renamed_devices_are_shared_under_their_new_name_in_our_domain() -> None:
    names = naming({"mig": [{"pattern": "1g.*", "name": "small"}]}, "example.com")
    slicing = time_slicing(
        {"resources": [{"name": "nvidia.com/small", "replicas": 2}], "renameByDefault": True}, "example.com"
    )
    found = assign(inventory(SEVENTHS), Strategy.MIXED, names, slicing).resources
    assert {str(name): of(ids) for name, ids in found.items()} == {"example.com/small.shared": (14, 0)}


def chosen(slicing: TimeSlicing, shared: set[str], whole: set[str]) -> set[str]:
    found: Assignment = assign(
        inventory(SEVENTHS),
        Strategy.MIXED,
        sharing=slicing,
        shared={DeviceId(i) for i in shared},
        whole={DeviceId(i) for i in whole},
    )
    return {device_of(id_) for ids in found.resources.values() for id_ in ids if is_replica(id_)}


def test_a_count_stays_with_what_is_shared_and_leaves_what_somebody_has_to_himself() -> None:
    a, b, c, d = (uuid(0, gi) for gi in (7, 8, 9, 10))
    two = sharing({"name": SMALL, "devices": 2})
    assert chosen(two, set(), set()) == {a, b}
    assert chosen(two, {c, d}, set()) == {c, d}
    assert chosen(two, {d}, {a}) == {d, b}
    assert chosen(two, set(), {uuid(0, gi) for gi in range(7, 13)}) == {uuid(0, 13), a}


def test_a_reference_to_nothing_is_named_and_the_rest_is_served() -> None:
    slicing = sharing({"name": SMALL, "devices": ["7", "0:1", uuid(2)]})
    found = assign(NODE, Strategy.MIXED, sharing=slicing)
    assert found.left_out == tuple(
        f"sharing.timeSlicing: {reference} is no device of {SMALL} here, or is shared already"
        for reference in ("7", uuid(2))
    )


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"renameByDefault": True}, "resources: None: expected at least one resource"),
        ({"resources": []}, "resources: []: expected at least one resource"),
        ({"resources": [{"name": GPU, "replicas": 1}]}, "resources[0].replicas: 1: expected a whole number"),
        ({"resources": [{"name": GPU}]}, "resources[0].replicas: None: expected a whole number"),
        ({"resources": [{"name": GPU, "replicas": True}]}, "resources[0].replicas: True: expected"),
        ({"resources": [{"name": GPU, "replicas": "4"}]}, "resources[0].replicas: '4': expected"),
        ({"resources": [{"name": GPU, "replicas": 1 << 60}]}, "resources[0].replicas: 1152921504606846976: "),
        ({"resources": [{"name": "a+b", "replicas": 2}]}, "resources[0].name: 'a+b': the kubelet"),
        ({"resources": [None]}, "resources[0].replicas: None: expected"),
        ({"resources": [{**TWICE, "rename": "+"}]}, "resources[0].rename: '+': the kubelet"),
        ({"resources": [{**TWICE, "rename": [1]}]}, "resources[0].rename: [1]: expected"),
        ({"resources": [{**TWICE, "devices": 0}]}, "resources[0].devices: 0: expected all"),
        ({"resources": [{**TWICE, "devices": True}]}, "resources[0].devices: True: expected"),
        ({"resources": [{**TWICE, "devices": []}]}, "resources[0].devices: []: expected all"),
        ({"resources": [{**TWICE, "devices": "some"}]}, "resources[0].devices: 'some': "),
        ({"resources": [{**TWICE, "devices": [0, -1]}]}, "resources[0].devices[1]: -1: "),
        ({"resources": [{**TWICE, "devices": ["GPU-1"]}]}, "resources[0].devices[0]: 'GPU-1': "),
        ({"resources": [TWICE], "renameByDefault": 1}, "renameByDefault: 1: expected true"),
        ({"resources": [TWICE], "failRequestsGreaterThanOne": "no"},
         "failRequestsGreaterThanOne: 'no': expected true"),
        ({"resources": [{"name": "m" * 60, "replicas": 2}], "renameByDefault": True}, "resources[0].name: "),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_with_its_path(document: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        time_slicing(document)
    assert str(caught.value).startswith(f"sharing.timeSlicing.{told}")
    assert "\n" not in str(caught.value)


ODD = st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=70)
DEVICES = ODD | st.lists(ODD | st.sampled_from([0, "0:1", uuid(0), uuid(0, 7)]), max_size=3)
ITEMS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "name": ODD | st.sampled_from([SMALL, GPU]),
        "replicas": ODD | st.integers(2, 5),
        "rename": ODD | st.lists(ODD, max_size=1),
        "devices": DEVICES,
    },
)


@given(
    document=st.fixed_dictionaries(
        {},
        optional={
            "resources": st.none() | st.lists(ITEMS, max_size=3),
            "renameByDefault": ODD,
            "failRequestsGreaterThanOne": ODD,
        },
    )
)
def test_whatever_stands_there_is_understood_or_refused(document: dict[str, Any]) -> None:
    try:
        slicing = time_slicing(document)
    except InputError as exc:
        refused = str(exc)
    else:
        refused = ""
    if refused:
        assert refused.startswith("sharing.timeSlicing.")
        return
    resources = assign(NODE, Strategy.MIXED, sharing=slicing).resources
    assert all(map(is_valid, resources))
    offered = Counter(
        device.id for ids in resources.values() for device in {d.id: d for d in ids.values()}.values()
    )
    assert set(offered.values()) == {1}
    assert len(offered) == 13
