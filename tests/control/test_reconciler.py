"""When the loop looks, decides and speaks, with a driver that is only a list of what it will say."""

import asyncio
import logging

import pytest

from migplugin.control.reconciler import FAULTS_AGAIN, Pace, Reconciler
from migplugin.core.decide import Fault, Options, Usage
from migplugin.core.inventory import Inventory
from tests.core.examples import SEVENTHS, inventory


class Told:
    """A driver that shows one node and tells whatever lies in `xids`."""

    events_work = True

    def __init__(self) -> None:
        self.xids: list[int] = []
        self.taken = 0

    async def look(self, *, suspect: bool = False) -> Inventory:
        return inventory(SEVENTHS)

    def faults(self) -> tuple[Fault, ...]:
        self.taken += bool(self.xids)
        merged = {x: Fault(SEVENTHS.uuid, 1, 0, x, self.xids.count(x), 0.0, 0.0) for x in self.xids}
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
