"""The decision where devices are shared or renamed while pods hold them."""

from dataclasses import replace

import pytest

from migplugin.core.allocation import granted
from migplugin.core.decide import Options, World, decide
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.naming import Naming, Rule
from migplugin.core.resource import GPU, ResourceName, Strategy
from migplugin.core.sharing import Shared, TimeSlicing
from tests.core.test_decide import MIG_1G, MIG_2G, ONE, WITHOUT_B, Run, gpu, inventory, usage

SHARED = ResourceName("nvidia.com/mig-1g.5gb.shared")
SMALL = ResourceName("nvidia.com/small")


def twice(rename: ResourceName | None = None, count: int = 2, **more: bool) -> TimeSlicing:
    return TimeSlicing((Shared(MIG_1G, count, rename),), **more)


def options(sharing: TimeSlicing | None = None, naming: Naming | None = None) -> Options:
    return Options(removal_delay=10.0, sharing=sharing or TimeSlicing(), naming=naming or Naming())


def test_replicas_are_shown_and_share_health() -> None:
    run = Run(inventory=ONE, options=options(twice()))
    assert run.shown(MIG_1G) == {"MIG-a::0": True, "MIG-a::1": True, "MIG-b::0": True, "MIG-b::1": True}
    run.step(now=1.0, inventory=WITHOUT_B)
    assert run.shown(MIG_1G) == {"MIG-a::0": True, "MIG-a::1": True, "MIG-b::0": False, "MIG-b::1": False}
    run.step(now=2.0, unready={DeviceId("MIG-a"): "no node"})
    assert run.sick(MIG_1G, "MIG-a::1") == "no node"


def test_replicas_do_not_stand_in_each_other_s_way() -> None:
    held = usage(0.0, (MIG_1G, "MIG-a::0"), (MIG_1G, "MIG-a::1"))
    run = Run(inventory=ONE, options=options(twice()), usage=held)
    assert run.shown(MIG_1G) == {"MIG-a::0": True, "MIG-a::1": True, "MIG-b::0": True, "MIG-b::1": True}


def test_sharing_under_another_name_waits_for_the_pod_that_has_the_device_to_itself() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (MIG_1G, "MIG-a")))
    run.step(now=1.0, options=options(twice(SHARED)))
    assert run.shown(MIG_1G) == {"MIG-a": False, "MIG-b": False}
    assert run.sick(MIG_1G, "MIG-b") == f"no longer offered as {MIG_1G} but as {SHARED}"
    assert run.shown(SHARED) == {"MIG-a::0": False, "MIG-a::1": False, "MIG-b::0": True, "MIG-b::1": True}
    assert run.sick(SHARED, "MIG-a::1") == f"still held by a pod as {MIG_1G}"
    run.step(now=11.5, usage=usage(11.5))
    assert run.shown(MIG_1G) == {}
    assert run.shown(SHARED) == {"MIG-a::0": True, "MIG-a::1": True, "MIG-b::0": True, "MIG-b::1": True}


def test_sharing_under_the_same_name_waits_too_and_so_does_the_way_back() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (MIG_1G, "MIG-a")))
    run.step(now=1.0, options=options(twice()))
    assert run.sick(MIG_1G, "MIG-a::0") == "a pod still has it to itself"
    assert run.sick(MIG_1G, "MIG-b::0") == ""
    assert run.sick(MIG_1G, "MIG-b").startswith("no longer offered under this id")
    run.step(now=20.0, usage=usage(20.0, (MIG_1G, "MIG-b::1")), options=options())
    assert run.sick(MIG_1G, "MIG-b") == "a pod still holds a replica of it"
    assert run.sick(MIG_1G, "MIG-a") == ""
    run.step(now=40.0, usage=usage(40.0))
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}


def test_fewer_replicas_take_none_from_a_pod() -> None:
    run = Run(inventory=ONE, options=options(twice(count=4)), usage=usage(0.0, (MIG_1G, "MIG-a::3")))
    run.step(now=1.0, options=options(twice()))
    run.step(now=12.0, usage=usage(12.0, (MIG_1G, "MIG-a::3")))
    assert run.shown(MIG_1G) == {
        "MIG-a::0": True, "MIG-a::1": True, "MIG-b::0": True, "MIG-b::1": True, "MIG-a::3": False,
    }  # fmt: skip


def test_what_a_pod_holds_under_a_name_of_an_earlier_configuration_is_served_after_a_restart() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (SMALL, "MIG-a::0"), (ResourceName("x.com/y"), "MIG-b")))
    assert run.shown(SMALL) == {"MIG-a::0": False}
    assert run.shown(MIG_1G) == {"MIG-a": False, "MIG-b": False}
    assert run.shown(ResourceName("x.com/y")) is None


def test_a_rename_waits_for_pods_and_a_resource_that_did_not_change_stays_as_it_is() -> None:
    both = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "2g.10gb")))
    run = Run(inventory=both, usage=usage(0.0, (MIG_1G, "MIG-a")))
    before = run.outcome.offers.resources[MIG_2G]
    run.step(now=1.0, options=options(naming=Naming(mig=(Rule("1g.5gb", SMALL),))))
    assert run.shown(SMALL) == {"MIG-a": False}
    assert run.outcome.offers.resources[MIG_2G] is before


def test_single_keeps_the_profile_that_pods_hold_as_replicas() -> None:
    shared = TimeSlicing((Shared(GPU, 2),))
    both = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "2g.10gb")))
    run = Run(
        inventory=both,
        usage=usage(0.0, (GPU, "MIG-b::1")),
        options=replace(options(shared), strategy=Strategy.SINGLE),
    )
    assert run.shown(GPU) == {"MIG-b::0": True, "MIG-b::1": True}


def test_use_of_a_gpu_counts_every_resource_and_every_lease() -> None:
    node = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "2g.10gb")), gpu(1, ("MIG-c", "1g.5gb")))
    world = World(
        1.0,
        inventory=node,
        usage=usage(0.0, (MIG_2G, "MIG-b"), (ResourceName("x.com/y"), "MIG-c"), (GPU, "GPU-1")),
        leases={(MIG_1G, DeviceId("MIG-a::1")): 0.5},
        options=options(twice()),
    )
    offers = decide(world).offers
    other = {ResourceName("x.com/y"): 1, GPU: 1}
    assert offers.use == {GpuUuid("GPU-0"): {MIG_2G: 1, MIG_1G: 1}, GpuUuid("GPU-1"): other}
    more = granted(offers, MIG_1G, [DeviceId("MIG-a::0"), DeviceId("MIG-c::0"), DeviceId("nobody")])
    assert more.use == {GpuUuid("GPU-0"): {MIG_2G: 1, MIG_1G: 2}, GpuUuid("GPU-1"): {**other, MIG_1G: 1}}


@pytest.mark.parametrize("fail", [True, False])
def test_what_answers_are_made_of_comes_with_the_offers(fail: bool) -> None:
    chosen = replace(options(twice(fail_requests_greater_than_one=fail)), policy="packed")
    offers = decide(
        World(0.0, inventory=replace(ONE, links={(GpuUuid("a"), GpuUuid("b")): 5}), options=chosen)
    ).offers
    assert (offers.one_replica_each, offers.policy, len(offers.links)) == (fail, "packed", 1)


def test_what_does_not_change_is_the_same_object() -> None:
    run = Run(inventory=ONE, options=options(twice(count=100)))
    before = run.outcome
    run.step(now=1.0)
    assert run.outcome.offers.resources[MIG_1G] is before.offers.resources[MIG_1G]
    assert len({id(offered) for offered in run.outcome.offers.resources[MIG_1G].devices.values()}) == 2
