"""Faults folded over geometries: who is sick afterwards, and for how long."""

from dataclasses import replace

import pytest

from migplugin.core.health import (
    BELIEVED_AFTER,
    LOOK_EVERY,
    RELAPSE_WITHIN,
    Health,
    Scene,
    awaits_release,
    clear,
    fold,
    look_at,
    suspects,
    wake_at,
)
from migplugin.core.health_record import record, restore
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuUuid, Inventory, Signs
from migplugin.core.sickness import Change, Fault
from migplugin.core.xid import Checks
from migplugin.errors import InputError
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
        self.now = 0.0
        self.answers = True
        self.held: frozenset[str] | None = frozenset()
        self.recovery_after = 300.0
        self.step(*faults)

    def step(self, *faults: Fault, see: Inventory | None = None, at: float | None = None) -> None:
        """At a time when both the driver and the kubelet are asked."""
        self.inventory = see or self.inventory
        self.now = self.now if at is None else at
        held = frozenset(map(DeviceId, self.held or ()))
        known = None if self.held is None else self.now
        scene = Scene(self.now, self.inventory, self.now, self.answers, held, known)
        self.health, changes = fold(self.health, scene, faults, self.checks, self.recovery_after)
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
    run.step(
        see=Inventory(
            NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "no answer"), BrokenGpu(1, None, "lost"))
        )
    )
    run.step(see=NODE)
    assert run.unfit() == {uuid(0, 9), *everything_on(ASSORTED)}


def test_a_fault_on_a_gpu_that_no_longer_answers_finds_whom_it_concerns() -> None:
    run = Run()
    silent = Inventory(
        NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "lost"), BrokenGpu(1, ASSORTED.uuid, "lost"))
    )
    run.step(fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 79), see=silent)
    run.step(see=NODE)
    assert run.unfit() == {uuid(0, 9), *everything_on(ASSORTED)}


def test_a_gpu_that_left_the_node_takes_its_sickness_with_it() -> None:
    run = Run(fault(SEVENTHS, 79))
    run.step(see=inventory(ASSORTED))
    run.step(see=NODE)
    assert run.unfit() == set()


def test_without_an_inventory_nobody_is_judged() -> None:
    assert fold(Health(), Scene(1.0), (fault(SEVENTHS, 79),), Checks(), 300.0) == (Health(), ())


NINE = frozenset({uuid(0, 9)})


def saying(action: int | None, of: Gpu = SEVENTHS, **other: bool) -> Inventory:
    return inventory(replace(of, signs=Signs(action, **other)), ASSORTED)


def test_a_contained_error_is_over_when_nobody_has_held_the_device_for_a_while() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.held = NINE
    run.step(at=10.0)
    assert awaits_release(run.health, 300.0) == {uuid(0, 9): 1.0, SEVENTHS.uuid: 1.0}
    run.held = frozenset({uuid(0, 10)})
    run.step(at=50.0)
    assert wake_at(run.health, 300.0) == [350.0]
    assert not awaits_release(run.health, 300.0)
    run.step(at=349.0)
    assert run.unfit() == NINE
    run.step(at=350.0)
    assert run.unfit() == set()
    assert "nobody has held it for 300 s" in run.changes[-1].reason


def test_while_nobody_can_say_who_holds_what_nothing_gets_well() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.held = None
    run.step(at=200.0)
    run.held = frozenset()
    run.step(at=310.0)
    assert run.unfit() == NINE
    run.step(at=610.0)
    assert run.unfit() == set()


def test_a_pod_with_the_whole_gpu_holds_every_device_on_it() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0), fault(ASSORTED, 94, at=1.0))
    run.held = frozenset({SEVENTHS.uuid, uuid(1, 9)})
    run.step(at=10.0)
    run.step(at=1000.0)
    assert run.unfit() == NINE | everything_on(ASSORTED)


def test_another_error_begins_the_wait_anew() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.step(fault(SEVENTHS, 94, 9, 0, at=300.0), at=300.0)
    run.step(at=310.0)
    assert run.unfit() == NINE
    assert wake_at(run.health, 300.0) == [610.0]


def test_a_contained_error_waits_for_as_long_as_the_driver_wants_something_done() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(see=saying(1), at=10.0)
    run.step(at=900.0)
    assert run.unfit() == everything_on(SEVENTHS)
    run.step(see=saying(0), at=901.0)
    assert run.unfit() == NINE
    run.step(at=1201.0)
    assert run.unfit() == set()


def test_with_0_no_time_is_long_enough() -> None:
    run = Run()
    run.recovery_after = 0.0
    run.step(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.step(at=1e6)
    assert run.unfit() == NINE
    assert not wake_at(run.health, 0.0)
    assert not awaits_release(run.health, 0.0)


def test_what_is_not_contained_gets_well_by_no_rest() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0), fault(SEVENTHS, 48, 9, 0), fault(ASSORTED, 79))
    run.step(at=10.0)
    run.step(at=1e6)
    assert run.unfit() == NINE | everything_on(ASSORTED)


def test_anything_else_is_over_when_the_driver_asked_later_wants_nothing_done() -> None:
    run = Run()
    run.step(see=saying(0))
    run.step(fault(SEVENTHS, 79, at=1.0), fault(SEVENTHS, 48, 9, 0, at=1.0), at=1.0)
    assert look_at(run.health, looked=0.5) == 1.0, "at once"
    assert look_at(run.health, looked=1.0) == 1.0 + BELIEVED_AFTER
    run.step(at=1.5)
    assert run.unfit() == everything_on(SEVENTHS), "it may not know yet"
    run.step(see=saying(1), at=2.0)
    run.step(at=60.0)
    assert look_at(run.health, looked=60.0) == 60.0 + LOOK_EVERY
    assert run.unfit() == everything_on(SEVENTHS)
    run.step(see=saying(0), at=70.0)
    assert run.unfit() == set()
    assert look_at(run.health, looked=70.0) is None


def test_a_lost_gpu_that_answers_again_was_reset() -> None:
    run = Run(fault(SEVENTHS, 79, at=1.0))
    run.step(see=Inventory(NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "no answer"),)), at=2.0)
    run.step(see=NODE, at=3.0)
    assert run.unfit() == everything_on(SEVENTHS), "it only did not answer"
    run.step(
        see=Inventory(NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "lost", lost=True),)), at=4.0
    )
    run.step(see=Inventory(NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "no answer"),)), at=5.0)
    run.step(see=NODE, at=6.0)
    assert run.unfit() == set()


def test_a_device_that_falls_sick_again_within_an_hour_stays_sick() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.step(at=310.0)
    assert run.unfit() == set()
    run.step(fault(SEVENTHS, 94, 9, 0, at=400.0), at=400.0)
    run.step(see=saying(0), at=410.0)
    run.step(at=1e6)
    assert run.unfit() == NINE
    assert "until a person acts" in run.changes[-1].reason
    assert not wake_at(run.health, 300.0)
    without = replace(SEVENTHS, devices=tuple(d for d in SEVENTHS.devices if d.gi != 9))
    run.step(see=inventory(without))
    run.step(see=NODE)
    assert run.unfit() == set(), "made anew it is another"


def test_after_an_hour_it_has_its_chance_again() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.step(at=310.0)
    later = 310.0 + RELAPSE_WITHIN
    run.step(fault(SEVENTHS, 94, 9, 0, at=later), at=later)
    run.step(at=later + 10.0)
    run.step(at=later + 310.0)
    assert run.unfit() == set()


def test_the_drivers_wish_makes_the_gpu_sick_for_as_long_as_it_stands() -> None:
    run = Run()
    run.step(see=saying(1))
    assert run.unfit() == everything_on(SEVENTHS)
    assert "GPU reset" in run.health.why(DeviceId(uuid(0, 9)), SEVENTHS.uuid)
    run.step(see=saying(4))
    run.step(see=saying(0))
    assert run.unfit() == set()
    assert [change.sick for change in run.changes] == [True, True, False]


def test_rows_that_could_not_be_remapped_make_sick_and_waiting_ones_unless_the_driver_wants_nothing() -> None:
    run = Run()
    for seen, sick in (
        (saying(0, remap_failed=True), True),
        (saying(0, remap_pending=True), False),
        (saying(None, remap_pending=True), True),
        (saying(None, remap_pending=False, remap_failed=False), False),
    ):
        run.step(see=seen)
        assert run.unfit() == (everything_on(SEVENTHS) if sick else set())


def test_xid_154_is_what_the_driver_says_and_where_it_cannot_say_makes_sick() -> None:
    run = Run()
    run.step(see=saying(0))
    run.step(fault(SEVENTHS, 154, at=1.0), at=1.0)
    assert run.unfit() == set()
    assert look_at(run.health, looked=0.5) == 1.0
    run.step(see=saying(2), at=1.1)
    assert run.unfit() == everything_on(SEVENTHS)
    assert Run(fault(SEVENTHS, 154)).unfit() == everything_on(SEVENTHS)


def test_checks_that_are_all_off_hear_no_signs() -> None:
    run = Run(checks=Checks(disabled=None, signs=False))
    run.step(see=saying(1))
    assert run.unfit() == set()


def test_what_was_remembered_and_is_no_longer_checked_for_is_forgotten() -> None:
    run = Run(fault(SEVENTHS, 79), fault(ASSORTED, 48))
    run.checks = Checks(disabled=frozenset({79}))
    run.step()
    assert run.unfit() == everything_on(ASSORTED)
    assert "no longer checked for" in run.changes[-1].reason


def relapsed() -> Run:
    """A device that fell sick again within an hour, and one on another GPU that fell sick once."""
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0))
    run.step(at=10.0)
    run.step(at=310.0)
    run.step(fault(SEVENTHS, 94, 9, 0, at=400.0), fault(ASSORTED, 48, 2, 0, at=400.0), at=400.0)
    assert run.unfit() == {uuid(0, 9), uuid(1, 2)}
    return run


def test_whom_a_person_clears_is_well_and_has_its_chance_again() -> None:
    run = relapsed()
    cleared = clear(run.health, [f"{uuid(0, 9)}::3"])
    assert [(id_, s.stays) for id_, s in cleared.sick.items()] == [(uuid(0, 9), True)]
    assert not cleared.notes
    run.health = cleared.health
    assert run.unfit() == {uuid(1, 2)}
    run.step(fault(SEVENTHS, 94, 9, 0, at=500.0), at=500.0)
    run.step(at=510.0)
    run.step(at=810.0)
    assert run.unfit() == {uuid(1, 2)}, "it gets well by itself, as after a first time"


def test_all_are_cleared_at_once_with_the_history_of_those_that_got_well() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0, at=1.0), fault(ASSORTED, 79, at=1.0))
    run.step(at=10.0)
    run.step(at=310.0)
    assert run.health.recovered.keys() == {uuid(0, 9)}
    cleared = clear(run.health, None)
    assert cleared.sick.keys() == {ASSORTED.uuid}
    assert not cleared.health.sick
    assert not cleared.health.recovered
    assert clear(cleared.health, None).sick == {}, "that there is nobody is no error"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["MIG-x"], f"'MIG-x' is not sick; sick are {ASSORTED.uuid}, {uuid(0, 9)}"),
        ([uuid(0, 9), "MIG-x"], "'MIG-x' is not sick"),
        ([uuid(0, 10)], "is not sick; sick are"),
        ([uuid(1, 2)], f"is not sick by itself, its GPU is: clear {ASSORTED.uuid}"),
        ([WHOLE.uuid], "cannot be cleared: the driver wants of this GPU: GPU reset; that is over"),
        ([uuid(3, 2)], "cannot be cleared: the driver wants of this GPU: node reboot; that is over"),
        ([""], "'' is not sick"),
    ],
)
def test_whom_nobody_can_clear_is_one_line_and_nothing_changes(ids: list[str], message: str) -> None:
    wishing = (replace(WHOLE, signs=Signs(1)), replace(gpu(3, (2, "3g.20gb", 0, 4)), signs=Signs(2)))
    run = Run()
    run.step(
        fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 79), see=inventory(SEVENTHS, ASSORTED, *wishing), at=1.0
    )
    with pytest.raises(InputError) as caught:
        clear(run.health, ids)
    assert message in str(caught.value)


def test_a_sign_of_one_device_cannot_be_cleared_either() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0))
    run.step(see=with_files(SEVENTHS, {}))
    run.step(see=with_files(SEVENTHS, {9: False}))
    cleared = clear(run.health, [uuid(0, 9)])
    (note,) = cleared.notes
    assert note.startswith(f"{uuid(0, 9)} stays unhealthy for as long as that is true: its capability files")
    with pytest.raises(InputError, match="cannot be cleared: its capability files"):
        clear(cleared.health, [uuid(0, 9)])


def test_what_the_driver_has_against_the_gpu_of_a_cleared_device_is_noted() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0))
    run.step(see=inventory(replace(SEVENTHS, signs=Signs(1))))
    (note,) = clear(run.health, [uuid(0, 9)]).notes
    assert note.startswith(f"{SEVENTHS.uuid} stays unhealthy for as long as that is true: the driver wants")


def test_nobody_is_sick_is_said_where_nobody_is() -> None:
    with pytest.raises(InputError, match="'MIG-x' is not sick; nobody is"):
        clear(Health(), ["MIG-x"])


def test_what_is_unfit_all_the_same_is_said() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0), fault(SEVENTHS, 79), fault(ASSORTED, 48))
    run.step(see=inventory(SEVENTHS, replace(ASSORTED, signs=Signs(1))))
    (by_gpu,) = clear(run.health, [uuid(0, 9)]).notes
    assert by_gpu.startswith(f"{uuid(0, 9)} stays unhealthy, since its GPU {SEVENTHS.uuid} is: XID 79")
    (by_driver,) = clear(run.health, None).notes
    assert by_driver.startswith(
        f"{ASSORTED.uuid} stays unhealthy for as long as that is true: the driver wants"
    )


def test_another_driver_or_the_same_one_loaded_anew_is_the_end_of_all() -> None:
    for other in (replace(NODE, driver_version="595.1"), replace(NODE, module=2)):
        run = Run()
        run.step(fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 79), see=replace(NODE, module=1))
        run.step()
        assert run.unfit()
        run.step(see=other, at=10.0)
        assert run.unfit() == set()
        assert {change.reason.partition(";")[0] for change in run.changes if not change.sick} == {
            "the driver was loaded anew"
        }
        run.step(fault(ASSORTED, 79, at=11.0), at=11.0)
        assert not run.health.sick[ASSORTED.uuid].stays, "nobody recovered: it was another life"


def test_a_module_that_cannot_be_seen_is_no_other_module() -> None:
    run = Run()
    run.step(fault(ASSORTED, 79), see=replace(NODE, module=1))
    run.step(see=replace(NODE, module=None), at=10.0)
    assert run.unfit() == everything_on(ASSORTED)
    run.step(see=replace(NODE, module=2), at=20.0)
    assert run.unfit() == everything_on(ASSORTED), "it was not seen what it was before"


def with_files(of: Gpu, files: dict[int, bool | None]) -> Inventory:
    """A node of one GPU, with what is seen of the files of its GPU instances."""
    devices = tuple(replace(device, files=files.get(device.gi, True)) for device in of.devices)
    return inventory(replace(of, devices=devices))


def test_a_device_whose_files_vanish_is_unfit_until_they_are_back() -> None:
    run = Run()
    run.step(see=with_files(SEVENTHS, {}))
    run.step(see=with_files(SEVENTHS, {9: False}))
    run.step()
    assert run.unfit() == {uuid(0, 9)}
    assert run.changes[-1] == Change(
        DeviceId(uuid(0, 9)),
        SEVENTHS.uuid,
        sick=True,
        reason="its capability files are gone: no container could open it",
    )
    run.step(see=with_files(SEVENTHS, {}))
    assert run.unfit() == set()


def test_files_that_were_never_seen_have_not_vanished() -> None:
    """The NVIDIA runtime may show a container no instances, or only those of before it started."""
    run = Run()
    run.step(see=with_files(SEVENTHS, {9: False, 10: None}))
    run.step(see=with_files(SEVENTHS, {9: False, 10: False}))
    assert run.unfit() == set()


def test_files_that_can_no_longer_be_seen_have_not_vanished() -> None:
    run = Run()
    run.step(see=with_files(SEVENTHS, {}))
    run.step(see=with_files(SEVENTHS, dict.fromkeys(range(7, 14))))
    assert run.unfit() == set()


def test_files_of_an_instance_that_was_made_anew_elsewhere_are_not_missed() -> None:
    run = Run()
    run.step(see=with_files(SEVENTHS, {}))
    run.step(see=with_files(gpu(0, (9, "2g.10gb", 0, 2)), {9: False}))
    assert run.unfit() == set()


def uncorrected(
    of: Gpu, counts: dict[int, int], *, whole: int | None = None, action: int | None = None
) -> Inventory:
    devices = tuple(replace(device, uncorrected=counts.get(device.gi, 0)) for device in of.devices)
    return inventory(replace(of, devices=devices, signs=Signs(action=action, uncorrected=whole)))


def test_memory_errors_that_grow_are_a_contained_fault_of_their_instance_or_gpu() -> None:
    run = Run()
    run.step(see=uncorrected(SEVENTHS, {9: 2}))
    assert run.unfit() == set(), "what was counted before we came is not held against anybody"
    run.step(see=uncorrected(SEVENTHS, {9: 3}), at=10.0)
    assert run.unfit() == {uuid(0, 9)}
    assert run.health.why(DeviceId(uuid(0, 9)), SEVENTHS.uuid).startswith(
        "uncorrected memory errors (ECC), until"
    )
    run.step(at=20.0)
    run.step(at=320.0)
    assert run.unfit() == set(), "left alone for long enough"
    assert run.health.counts == {}, "they are no XIDs"
    run.step(see=uncorrected(WHOLE, {}, whole=1), at=330.0)
    run.step(see=uncorrected(WHOLE, {}, whole=2), at=331.0)
    assert run.unfit() == {WHOLE.uuid}
    run.step(see=uncorrected(WHOLE, {}, whole=0), at=332.0)
    assert run.unfit() == set(), "counted anew: it was reset"


def test_memory_errors_are_told_beside_other_faults() -> None:
    run = Run()
    run.step(see=uncorrected(SEVENTHS, {}))
    run.step(fault(SEVENTHS, 48, 9, 0), see=uncorrected(SEVENTHS, {9: 1}))
    run.step(fault(SEVENTHS, 95, 9, 0))
    cause = run.health.sick[DeviceId(uuid(0, 9))].cause
    assert cause.endswith(" and uncorrected memory errors (ECC)")


def test_a_restart_forgets_no_memory_errors() -> None:
    run = Run()
    run.step(see=uncorrected(SEVENTHS, {9: 1}))
    run.health = restore(record(run.health), 0.0)
    run.step(see=uncorrected(SEVENTHS, {9: 2}))
    assert run.unfit() == {uuid(0, 9)}


def test_where_the_driver_tells_an_action_it_outranks_its_counters() -> None:
    run = Run()
    run.step(see=uncorrected(SEVENTHS, {9: 2}, whole=2, action=0))
    run.step(see=uncorrected(SEVENTHS, {9: 3}, whole=3, action=0))
    assert run.unfit() == set()


def test_no_sign_counts_where_all_checks_are_off() -> None:
    run = Run(checks=Checks(None, signs=False))
    run.step(see=uncorrected(SEVENTHS, {9: 2}))
    run.step(see=uncorrected(SEVENTHS, {9: 3}))
    assert run.unfit() == set()


def test_a_process_that_the_driver_sees_stands_against_getting_well_by_rest() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0), fault(ASSORTED, 94, 2, 0))
    assert suspects(run.health) == {uuid(0, 9), uuid(1, 2)}
    run.step(see=replace(NODE, running=frozenset({uuid(0, 9)})), at=10.0)
    run.step(at=310.0)
    assert run.unfit() == {uuid(0, 9)}, "no pod holds it, but something that no kubelet knows does"
    run.step(see=NODE, at=320.0)
    assert run.unfit() == {uuid(0, 9)}
    run.step(at=620.0)
    assert run.unfit() == set()


def test_who_waits_to_be_left_alone_is_looked_at_now_and_then() -> None:
    run = Run(fault(SEVENTHS, 94, 9, 0))
    assert look_at(run.health, 100.0) == 100.0 + LOOK_EVERY


def test_what_came_after_the_look_at_another_driver_had_begun_is_of_that_driver() -> None:
    run = Run()
    run.step(fault(SEVENTHS, 48, 9, 0), see=replace(NODE, module=1))
    run.step(fault(ASSORTED, 79, at=20.0), at=20.0)
    run.step(see=replace(NODE, module=2), at=20.0)
    assert run.unfit() == everything_on(ASSORTED)
    run.step(at=30.0)
    assert run.unfit() == everything_on(ASSORTED)


def test_an_instance_on_a_gpu_that_was_lost_is_well_when_that_is_back() -> None:
    run = Run(fault(SEVENTHS, 48, 9, 0))
    lost = Inventory(NODE.driver_version, (), (BrokenGpu(0, SEVENTHS.uuid, "lost", lost=True),))
    run.step(see=lost, at=2.0)
    run.step(see=NODE, at=4.0)
    assert run.unfit() == set()


def test_who_was_sick_of_a_driver_that_is_gone_is_history_until_all_is_cleared() -> None:
    run = Run()
    run.step(fault(SEVENTHS, 94, 9, 0), see=replace(NODE, module=1))
    run.step(see=replace(NODE, module=2), at=10.0)
    (past,) = run.health.history
    assert (past.id, past.ended) == (uuid(0, 9), "the driver was loaded anew")
    assert past.cause.startswith("XID 94")
    run.step(see=replace(NODE, module=3), at=20.0)
    assert run.health.history == (past,), "nobody has been sick since"
    assert clear(run.health, None).health.history == ()
