"""NUMA hints and policies: the stand-in kubelet's topology manager."""

import pytest

from migplugin._proto.deviceplugin.v1beta1 import api_pb2
from migplugin.sim.kubelet import Container, Kubelet, Pod
from migplugin.sim.kubelet.pods import NotAdmitted
from migplugin.sim.kubelet.topology import IMPOSSIBLE, INDIFFERENT, Hint, affinity, hints
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, listed, pod, running

ZERO, ONE, BOTH = frozenset({0}), frozenset({1}), frozenset({0, 1})


def nodes(*counts: int) -> list[tuple[int]]:
    """That many devices on each node."""
    return [(node,) for node, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    ("every", "available", "request_", "expected"),
    [
        (nodes(2, 2), nodes(2, 2), 1, {ZERO: True, ONE: True, BOTH: False}),
        (nodes(2, 2), nodes(0, 2), 2, {ONE: True, BOTH: False}),
        (nodes(2, 2), nodes(1, 1), 2, {BOTH: False}),
        (nodes(2, 2), nodes(2, 2), 3, {BOTH: True}),
    ],
)
def test_a_hint_is_preferred_where_no_smaller_set_of_nodes_could_ever_do(
    every: list[tuple[int]],
    available: list[tuple[int]],
    request_: int,
    expected: dict[frozenset[int], bool],
) -> None:
    found = hints((0, 1), every, available, [], request_)
    assert {hint.nodes: hint.preferred for hint in found} == expected


def test_devices_of_an_init_container_bind_the_hint() -> None:
    found = hints((0, 1), nodes(2, 2), nodes(1, 2), [(0,)], 2)
    assert {hint.nodes for hint in found} == {ZERO, BOTH}


def test_too_few_devices_are_impossible() -> None:
    assert hints((0, 1), nodes(1, 0), nodes(1, 0), [], 2) == IMPOSSIBLE


@pytest.mark.parametrize("policy", ["none", "best-effort", "restricted", "single-numa-node"])
def test_indifferent_resources_are_admitted_by_every_policy(policy: str) -> None:
    affinity(policy, (0, 1), [INDIFFERENT, INDIFFERENT])


def test_the_narrowest_preferred_affinity_wins() -> None:
    found = (Hint(BOTH, preferred=False), Hint(ONE, preferred=True), Hint(ZERO, preferred=True))
    assert affinity("best-effort", (0, 1), [found, INDIFFERENT]) == ZERO
    assert affinity("none", (0, 1), [found]) is None


@pytest.mark.parametrize("policy", ["restricted", "single-numa-node"])
def test_strict_policies_refuse_what_is_not_preferred(policy: str) -> None:
    with pytest.raises(NotAdmitted, match="cannot be allocated with Topology locality") as caught:
        affinity(policy, (0, 1), [(Hint(BOTH, preferred=False),)])
    assert caught.value.reason == "TopologyAffinityError"


def test_a_single_node_is_refused_where_two_are_needed_and_restricted_takes_them() -> None:
    needs_both = [(Hint(BOTH, preferred=True),)]
    assert affinity("restricted", (0, 1), needs_both) == BOTH
    with pytest.raises(NotAdmitted):
        affinity("single-numa-node", (0, 1), needs_both)


def four() -> list[api_pb2.Device]:
    return [device(f"n{node}-{number}", nodes=[node]) for node in (0, 1) for number in (0, 1)]


def held(kubelet: Kubelet, of: Pod) -> set[str]:
    return {
        id_
        for edits in kubelet.status(of).containers.values()
        for ids in edits.device_ids.values()
        for id_ in ids
    }


@pytest.mark.parametrize("policy", ["best-effort", "restricted", "single-numa-node"])
async def test_devices_of_one_container_come_from_one_node(policy: str) -> None:
    async with running(topology_policy=policy) as kubelet, Plugin(kubelet.socket, R, four()):
        await listed(kubelet, 4)
        for name in ("first", "second"):
            two = pod(name, 2)
            assert (await kubelet.admit(two)).phase == "Running"
            assert len({id_.partition("-")[0] for id_ in held(kubelet, two)}) == 1


@pytest.mark.parametrize(
    ("policy", "phase", "reason"),
    [
        ("none", "Running", ""),
        ("best-effort", "Running", ""),
        ("restricted", "Failed", "TopologyAffinityError"),
        ("single-numa-node", "Failed", "TopologyAffinityError"),
    ],
)
async def test_when_only_both_nodes_together_have_enough(policy: str, phase: str, reason: str) -> None:
    async with running(topology_policy=policy) as kubelet, Plugin(kubelet.socket, R, four()) as plugin:
        plugin.list(*four()[:3:2], *(device(f"sick{node}", "Unhealthy", [node]) for node in (0, 1)))
        await listed(kubelet, 2)
        status = await kubelet.admit(pod(count=2))
        assert (status.phase, status.reason) == (phase, reason)
        assert plugin.calls["Allocate"] == (phase == "Running")


async def test_the_preference_is_asked_for_within_the_aligned_devices_where_there_is_a_choice() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, four(), preferred=True) as plugin:
        await listed(kubelet, 4)
        await kubelet.admit(pod())
        (wanted,) = plugin.preferences
        assert sorted(wanted.available_deviceIDs) == ["n0-0", "n0-1"]


async def test_no_preference_is_asked_for_where_the_aligned_devices_are_just_enough() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, four(), preferred=True) as plugin:
        await listed(kubelet, 4)
        await kubelet.admit(pod(count=2))
        assert not plugin.preferences


async def test_what_is_left_over_after_the_aligned_devices_is_asked_for() -> None:
    devices = [device("near", nodes=[0]), device("a"), device("b")]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices, preferred=True) as plugin:
        await listed(kubelet, 3)
        two = pod(count=2)
        plugin.prefer = lambda _: ["b"]
        await kubelet.admit(two)
        (wanted,) = plugin.preferences
        assert list(wanted.must_include_deviceIDs) == ["near"]
        assert wanted.allocation_size == 2
        assert held(kubelet, two) == {"near", "b"}


async def test_without_a_policy_numa_nodes_mean_nothing() -> None:
    async with (
        running(topology_policy="none") as kubelet,
        Plugin(kubelet.socket, R, four(), preferred=True) as plugin,
    ):
        await listed(kubelet, 4)
        await kubelet.admit(pod(count=4))
        assert len(plugin.preferences) == 1


async def test_an_init_container_keeps_its_node_for_the_next_container() -> None:
    async with running(topology_policy="single-numa-node") as kubelet, Plugin(kubelet.socket, R, four()):
        await listed(kubelet, 4)
        chain = Pod("a", (Container("i", {R: 1}, init=True), Container("app", {R: 2})))
        assert (await kubelet.admit(chain)).phase == "Running"
        assert len({id_.partition("-")[0] for id_ in held(kubelet, chain)}) == 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'odd' is none of none, best-effort"):
        Kubelet(None, topology_policy="odd")  # type: ignore[arg-type]
