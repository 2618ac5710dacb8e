"""Any sequence of faults, recoveries, changes and restarts: health is what happened to each instance."""

import json
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from migplugin.core.health import BELIEVED_AFTER, RELAPSE_WITHIN, Health, Scene, fold
from migplugin.core.health_record import record, restore
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, Inventory, Signs
from migplugin.core.sickness import Fault
from migplugin.core.xid import Checks
from tests.core.examples import gpu

AFTER = 300.0
# By hand, so that the table is not its own witness: code -> whom it concerns; nobody for the first three.
NOBODY, OWN, GPU = "nobody", "own", "gpu"
ECC = -1
CODES = {
    31: NOBODY,
    45: NOBODY,
    63: NOBODY,
    48: OWN,
    94: OWN,
    5000: OWN,
    79: GPU,
    74: GPU,
    109: GPU,
    999: GPU,
}
SLOTS = tuple((gi, ci) for gi in (1, 2) for ci in (0, 1))


@dataclass
class Thing:
    """An instance, or a GPU: what made it sick since it was last well, and when nobody held it since."""

    faults: list[tuple[int, float]] = field(default_factory=list)
    resting: float | None = None
    well_at: float | None = None
    doomed: bool = False
    files: bool = True
    errors: int = 0

    def hit(self, code: int, now: float) -> None:
        if not self.faults:
            self.doomed = self.well_at is not None and now < self.well_at + RELAPSE_WITHIN
        self.faults.append((code, now))
        self.resting = None

    def recover(self, now: float, *, held: bool, action: int | None) -> None:
        if not self.faults or self.doomed:
            return
        last = self.faults[-1][1]
        if {code for code, _ in self.faults} <= {94, ECC}:
            if held or action or now <= last:
                self.resting = None
                return
            self.resting = now if self.resting is None else self.resting
            well = now >= self.resting + AFTER
        else:
            well = action == 0 and now >= last + BELIEVED_AFTER
        if well:
            self.faults, self.resting, self.well_at = [], None, now


class Machine(RuleBasedStateMachine):
    """Two GPUs with MIG on: whatever is made in a slot has the ids and the UUID of what was there before."""

    @initialize()
    def begin(self) -> None:
        self.health = Health()
        self.now = 100.0
        self.cards = [Thing(), Thing()]
        self.slots: list[dict[tuple[int, int], Thing]] = [{slot: Thing() for slot in SLOTS} for _ in "01"]
        self.silent = [False, False]
        self.actions: list[int | None] = [None, None]
        self.held: set[str] = set()
        self.module = 1
        self.look()

    def card(self, n: int) -> Gpu:
        made = gpu(n, *((gi, "3g.20gb", 4 * (gi - 1), 4, ("1c.3g.20gb",) * 2) for gi in (1, 2)))
        live = tuple(
            replace(d, files=thing.files, uncorrected=thing.errors)
            for d in made.devices
            if (thing := self.slots[n].get((d.gi, d.ci))) is not None
        )
        return replace(made, devices=live, signs=Signs(self.actions[n]))

    def look(self, *faults: Fault) -> None:
        cards = [self.card(n) for n in (0, 1)]
        there = tuple(card for n, card in enumerate(cards) if not self.silent[n])
        broken = tuple(BrokenGpu(n, card.uuid, "silent") for n, card in enumerate(cards) if self.silent[n])
        pods = frozenset(map(DeviceId, self.held))
        node = Inventory("1", there, broken, module=self.module)
        scene = Scene(self.now, node, self.now, answers=True, held=pods, held_known=self.now)
        for n in (0, 1):
            if self.silent[n]:
                for thing in (self.cards[n], *self.slots[n].values()):
                    thing.resting = None
                continue
            devices = {(d.gi, d.ci): d.uuid for d in cards[n].devices}
            anything = bool(self.held & {cards[n].uuid, *devices.values()})
            self.cards[n].recover(self.now, held=anything, action=self.actions[n])
            for slot, thing in self.slots[n].items():
                held = bool(self.held & {cards[n].uuid, devices[slot]})
                thing.recover(self.now, held=held, action=self.actions[n])
        self.health, _ = fold(self.health, scene, faults, Checks(), AFTER)

    @rule(
        n=st.integers(0, 1),
        code=st.sampled_from(list(CODES)),
        gi=st.sampled_from([None, 1, 2]),
        ci=st.sampled_from([None, 0, 1]),
    )
    def fault(self, n: int, code: int, gi: int | None, ci: int | None) -> None:
        ci = None if gi is None else ci
        self.look(Fault(self.card(n).uuid, gi, ci, code, 1, self.now, self.now))
        if CODES[code] == GPU or (CODES[code] == OWN and gi is None):
            self.cards[n].hit(code, self.now)
        elif CODES[code] == OWN:
            for (of_gi, of_ci), thing in self.slots[n].items():
                if of_gi == gi and ci in {None, of_ci}:
                    thing.hit(code, self.now)

    @rule(n=st.integers(0, 1), slot=st.sampled_from(SLOTS))
    def destroy(self, n: int, slot: tuple[int, int]) -> None:
        if not self.silent[n]:
            self.slots[n].pop(slot, None)
            self.look()

    @rule(n=st.integers(0, 1), slot=st.sampled_from(SLOTS))
    def make(self, n: int, slot: tuple[int, int]) -> None:
        if not self.silent[n]:
            self.slots[n].setdefault(slot, Thing())
            self.look()

    @rule(n=st.integers(0, 1))
    def fall_silent_or_speak(self, n: int) -> None:
        self.silent[n] = not self.silent[n]
        self.look()

    @rule(n=st.integers(0, 1), action=st.sampled_from([None, 0, 0, 1]))
    def want(self, n: int, action: int | None) -> None:
        if not self.silent[n]:
            self.actions[n] = action
            self.look()

    @rule(n=st.integers(0, 1), which=st.integers(0, 4))
    def hold_or_let_go(self, n: int, which: int) -> None:
        card = gpu(n, *((gi, "3g.20gb", 4 * (gi - 1), 4, ("1c.3g.20gb",) * 2) for gi in (1, 2)))
        self.held ^= {(card.uuid, *(d.uuid for d in card.devices))[which]}
        self.look()

    @rule(n=st.integers(0, 1), slot=st.sampled_from(SLOTS))
    def files_vanish_or_come_back(self, n: int, slot: tuple[int, int]) -> None:
        thing = self.slots[n].get(slot)
        if thing is not None and not self.silent[n]:
            thing.files = not thing.files
            self.look()

    @rule(n=st.integers(0, 1), slot=st.sampled_from(SLOTS))
    def memory_fails(self, n: int, slot: tuple[int, int]) -> None:
        thing = self.slots[n].get(slot)
        if thing is not None and not self.silent[n]:
            thing.errors += 1
            self.look()
            if self.actions[n] is None:
                thing.hit(ECC, self.now)

    @rule()
    def the_driver_is_loaded_anew(self) -> None:
        """Both GPUs answer again, or do not yet; nobody is sick of anything that came before."""
        self.module, self.now = self.module + 1, self.now + 0.1
        for things in (self.cards, *(list(slots.values()) for slots in self.slots)):
            for thing in things:
                thing.faults, thing.resting, thing.well_at, thing.doomed = [], None, None, False
        self.look()

    @rule()
    def the_agent_is_started_anew(self) -> None:
        """It forgets how long anybody has rested, and whose files it has seen; nothing else."""
        self.health = restore(json.loads(json.dumps(record(self.health))), self.now)
        for thing in (*self.cards, *(thing for slots in self.slots for thing in slots.values())):
            thing.resting = None
        self.silent = [False, False]
        for slots in self.slots:
            for thing in slots.values():
                thing.files = True
        self.look()

    @rule(seconds=st.sampled_from([0.5, 6.0, 299.0, 301.0, 3000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    @invariant()
    def every_device_is_what_happened_to_it(self) -> None:
        for n in (0, 1):
            card = self.card(n)
            whole = bool(self.cards[n].faults) or bool(self.actions[n])
            assert bool(self.health.why(DeviceId(card.uuid), card.uuid)) == whole
            for device in card.devices:
                thing = self.slots[n][device.gi, device.ci]
                sick = whole or bool(thing.faults) or not thing.files
                assert bool(self.health.why(device.uuid, card.uuid)) == sick, (device.gi, device.ci)

    @invariant()
    def nothing_is_remembered_for_longer_than_it_matters(self) -> None:
        assert len(self.health.sick) + len(self.health.recovered) <= 2 * (2 + 2 * len(SLOTS))


TestHealth = Machine.TestCase
TestHealth.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
