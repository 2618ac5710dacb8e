"""The status document: what it says of a node, and what it leaves open."""

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from migplugin.core.decide import Memory, Options, Source, Usage, World, decide
from migplugin.core.health import Health
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuUuid, Inventory, Placement, Signs
from migplugin.core.resource import ResourceName, Strategy
from migplugin.core.sickness import Fault, Instance
from migplugin.core.status import SCHEMA, UNTIL_UNSAID, AgentFacts, DeviceStatus, Status, fits, status
from tests.core.examples import A30_24GB, ASSORTED, RTX_PRO, SEVENTHS, gpu, inventory, key, usage, uuid

GOLDEN = Path(__file__).parents[1] / "golden" / "status"
MIG_1G = ResourceName("nvidia.com/mig-1g.5gb")


def of(
    seen: Inventory | None, used: Usage | None = None, *, agent: AgentFacts | None = None, **more: object
) -> Status:
    world = World(1.0, seen, usage=used or usage(), **more)  # type: ignore[arg-type]
    return status(world, decide(world), node="node-a", agent=agent)


def devices(document: Status) -> dict[str, DeviceStatus]:
    found = {d.uuid: d for g in document.gpus for i in g.instances for d in i.devices}
    return found | {g.whole.uuid: g.whole for g in document.gpus if g.whole is not None}


def test_the_document_is_json_and_says_which_schema_it_has() -> None:
    held = {key("mig-3g.20gb", uuid(1, 2)): "ml/train-7:main"}
    document = of(inventory(SEVENTHS, ASSORTED), usage(held))
    assert document.schema == SCHEMA
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"
    path = GOLDEN / "demo.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), "GOLDEN=write writes it anew"
    assert msgspec.json.decode(text, type=Status) == document


def test_a_device_is_told_with_its_resource_and_holder() -> None:
    found = devices(of(inventory(ASSORTED), usage({key("mig-2g.10gb", uuid(1, 3)): "ml/nb-0:jupyter"})))
    device = found[uuid(1, 3)]
    assert (device.gi, device.ci, device.profile, device.placement) == (3, 0, "2g.10gb", Placement(0, 2))
    assert device.resources == ("nvidia.com/mig-2g.10gb",)
    assert (device.health, device.reason, device.held, device.holders) == (
        "healthy", None, True, ("ml/nb-0:jupyter",),
    )  # fmt: skip
    assert (found[uuid(1, 2)].held, found[uuid(1, 2)].holders) == (False, ())


@pytest.mark.parametrize(
    ("checkpoint", "pod_resources", "named", "held", "holders"),
    [
        (Source.OK, Source.OK, True, True, ("ml/a:b",)),
        (Source.OK, Source.OK, False, False, ()),
        (Source.OK, Source.ABSENT, True, True, None),
        (Source.OK, Source.ABSENT, False, False, None),
        (Source.OK, Source.FAILED, True, True, None),
        (Source.OK, Source.FAILED, False, None, None),
        (Source.FAILED, Source.OK, True, True, ("ml/a:b",)),
        (Source.FAILED, Source.OK, False, None, ()),
        (Source.FAILED, Source.ABSENT, False, None, None),
        (Source.FAILED, Source.FAILED, True, None, None),
    ],
)
def test_nobody_is_said_to_hold_nothing_where_nobody_can_know(
    checkpoint: Source, pod_resources: Source, named: bool, held: bool | None, holders: tuple[str, ...] | None
) -> None:
    pods = {key("mig-1g.5gb", uuid(0, 7)): "ml/a:b"} if named else {}
    document = of(inventory(SEVENTHS), usage(pods, checkpoint=checkpoint, pod_resources=pod_resources))
    device = devices(document)[uuid(0, 7)]
    assert (device.held, device.holders) == (held, holders)
    complete = checkpoint is Source.OK and pod_resources is not Source.FAILED
    assert document.resources[0].held == (int(named) if complete else None)
    assert (document.usage.checkpoint, document.usage.pod_resources) == (
        checkpoint.value,
        pod_resources.value,
    )


def test_a_device_in_the_checkpoint_alone_is_held_by_nobody_who_can_be_named() -> None:
    document = of(inventory(SEVENTHS), usage(unseen=frozenset({key("mig-1g.5gb", uuid(0, 7))})))
    device = devices(document)[uuid(0, 7)]
    assert (device.held, device.holders) == (True, ())


def test_only_an_agent_knows_leases_refusals_registrations_and_since_when() -> None:
    gone = usage(unseen=frozenset({key("mig-2g.10gb", "MIG-x")}))
    outside = of(inventory(SEVENTHS), gone)
    one_g, two_g = outside.resources
    assert (one_g.leased, one_g.refused_allocations, one_g.registration) == (None, None, None)
    assert outside.missing[0].unhealthy_for is None
    assert outside.seen_by == "command"

    world = World(1.0, inventory(SEVENTHS), usage=gone, leases={key("mig-1g.5gb", uuid(0, 7)): 0.5})
    world = replace(world, now=31.0, memory=decide(world).memory)
    facts = AgentFacts({MIG_1G: "registered"}, {MIG_1G: 3})
    inside = status(world, decide(world), agent=facts)
    one_g, two_g = inside.resources
    assert (one_g.leased, one_g.refused_allocations, one_g.registration) == (1, 3, "registered")
    assert (two_g.leased, two_g.refused_allocations, two_g.registration) == (0, 0, "not registered")
    assert inside.missing[0].unhealthy_for == 30.0
    assert devices(inside)[uuid(0, 7)].held, "a lease holds"
    assert inside.seen_by == "agent"


def test_who_is_sick_is_told_with_why_since_when_and_until_what() -> None:
    wishing = replace(gpu(2, (9, "1g.5gb", 0, 1)), signs=Signs(1))
    failing = gpu(3, (9, "1g.5gb", 0, 1))
    failing = replace(failing, devices=(replace(failing.devices[0], files=False),))
    filed = Memory(health=Health(filed=frozenset({Instance(DeviceId(uuid(3, 9)), 9, 0, "1g.5gb")})))
    came = (Fault(SEVENTHS.uuid, 9, 0, 94, 1, 1.0, 1.0), Fault(ASSORTED.uuid, None, None, 79, 1, 5.0, 5.0))
    world = World(
        31.0, inventory(SEVENTHS, ASSORTED, wishing, failing), usage=usage(), faults=came, memory=filed
    )
    world = replace(world, now=41.0, faults=(), memory=decide(world).memory)
    document = status(world, decide(world))
    found = devices(document)
    nine = found[uuid(0, 9)]
    assert nine.reason == "XID 94 ROBUST_CHANNEL_CONTAINED_ERROR (RESTART_APP)"
    assert (nine.until, nine.unhealthy_for) == (
        "until it is made anew or nobody has held it for a while",
        40.0,
    )
    assert (found[uuid(1, 2)].until or "").startswith("until its GPU is reset")
    assert found[uuid(2, 9)].until == found[uuid(3, 9)].until == UNTIL_UNSAID
    assert found[uuid(2, 9)].unhealthy_for == found[uuid(3, 9)].unhealthy_for == 10.0
    assert (found[uuid(0, 8)].health, found[uuid(0, 8)].until) == ("healthy", None)
    assert [(s.id, s.gpu_index, s.profile, s.sick_for, s.clearable) for s in document.sick] == [
        (uuid(0, 9), 0, "1g.5gb", 40.0, True),
        (ASSORTED.uuid, 1, None, 36.0, True),
        (wishing.uuid, 2, None, 10.0, False),
        (uuid(3, 9), 3, "1g.5gb", 10.0, False),
    ]


def test_who_is_sick_is_told_also_where_it_is_in_no_resource_and_its_gpu_silent() -> None:
    world = World(1.0, inventory(SEVENTHS, gpu(1)), usage=usage(), options=Options(Strategy.NONE))
    came = (Fault(SEVENTHS.uuid, 9, 0, 94, 1, 1.0, 1.0), Fault(GpuUuid(uuid(1)), None, None, 79, 1, 1.0, 1.0))
    health = decide(replace(world, faults=came)).memory
    silent = replace(inventory(SEVENTHS), broken=(BrokenGpu(3, None, "no answer"),))
    document = of(silent, memory=health, options=Options(Strategy.NONE))
    assert [(s.id, s.gpu_index) for s in document.sick] == [(uuid(0, 9), 0), (uuid(1), None)]


def test_an_instance_without_a_device_is_told() -> None:
    document = of(inventory(gpu(0, (5, "2g.10gb", 2, 2, ()))))
    (instance,) = document.gpus[0].instances
    assert (instance.gi, instance.profile, instance.devices) == (5, "2g.10gb", ())
    assert document.resources == ()


def test_devices_that_share_an_instance_are_told_inside_it() -> None:
    document = of(inventory(gpu(0, (1, "3g.20gb", 0, 4, ("1c.3g.20gb", "1c.3g.20gb")))))
    (instance,) = document.gpus[0].instances
    assert instance.profile == "3g.20gb"
    assert [(d.ci, d.profile, d.resources) for d in instance.devices] == [
        (0, "1c.3g.20gb", ("nvidia.com/mig-1c.3g.20gb",)),
        (1, "1c.3g.20gb", ("nvidia.com/mig-1c.3g.20gb",)),
    ]


def without_privilege(full: Gpu) -> Gpu:
    """What a caller sees to whom the driver does not tell placements and GPU instances."""
    bare = tuple(replace(device, placement=None) for device in full.devices)
    return replace(full, memory_slices=0, profiles=(), instances=(), devices=bare)


def test_without_privilege_instances_are_known_from_their_devices_and_placements_are_not() -> None:
    document = of(inventory(without_privilege(gpu(0, (1, "3g.20gb", 0, 4, ("1c.3g.20gb", "2c.3g.20gb"))))))
    (shown,) = document.gpus
    assert (shown.memory_slices, shown.fits) == (None, None)
    (instance,) = shown.instances
    assert (instance.gi, instance.profile, instance.placement) == (1, "3g.20gb", None)
    assert [device.health for device in instance.devices] == ["healthy", "healthy"]


def test_a_whole_gpu_is_a_device_of_its_own_where_it_is_offered() -> None:
    document = of(inventory(gpu(0, mig=False), gpu(1), gpu(2, mig=None)))
    off, on, incapable = document.gpus
    assert off.whole is not None
    assert (off.whole.uuid, off.whole.gi, off.whole.resources) == (uuid(0), None, ("nvidia.com/gpu",))
    assert on.whole is None
    assert incapable.whole is not None
    assert (incapable.mig_enabled, incapable.fits) == (None, None)


def test_what_the_strategy_leaves_out_has_no_health() -> None:
    document = of(inventory(SEVENTHS), options=Options(Strategy.NONE))
    device = devices(document)[uuid(0, 7)]
    assert (device.resources, device.health) == ((), None)
    assert document.strategy == "none"
    assert any("strategy none" in warning for warning in document.warnings)


def test_a_broken_gpu_is_told_in_its_place_with_what_stays_listed_of_it() -> None:
    whole = World(0.0, inventory(SEVENTHS, ASSORTED), usage=usage())
    broken = (BrokenGpu(0, GpuUuid(uuid(0)), "GPU is lost"),)
    world = replace(
        whole, now=5.0, inventory=Inventory("1", (ASSORTED,), broken), memory=decide(whole).memory
    )
    document = status(world, decide(world))
    assert [(g.index, g.broken) for g in document.gpus] == [(0, "GPU is lost"), (1, None)]
    assert {(d.gpu_index, d.gone, d.reason) for d in document.missing} == {(0, False, "GPU 0: GPU is lost")}
    assert len(document.missing) == 7
    one_g = next(resource for resource in document.resources if resource.name == MIG_1G)
    assert (one_g.total, one_g.healthy) == (9, 2)


def test_an_id_that_came_back_as_another_resource_is_told_once_alive_and_once_missing() -> None:
    before = World(0.0, inventory(gpu(0, (1, "2g.10gb", 0, 2))), usage=usage())
    held = usage({key("mig-2g.10gb", uuid(0, 1)): "ml/a:b"})
    now = inventory(gpu(0, (1, "1g.10gb", 0, 2)))
    world = replace(before, now=1.0, inventory=now, usage=held, memory=decide(before).memory)
    document = status(world, decide(world))
    device = devices(document)[uuid(0, 1)]
    assert device.resources == ("nvidia.com/mig-1g.10gb", "nvidia.com/mig-2g.10gb")
    assert (device.health, device.reason) == ("unhealthy", "still held by a pod as nvidia.com/mig-2g.10gb")
    (missing,) = document.missing
    assert (missing.resource, missing.gone, missing.held) == ("nvidia.com/mig-2g.10gb", True, True)


def test_a_driver_that_does_not_answer_is_told_beside_what_it_said_last() -> None:
    document = of(inventory(SEVENTHS), driver_failed=0.5, driver_error="nvmlInit did not come back")
    assert document.driver_error == "nvmlInit did not come back"
    assert (document.driver_version, len(document.gpus)) == ("590.48.01", 1)


def test_no_driver_at_all_still_gives_a_document() -> None:
    held = usage(unseen=frozenset({key("mig-1g.5gb", "MIG-x")}))
    document = of(None, held, driver_failed=0.5, driver_error="libnvidia-ml.so.1 not found")
    assert (document.driver_version, document.gpus) == (None, ())
    assert [(d.uuid, d.gone, d.gpu_index) for d in document.missing] == [("MIG-x", False, None)]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (gpu(0), "1g.5gb*7 1g.5gb+me*1 1g.10gb*4 2g.10gb*3 3g.20gb*2 4g.20gb*1 7g.40gb*1"),
        (SEVENTHS, ""),
        (ASSORTED, ""),
        (gpu(0, (2, "3g.20gb", 4, 4)), "1g.5gb*4 1g.5gb+me*1 1g.10gb*2 2g.10gb*2 3g.20gb*1 4g.20gb*1"),
        (gpu(0, (1, "3g.20gb", 0, 4)), "1g.5gb*3 1g.5gb+me*1 1g.10gb*2 2g.10gb*1 3g.20gb*1"),
        (gpu(0, (9, "1g.5gb+me", 0, 1)), "1g.5gb*6 1g.10gb*3 2g.10gb*2 3g.20gb*1"),
        (gpu(0, (8, "1g.5gb", 1, 1), (12, "1g.5gb", 5, 1)), "1g.5gb*5 1g.5gb+me*1 1g.10gb*2 2g.10gb*1"),
        (gpu(0, product=A30_24GB), "1g.6gb*4 1g.6gb+me*1 2g.12gb*2 2g.12gb+me*1 4g.24gb*1"),
        (gpu(0, (1, "2g.48gb", 6, 6), product=RTX_PRO),
         "1g.24gb*2 1g.24gb+gfx*2 1g.24gb+me*1 1g.24gb+me.all*1 1g.24gb-me*2 "
         "2g.48gb*1 2g.48gb+gfx*1 2g.48gb+me.all*1 2g.48gb-me*1"),
    ],
)  # fmt: skip
def test_what_still_fits_is_counted_for_each_profile_by_itself(on: Gpu, expected: str) -> None:
    found = fits(on)
    assert found is not None
    assert " ".join(f"{fit.profile}*{fit.count}" for fit in found) == expected


def test_what_still_fits_is_not_guessed() -> None:
    assert fits(gpu(0, mig=False)) is None
    assert fits(without_privilege(SEVENTHS)) is None
    placed = gpu(0, (1, "3g.20gb", 0, 4), (9, "1g.5gb", 4, 1))
    assert fits(replace(placed, instances=placed.instances[:1])) is None, "a device in an unknown place"
    unplaced = (replace(placed.instances[0], placement=None), placed.instances[1])
    assert fits(replace(placed, instances=unplaced)) is None


def test_the_document_of_a_memory_that_never_was_is_empty() -> None:
    world = World(0.0, memory=Memory())
    document = status(world, decide(world))
    assert (document.gpus, document.missing, document.resources) == ((), (), ())
