"""The one session and the doubts about it: when it is opened anew, how often, and what survives a hang."""

import asyncio
import threading
import time
from typing import Any

import pytest

from migplugin.errors import DriverError, DriverNotReady, DriverTimeout, LibraryMissing
from migplugin.nvml import driver as edges
from migplugin.sim.model import Node
from migplugin.sim.records import Failure, Process
from tests.nvml.machine import SEVEN, devices, edge, machine, patiently, until, watching

INIT, SHUTDOWN, WAIT = "nvmlInitWithFlags", "nvmlShutdown", "nvmlEventSetWait_v2"


async def test_a_stale_session_is_noticed_by_the_files_at_a_plain_look() -> None:
    with machine(SEVEN, stale_sessions=True) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.recarve("3g.20gb", "2g.10gb")
            found = devices(await watched.driver.look())
            assert {device.uuid for device in found} == place.uuids()
            assert {device.profile for device in found} == {"3g.20gb", "2g.10gb"}
            assert place.calls[INIT] == 2


async def test_a_stale_session_behind_hidden_files_is_noticed_when_an_event_came() -> None:
    with machine(SEVEN, stale_sessions=True, runtime_view="container", privilege="none") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.recarve("3g.20gb", "2g.10gb")
            found = devices(await watched.changed())
            assert {device.uuid for device in found} == place.uuids()
            assert place.calls[INIT] == 2


async def test_a_new_device_behind_hidden_files_is_noticed_though_its_gpu_instance_is_told() -> None:
    """GPU instances are listed live, MIG devices by the stale session: something has changed, not enough."""
    with machine("1xa100-40gb=1g.5gb", stale_sessions=True, runtime_view="container") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.create("3g.20gb")
            found = devices(await watched.changed())
            assert {device.uuid for device in found} == place.uuids()


async def test_another_profile_under_the_same_ids_is_not_served_under_a_mixed_name() -> None:
    """4g.20gb and 3g.20gb at the same place have one GPU instance id, and with it one UUID."""
    with machine("1xa100-40gb=4g.20gb", stale_sessions=True) as place:
        async with watching(place) as watched:
            (before,) = devices(await watched.driver.look())

            def swap(node: Any) -> None:
                node.gpus[0].destroy(1)
                node.gpus[0].create("3g.20gb", 0)

            place.change(swap)
            (after,) = devices(await watched.driver.look())
            assert (before.uuid, after.uuid) == (after.uuid, before.uuid)
            assert (before.profile, after.profile) == ("4g.20gb", "3g.20gb")


async def test_an_event_that_shows_no_change_opens_the_session_anew_once() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            first = await watched.driver.look()
            assert place.calls[INIT] == 1
            assert await watched.driver.look(suspect=True) == first
            assert place.calls[INIT] == 2
            assert place.calls[SHUTDOWN] == 1


async def test_devices_of_the_past_in_places_of_the_present_are_doubted() -> None:
    """Made again with the ids that they had, in other places: only the places are new in a stale session."""
    with machine(SEVEN, stale_sessions=True, runtime_view="container", uuid_reuse=False) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.recarve(*["1g.5gb"] * 7)
            place.change(_swap_places)
            assert {
                device.uuid for device in devices(await watched.driver.look(suspect=True))
            } == place.uuids()


def _swap_places(node: Node) -> None:
    one, other, *_ = node.gpus[0].instances
    one.start, other.start = other.start, one.start


async def test_an_event_that_shows_its_change_leaves_the_session_alone() -> None:
    with machine("1xa100-40gb=") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.create("1g.5gb")
            assert len(devices(await watched.changed())) == 1
            assert place.calls[INIT] == 1


async def test_files_that_never_agree_open_the_session_anew_once() -> None:
    """A container that sees the instances of its start, and none that came later."""
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            tree = place.simulation.proc_root / "driver/nvidia/capabilities/gpu0/mig"
            for part in ("ci0/access", "access"):
                (tree / "gi13" / part).unlink()
            for _ in range(4):
                assert len(devices(await watched.driver.look())) == 7
            assert place.calls[INIT] == 2


async def test_files_that_are_only_partly_visible_do_not_hide_a_device_from_the_start() -> None:
    with machine(SEVEN) as place:
        tree = place.simulation.proc_root / "driver/nvidia/capabilities/gpu0/mig"
        (tree / "gi13/ci0/access").unlink()
        async with watching(place) as watched:
            for _ in range(3):
                assert len(devices(await watched.driver.look())) == 7
            assert place.calls[INIT] == 1


async def test_a_disagreement_that_ends_and_comes_back_is_doubted_again() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            access = place.simulation.proc_root / "driver/nvidia/capabilities/gpu0/mig/gi13/ci0/access"
            text = access.read_text()
            for seen, sessions in ((False, 2), (True, 2), (False, 3), (False, 3)):
                access.unlink(missing_ok=True)
                if seen:
                    access.write_text(text)
                await watched.driver.look()
                assert place.calls[INIT] == sessions


async def test_hidden_files_let_a_session_be_trusted_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = {"runtime_view": "container", "privilege": "none", "events": "none"}
    with machine(SEVEN, stale_sessions=True, **switches) as place:
        async with watching(place) as watched:
            first = await watched.driver.look()
            place.recarve("7g.40gb")
            assert [d.uuid for d in devices(await watched.driver.look())] == [d.uuid for d in devices(first)]
            monkeypatch.setattr(edges, "UNSEEN_SESSION_TRUSTED", 0.0)
            assert [device.profile for device in devices(await watched.driver.look())] == ["7g.40gb"]


async def test_without_events_a_device_made_again_in_its_place_is_found_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its files are the same as before, and no event tells that it is another one."""
    with machine("1xa100-40gb=3g.20gb", stale_sessions=True, events="none", uuid_reuse=False) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.recarve("3g.20gb")
            monkeypatch.setattr(edges, "UNSEEN_SESSION_TRUSTED", 0.0)
            assert {device.uuid for device in devices(await watched.driver.look())} == place.uuids()


async def test_a_session_that_can_be_checked_is_not_opened_anew_by_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edges, "UNSEEN_SESSION_TRUSTED", 0.0)
    with machine(f"{SEVEN},1xa100-40gb") as place:
        async with watching(place) as watched:
            for _ in range(3):
                await watched.driver.look()
            assert place.calls[INIT] == 1


async def test_events_still_arrive_after_the_session_was_opened_anew() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            await watched.driver.look(suspect=True)
            assert watched.hears()
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)
            place.recarve("2g.10gb")
            assert [device.profile for device in devices(await watched.changed())] == ["2g.10gb"]


async def test_the_session_never_ends_under_the_event_thread() -> None:
    with machine(SEVEN) as place:
        inside = threading.Semaphore(0)
        waiting: list[bool] = []
        wait, shutdown = place.library.original(WAIT), place.library.original(SHUTDOWN)
        free = place.library.original("nvmlEventSetFree")

        def watched_wait(*arguments: object) -> int:
            waiting.append(True)
            inside.release()
            try:
                return wait(*arguments)
            finally:
                waiting.pop()

        ended: list[int] = []

        def watched_shutdown() -> int:
            ended.append(len(waiting))
            return shutdown()

        def watched_free(events: object) -> int:
            ended.append(len(waiting))
            return free(events)

        place.library.replaced |= {
            WAIT: watched_wait,
            SHUTDOWN: watched_shutdown,
            "nvmlEventSetFree": watched_free,
        }
        async with watching(place) as watched:
            await watched.driver.look()
            assert inside.acquire(timeout=5)
            await watched.driver.look(suspect=True)
        assert ended == [0, 0, 0, 0]


async def test_an_event_between_two_sessions_is_not_lost() -> None:
    """It comes when the event thread has left and the old session still stands."""
    with machine(SEVEN) as place:
        drained = place.library.original(WAIT)
        left = threading.Event()

        def wait(events: object, data: object, timeout: Any) -> int:
            if threading.current_thread().name == "nvml" and not left.is_set():
                left.set()
                place.xid(48, gi=13, ci=0)
            return drained(events, data, timeout)

        place.library.replaced[WAIT] = wait
        async with watching(place) as watched:
            await watched.driver.look()
            await watched.driver.look(suspect=True)
            assert left.is_set()
            assert [fault.xid for fault in watched.driver.faults()] == [48]


async def test_a_call_that_hangs_is_told_within_the_deadline_and_the_next_look_works_after_it() -> None:
    with machine(SEVEN) as place:
        async with watching(place, deadline=0.2) as watched:
            before = await watched.driver.look()
            place.switch(hang=["nvmlDeviceGetUUID"])
            began = time.monotonic()
            with pytest.raises(DriverTimeout, match=r"within 0\.2 s"):
                await watched.driver.look()
            with pytest.raises(DriverTimeout):
                await watched.driver.look()
            assert time.monotonic() - began < 2
            place.switch(hang=[])
            assert await patiently(watched.driver) == before


async def test_a_hang_of_the_opening_is_over_when_the_driver_answers() -> None:
    with machine(SEVEN, hang=[INIT]) as place:
        async with watching(place, deadline=0.2) as watched:
            with pytest.raises(DriverTimeout):
                await watched.driver.look()
            place.switch(hang=[])
            assert len(devices(await patiently(watched.driver))) == 7
            assert place.calls[INIT] == 1


@pytest.mark.parametrize("call", ["nvmlDeviceGetUUID", INIT, WAIT, SHUTDOWN, "*"])
async def test_closing_gives_up_in_time_however_the_driver_hangs(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert edges.CLOSE_WITHIN == 1
    monkeypatch.setattr(edges, "CLOSE_WITHIN", 0.2)
    with machine(SEVEN) as place:
        watched = edge(place, deadline=0.1)
        if call != INIT:
            await patiently(watched.driver)
        place.switch(hang=[call])
        if call not in {SHUTDOWN, WAIT}:
            with pytest.raises(DriverTimeout):
                await watched.driver.look()
        began = time.monotonic()
        await watched.driver.close()
        assert time.monotonic() - began < 1
        # When the hang is over every thread of ours leaves: the end of `machine` checks it.


async def test_a_hung_event_thread_costs_no_look_and_is_replaced_once_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migplugin.nvml.events.GIVE_UP_AFTER", 0.05)
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            first = await watched.driver.look()
            entered, back = threading.Event(), threading.Event()

            def hang(*_: object) -> int:
                entered.set()
                back.wait(10)
                return 10

            place.library.replaced[WAIT] = hang
            await until(entered.is_set)
            assert await watched.driver.look(suspect=True) == first
            assert not watched.hears()
            assert place.calls[INIT] == 1, "a session does not end under its event thread"
            assert await watched.driver.look() == first
            place.library.replaced.clear()
            back.set()
            await until(lambda: not _alive("nvml-events"))
            assert await watched.driver.look() == first
            assert place.calls[INIT] == 2
            assert watched.hears()
            place.xid(31)
            await asyncio.wait_for(watched.fault.wait(), 5)


async def test_a_driver_that_is_not_loaded_is_told_and_works_once_it_is() -> None:
    with machine(SEVEN, driver_loaded=False) as place:
        async with watching(place) as watched:
            for _ in range(2):
                with pytest.raises(DriverNotReady, match="not loaded"):
                    await watched.driver.look()
            place.switch(driver_loaded=True)
            assert len(devices(await watched.driver.look())) == 7
            assert watched.hears()


@pytest.mark.parametrize("call", ["nvmlDeviceGetCount_v2", "nvmlSystemGetDriverVersion"])
async def test_an_opening_that_fails_half_way_leaves_nothing_open(call: str) -> None:
    with machine(SEVEN, fail={call: Failure(999)}) as place:
        async with watching(place) as watched:
            for _ in range(3):
                with pytest.raises(DriverError, match="999"):
                    await watched.driver.look()
            assert place.calls[INIT] == place.calls[SHUTDOWN] == 3
            assert place.calls["nvmlEventSetCreate"] == place.calls["nvmlEventSetFree"]
            place.switch(fail={})
            assert len(devices(await watched.driver.look())) == 7
            assert watched.hears()


async def test_a_reopening_that_fails_half_way_is_mended_by_the_next_look() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            first = await watched.driver.look()
            with place.refusing("nvmlDeviceGetCount_v2", 999), pytest.raises(DriverError):
                await watched.driver.look(suspect=True)
            with place.refusing(INIT, 9), pytest.raises(DriverNotReady):
                await watched.driver.look()
            assert await watched.driver.look() == first
            assert watched.hears()


@pytest.mark.parametrize(
    "symbol",
    [
        "nvmlEventSetCreate",
        "nvmlEventSetWait_v2",
        "nvmlEventSetFree",
        "nvmlDeviceRegisterEvents",
        "nvmlDeviceGetSupportedEventTypes",
    ],
)
async def test_a_driver_without_an_event_function_is_served_by_looking(symbol: str) -> None:
    with machine(SEVEN, missing_symbols=[symbol]) as place:
        async with watching(place) as watched:
            first = await watched.driver.look()
            if symbol == "nvmlEventSetWait_v2":
                await asyncio.wait_for(watched.geometry.wait(), 5)
            assert watched.hears() == (symbol == "nvmlEventSetFree")
            assert len(devices(first)) == 7
            place.recarve("7g.40gb")
            assert [device.profile for device in devices(await watched.driver.look())] == ["7g.40gb"]


@pytest.mark.parametrize("events", ["none", "no-mig"])
async def test_events_that_are_not_supported_do_not_work(events: str) -> None:
    with machine(SEVEN, events=events) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            assert not watched.hears()


async def test_xids_arrive_where_changes_of_geometry_are_not_told() -> None:
    with machine(SEVEN, events="no-mig") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.xid(79)
            await asyncio.wait_for(watched.fault.wait(), 5)


async def test_mig_that_is_enabled_later_is_registered_then() -> None:
    with machine("1xa100-40gb", events="mig-when-enabled") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            assert not watched.hears()
            place.mig_mode(on=True)
            await watched.driver.look()
            assert watched.hears()
            place.create("1g.5gb")
            assert len(devices(await watched.changed())) == 1


async def test_what_is_created_before_its_events_are_registered_is_seen_all_the_same() -> None:
    """Between the look and the registration that it led to."""
    with machine("1xa100-40gb", events="mig-when-enabled") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.mig_mode(on=True)
            register = place.library.original("nvmlDeviceRegisterEvents")

            def late(*arguments: object) -> int:
                if not place.uuids():
                    place.create("1g.5gb")
                return register(*arguments)

            place.library.replaced["nvmlDeviceRegisterEvents"] = late
            assert len(devices(await watched.driver.look())) == 1


async def test_a_node_without_mig_needs_no_events_of_geometry() -> None:
    with machine("1xa100-40gb", fail={"nvmlDeviceGetMigMode": Failure(3)}, events="no-mig") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            assert watched.hears()


@pytest.mark.parametrize("stale", [False, True])
async def test_looks_while_others_carve_break_nothing_and_end_with_the_truth(*, stale: bool) -> None:
    with machine("2xa100-40gb=1g.5gb*7", stale_sessions=stale) as place:
        layouts = [["3g.20gb", "2g.10gb"], ["7g.40gb"], ["1c.4g.20gb", "1g.5gb"], ["4g.20gb"], ["1g.5gb"] * 7]

        def carve() -> None:
            for number in range(25):
                place.recarve(*layouts[number % len(layouts)], gpu=number % 2)

        async with watching(place) as watched:
            before = await watched.driver.look()
            carver = threading.Thread(target=carve)
            carver.start()
            looks = 0
            while carver.is_alive():
                looks += 1
                seen = await watched.driver.look(suspect=bool(looks % 2))
                assert not seen.broken
                assert [gpu.uuid for gpu in seen.gpus] == [gpu.uuid for gpu in before.gpus]
            carver.join()
            found = devices(await watched.driver.look(suspect=True))
            assert {device.uuid for device in found} == place.uuids(0) | place.uuids(1)
            assert {(d.gi, d.ci, d.profile) for d in found} == {
                (gi.id, ci.id, gpu.ci_name(gi, ci)) for gpu in place.node.gpus for gi, ci in gpu.mig_devices()
            }
            assert all(device.placement for device in found)


async def test_a_library_that_is_installed_later_is_loaded_then() -> None:
    with machine(SEVEN) as place:
        missing = [LibraryMissing("not yet")] * 2

        def library() -> object:
            if missing:
                raise missing.pop()
            return place.library

        watched = edge(place)
        watched.driver._library = library
        for _ in range(2):
            with pytest.raises(LibraryMissing):
                await watched.driver.look()
        assert len(devices(await watched.driver.look())) == 7
        await watched.driver.close()


async def test_processes_are_asked_for_only_where_somebody_wants_to_know() -> None:
    with machine("1xa100-40gb=1g.5gb*2,1xa100-40gb") as place:
        (busy, ci), (_, idle) = place.node.gpus[0].mig_devices()
        whole = place.node.gpus[1].uuid
        place.change(lambda node: node.gpus[0].ci(busy.id, ci.id).processes.append(Process(7, "python3")))
        place.change(lambda node: node.gpus[1].record.processes.append(Process(8, "python3")))
        async with watching(place) as watched:
            assert (await watched.driver.look()).running == frozenset()
            assert "nvmlDeviceGetComputeRunningProcesses_v3" not in place.calls
            asked = frozenset({ci.uuid, idle.uuid, whole})
            assert (await watched.driver.look(processes_of=asked)).running == {ci.uuid, whole}


@pytest.mark.parametrize(
    "symbol", ["nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMemoryErrorCounter"]
)
async def test_a_driver_that_cannot_be_asked_about_fitness_is_served(symbol: str) -> None:
    with machine(SEVEN, missing_symbols=[symbol]) as place:
        async with watching(place) as watched:
            seen = await watched.driver.look(processes_of=frozenset(place.uuids()))
            assert len(devices(seen)) == 7
            assert seen.running == frozenset()


async def test_after_the_end_a_look_is_refused_and_another_end_is_nothing() -> None:
    with machine(SEVEN) as place:
        driver = edge(place).driver
        await driver.look()
        await driver.close()
        await driver.close()
        with pytest.raises(DriverError, match="closed"):
            await driver.look()
        assert place.calls[SHUTDOWN] == 1


async def test_closing_what_was_never_opened_is_quick() -> None:
    with machine(SEVEN) as place:
        await edge(place).driver.close()
        assert not place.calls


def _alive(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())
