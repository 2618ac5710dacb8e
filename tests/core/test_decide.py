"""The decision, as tables of what happened and what the kubelet is then shown."""

from dataclasses import replace

from migplugin.core.decide import Memory, Options, Source, Usage, World, decide
from migplugin.core.inventory import BrokenGpu, DeviceId, Gpu, GpuUuid, Inventory, MigDevice, Placement, Signs
from migplugin.core.resource import GPU, ResourceName, Strategy
from migplugin.core.sharing import Shared, TimeSlicing
from migplugin.core.sickness import Fault

MIG_1G = ResourceName("nvidia.com/mig-1g.5gb")
MIG_2G = ResourceName("nvidia.com/mig-2g.10gb")


def gpu(index: int, *devices: tuple[str, str], mig: bool = True) -> Gpu:
    uuid = GpuUuid(f"GPU-{index}")
    migs = tuple(
        MigDevice(DeviceId(id_), uuid, n, n, 0, profile, Placement(n, 1), 4864, 14, 30 + n, 31 + n)
        for n, (id_, profile) in enumerate(devices)
    )
    return Gpu(uuid, index, index, f"0000:0{index}:00.0", None, "A100", 40960, mig, mig, devices=migs)


def inventory(*gpus: Gpu, broken: tuple[BrokenGpu, ...] = ()) -> Inventory:
    return Inventory("1", gpus, broken)


def usage(began: float, *named: tuple[ResourceName, str], pod_resources: bool = True) -> Usage:
    keys = frozenset((resource, DeviceId(id_)) for resource, id_ in named)
    return Usage(began, Source.OK, Source.OK, keys, keys if pod_resources else frozenset())


class Run:
    """A world that is decided again and again; each call changes what is given and keeps the rest."""

    def __init__(self, **first: object) -> None:
        self.world = World(0.0, usage=usage(0.0), options=Options(removal_delay=10.0))
        self.step(**first)

    def step(self, **changes: object) -> None:
        self.world = replace(self.world, **changes)  # type: ignore[arg-type]
        self.outcome = decide(self.world)
        leases = {k: t for k, t in self.world.leases.items() if (k, t) not in self.outcome.ended_leases}
        self.world = replace(self.world, memory=self.outcome.memory, leases=leases)

    def shown(self, resource: ResourceName) -> dict[str, bool] | None:
        offer = self.outcome.offers.resources.get(resource)
        return None if offer is None else {str(i): d.healthy for i, d in offer.devices.items()}

    def times(self) -> tuple[float | None, float | None, float | None]:
        return self.outcome.usage_at, self.outcome.wake_at, self.outcome.look_at

    def sick(self, resource: ResourceName, id_: str) -> str:
        return self.outcome.offers.resources[resource].devices[DeviceId(id_)].sick


ONE = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "1g.5gb")))
WITHOUT_B = inventory(gpu(0, ("MIG-a", "1g.5gb")))


def test_live_devices_are_shown_healthy_under_their_resource() -> None:
    run = Run(inventory=ONE)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}
    assert run.outcome.wake_at is None
    assert run.outcome.usage_at is None


def test_a_device_that_left_is_unhealthy_and_leaves_the_list_only_after_the_delay_and_a_look() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, inventory=WITHOUT_B)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    assert run.outcome.wake_at == 11.0
    run.step(now=11.0)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}, "nobody has asked who holds it"
    assert run.outcome.usage_at is not None
    assert run.outcome.usage_at <= 11.0
    run.step(now=11.1, usage=usage(11.0))
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_a_look_begun_before_the_delay_was_over_is_not_enough() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, inventory=WITHOUT_B)
    run.step(now=12.0, usage=usage(10.9))
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}


def test_a_device_that_a_pod_holds_stays_listed_for_as_long_as_it_is_held() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (MIG_1G, "MIG-b")))
    run.step(now=1.0, inventory=WITHOUT_B)
    for now in (20.0, 500.0, 9000.0):
        run.step(now=now, usage=usage(now, (MIG_1G, "MIG-b")))
        assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    run.step(now=9010.0, usage=usage(9010.0))
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_a_name_in_the_checkpoint_alone_has_the_list_sent_again_once_a_read() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, inventory=WITHOUT_B)
    before = run.outcome.offers.resources[MIG_1G].revision
    run.step(now=12.0, usage=usage(12.0, (MIG_1G, "MIG-b"), pod_resources=False))
    assert run.outcome.offers.resources[MIG_1G].revision == before + 1
    run.step(now=12.5)
    assert run.outcome.offers.resources[MIG_1G].revision == before + 1, "the same read says nothing new"


def test_an_unreadable_checkpoint_keeps_what_is_gone_and_says_so() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, inventory=WITHOUT_B)
    run.step(now=100.0, usage=Usage(100.0, Source.FAILED, Source.OK))
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    assert any("checkpoint" in warning for warning in run.outcome.warnings)


def test_a_lease_holds_a_device_until_two_late_looks_have_not_seen_it() -> None:
    key = (MIG_1G, DeviceId("MIG-b"))
    run = Run(inventory=ONE)
    run.step(now=5.0, leases={key: 5.0}, inventory=WITHOUT_B)
    run.step(now=15.0, usage=usage(15.0))
    assert run.world.leases
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    run.step(now=15.5)
    assert run.world.leases, "one look, decided twice, is one look"
    run.step(now=18.0, usage=usage(18.0))
    assert not run.world.leases
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_looks_soon_after_an_allocation_do_not_end_its_lease() -> None:
    run = Run(inventory=ONE, now=5.0, leases={(MIG_1G, DeviceId("MIG-b")): 5.0})
    for now in (7.0, 9.0, 11.0, 14.9):
        run.step(now=now, usage=usage(now))
    assert run.world.leases, "the kubelet may not have written it down yet"


def test_losing_the_driver_takes_nothing_away() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, inventory=WITHOUT_B)
    run.step(now=2.0, driver_failed=2.0, driver_error="no answer")
    run.step(now=500.0, usage=usage(500.0))
    assert run.shown(MIG_1G) == {"MIG-a": False, "MIG-b": False}
    run.step(now=501.0, driver_failed=None)
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_single_serves_on_when_the_agent_restarts_under_a_pod() -> None:
    options = Options(strategy=Strategy.SINGLE, removal_delay=10.0)
    run = Run(inventory=ONE, usage=usage(0.0, (GPU, "MIG-a")), options=options)
    assert run.shown(GPU) == {"MIG-a": True, "MIG-b": True}


def test_a_lease_ends_when_a_look_begun_after_it_names_the_device() -> None:
    key = (MIG_1G, DeviceId("MIG-b"))
    run = Run(inventory=ONE, usage=usage(4.0, (MIG_1G, "MIG-b")), leases={key: 5.0})
    assert run.world.leases, "that look may have seen an older pod"
    run.step(now=6.0, usage=usage(6.0, (MIG_1G, "MIG-b")))
    assert not run.world.leases


def test_the_last_id_leaves_an_empty_offer_for_a_minute() -> None:
    run = Run(inventory=inventory(gpu(0, ("MIG-a", "1g.5gb"))))
    run.step(now=1.0, inventory=inventory(gpu(0)))
    run.step(now=11.0, usage=usage(11.0))
    assert run.shown(MIG_1G) == {}
    assert run.outcome.wake_at == 71.0
    run.step(now=70.0)
    assert run.shown(MIG_1G) == {}
    run.step(now=71.0)
    assert run.shown(MIG_1G) is None


def test_a_resource_that_was_empty_comes_back_with_its_first_device() -> None:
    run = Run(inventory=WITHOUT_B)
    run.step(now=1.0, inventory=inventory(gpu(0)))
    run.step(now=11.0, usage=usage(11.0))
    run.step(now=20.0, inventory=WITHOUT_B)
    assert run.shown(MIG_1G) == {"MIG-a": True}
    run.step(now=200.0)
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_a_pod_s_device_is_listed_from_the_first_decision_though_it_is_gone() -> None:
    run = Run(inventory=WITHOUT_B, usage=usage(0.0, (MIG_2G, "MIG-x"), (ResourceName("vendor.io/nic"), "n0")))
    assert run.shown(MIG_2G) == {"MIG-x": False}
    assert run.shown(ResourceName("vendor.io/nic")) is None


def test_devices_that_pods_hold_are_listed_before_the_driver_has_answered() -> None:
    run = Run(usage=usage(0.0, (MIG_1G, "MIG-a")), driver_failed=0.0, driver_error="not loaded")
    assert run.shown(MIG_1G) == {"MIG-a": False}
    run.step(now=100.0, usage=usage(100.0))
    assert run.shown(MIG_1G) == {"MIG-a": False}, "not known to be gone"
    run.step(now=101.0, inventory=WITHOUT_B, driver_failed=None)
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_an_id_held_under_one_resource_is_not_healthy_under_another() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (MIG_1G, "MIG-a")))
    run.step(now=1.0, inventory=inventory(gpu(0, ("MIG-a", "2g.10gb"))))
    assert run.shown(MIG_1G) == {"MIG-a": False, "MIG-b": False}
    assert run.shown(MIG_2G) == {"MIG-a": False}
    assert "held by a pod as nvidia.com/mig-1g.5gb" in run.sick(MIG_2G, "MIG-a")
    run.step(now=20.0, usage=usage(20.0))
    assert run.shown(MIG_1G) == {}
    assert run.shown(MIG_2G) == {"MIG-a": True}


def test_a_source_that_falls_silent_frees_nothing() -> None:
    run = Run(inventory=ONE, usage=usage(0.0, (MIG_1G, "MIG-a")))
    run.step(now=1.0, inventory=inventory(gpu(0, ("MIG-a", "2g.10gb"))))
    run.step(now=2.0, usage=Usage(2.0, Source.FAILED, Source.OK))
    assert run.shown(MIG_2G) == {"MIG-a": False}
    run.step(now=4.0, usage=usage(4.0))
    assert run.shown(MIG_2G) == {"MIG-a": True}


def test_a_broken_gpu_makes_its_devices_sick_and_no_others() -> None:
    both = inventory(gpu(0, ("MIG-a", "1g.5gb")), gpu(1, ("MIG-b", "1g.5gb")))
    run = Run(inventory=both)
    lost = inventory(gpu(0, ("MIG-a", "1g.5gb")), broken=(BrokenGpu(1, GpuUuid("GPU-1"), "GPU is lost"),))
    run.step(now=1.0, inventory=lost)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    assert run.sick(MIG_1G, "MIG-b") == "GPU 1: GPU is lost"
    run.step(now=1000.0, usage=usage(1000.0))
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}, "silent is not gone"
    run.step(now=1001.0, inventory=both)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}


def test_a_broken_gpu_without_a_name_keeps_whatever_is_unaccounted_for() -> None:
    run = Run(inventory=inventory(gpu(0, ("MIG-a", "1g.5gb")), gpu(1, ("MIG-b", "1g.5gb"))))
    run.step(now=1.0, inventory=inventory(gpu(0), broken=(BrokenGpu(1, None, "no answer"),)))
    run.step(now=1000.0, usage=usage(1000.0))
    assert run.shown(MIG_1G) == {"MIG-b": False}, "MIG-a is gone from a GPU that answers"


def test_a_device_that_only_a_pod_names_may_be_on_a_broken_gpu() -> None:
    lost = inventory(gpu(0), broken=(BrokenGpu(1, GpuUuid("GPU-1"), "GPU is lost"),))
    run = Run(inventory=lost, usage=usage(0.0, (MIG_1G, "MIG-b")))
    assert run.sick(MIG_1G, "MIG-b") == "GPU 1: GPU is lost"
    run.step(now=1000.0, usage=usage(1000.0))
    assert run.shown(MIG_1G) == {"MIG-b": False}
    run.step(now=1001.0, inventory=inventory(gpu(0), gpu(1)))
    run.step(now=1011.0, usage=usage(1011.0))
    assert run.shown(MIG_1G) == {}


def test_losing_the_driver_changes_nothing_until_the_grace_is_over() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, driver_failed=1.0, driver_error="nvmlDeviceGetCount did not come back")
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}
    assert run.outcome.wake_at == 61.0
    run.step(now=61.0)
    assert run.shown(MIG_1G) == {"MIG-a": False, "MIG-b": False}
    run.step(now=62.0, driver_failed=None)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}


def test_single_stays_with_the_profile_it_serves_until_the_last_device_of_it_is_free() -> None:
    options = Options(strategy=Strategy.SINGLE, removal_delay=10.0)
    mixed = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "2g.10gb"), ("MIG-c", "2g.10gb")))
    run = Run(inventory=inventory(gpu(0, ("MIG-a", "1g.5gb"))), options=options)
    run.step(now=1.0, inventory=mixed)
    assert run.shown(GPU) == {"MIG-a": True}
    assert any("2g.10gb" in warning for warning in run.outcome.warnings)
    run.step(now=2.0, inventory=inventory(gpu(0, ("MIG-b", "2g.10gb"))), usage=usage(2.0, (GPU, "MIG-a")))
    assert run.shown(GPU) == {"MIG-a": False}, "a pod still holds the profile that is served"
    run.step(now=20.0, usage=usage(20.0))
    run.step(now=20.1)
    assert run.shown(GPU) == {"MIG-b": True}


def test_what_is_there_and_no_longer_offered_is_not_called_gone() -> None:
    run = Run(inventory=inventory(gpu(0, mig=False)))
    run.step(now=1.0, inventory=inventory(gpu(0, ("MIG-a", "1g.5gb"))))
    assert run.shown(GPU) == {"GPU-0": False}
    assert run.sick(GPU, "GPU-0") == "no longer offered as nvidia.com/gpu"


def test_the_same_world_gives_the_same_outcome() -> None:
    world = World(3.0, ONE, usage=usage(1.0, (MIG_2G, "MIG-x")), memory=Memory())
    assert decide(world) == decide(world)


def test_a_sick_device_is_shown_unhealthy_with_its_reason_until_it_was_seen_absent() -> None:
    run = Run(inventory=ONE)
    run.step(now=1.0, faults=(Fault(GpuUuid("GPU-0"), 1, 0, 94, 1, 0.5, 0.5),))
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    assert "XID 94" in run.sick(MIG_1G, "MIG-b")
    run.step(now=2.0, faults=(), driver_failed=2.0)
    run.step(now=3.0, driver_failed=None)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": False}
    run.step(now=4.0, inventory=WITHOUT_B)
    run.step(now=5.0, inventory=ONE)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}


def test_a_sick_gpu_makes_all_that_is_offered_of_it_unhealthy() -> None:
    node = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "2g.10gb")), gpu(1, mig=False), gpu(2, mig=False))
    run = Run(inventory=node)
    run.step(faults=tuple(Fault(GpuUuid(f"GPU-{n}"), 0, 0, 79, 1, 0.5, 0.5) for n in (0, 2)))
    assert run.shown(MIG_1G) == {"MIG-a": False}
    assert run.shown(MIG_2G) == {"MIG-b": False}
    assert run.shown(GPU) == {"GPU-1": True, "GPU-2": False}
    assert [change.subject for change in run.outcome.health_changes] == ["GPU-0", "GPU-2"]


def test_a_contained_error_has_usage_read_and_wakes_when_its_device_is_well() -> None:
    key = (MIG_1G, DeviceId("MIG-b"))
    run = Run(inventory=ONE, looked=0.0)
    run.step(now=1.0, faults=(Fault(GpuUuid("GPU-0"), 1, 0, 94, 1, 0.5, 0.5),), leases={key: 0.7})
    run.step(now=1.1, faults=())
    assert run.times()[:2] == (2.0, None)
    before = run.outcome.offers.resources[MIG_1G].revision
    run.step(now=2.0, usage=usage(2.0, (MIG_1G, "MIG-b")))
    assert run.times()[:2] == (4.0, None)
    assert run.outcome.offers.resources[MIG_1G].revision == before
    run.step(now=4.0, usage=usage(4.0, (MIG_1G, "MIG-b"), pod_resources=False))
    assert run.outcome.offers.resources[MIG_1G].revision == before + 1, "the kubelet is to look again"
    run.step(now=10.0, usage=usage(10.0))
    assert run.times()[:2] == (None, 310.0)
    run.step(now=310.0)
    assert run.shown(MIG_1G) == {"MIG-a": True, "MIG-b": True}
    assert run.times() == (None, None, None)


def test_the_driver_is_asked_about_a_fault_where_it_can_say_and_answers() -> None:
    able = inventory(replace(gpu(0, ("MIG-a", "1g.5gb")), signs=Signs(action=0)))
    fault = Fault(GpuUuid("GPU-0"), None, None, 79, 1, 0.5, 0.5)
    run = Run(inventory=ONE, looked=0.0)
    run.step(now=1.0, faults=(fault,))
    assert run.times()[2] is None
    run = Run(inventory=able, looked=0.0)
    run.step(now=1.0, faults=(fault,))
    assert run.times()[2] == 0.5
    run.step(now=1.1, faults=(), looked=1.0)
    assert run.times()[2] == 5.5
    run.step(now=1.2, driver_failed=1.2)
    assert run.times()[2] is None
    run.step(now=6.0, driver_failed=None, looked=5.5)
    assert run.shown(MIG_1G) == {"MIG-a": True}


def test_every_replica_of_a_sick_device_is_unhealthy_and_no_other_is() -> None:
    options = Options(sharing=TimeSlicing((Shared(MIG_1G, 3), Shared(GPU, 2))))
    node = inventory(gpu(0, ("MIG-a", "1g.5gb"), ("MIG-b", "1g.5gb")), gpu(1, mig=False), gpu(2, mig=False))
    run = Run(inventory=node, options=options)
    faults = (
        Fault(GpuUuid("GPU-0"), 1, 0, 94, 1, 0.5, 0.5),
        Fault(GpuUuid("GPU-2"), None, None, 79, 1, 0.5, 0.5),
    )
    run.step(now=1.0, faults=faults)
    assert run.shown(MIG_1G) == {f"MIG-{x}::{n}": x == "a" for x in "ab" for n in range(3)}
    assert run.shown(GPU) == {f"GPU-{x}::{n}": x == 1 for x in (1, 2) for n in range(2)}
    run.step(now=10.0, faults=(), usage=usage(10.0, (MIG_1G, "MIG-b::2")))
    assert run.times()[1] is None, "a pod has one of its replicas"
    run.step(now=20.0, usage=usage(20.0, (MIG_1G, "MIG-a::2")))
    assert run.times()[1] == 320.0


def asked_again(run: Run) -> float | None:
    return run.outcome.usage_at


def test_leases_are_looked_for_until_they_end_and_not_in_a_spin_where_a_source_is_silent() -> None:
    key = (MIG_1G, DeviceId("MIG-a"))
    run = Run(inventory=ONE)
    run.step(now=5.0, leases={key: 4.0})
    assert asked_again(run) == 14.0
    run.step(now=14.0, usage=usage(14.0))
    assert asked_again(run) == 16.0
    run.step(now=16.0, usage=replace(usage(16.0), checkpoint=Source.FAILED))
    assert asked_again(run) == 46.0
    run.step(now=46.0, usage=usage(46.0))
    assert asked_again(run) is None
    run.step(now=50.0, leases={key: 49.0})
    run.step(now=59.0, usage=usage(59.0, key))
    assert asked_again(run) is None, "it was seen"
