"""When the loop looks, decides and speaks, with a driver that is only a list of what it will say."""

import asyncio
import logging
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace

import pytest

from migplugin.control import reconciler as reconciler_module
from migplugin.control.ports import Readiness
from migplugin.control.reconciler import DEBOUNCE, FAULTS_AGAIN, Pace, Reconciler
from migplugin.core.allocation import EditOptions
from migplugin.core.decide import Options, Source, Usage
from migplugin.core.health import Health
from migplugin.core.inventory import Inventory
from migplugin.core.resource import Device, of_profile
from migplugin.core.sharing import Shared, TimeSlicing
from migplugin.core.sickness import Fault
from migplugin.errors import DriverError, InputError
from tests.core.examples import ASSORTED, SEVENTHS, inventory


class Told:
    """A driver that shows one node and tells whatever lies in `xids`."""

    events_work = True
    overdue_at: float | None = None

    def __init__(self) -> None:
        self.xids: list[int] = []
        self.taken = self.looks = 0
        self.shown = inventory(SEVENTHS)

    async def look(self, *, suspect: bool = False, processes_of: AbstractSet[str] = frozenset()) -> Inventory:
        self.looks += 1
        return self.shown

    def faults(self) -> tuple[Fault, ...]:
        self.taken += bool(self.xids)
        merged = {x: Fault(SEVENTHS.uuid, 9, 0, x, self.xids.count(x), 0.0, 0.0) for x in self.xids}
        self.xids.clear()
        return tuple(merged.values())


class Nobody:
    async def read(self, began: float) -> Usage:
        return Usage(began=began)


async def test_a_storm_of_xids_is_told_now_and_then_and_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    driver = Told()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace())
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        for _ in range(300):
            driver.xids.append(31)
            reconciler.fault_arrived()
            await asyncio.sleep(0.003)
        await asyncio.sleep(2 * FAULTS_AGAIN)
    finally:
        running.cancel()
    assert sum(vars(record)["count"] for record in caplog.records) == 300
    assert len(caplog.records) == driver.taken <= 4


class Silent:
    """A kubelet that answers the first question and then no other, until it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.let = asyncio.Event()

    async def read(self, began: float) -> Usage:
        self.asked += 1
        if self.asked > 1:
            await self.let.wait()
        return Usage(began=began, checkpoint=Source.OK)


async def test_a_kubelet_that_does_not_say_who_holds_what_holds_no_change_back() -> None:
    driver, usage = Told(), Silent()
    reconciler = Reconciler(driver, usage, Options(), Pace())
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        reconciler.kubelet_changed()
        await until(lambda: usage.asked == 2)
        for shown in (inventory(ASSORTED), inventory(SEVENTHS), inventory(ASSORTED)):
            driver.shown = shown
            version = reconciler.offers.version
            reconciler.geometry_changed()
            await asyncio.wait_for(reconciler.offers.after(version), 2.0)
        steps = driver.looks
        reconciler.kubelet_changed()
        await asyncio.sleep(0.1)
        assert (usage.asked, driver.looks) == (2, steps), "one question at a time, and no spinning meanwhile"
        began = reconciler.world.usage.began
        usage.let.set()
        await until(lambda: usage.asked >= 3 and reconciler.world.usage.began > began)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Away(Told):
    """A driver that does not answer yet, and has an XID to tell all the same."""

    answers = False

    async def look(self, *, suspect: bool = False, processes_of: AbstractSet[str] = frozenset()) -> Inventory:
        if not self.answers:
            self.looks += 1
            raise DriverError("not yet")
        return await super().look(suspect=suspect)


async def test_an_xid_before_the_first_inventory_waits_for_it_and_nobody_spins() -> None:
    driver = Away()
    usage = Silent()
    usage.let.set()
    reconciler = Reconciler(driver, usage, Options(), Pace())
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    decided = reconciler.outcome
    try:
        driver.xids.append(94)
        reconciler.fault_arrived()
        steps = 0
        async with asyncio.timeout(5):
            while driver.looks < 2:
                steps += reconciler.outcome is not decided
                decided = reconciler.outcome
                await asyncio.sleep(0)
        assert steps < 10
        driver.answers = True
        await until(
            lambda: reconciler.outcome is not None and len(reconciler.outcome.memory.health.sick) == 1
        )
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not claim():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_is_granted_is_in_use_at_once_and_counted_once() -> None:
    reconciler = Reconciler(Told(), Nobody(), Options(), Pace())
    await reconciler.first()
    version, before = reconciler.offers.version, reconciler.offers.value
    id_ = SEVENTHS.devices[0].uuid
    for _ in range(2):
        reconciler.grant(of_profile("1g.5gb"), [id_])
    assert reconciler.offers.value.use == {SEVENTHS.uuid: {of_profile("1g.5gb"): 1}}
    assert reconciler.offers.version == version, "no list is looked at for that"
    assert reconciler.offers.value.resources is before.resources


async def test_leases_are_looked_for_though_nothing_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "LEASE_CERTAIN_AFTER", 0.05)
    usage = Silent()
    usage.let.set()
    reconciler = Reconciler(Told(), usage, Options(), Pace())
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        reconciler.grant(of_profile("1g.5gb"), [SEVENTHS.devices[0].uuid])
        await until(lambda: usage.asked >= 2)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_other_options_hold_at_once_and_without_a_look() -> None:
    driver = Told()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace())
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        sharing = TimeSlicing((Shared(of_profile("1g.5gb"), 3),))
        reconciler.reconfigure(Options(sharing=sharing), Pace())
        await until(lambda: len(reconciler.offers.value.resources[of_profile("1g.5gb")].fit) == 7)
        await until(lambda: len(reconciler.offers.value.resources[of_profile("1g.5gb")].devices) == 28)
        assert driver.looks == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def sick_nine() -> tuple[Reconciler, Told]:
    driver = Told()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace())
    await reconciler.first()
    driver.xids.append(94)
    return reconciler, driver


NINE = SEVENTHS.devices[2].uuid


async def test_whom_a_person_clears_is_offered_when_it_returns_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    reconciler, _ = await sick_nine()
    reconciler._judge_faults()
    offer = reconciler.offers.value.resources[of_profile("1g.5gb")]
    assert NINE not in offer.fit
    cleared = reconciler.clear_health([NINE])
    assert cleared.sick.keys() == {NINE}
    assert NINE in reconciler.offers.value.resources[of_profile("1g.5gb")].fit
    (said,) = [record for record in caplog.records if record.message == "cleared by a person"]
    assert (vars(said)["device"], vars(said)["gpu"]) == (NINE, SEVENTHS.uuid)
    assert vars(said)["was"].startswith("XID 94")
    assert "no longer sick" not in caplog.text


async def test_what_came_before_a_person_asked_is_cleared_too() -> None:
    reconciler, driver = await sick_nine()
    assert reconciler.clear_health(None).sick.keys() == {NINE}
    assert not driver.xids


async def test_who_cannot_be_cleared_changes_nothing() -> None:
    reconciler, _ = await sick_nine()
    reconciler._judge_faults()
    outcome = reconciler.outcome
    with pytest.raises(InputError, match="'x' is not sick"):
        reconciler.clear_health([NINE, "x"])
    assert reconciler.outcome is outcome


class Record:
    def __init__(self) -> None:
        self.saved: list[Health] = []

    def load(self, now: float) -> Health:
        return Health()

    def save(self, health: Health) -> bool:
        self.saved.append(health)
        return True


async def test_what_is_cleared_is_recorded_at_once() -> None:
    driver, record = Told(), Record()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace(), record=record)
    await reconciler.first()
    driver.xids.append(94)
    reconciler._judge_faults()
    assert record.saved[-1].sick
    reconciler.clear_health(None)
    assert not record.saved[-1].sick


async def test_what_a_person_sees_has_the_leases_of_now_and_fresh_usage_but_no_new_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconciler_module, "USAGE_SOONEST", 0.0)
    driver, usage = Told(), Silent()
    usage.let.set()
    reconciler = Reconciler(driver, usage, Options(), Pace())
    await reconciler.first()
    reconciler.grant(of_profile("1g.5gb"), [NINE])
    world, _ = await reconciler.seen(within=1.0)
    assert world.leases.keys() == {(of_profile("1g.5gb"), NINE)}
    assert (usage.asked, driver.looks) == (2, 1)
    usage.let.clear()
    began = time.monotonic()
    again, outcome = await reconciler.seen(within=0.05)
    assert 0.04 < time.monotonic() - began < 1.0, "a kubelet that does not say is not waited for"
    assert (again.usage, outcome) == (world.usage, reconciler.outcome)
    monkeypatch.setattr(reconciler_module, "USAGE_SOONEST", 60.0)
    await reconciler.seen(within=0.05)
    assert usage.asked == 3, "one question at a time"
    usage.let.set()


class Slow:
    """A preparation that says what a device lacks once it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.entered = asyncio.Event()

    async def prepare(self, inventory: Inventory, edits: EditOptions) -> Readiness:
        if len(inventory.gpus) > 1:
            self.entered.set()
            await self.let.wait()
        return Readiness({device.uuid: "no device node" for gpu, device in inventory.devices() if gpu.index})


async def test_whoever_asks_while_devices_are_made_ready_is_not_shown_them_as_ready() -> None:
    driver, slow = Told(), Slow()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace(), preparations=[slow])
    await reconciler.first()
    driver.shown = inventory(SEVENTHS, ASSORTED)
    running = asyncio.ensure_future(reconciler.run())
    try:
        reconciler.geometry_changed()
        await asyncio.wait_for(slow.entered.wait(), 5)
        reconciler.clear_health(None)
        await reconciler.seen(0.1)
        assert {device.gpu_index for device in offered(reconciler)} == {0}
        slow.let.set()
        await until(lambda: {device.gpu_index for device in offered(reconciler)} == {0, 1})
        assert not any(device.gpu_index for device in offered(reconciler, healthy=True))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def offered(reconciler: Reconciler, *, healthy: bool = False) -> list[Device]:
    return [
        entry.device
        for offer in reconciler.offers.value.resources.values()
        for entry in offer.devices.values()
        if entry.healthy or not healthy
    ]


class Looking(Told):
    """A driver that says in a look what is news only afterwards, and how often it was looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.let.set()

    async def look(self, *, suspect: bool = False, processes_of: AbstractSet[str] = frozenset()) -> Inventory:
        shown = self.shown
        self.looks += 1
        await self.let.wait()
        return shown


async def test_news_that_come_during_a_look_are_looked_at_and_in_a_storm_now_and_then() -> None:
    driver = Looking()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace(3600.0))
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        driver.let.clear()
        reconciler.geometry_changed()
        await until(lambda: driver.looks == 2)
        driver.shown = inventory(SEVENTHS, ASSORTED)
        reconciler.look_soon()
        driver.let.set()
        await until(lambda: {device.gpu_index for device in offered(reconciler)} == {0, 1})
        looks, began = driver.looks, time.monotonic()
        while time.monotonic() < began + 3 * FAULTS_AGAIN:
            reconciler.look_soon()
            await asyncio.sleep(0.005)
        assert 2 <= driver.looks - looks <= 4
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_question_about_usage_that_is_given_up_leaves_its_answer_to_the_loop() -> None:
    usage = Silent()
    usage.let.set()
    reconciler = Reconciler(Told(), usage, Options(), Pace(3600.0))
    await reconciler.first()
    usage.let.clear()
    reconciler.world = replace(reconciler.world, usage=replace(reconciler.world.usage, began=-100.0))
    asking = asyncio.ensure_future(reconciler.seen(60.0))
    await until(lambda: usage.asked == 2)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    running = asyncio.ensure_future(reconciler.run())
    try:
        usage.let.set()
        await until(lambda: reconciler.world.usage.began > 0)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_who_is_sick_is_seen_to_be_gone_though_made_anew_at_once() -> None:
    driver = Told()
    reconciler = Reconciler(driver, Nobody(), Options(), Pace(3600.0))
    await reconciler.first()
    running = asyncio.ensure_future(reconciler.run())
    try:
        driver.xids.append(94)
        reconciler.fault_arrived()
        await until(lambda: sick(reconciler))
        devices = SEVENTHS.devices
        driver.shown = inventory(replace(SEVENTHS, devices=tuple(d for d in devices if d.gi != 9)))
        reconciler.geometry_changed()
        await asyncio.sleep(DEBOUNCE / 2)
        driver.shown = inventory(SEVENTHS)
        reconciler.geometry_changed()
        await until(lambda: not sick(reconciler))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def sick(reconciler: Reconciler) -> bool:
    return reconciler.outcome is not None and bool(reconciler.outcome.memory.health.sick)
