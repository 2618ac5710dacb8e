"""Faults folded over geometries: who is sick afterwards, and for how long."""

from dataclasses import replace

from migplugin.core.health import Change, Fault, Health, fold
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuUuid, Inventory
from migplugin.core.xid import Checks
from tests.core.examples import ASSORTED, SEVENTHS, gpu, inventory, uuid

WHOLE = gpu(2, mig=False)
SHARED_GI = gpu(3, (2, "3g.20gb", 0, 4, ("1c.3g.20gb", "2c.3g.20gb")), (1, "3g.20gb", 4, 4))
NODE = inventory(SEVENTHS, ASSORTED, WHOLE, SHARED_GI)


def fault(
    of: Gpu, code: int, gi: int | None = None, ci: int | None = None, *, at: float = 1.0, count: int = 1
) -> Fault:
    return Fault(of.uuid, gi, ci, code, count, at, at)


class Run:
    """The state after each step, and what changed in all."""

    def __init__(self, *faults: Fault, checks: Checks | None = None) -> None:
        self.health = Health()
        self.changes: list[Change] = []
        self.checks = checks or Checks()
        self.inventory = NODE
        self.step(*faults)

    def step(self, *faults: Fault, see: Inventory | None = None) -> None:
        self.inventory = see or self.inventory
        self.health, changes = fold(self.health, self.inventory, faults, self.checks)
        self.changes += changes

    def unfit(self) -> set[str]:
        """Every device and GPU in the inventory that is unfit."""
        ids = [(d.uuid, g.uuid) for g, d in self.inventory.devices()]
        ids += [(DeviceId(g.uuid), g.uuid) for g in self.inventory.gpus]
        return {id_ for id_, of in ids if self.health.why(id_, of)}


def everything_on(of: Gpu) -> set[str]:
    return {of.uuid, *(device.uuid for device in of.devices)}


def test_a_fault_of_an_instance_concerns_its_device_alone() -> None:
    assert Run(fault(SEVENTHS, 94, 9, 0)).unfit() == {uuid(0, 9)}
    assert Run(fault(SHARED_GI, 94, 2, 1)).unfit() == {uuid(3, 2, 1)}


def test_a_fault_of_a_gpu_instance_concerns_all_that_is_in_it() -> None:
    assert Run(fault(SHARED_GI, 94, 2)).unfit() == {uuid(3, 2, 0), uuid(3, 2, 1)}


def test_a_fault_that_names_no_instance_concerns_the_whole_gpu() -> None:
    assert Run(fault(ASSORTED, 48)).unfit() == everything_on(ASSORTED)


def test_a_fault_of_the_gpu_concerns_it_whatever_instance_the_driver_names() -> None:
    for code in (79, 74, 109):
        assert Run(fault(SEVENTHS, code, 0, 0)).unfit() == everything_on(SEVENTHS)


def test_where_mig_is_off_the_gpu_is_the_device() -> None:
    assert Run(fault(WHOLE, 48, 0, 0)).unfit() == {WHOLE.uuid}


def test_what_an_application_did_is_counted_and_leaves_healthy() -> None:
    run = Run(fault(SEVENTHS, 31, 9, 0, count=3), fault(ASSORTED, 45))
    run.step(fault(SEVENTHS, 31))
    assert run.unfit() == set()
    assert run.health.counts == {31: 4, 45: 1}
    assert not run.changes


def test_an_unknown_xid_makes_sick_and_says_that_it_is_unknown() -> None:
    run = Run(fault(SEVENTHS, 5000, 9, 0))
    assert run.unfit() == {uuid(0, 9)}
    assert "XID 5000 (not in the table)" in run.health.why(DeviceId(uuid(0, 9)), SEVENTHS.uuid)


def test_checks_that_are_off_leave_healthy() -> None:
    assert Run(fault(SEVENTHS, 79), checks=Checks(disabled=None)).unfit() == set()
    assert Run(fault(SEVENTHS, 31, 9, 0), checks=Checks(enabled=frozenset({31}))).unfit() == {uuid(0, 9)}


def test_a_fault_that_names_nobody_concerns_nobody() -> None:
    stranger = replace(WHOLE, uuid=GpuUuid("GPU-of-nobody"))
    run = Run(fault(SEVENTHS, 94, 3, 0), fault(SEVENTHS, 94, 9, 1), fault(stranger, 79))
    assert run.unfit() == set()
    assert not run.health.sick


def test_a_fault_comes_with_its_time_and_the_next_one_is_added() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=5.0))
    run.step(fault(SEVENTHS, 48, 9, 0, at=7.0), fault(SEVENTHS, 94, 9, 0, at=8.0))
    (sickness,) = run.health.sick.values()
    assert (sickness.xids, sickness.since, sickness.last) == ((94, 48), 5.0, 8.0)
    assert "and XID 48" in sickness.reason
    assert [(change.subject, change.sick) for change in run.changes] == [(uuid(0, 9), True)]


def test_a_flood_of_different_codes_takes_bounded_memory() -> None:
    run = Run(*(fault(SEVENTHS, 10_000 + n, 9, 0) for n in range(1000)))
    assert sum(len(sickness.xids) for sickness in run.health.sick.values()) < 20
    assert run.health.counts == {999: 1000}


def test_a_fault_does_not_jump_to_a_later_instance_with_the_same_ids_and_uuid() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0))
    without = replace(SEVENTHS, devices=tuple(d for d in SEVENTHS.devices if d.gi != 9))
    run.step(see=inventory(without, ASSORTED))
    run.step(see=NODE)
    assert run.unfit() == set()
    assert [change.sick for change in run.changes] == [True, False]


def test_the_same_uuid_on_another_profile_is_another_instance() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0))
    made = tuple(replace(d, profile="1g.10gb") if d.gi == 9 else d for d in SEVENTHS.devices)
    run.step(see=inventory(replace(SEVENTHS, devices=made)))
    assert run.unfit() == set()


def test_instances_made_on_a_sick_gpu_are_sick() -> None:
    run = Run(fault(SEVENTHS, 79))
    run.step(see=inventory(gpu(0)))
    run.step(see=inventory(gpu(0, (3, "2g.10gb", 0, 2))))
    assert run.unfit() == {SEVENTHS.uuid, uuid(0, 3)}


def test_a_gpu_that_does_not_answer_keeps_its_sick() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 79))
    run.step(see=Inventory("1", (), (BrokenGpu(0, SEVENTHS.uuid, "no answer"), BrokenGpu(1, None, "lost"))))
    run.step(see=NODE)
    assert run.unfit() == {uuid(0, 9), *everything_on(ASSORTED)}


def test_a_fault_on_a_gpu_that_no_longer_answers_finds_whom_it_concerns() -> None:
    run = Run()
    silent = Inventory("1", (), (BrokenGpu(0, SEVENTHS.uuid, "lost"), BrokenGpu(1, ASSORTED.uuid, "lost")))
    run.step(fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 79), see=silent)
    run.step(see=NODE)
    assert run.unfit() == {uuid(0, 9), *everything_on(ASSORTED)}


def test_a_gpu_that_left_the_node_takes_its_sickness_with_it() -> None:
    run = Run(fault(SEVENTHS, 79))
    run.step(see=inventory(ASSORTED))
    run.step(see=NODE)
    assert run.unfit() == set()


def test_without_an_inventory_nobody_is_judged() -> None:
    assert fold(Health(), None, (fault(SEVENTHS, 79),), Checks()) == (Health(), ())
