"""Drivers that behave in ways for which the simulator has no switch, and a library that is passed over."""

import asyncio
import contextlib
import ctypes
import logging
import time
from pathlib import Path

import pytest

from migplugin.core.inventory import Signs
from migplugin.errors import DriverError, DriverTimeout, LibraryOutdated
from migplugin.nvml import binding
from migplugin.nvml.capabilities import Capabilities
from migplugin.nvml.library import SONAME
from migplugin.sim.records import Failure
from tests.nvml.machine import SEVEN, Watched, devices, machine, patiently, until, watching

WAIT, INIT, REGISTER = "nvmlEventSetWait_v2", "nvmlInitWithFlags", "nvmlDeviceRegisterEvents"
UNKNOWN = 999


async def test_a_wait_that_always_fails_opens_the_session_anew_once_and_not_for_ever() -> None:
    """As the agent follows it: each time it is told of a change it looks, in doubt about the session."""
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            with place.refusing(WAIT, UNKNOWN):
                await _follow(watched, 1.0)
                assert place.calls[INIT] == 2
                assert place.calls[WAIT] < 30
                assert not watched.driver.events_work


async def test_a_failure_that_comes_after_waits_have_worked_again_is_told_again() -> None:
    with machine(SEVEN) as place:
        async with watching(place) as watched:
            await watched.driver.look()
            for times in (1, 2):
                with place.refusing(WAIT, UNKNOWN):
                    await asyncio.wait_for(watched.geometry.wait(), 5)
                    watched.geometry.clear()
                assert watched.told["geometry"] == times
                place.xid(79)
                await asyncio.wait_for(watched.fault.wait(), 5)
                watched.fault.clear()


async def test_a_set_that_one_gpu_spoils_is_freed_and_made_again_without_it() -> None:
    """nvml.h: after UNKNOWN the event set is in an undefined state and should be freed."""
    with machine("3xa100-40gb=1g.5gb") as place:
        register = place.library.original(REGISTER)
        second: list[object] = []

        def spoil(device: object, kind: int, events: object) -> int:
            address = ctypes.cast(device, ctypes.c_void_p).value  # type: ignore[arg-type]
            if address not in second:
                second.append(address)
            return UNKNOWN if second.index(address) == 1 else register(device, kind, events)

        place.library.replaced[REGISTER] = spoil
        async with watching(place) as watched:
            seen = await watched.driver.look()
            assert len(devices(seen)) == 3
            assert not watched.driver.events_work, "one GPU tells nothing: look often"
            assert place.calls["nvmlEventSetCreate"] == 2
            assert place.calls["nvmlEventSetFree"] == 1
            calls = place.calls[REGISTER]
            await watched.driver.look()
            assert place.calls[REGISTER] == calls, "nor is it asked again and again"
            place.xid(79, gpu=2)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert [fault.gpu for fault in watched.driver.faults()] == [seen.gpus[2].uuid]


async def test_a_set_that_is_spoilt_later_stays_spoilt_and_is_given_up_at_the_next_look() -> None:
    with machine("3xa100-40gb", events="mig-when-enabled") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            for gpu in range(3):
                place.mig_mode(on=True, gpu=gpu)
            codes = iter([UNKNOWN, 15, 15, 15])
            place.library.replaced[REGISTER] = lambda *_: next(codes)
            with place.refusing("nvmlDeviceGetSupportedEventTypes", 15):
                await watched.driver.look()
            assert place.calls[INIT] == 1, "a GPU that cannot be asked spoils nothing"
            await watched.driver.look()
            assert list(codes) == [15, 15, 15], "a spoilt set is not added to"
            del place.library.replaced[REGISTER]
            assert not watched.driver.events_work
            await watched.driver.look()
            assert place.calls[INIT] == 2
            await watched.driver.look()
            assert place.calls[INIT] == 2
            place.xid(79, gpu=2)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert watched.driver.events_work


async def test_an_event_of_a_handle_that_we_were_never_given_is_asked_for_its_gpu() -> None:
    with machine("2xa100-40gb=1g.5gb") as place:
        async with watching(place) as watched:
            seen = await watched.driver.look()
            assert watched.driver._registration is not None
            watched.driver._registration.gpus.clear()
            place.xid(79, gpu=1)
            await asyncio.wait_for(watched.fault.wait(), 5)
            assert [fault.gpu for fault in watched.driver.faults()] == [seen.gpus[1].uuid]


def test_a_gpu_is_remembered_by_its_uuid_though_the_rest_of_it_could_not_be_read() -> None:
    with machine("2xa100-40gb=1g.5gb") as place, place.session() as snapshots:
        with place.refusing("nvmlDeviceGetMinorNumber", UNKNOWN):
            snapshots.take()
        place.lose(1)
        (lost,) = snapshots.take().inventory.broken
        assert lost.uuid == place.node.gpus[1].uuid


def test_a_gpu_whose_name_is_no_text_breaks_no_other() -> None:
    with machine("2xa100-40gb=1g.5gb") as place:
        name = place.library.original("nvmlDeviceGetName")
        asked: list[object] = []

        def garble(device: object, buffer: ctypes.Array[ctypes.c_char], length: object) -> int:
            code = name(device, buffer, length)
            asked.append(device)
            if len(asked) == 1:
                buffer.value = b"\xff\xfe"
            return code

        place.library.replaced["nvmlDeviceGetName"] = garble
        inventory = place.look().inventory
    assert [gpu.index for gpu in inventory.broken] == [0]
    assert len(inventory.gpus[0].devices) == 1


def test_an_instance_that_leaves_while_its_files_are_read_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine(SEVEN) as place:
        read = Path.iterdir

        def leave(path: Path) -> object:
            if path.name == "gi7":
                raise FileNotFoundError(path)
            return read(path)

        monkeypatch.setattr(Path, "iterdir", leave)
        seen = Capabilities(place.simulation.proc_root).seen(0)
    assert seen == frozenset((gi, 0) for gi in range(8, 14))


def test_a_library_that_was_passed_over_for_that_of_the_linker_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usr/lib64" / SONAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    load, found = ctypes.CDLL, object()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found if name == SONAME else load(name))
    with caplog.at_level(logging.WARNING):
        binding.load(search=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "the driver root's NVML library was passed over"
    ]
    assert str(path) in str(caplog.records[0].__dict__["reason"])


def test_files_that_cannot_be_read_for_want_of_descriptors_are_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with machine(SEVEN) as place:
        read = Path.iterdir

        def fail(path: Path) -> object:
            if path.name == "gi7":
                raise OSError(24, "Too many open files", str(path))
            return read(path)

        monkeypatch.setattr(Path, "iterdir", fail)
        assert Capabilities(place.simulation.proc_root).seen(0) is None


async def test_what_the_driver_once_fails_to_tell_is_as_it_told_it_last() -> None:
    with machine("1xa100-40gb=1g.5gb*2,1xa100-40gb") as place:
        place.change(lambda node: node.gpus[0].record.fields.update({230: 1}))
        place.change(lambda node: node.gpus[1].ecc(2))
        async with watching(place) as watched:
            told = [gpu.signs for gpu in (await watched.driver.look()).gpus]
            assert [(s.action, s.uncorrected) for s in told] == [(1, None), (None, 2)]
            calls = (
                "nvmlDeviceGetFieldValues",
                "nvmlDeviceGetTotalEccErrors",
                "nvmlDeviceGetMemoryErrorCounter",
            )
            for code in (3, UNKNOWN):
                with contextlib.ExitStack() as stack:
                    for call in calls:
                        stack.enter_context(place.refusing(call, code))
                    assert [gpu.signs for gpu in (await watched.driver.look()).gpus] == told
            place.switch(driver_version="595.10")
            with contextlib.ExitStack() as stack:
                for call in calls:
                    stack.enter_context(place.refusing(call, 3))
                with pytest.raises(DriverError):
                    await watched.driver.look()
                assert {gpu.signs for gpu in (await watched.driver.look()).gpus} == {Signs()}


@pytest.mark.parametrize("code", [2, 6])
async def test_a_device_that_exists_and_of_which_the_driver_says_nothing_is_not_taken_for_gone(
    code: int,
) -> None:
    with machine("2xa100-40gb=1g.5gb*2") as place:
        async with watching(place) as watched:
            await watched.driver.look()
            place.switch(fail={"nvmlDeviceGetGpuInstanceId": Failure(code, 0)})
            seen = await watched.driver.look()
            assert [gpu.index for gpu in seen.gpus] == [1]
            assert [(gpu.index, gpu.reason.partition(":")[0]) for gpu in seen.broken] == [
                (0, "nvmlDeviceGetGpuInstanceId")
            ]
            place.switch(fail={})
            assert len(devices(await watched.driver.look())) == 4


CALLS = ("nvmlEventSetCreate", "nvmlDeviceGetSupportedEventTypes", REGISTER, WAIT)


@pytest.mark.parametrize("call", CALLS)
async def test_a_library_that_no_longer_fits_is_told_by_any_call_of_events(call: str) -> None:
    with machine(SEVEN) as place, place.refusing(call, 18):
        async with watching(place) as watched:
            with pytest.raises(LibraryOutdated):
                await _look_until_told(watched)


async def test_a_wait_that_does_not_come_back_is_a_driver_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("migplugin.nvml.events.GIVE_UP_AFTER", 0.05)
    with machine(SEVEN) as place:
        async with watching(place, deadline=0.3) as watched:
            await patiently(watched.driver)
            place.switch(hang=[WAIT])
            await until(lambda: (watched.driver.overdue_at or time.monotonic()) < time.monotonic())
            said: set[str] = set()
            for _ in range(5):
                with pytest.raises(DriverTimeout) as error:
                    await watched.driver.look()
                said.add(str(error.value))
            assert any("nvmlEventSetWait" in text for text in said)
            place.switch(hang=[])
            assert len(devices(await patiently(watched.driver))) == 7
            assert watched.hears()


async def _look_until_told(watched: Watched) -> None:
    await watched.driver.look()
    await asyncio.wait_for(watched.geometry.wait(), 5)
    await watched.driver.look()


async def _follow(watched: Watched, seconds: float) -> None:
    """Looks whenever a change is told, for a while: what must not happen would take no time at all."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            await asyncio.wait_for(watched.geometry.wait(), left)
        except TimeoutError:
            return
        watched.geometry.clear()
        await watched.driver.look(suspect=True)
