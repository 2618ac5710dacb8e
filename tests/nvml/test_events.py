"""What the driver says by itself: XIDs at every scope, bursts, lost GPUs, and events of unknown kinds."""

import asyncio
import threading
import time
from typing import Any

import pynvml
import pytest

from migplugin.nvml.events import LONGEST_PAUSE, SHORTEST_PAUSE
from migplugin.sim.records import WHOLE
from tests.nvml.machine import SEVEN, devices, machine, until, watching

WAIT = "nvmlEventSetWait_v2"
INIT = "nvmlInitWithFlags"


@pytest.mark.parametrize(
    ("gi", "ci", "scope"),
    [(WHOLE, WHOLE, (None, None)), (13, WHOLE, (13, None)), (13, 0, (13, 0)), (0, 0, (0, 0))],
)
async def test_an_xid_arrives_at_its_scope(gi: int, ci: int, scope: tuple[int | None, int | None]) -> None:
    with machine("2xa100-40gb=1g.5gb*7") as place:
        async with watching(place) as watched:
            seen = await watched.driver.look()
            place.xid(94, gpu=1, gi=gi, ci=ci)
            await asyncio.wait_for(watched.fault.wait(), 5)
            (fault,) = watched.driver.faults()
            assert (fault.gpu, fault.xid, fault.count) == (seen.gpus[1].uuid, 94, 1)
            assert (fault.gi, fault.ci) == scope
            assert watched.driver.faults() == ()
            assert not watched.geometry.is_set()


async def test_an_xid_from_another_process_wakes_within_a_second() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            began = time.monotonic()
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert time.monotonic() - began < 1


async def test_different_faults_stay_apart_and_equal_ones_are_counted() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            for xid, gi in ((31, 13), (31, 11), (43, 13), (31, 13), (31, 13)):
                place.xid(xid, gi=gi, ci=0)
            await until(lambda: watched.told["fault"] and place.calls[WAIT] > 6)
            found = {(fault.xid, fault.gi): fault for fault in watched.driver.faults()}
            assert {key: fault.count for key, fault in found.items()} == {
                (31, 11): 1,
                (43, 13): 1,
                (31, 13): 3,
            }
            assert found[31, 13].first < found[31, 13].last


async def test_ten_thousand_xids_are_one_fault_and_do_not_flood_the_loop() -> None:
    with machine(SEVEN) as place:
        done = threading.Event()
        left = 10_000

        def storm(_events: object, data: Any, _timeout: object) -> int:
            nonlocal left
            if not left:
                done.set()
                return 10
            left -= 1
            _event(data, kind=0x8, number=13, gi=13, ci=0)
            data._obj.device = handle
            return 0

        async with watching(place) as watched:
            seen = await watched.driver.look()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            place.library.replaced[WAIT] = storm
            # The loop is held: whatever it is told meanwhile must not pile up.
            assert done.wait(20)
            await asyncio.wait_for(watched.fault.wait(), 5)
            (fault,) = watched.driver.faults()
            assert (fault.gpu, fault.count) == (seen.gpus[0].uuid, 10_000)
            assert watched.told["fault"] <= 2


async def test_more_different_faults_than_are_kept_are_said_to_be_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            watched.driver._faults._limit = 2
            for xid in (13, 31, 43, 45):
                place.xid(xid)
            await until(lambda: watched.told["fault"] and watched.driver._faults.dropped == 2)
            assert [fault.xid for fault in watched.driver.faults()] == [43, 45]
            assert watched.driver.faults() == ()
    said = [record for record in caplog.records if "lost" in record.message]
    assert [vars(record)["lost"] for record in said] == [2]


async def test_a_change_of_geometry_is_told_and_then_seen() -> None:
    with machine("2xa100-40gb=") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.create("3g.20gb", gpu=1)
            found = devices(await watched.changed())
            assert {device.uuid for device in found} == place.uuids(1)
            assert watched.driver.faults() == ()


async def test_unknown_kinds_of_events_are_passed_over() -> None:
    with machine(SEVEN) as place:
        said: list[int] = []

        def odd(_events: object, data: Any, _timeout: object) -> int:
            if len(said) < 3:
                said.append(_event(data, kind=(0x4000, 0x8 | 0x2, 0)[len(said)], number=1))
                data._obj.device = handle
                return 0
            del place.library.replaced[WAIT]
            return 10

        async with watching(place) as watched:
            await watched.driver.look()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            place.library.replaced[WAIT] = odd
            await until(lambda: WAIT not in place.library.replaced)
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert [fault.xid for fault in watched.driver.faults()] == [79]
            assert not watched.geometry.is_set()


async def test_an_event_of_a_device_that_is_not_ours_is_passed_over() -> None:
    with machine(SEVEN) as place:
        said: list[int] = []

        def stranger(_events: object, data: Any, _timeout: object) -> int:
            said.append(_event(data, kind=0x8, number=79))
            del place.library.replaced[WAIT]
            return 0

        async with watching(place) as watched:
            await watched.driver.look()
            place.library.replaced[WAIT] = stranger
            await until(lambda: said and place.calls[WAIT] > 2)
            assert watched.driver.faults() == ()


async def test_a_lost_gpu_neither_spins_nor_deafens_the_others() -> None:
    with machine("2xa100-40gb=1g.5gb") as place:
        async with watching(place) as watched:
            before = await watched.driver.look()
            place.lose(0)
            after = await watched.changed()
            assert [gpu.uuid for gpu in after.broken] == [before.gpus[0].uuid]
            assert [gpu.uuid for gpu in after.gpus] == [before.gpus[1].uuid]
            assert place.calls[INIT] == 2, "its events are not waited for any more"
            calls = place.calls[WAIT]
            began = time.monotonic()
            place.xid(43, gpu=1, gi=13, ci=0)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert time.monotonic() - began < 1
            # Waits of the tests take 20 ms: a spin would be thousands.
            assert place.calls[WAIT] - calls < 100
            for _ in range(3):
                assert (await watched.driver.look()).broken == after.broken
            assert place.calls[INIT] == 2


async def test_a_wait_that_always_fails_is_repeated_ever_more_slowly() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            with place.refusing(WAIT, 15):
                await asyncio.wait_for(watched.geometry.wait(), 5)
                calls, began = place.calls[WAIT], time.monotonic()
                await until(lambda: place.calls[WAIT] >= calls + 2)
                assert time.monotonic() - began > 0.8 * (SHORTEST_PAUSE + 2 * SHORTEST_PAUSE)
                assert not watched.hears()
                assert watched.told["geometry"] == 1, "one reason to look, not one for each failure"
            assert SHORTEST_PAUSE < LONGEST_PAUSE


async def test_events_that_come_back_after_a_failure_are_heard() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            with place.refusing(WAIT, 999):
                await asyncio.wait_for(watched.geometry.wait(), 5)
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert watched.hears()


async def test_a_gpu_that_comes_back_is_heard_again() -> None:
    with machine("2xa100-40gb=1g.5gb") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.lose(0)
            assert (await watched.changed()).broken
            assert not watched.hears(), "nobody tells when it is back: look often"
            place.lose(0, lost=False)
            assert not (await watched.driver.look()).broken
            assert watched.hears()
            place.xid(43, gpu=0, gi=13, ci=0)
            await asyncio.wait_for(watched.fault.wait(), 5)


async def test_without_privilege_an_xid_of_the_whole_gpu_arrives() -> None:
    with machine(SEVEN, privilege="none") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.xid(43, gi=13, ci=0)
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert [fault.xid for fault in watched.driver.faults()] == [79]


def _event(data: Any, *, kind: int, number: int, gi: int = WHOLE, ci: int = WHOLE) -> int:
    """Fills the caller's event, as the library would; its device stays NULL."""
    event = data._obj
    event.eventType, event.eventData = kind, number
    event.gpuInstanceId, event.computeInstanceId = gi, ci
    return kind
