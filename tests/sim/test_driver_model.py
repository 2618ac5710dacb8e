"""The model under any changes: what it accepts never breaks a rule, what it refuses changes nothing."""

import itertools
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migplugin.sim import placement, profiles, spec
from migplugin.sim.codes import Code, EventType
from migplugin.sim.model import Gpu, Node, Refusal
from migplugin.sim.records import Process, Switches

DRIVEN = ["a100-40gb", "h100-80gb", "a30", "b200", "rtxpro6000"]


class AnyChanges(RuleBasedStateMachine):
    """One GPU, changed in every way there is."""

    node: Node
    gpu: Gpu

    @initialize(product=st.sampled_from(DRIVEN), swapped=st.booleans(), reuse=st.booleans())
    def start(self, product: str, swapped: bool, reuse: bool) -> None:
        switches = Switches(gi_ids="swapped" if swapped else "ordered", uuid_reuse=reuse)
        self.node = spec.build(f"1x{product}=", switches=switches)
        self.gpu = self.node.gpus[0]
        self.changes = self.node.record.last_seq

    def _try(self, act: Any, *arguments: Any, **options: Any) -> Code:
        before = msgspec.json.encode(self.node.record)
        try:
            act(*arguments, **options)
        except Refusal as exc:
            assert msgspec.json.encode(self.node.record) == before, "a refusal changed something"
            return exc.code
        return Code.SUCCESS

    @rule(data=st.data(), anywhere=st.booleans())
    def create_gi(self, data: st.DataObject, anywhere: bool) -> None:
        profile = data.draw(st.sampled_from(self.gpu.product.profiles))
        start = None if anywhere else data.draw(st.sampled_from(profile.placements))
        room = placement.remaining(self.gpu.product, profile, self.gpu.held)
        fits = room and (start is None or start in placement.free_starts(profile, self.gpu.held))
        code = self._try(self.gpu.create_gi, profile.gi_profile_id, start)
        assert code is (Code.SUCCESS if fits else Code.INSUFFICIENT_RESOURCES)
        self.changes += code is Code.SUCCESS

    @precondition(lambda self: self.gpu.instances)
    @rule(data=st.data())
    def create_ci(self, data: st.DataObject) -> None:
        gi = data.draw(st.sampled_from(self.gpu.instances))
        profile = self.gpu.profile(gi)
        ci = data.draw(st.sampled_from(profile.ci_profiles))
        room = placement.ci_remaining(profile, ci, [(c.start, c.size) for c in gi.compute])
        code = self._try(self.gpu.create_ci, gi.id, ci.id)
        assert code is (Code.SUCCESS if room else Code.INSUFFICIENT_RESOURCES)
        self.changes += code is Code.SUCCESS

    @precondition(lambda self: self.gpu.instances)
    @rule(data=st.data())
    def destroy_gi(self, data: st.DataObject) -> None:
        gi = data.draw(st.sampled_from(self.gpu.instances))
        expected = Code.IN_USE if gi.compute or gi.leaked else Code.SUCCESS
        assert self._try(self.gpu.destroy_gi, gi.id) is expected
        self.changes += expected is Code.SUCCESS

    @precondition(lambda self: self.gpu.mig_devices())
    @rule(data=st.data())
    def destroy_ci(self, data: st.DataObject) -> None:
        gi, ci = data.draw(st.sampled_from(self.gpu.mig_devices()))
        expected = Code.IN_USE if ci.processes or ci.leaked else Code.SUCCESS
        assert self._try(self.gpu.destroy_ci, gi.id, ci.id) is expected
        self.changes += expected is Code.SUCCESS

    @precondition(lambda self: self.gpu.mig_devices())
    @rule(data=st.data(), leak=st.booleans())
    def use(self, data: st.DataObject, leak: bool) -> None:
        _, ci = data.draw(st.sampled_from(self.gpu.mig_devices()))
        ci.leaked = leak
        ci.processes.append(Process(4242, "python3"))

    @precondition(lambda self: self.gpu.mig_devices())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        _, ci = data.draw(st.sampled_from(self.gpu.mig_devices()))
        ci.leaked = False
        ci.processes.clear()

    @invariant()
    def placements_are_disjoint_and_legal(self) -> None:
        held = sorted(self.gpu.held, key=lambda h: h.start)
        assert all(a.end <= b.start for a, b in itertools.pairwise(held))
        assert all(h.start in h.profile.placements for h in held)

    @invariant()
    def counts_and_engines_hold(self) -> None:
        product = self.gpu.product
        for name, count in Counter(h.profile.name for h in self.gpu.held).items():
            pair = product.by_name(name)
            assert pair is not None
            assert count <= pair[0].max_instances
        if product.engines_known:
            for column, limit in enumerate(product.full.engines.rationed):
                assert sum(h.profile.engines.rationed[column] for h in self.gpu.held) <= limit

    @invariant()
    def compute_instances_are_disjoint(self) -> None:
        for gi in self.gpu.instances:
            spans = sorted((ci.start, ci.start + ci.size) for ci in gi.compute)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
            assert all(end <= self.gpu.profile(gi).slices for _, end in spans)

    @invariant()
    def identities_are_unique(self) -> None:
        devices = self.gpu.mig_devices()
        for count, distinct in (
            (len(self.gpu.instances), {gi.id for gi in self.gpu.instances}),
            (len(devices), {ci.uuid for _, ci in devices}),
            (len(devices), {(gi.id, ci.id) for gi, ci in devices}),
            (len(devices), {ci.serial for _, ci in devices} - {gi.serial for gi in self.gpu.instances}),
        ):
            assert len(distinct) == count

    @invariant()
    def indices_stay_below_the_maximum(self) -> None:
        indices = [self.gpu.mig_index(gi, ci) for gi, ci in self.gpu.mig_devices()]
        assert sorted(indices) == list(range(len(indices)))
        self.node.switches.mig_index = "sparse"
        sparse = [self.gpu.mig_index(gi, ci) for gi, ci in self.gpu.mig_devices()]
        self.node.switches.mig_index = "compact"
        assert len(set(sparse)) == len(sparse)
        assert all(index < self.gpu.product.compute_slices for index in sparse)

    @invariant()
    def each_change_posts_one_event(self) -> None:
        assert self.node.record.last_seq == self.changes
        assert all(event.type == EventType.MIG_CONFIG_CHANGE for event in self.node.journal)


AnyChanges.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_any_changes = AnyChanges.TestCase


def _empty(product: str = "a100-40gb", **switches: Any) -> Gpu:
    return spec.build(f"1x{product}=", switches=Switches(**switches)).gpus[0]


def test_uuid_comes_back_with_another_profile_in_the_same_place() -> None:
    gpu = _empty()
    old = gpu.create("3g.20gb", 0).compute[0].uuid
    gpu.destroy(1)
    assert gpu.create("4g.20gb", 0).compute[0].uuid == old


def test_uuid_does_not_come_back_where_the_driver_makes_new_ones() -> None:
    gpu = _empty(uuid_reuse=False)
    old = gpu.create("3g.20gb", 0).compute[0].uuid
    gpu.destroy(1)
    assert gpu.create("3g.20gb", 0).compute[0].uuid != old


def test_busy_instance_is_refused_and_its_neighbours_in_the_gi_survive() -> None:
    gpu = _empty()
    gi = gpu.create("3g.20gb", compute=False)
    gpu.create_ci(gi.id, 0)
    gpu.create_ci(gi.id, 0).processes.append(Process(1, "python3"))
    with pytest.raises(Refusal) as refusal:
        gpu.destroy(gi.id)
    assert refusal.value.code is Code.IN_USE
    assert len(gi.compute) == 2


def test_leaked_handle_keeps_an_empty_gpu_instance() -> None:
    gpu = _empty()
    gi = gpu.create("3g.20gb", compute=False)
    gi.leaked = True
    with pytest.raises(Refusal, match="leaked handle"):
        gpu.destroy_gi(gi.id)


@pytest.mark.parametrize(
    ("activation", "status"), [("in-use", Code.IN_USE), ("reset-required", Code.RESET_REQUIRED)]
)
def test_mode_stays_pending_until_a_reset(activation: str, status: Code) -> None:
    gpu = spec.build("1xa100-40gb", switches=Switches(mig_activation=activation)).gpus[0]  # type: ignore[arg-type]
    assert gpu.set_mig_mode(on=True) is status
    assert (gpu.record.mig_current, gpu.record.mig_pending) == (False, True)
    gpu.reset()
    assert (gpu.record.mig_current, gpu.record.mig_pending) == (True, True)


def test_change_of_mode_posts_no_event() -> None:
    gpu = spec.build("1xa100-40gb").gpus[0]
    gpu.set_mig_mode(on=True)
    assert gpu.node.journal == []


def test_mode_is_pending_while_instances_or_processes_are_there() -> None:
    gpu = spec.build("1xa100-40gb=1g.5gb").gpus[0]
    assert gpu.set_mig_mode(on=False) is Code.IN_USE
    assert gpu.record.mig_current
    whole = spec.build("1xa100-40gb").gpus[0]
    whole.record.processes.append(Process(7, "python3"))
    assert whole.set_mig_mode(on=True) is Code.IN_USE


def test_table_keeps_what_was_assumed_and_where_the_rest_is_from() -> None:
    for product in profiles.table().products:
        for profile in product.profiles:
            assert profile.source
            assert set(profile.assumed) <= {"memory_mb", "sm_count", "engines"}
