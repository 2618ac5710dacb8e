"""How near whole GPUs are: asked once, of those that can be given whole, and never in the way."""

from itertools import combinations

import pynvml
import pytest

from migplugin.core.inventory import GpuUuid, Inventory
from migplugin.nvml.links import WORTH
from migplugin.sim.records import Failure
from tests.nvml.machine import Machine, machine

FOUR = "4xa100-40gb"
ANCESTOR = "nvmlDeviceGetTopologyCommonAncestor"
STATE = "nvmlDeviceGetNvLinkState"
REMOTE = "nvmlDeviceGetNvLinkRemotePciInfo_v2"
NVLINKS = [(0, 3, 2), (1, 2, 4)]
# By NUMA node 0, 0, 1, 1, but for the pairs that have NVLinks.
TOLD = {(0, 1): 20, (0, 2): 10, (0, 3): 200, (1, 2): 400, (1, 3): 10, (2, 3): 20}
BY_NODE = {**TOLD, (0, 3): 10, (1, 2): 10}


def by_index(inventory: Inventory) -> dict[tuple[int, int], int]:
    index = {gpu.uuid: gpu.index for gpu in inventory.gpus}
    return {(index[one], index[other]): worth for (one, other), worth in inventory.links.items()}


def asked(place: Machine) -> int:
    return sum(place.calls[name] for name in (ANCESTOR, STATE, REMOTE))


def test_nvlinks_count_a_hundred_each_and_other_pairs_by_where_they_meet() -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place:
        assert by_index(place.look().inventory) == TOLD


def test_addresses_match_whatever_the_order_of_the_buses() -> None:
    with machine(FOUR, nvlinks=NVLINKS, pci_order="descending") as place:
        assert by_index(place.look().inventory) == TOLD


@pytest.mark.parametrize(("level", "worth"), WORTH.items())
def test_every_level_has_its_worth(level: int, worth: int) -> None:
    with machine("2xa100-40gb") as place, place.session() as snapshots:

        def answer(_one: object, _other: object, out: object) -> int:
            out._obj.value = level  # type: ignore[attr-defined]
            return 0

        place.library.replaced[ANCESTOR] = answer
        assert by_index(snapshots.take().inventory) == {(0, 1): worth}


def test_a_level_that_nobody_knows_is_no_entry() -> None:
    with machine("2xa100-40gb") as place, place.session() as snapshots:

        def answer(_one: object, _other: object, out: object) -> int:
            out._obj.value = 35  # type: ignore[attr-defined]
            return 0

        place.library.replaced[ANCESTOR] = answer
        assert snapshots.take().inventory.links == {}


def test_a_session_asks_once_and_the_next_one_again() -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place, place.session() as snapshots:
        snapshots.take()
        first = asked(place)
        # Four pairs meet somewhere; the last GPU's links are those of the others.
        assert (place.calls[ANCESTOR], place.calls[STATE], place.calls[REMOTE]) == (4, 3 * 18, 2 + 4 + 4)
        assert by_index(snapshots.take().inventory) == TOLD
        assert asked(place) == first
        place.switch(nvlinks=[])
        snapshots.forget()
        assert by_index(snapshots.take().inventory) == BY_NODE
        assert asked(place) > first


def test_gpus_without_nvlink_cost_one_call_each_and_one_for_each_pair() -> None:
    with machine("8xa100-40gb") as place:
        place.look()
        assert (place.calls[ANCESTOR], place.calls[STATE], place.calls[REMOTE]) == (28, 7, 0)


@pytest.mark.parametrize("node", ["4xa100-40gb=1g.5gb*7", "3xa100-40gb=,1xa100-40gb", "1xa100-40gb"])
def test_nothing_is_asked_where_no_two_gpus_can_be_given_whole(node: str) -> None:
    with machine(node) as place:
        assert place.look().inventory.links == {}
        assert asked(place) == 0


def test_only_gpus_with_mig_off_have_entries_and_those_that_change_cost_no_second_question() -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place, place.session() as snapshots:
        snapshots.take()
        first = asked(place)
        place.mig_mode(on=True, gpu=2)
        without = {pair: worth for pair, worth in TOLD.items() if 2 not in pair}
        assert by_index(snapshots.take().inventory) == without
        place.mig_mode(on=False, gpu=2)
        assert by_index(snapshots.take().inventory) == TOLD
        assert asked(place) == first


def test_gpus_that_have_no_mig_at_all_are_whole_too() -> None:
    with machine("2xa100-40gb") as place, place.refusing("nvmlDeviceGetMigMode", 3):
        assert by_index(place.look().inventory) == {(0, 1): 10}


def test_a_lost_gpu_takes_only_its_own_pairs_along_until_it_is_back() -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place, place.session() as snapshots:
        place.lose(1)
        inventory = snapshots.take().inventory
        assert [broken.index for broken in inventory.broken] == [1]
        assert by_index(inventory) == {pair: worth for pair, worth in TOLD.items() if 1 not in pair}
        place.lose(1, lost=False)
        assert by_index(snapshots.take().inventory) == TOLD


@pytest.mark.parametrize("name", [ANCESTOR, STATE])
@pytest.mark.parametrize("code", [15, 16])
def test_a_gpu_that_is_lost_while_it_is_asked_is_asked_again(name: str, code: int) -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place, place.session() as snapshots:
        with place.refusing(name, code):
            inventory = snapshots.take().inventory
            assert not inventory.broken
            assert set(by_index(inventory)) <= {(0, 3), (1, 2)}
        assert by_index(snapshots.take().inventory) == TOLD


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ([ANCESTOR], {(0, 3): 200, (1, 2): 400}),
        ([STATE], BY_NODE),
        ([REMOTE], BY_NODE),
        ([STATE, REMOTE], BY_NODE),
        ([ANCESTOR, STATE, REMOTE], {}),
    ],
)
def test_symbols_that_a_driver_lacks_are_no_entries(missing: list[str], told: dict[object, int]) -> None:
    with machine(FOUR, nvlinks=NVLINKS, missing_symbols=missing) as place:
        inventory = place.look().inventory
    assert by_index(inventory) == told
    assert not inventory.broken
    assert not inventory.unreadable


@pytest.mark.parametrize("code", [1, 2, 3, 4, 6, 9, 13, 15, 16, 18, 999, 12345])
@pytest.mark.parametrize("name", [ANCESTOR, STATE, REMOTE])
def test_no_refusal_breaks_a_gpu_or_a_look(name: str, code: int) -> None:
    with machine(FOUR, nvlinks=NVLINKS, fail={name: Failure(code)}) as place:
        inventory = place.look().inventory
    assert len(inventory.gpus) == 4
    left = {(0, 3): 200, (1, 2): 400} if name == ANCESTOR else BY_NODE
    assert by_index(inventory).items() <= left.items()


def test_a_refusal_is_not_asked_again_in_the_same_session() -> None:
    with machine(FOUR, nvlinks=NVLINKS) as place, place.session() as snapshots:
        with place.refusing(ANCESTOR, 999), place.refusing(STATE, 999):
            assert snapshots.take().inventory.links == {}
            first = asked(place)
        assert snapshots.take().inventory.links == {}
        assert asked(place) == first


def test_an_end_that_is_no_gpu_of_this_node_is_no_link_to_one() -> None:
    """As on boards with NVSwitch, where every link ends in a switch."""
    with machine("2xa100-40gb", nvlinks=[(0, 1, 4)]) as place, place.session() as snapshots:
        original = place.library.original(REMOTE)

        def switch(handle: object, link: object, out: object) -> int:
            answer = original(handle, link, out)
            pci = out._obj  # type: ignore[attr-defined]
            assert isinstance(pci, pynvml.nvmlPciInfo_t)
            pci.bus, pci.busId = 0xC1, b""
            return answer

        place.library.replaced[REMOTE] = switch
        assert by_index(snapshots.take().inventory) == {(0, 1): 10}


def test_pairs_are_named_by_their_uuids_in_order_of_index() -> None:
    with machine(FOUR) as place:
        inventory = place.look().inventory
    uuids: list[GpuUuid] = [gpu.uuid for gpu in inventory.gpus]
    assert list(inventory.links) == list(combinations(uuids, 2))
