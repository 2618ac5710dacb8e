"""One look at a time: what a snapshot says of every product, every odd driver and every failing call."""

from collections.abc import Iterator
from typing import Any

import pytest

from migplugin.core.inventory import Placement, Signs
from migplugin.errors import DriverError
from migplugin.nvml import binding
from migplugin.nvml.snapshot import PRIVILEGE_MISSING
from migplugin.sim.model import Node
from migplugin.sim.profiles import GiProfile, Product, table
from migplugin.sim.records import Failure
from tests.nvml.machine import SEVEN, Machine, devices, machine, only_gpu

PRODUCTS = table().products
MANDATORY = (
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetMinorNumber",
    "nvmlDeviceGetMigMode",
    "nvmlDeviceGetName",
    "nvmlDeviceGetPciInfo_v3",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetGpuInstanceProfileInfoV",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
    "nvmlDeviceGetGpuInstances",
    "nvmlGpuInstanceGetInfo",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetMigDeviceHandleByIndex",
    "nvmlDeviceGetGpuInstanceId",
    "nvmlDeviceGetComputeInstanceId",
    "nvmlDeviceGetAttributes_v2",
)
OPTIONAL = (
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetGpuInstanceProfileInfo",
    "nvmlDeviceGetGpuInstanceProfileInfoV",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
    "nvmlDeviceGetGpuInstances",
    "nvmlDeviceGetGpuInstanceById",
    "nvmlGpuInstanceGetInfo",
    "nvmlGpuInstanceGetComputeInstanceById",
    "nvmlComputeInstanceGetInfo_v2",
    "nvmlGpuInstanceGetComputeInstanceProfileInfo",
    "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
    "nvmlDeviceGetMaxMigDeviceCount",
    "nvmlDeviceGetAttributes",
    "nvmlDeviceGetAttributes_v2",
)


def fills() -> Iterator[object]:
    for product in PRODUCTS:
        for profile in product.profiles:
            yield pytest.param(product, profile, id=f"{product.cli_name} {profile.name}")


@pytest.mark.parametrize(("product", "profile"), list(fills()))
def test_a_gpu_filled_with_a_profile_is_told_as_the_table_has_it(
    product: Product, profile: GiProfile
) -> None:
    with machine(f"1x{product.cli_name}=") as place:
        place.create(*[profile.name] * profile.max_instances)
        gpu = only_gpu(place.look())
        held = {(gi.id, gi.start) for gi in place.node.gpus[0].instances}
        assert (gpu.product, gpu.memory_mib) == (product.nvml_name, product.memory_total_mib)
        assert gpu.memory_slices == product.memory_slots
        assert [device.profile for device in gpu.devices] == [profile.name] * profile.max_instances
        assert {device.uuid for device in gpu.devices} == place.uuids()
        assert {(device.gi, device.placement) for device in gpu.devices} == {
            (gi, Placement(start, profile.placement_size)) for gi, start in held
        }
        assert {device.memory_mib for device in gpu.devices} == {profile.memory_mib}
        assert {device.multiprocessors for device in gpu.devices} == {profile.whole.sm_count}
        assert [(i.gi, i.profile) for i in gpu.instances] == [(gi, profile.name) for gi, _ in sorted(held)]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.cli_name)
def test_every_profile_on_offer_is_told_as_the_table_has_it(product: Product) -> None:
    with machine(f"1x{product.cli_name}=") as place:
        offered = {
            (p.name, p.id, p.slices, p.memory_mib, p.max_instances, p.placements)
            for p in only_gpu(place.look()).profiles
        }
    assert offered == {
        (
            p.name,
            p.gi_profile_id,
            p.slices,
            p.memory_mib,
            p.max_instances,
            tuple(Placement(start, p.placement_size) for start in p.placements),
        )
        for p in product.profiles
    }


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.cli_name)
def test_a_driver_that_says_no_names_has_them_computed(product: Product) -> None:
    with machine(f"1x{product.cli_name}=", v2_profile_info=False) as place:
        largest = max(product.profiles, key=lambda profile: profile.memory_mib)
        place.create(largest.name)
        gpu = only_gpu(place.look())
    assert {profile.id: profile.name for profile in gpu.profiles} == {
        profile.gi_profile_id: profile.name for profile in product.profiles
    }
    assert [device.profile for device in gpu.devices] == [largest.name]


@pytest.mark.parametrize(("product", "half"), [("b200", "1g.23gb"), ("h200", "3g.71gb")])
def test_computed_names_round_halves_up(product: str, half: str) -> None:
    with machine(f"1x{product}={half}", v2_profile_info=False) as place:
        assert [device.profile for device in only_gpu(place.look()).devices] == [half]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.cli_name)
def test_compute_instances_smaller_than_their_gpu_instance_have_their_own_profile(product: Product) -> None:
    for profile in product.profiles:
        for ci in profile.ci_profiles:
            name = profile.ci_name(ci)
            with machine(f"1x{product.cli_name}={name}") as place:
                (device,) = only_gpu(place.look()).devices
            assert (device.profile, device.multiprocessors) == (name, ci.sm_count)
            assert device.placement is not None


def test_compute_instances_of_one_gpu_instance_share_its_place_and_its_node() -> None:
    with machine("1xa100-40gb=1c.3g.20gb*3") as place:
        gpu = only_gpu(place.look())
    assert [(device.gi, device.ci) for device in gpu.devices] == [(2, 0), (2, 1), (2, 2)]
    assert len({device.placement for device in gpu.devices}) == 1
    assert len({device.gi_minor for device in gpu.devices}) == 1
    assert len({device.ci_minor for device in gpu.devices}) == 3


def test_a_gpu_instance_without_compute_instance_is_no_mig_device(place: Machine) -> None:
    place.change(lambda node: node.gpus[0].create("3g.20gb", 4, compute=False))
    look = place.look()
    gpu = only_gpu(look)
    assert gpu.devices == ()
    assert [(i.profile, i.placement) for i in gpu.instances] == [("3g.20gb", Placement(4, 4))]
    assert not look.disagreements


def test_a_gpu_with_mig_off_still_tells_what_it_could_hold() -> None:
    with machine("1xa100-40gb") as place:
        gpu = only_gpu(place.look())
    assert (gpu.mig_enabled, gpu.mig_pending) == (False, False)
    assert gpu.memory_slices == 8
    assert {profile.name for profile in gpu.profiles} >= {"1g.5gb", "7g.40gb"}
    assert not gpu.devices
    assert not gpu.instances


def test_profiles_that_are_told_only_with_mig_on_are_read_once_it_is() -> None:
    with machine("1xa100-40gb", profile_queries="mig-on") as place, place.session() as snapshots:
        assert only_gpu(snapshots.take()).profiles == ()
        place.mig_mode(on=True)
        place.create("2g.10gb")
        gpu = only_gpu(snapshots.take())
        assert len(gpu.profiles) == 7
        assert [device.profile for device in gpu.devices] == ["2g.10gb"]


def test_a_gpu_that_cannot_do_mig_says_so() -> None:
    with machine("1xa100-40gb", fail={"nvmlDeviceGetMigMode": Failure(3)}) as place:
        gpu = only_gpu(place.look())
    assert gpu.mig_enabled is None
    assert gpu.mig_pending is None
    assert gpu.profiles == ()


def test_a_change_of_mode_that_waits_is_told_as_pending() -> None:
    with machine("1xa100-40gb", mig_activation="reset-required") as place:
        place.mig_mode(on=True)
        gpu = only_gpu(place.look())
    assert (gpu.mig_enabled, gpu.mig_pending) == (False, True)


def test_minors_that_differ_from_indices_lead_to_the_right_nodes() -> None:
    with machine("3xa100-40gb=1g.5gb*7", minors=[2, 0, 1]) as place:
        look = place.look()
        for gpu, device in look.inventory.devices():
            assert gpu.minor == (2, 0, 1)[gpu.index]
            assert device.gi_minor == 3 + 135 * gpu.minor + 9 * device.gi
            assert device.ci_minor == device.gi_minor + 1 + device.ci
        assert not look.disagreements


def test_a_minor_that_changes_is_seen_at_the_next_look() -> None:
    with machine("2xa100-40gb=1g.5gb", minors=[0, 1]) as place, place.session() as snapshots:
        snapshots.take()
        place.switch(minors=[1, 0])
        look = snapshots.take()
        assert [gpu.minor for gpu in look.inventory.gpus] == [1, 0]
        assert [device.gi_minor for device in devices(look.inventory)] == [3 + 135 + 9 * 13, 3 + 9 * 13]


def test_capability_minors_come_from_the_static_table_where_the_files_are_hidden() -> None:
    with machine(SEVEN) as place:
        visible = only_gpu(place.look()).devices
        place.switch(runtime_view="container")
        look = place.look()
        assert look.hidden
        assert only_gpu(look).devices == visible


def test_a_driver_without_any_capability_files_leaves_the_minors_open() -> None:
    with machine(SEVEN, runtime_view="container") as place:
        (place.simulation.proc_root / "driver/nvidia-caps/mig-minors").unlink()
        look = place.look()
        assert {(d.gi_minor, d.ci_minor) for d in only_gpu(look).devices} == {(None, None)}
        (sentence,) = look.inventory.unreadable
        assert str(place.simulation.proc_root) in sentence
        assert "--proc-root" in sentence


def test_swapped_gpu_instance_ids_do_not_move_the_placement() -> None:
    with machine("1xa100-40gb=3g.20gb:1g.5gb", gi_ids="swapped") as place:
        held = {gi.id: gi.start for gi in place.node.gpus[0].instances}
        found = only_gpu(place.look()).devices
    assert {device.gi: device.placement.start for device in found if device.placement} == held
    assert held[1] == 4


def test_gaps_between_mig_indices_hide_nobody() -> None:
    with machine(SEVEN, mig_index="sparse") as place:
        first = only_gpu(place.look()).devices
        place.destroy(*[device.gi for device in first if device.index in {0, 3}])
        left = only_gpu(place.look()).devices
    assert {device.index for device in left} == {1, 2, 4, 5, 6}
    assert set(left) < set(first)


def test_uuids_of_the_old_form_are_ids_like_others() -> None:
    with machine("1xa100-40gb", uuid_format="legacy") as place:
        place.mig_mode(on=True)
        place.create("3g.20gb")
        (device,) = only_gpu(place.look()).devices
    assert device.uuid == f"MIG-{device.gpu}/{device.gi}/{device.ci}"


def test_the_numa_node_comes_from_sysfs_and_minus_one_is_none() -> None:
    with machine("3xa100-40gb", numa=[1, -1, 0], pci_order="descending") as place:
        look = place.look()
    assert [gpu.numa_node for gpu in look.inventory.gpus] == [1, None, 0]
    assert [gpu.pci_address for gpu in look.inventory.gpus] == [
        "0000:17:00.0",
        "0000:0f:00.0",
        "0000:07:00.0",
    ]


def test_only_control_nodes_that_exist_are_told(place: Machine) -> None:
    (place.simulation.dev_root / "dev/nvidia-modeset").unlink()
    assert place.look().inventory.control_nodes == (
        "/dev/nvidiactl",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
    )


@pytest.mark.parametrize("symbol", OPTIONAL)
def test_a_missing_symbol_costs_detail_and_no_device(symbol: str) -> None:
    with machine("1xa100-40gb=1c.3g.20gb:2g.10gb:1g.5gb", missing_symbols=[symbol]) as place:
        found = only_gpu(place.look()).devices
    assert {device.profile for device in found} == {"1c.3g.20gb", "2g.10gb", "1g.5gb"}


def test_a_driver_without_any_instance_calls_serves_all_the_same() -> None:
    missing = [name for name in OPTIONAL if name != "nvmlDeviceGetMaxMigDeviceCount"]
    with machine("1xa100-40gb=1c.3g.20gb:2g.10gb", missing_symbols=missing) as place:
        look = place.look()
    assert {device.profile for device in only_gpu(look).devices} == {"1c.3g.20gb", "2g.10gb"}
    assert {device.placement for device in only_gpu(look).devices} == {None}
    assert not look.disagreements, "a driver that cannot tell is not one that disagrees"
    assert not look.inventory.unreadable


def test_without_privilege_devices_are_served_and_one_sentence_says_what_is_missing() -> None:
    with machine("2xa100-40gb=3g.20gb:2g.10gb,1xa100-40gb=1c.3g.20gb*2", privilege="none") as place:
        look = place.look()
    found = devices(look.inventory)
    assert sorted(device.profile for device in found) == [
        *["1c.3g.20gb"] * 2,
        *["2g.10gb"] * 2,
        *["3g.20gb"] * 2,
    ]
    assert {device.placement for device in found} == {None}
    assert all(device.memory_mib and device.multiprocessors for device in found)
    assert all(device.gi_minor and device.ci_minor for device in found)
    assert look.inventory.unreadable == (PRIVILEGE_MISSING,)
    assert not look.disagreements


@pytest.mark.parametrize("privilege", ["none", "monitor", "config", "admin"])
def test_two_looks_are_equal_whatever_the_caller_may_do(privilege: str) -> None:
    with (
        machine("1xa100-40gb=1g.5gb,1xa30", privilege=privilege) as place,
        place.session() as snapshots,
    ):
        first = snapshots.take()
        assert snapshots.take() == first
        assert [device.profile for device in devices(first.inventory)] == ["1g.5gb"]


@pytest.mark.parametrize("privilege", ["none", "monitor"])
def test_a_node_without_mig_is_not_told_that_placements_are_missing(privilege: str) -> None:
    with machine("1xa100-40gb", privilege=privilege) as place:
        assert place.look().inventory.unreadable == ()


def test_the_config_capability_is_enough_for_placements() -> None:
    with machine(SEVEN, privilege="config") as place:
        look = place.look()
    assert all(device.placement for device in only_gpu(look).devices)
    assert look.inventory.unreadable == ()


def test_privilege_that_comes_later_is_used() -> None:
    with machine(SEVEN, privilege="none") as place, place.session() as snapshots:
        snapshots.take()
        place.switch(privilege="admin")
        look = snapshots.take()
        gpu = only_gpu(look)
        assert all(device.placement for device in gpu.devices)
        assert (gpu.memory_slices, gpu.memory_mib) == (8, 40960)
        assert look.inventory.unreadable == ()


def test_without_privilege_and_without_names_the_name_of_the_device_is_used() -> None:
    with machine("1xb200=1g.23gb", privilege="none", v2_profile_info=False) as place:
        assert [device.profile for device in only_gpu(place.look()).devices] == ["1g.23gb"]


def test_a_lost_gpu_keeps_its_uuid_and_hides_nobody() -> None:
    with machine("3xa100-40gb=1g.5gb") as place, place.session() as snapshots:
        before = snapshots.take().inventory
        place.lose(1)
        after = snapshots.take().inventory
    assert [gpu.index for gpu in after.gpus] == [0, 2]
    (lost,) = after.broken
    assert (lost.index, lost.uuid) == (1, before.gpus[1].uuid)
    assert "lost" in lost.reason
    assert lost.lost
    assert [device for device in devices(after) if device.gpu != lost.uuid] == devices(after)
    assert set(devices(after)) < set(devices(before))


def test_what_the_driver_knows_of_a_gpu_s_fitness_is_told_and_what_it_does_not_know_is_absent() -> None:
    with machine("2xa100-40gb=1g.5gb") as place, place.session() as snapshots:
        assert [gpu.signs for gpu in snapshots.take().inventory.gpus] == [Signs(), Signs()]
        place.change(lambda node: node.gpus[1].record.fields.update({230: 4, 144: 1, 145: 0}))
        found = snapshots.take().inventory.gpus
    assert [gpu.signs for gpu in found] == [Signs(), Signs(4, remap_pending=True, remap_failed=False)]


@pytest.mark.parametrize("code", [2, 3, 4, 7, 13, 25, 999])
def test_a_driver_that_refuses_to_tell_fields_has_no_signs(code: int) -> None:
    with machine("1xa100-40gb=1g.5gb") as place, place.session() as snapshots:
        place.change(lambda node: node.switches.fail.update({"nvmlDeviceGetFieldValues": Failure(code)}))
        assert only_gpu(snapshots.take()).signs == Signs()
        place.change(lambda node: node.switches.fail.update({"nvmlDeviceGetFieldValues": Failure(15)}))
        assert [gpu.lost for gpu in snapshots.take().inventory.broken] == [True]


def test_a_gpu_lost_from_the_beginning_is_told_without_uuid() -> None:
    with machine("2xa100-40gb=1g.5gb") as place:
        place.lose(0)
        inventory = place.look().inventory
    assert [(gpu.index, gpu.uuid) for gpu in inventory.broken] == [(0, None)]
    assert inventory.gpu_count == 2


@pytest.mark.parametrize("code", [15, 999, 12345])
@pytest.mark.parametrize("call", MANDATORY)
def test_a_call_that_fails_on_one_gpu_breaks_no_other(call: str, code: int) -> None:
    with machine("2xa100-40gb=1g.5gb*2", fail={call: Failure(code, 1)}) as place:
        inventory = place.look().inventory
        assert len(devices(inventory)) >= 2
        assert inventory.gpus[0].index == 0
        assert len(inventory.gpus[0].devices) == 2
        (broken,) = inventory.broken
        assert broken.index == 1
        assert str(code) in broken.reason
        if call not in {"nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID"}:
            assert broken.uuid == place.node.gpus[1].uuid


@pytest.mark.parametrize("call", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2"])
def test_a_driver_that_does_not_answer_as_a_whole_is_an_error_of_the_look(call: str) -> None:
    with machine(SEVEN, fail={call: Failure(999)}) as place, pytest.raises(DriverError) as error:
        place.look()
    assert error.value.code == 999
    assert error.value.call in {"nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"}


def test_a_gpu_that_comes_back_is_read_again() -> None:
    with machine("2xa100-40gb=1g.5gb") as place, place.session() as snapshots:
        before = snapshots.take()
        place.lose(1)
        snapshots.take()
        place.lose(1, lost=False)
        assert snapshots.take() == before


@pytest.mark.parametrize(
    "victim", ["nvmlGpuInstanceGetInfo", "nvmlDeviceGetUUID", "nvmlDeviceGetGpuInstanceId"]
)
def test_an_instance_that_leaves_while_we_look_breaks_nothing(victim: str) -> None:
    """The last of them is destroyed by another process just before we ask for it."""
    with machine("1xa100-40gb=1g.5gb*7") as place:
        gone: list[int] = []
        function = place.library.original(victim)

        def leave(*arguments: object) -> int:
            if place.calls[victim] == 4 and not gone:
                gone.extend(gi.id for gi in place.node.gpus[0].instances)
                place.destroy(*gone)
            return int(function(*arguments))

        place.library.replaced[victim] = leave
        look = place.look()
        assert gone
        assert not look.inventory.broken
        place.library.replaced.clear()
        assert only_gpu(place.look()).devices == ()


def test_an_instance_of_a_profile_that_nobody_lists_is_found_by_its_device(
    place: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile that this program cannot ask for: the walk over the enum ends before it."""
    place.change(lambda node: node.gpus[0].create("3g.20gb", 0))
    place.create("1g.5gb")
    honest = binding.gi_profiles
    monkeypatch.setattr(binding, "gi_profiles", lambda handle: [p for p in honest(handle) if p.id != 9])
    look = place.look()
    found = {device.profile: device for device in only_gpu(look).devices}
    assert found["3g.20gb"].placement == Placement(0, 4)
    assert ("3g.20gb", Placement(0, 4)) in {(i.profile, i.placement) for i in only_gpu(look).instances}
    assert not look.disagreements


@pytest.mark.parametrize("code", [2, 3, 6])
@pytest.mark.parametrize(
    "call", ["nvmlDeviceGetGpuInstances", "nvmlDeviceGetGpuInstancePossiblePlacements_v2"]
)
def test_a_profile_that_the_driver_lists_nothing_of_costs_no_other(call: str, code: int) -> None:
    with machine("1xa100-40gb=3g.20gb:2g.10gb") as place:
        place.change(lambda node: node.gpus[0].create("1g.5gb", compute=False))
        function = place.library.original(call)

        def all_but_3g(device: object, profile: int, *rest: object) -> int:
            return code if profile == 9 else function(device, profile, *rest)

        place.library.replaced[call] = all_but_3g
        look = place.look()
    gpu = only_gpu(look)
    assert {device.profile for device in gpu.devices} == {"3g.20gb", "2g.10gb"}
    assert all(device.placement for device in gpu.devices)
    assert {instance.profile for instance in gpu.instances} == {"3g.20gb", "2g.10gb", "1g.5gb"}
    assert not look.disagreements


def test_a_future_profile_is_served_under_the_name_that_the_driver_gives_it(
    place: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.create("3g.20gb")
    honest = binding.gi_profiles

    def future(handle: binding.Handle) -> list[binding.GiProfileInfo]:
        return [
            binding.GiProfileInfo(40, p.id, p.slices, p.memory_mib, p.max_instances, "MIG 3q.turbo")
            if p.id == 9
            else p
            for p in honest(handle)
        ]

    monkeypatch.setattr(binding, "gi_profiles", future)
    monkeypatch.setattr(binding, "name", lambda _handle: "NVIDIA Z1000 MIG 3q.turbo")
    (device,) = only_gpu(place.look()).devices
    assert device.profile == "3q.turbo"


def test_a_profile_beyond_the_known_enum_is_asked_for(place: Machine) -> None:
    """The walk goes on until the driver says that there are no more."""
    asked = []
    function = place.library.original("nvmlDeviceGetGpuInstanceProfileInfoV")

    def profile_info(device: object, enum: int, info: object) -> int:
        asked.append(enum)
        if enum in {0x12, 0x13}:
            return 3 if enum == 0x12 else int(function(device, 0, info))
        return int(function(device, enum, info))

    place.library.replaced["nvmlDeviceGetGpuInstanceProfileInfoV"] = profile_info
    with place.session():
        assert [p.enum for p in binding.gi_profiles(binding.gpu(0))][-1] == 0x13
    assert asked == list(range(0x15))


def test_a_version_word_that_the_driver_refuses_is_answered_with_the_first_version(place: Machine) -> None:
    place.create("1g.5gb")
    with place.refusing("nvmlDeviceGetGpuInstanceProfileInfoV", 25):
        gpu = only_gpu(place.look())
    assert {profile.name for profile in gpu.profiles} >= {"1g.5gb", "1g.5gb+me", "7g.40gb"}


def test_a_wrong_instance_count_does_not_overrun_the_list() -> None:
    """As NVML reports for an A30 (mig-parted): more instances are live than the profile says can be."""
    with machine("1xa100-40gb=1g.5gb*7") as place, place.session():
        handle = binding.gpu(0)
        assert len(binding.gis(handle, 19, 1)) == 7
        assert len(binding.gis(handle, 19, 0)) == 7


def test_places_that_become_more_between_two_calls_do_not_overrun_the_list(place: Machine) -> None:
    function = place.library.original("nvmlDeviceGetGpuInstancePossiblePlacements_v2")
    room: list[int] = []

    def fewer_first(device: object, profile: object, array: Any, count: Any) -> int:
        if array is None:
            count._obj.value = 1
            return 0
        room.append(len(array))
        return int(function(device, profile, array, count)) if len(array) >= 7 else 999

    place.library.replaced["nvmlDeviceGetGpuInstancePossiblePlacements_v2"] = fewer_first
    with place.session():
        assert len(binding.placements(binding.gpu(0), 19)) == 7
    assert room[0] >= 7


def test_a_look_costs_few_calls() -> None:
    """A look at a full node is some seventy calls for each GPU, once its profiles are known."""
    with machine("8xa100-40gb=1g.5gb*7") as place, place.session() as snapshots:
        snapshots.take()
        place.calls.clear()
        assert len(devices(snapshots.take().inventory)) == 56
    assert place.calls.total() <= 8 * 70
    assert place.calls["nvmlDeviceGetGpuInstanceProfileInfoV"] == 0


def test_a_device_whose_name_tells_another_profile_than_its_instance_is_a_disagreement() -> None:
    """A stale session names what was there before under the ids of what is there now."""
    with machine("1xa100-40gb=4g.20gb", stale_sessions=True) as place, place.session() as snapshots:
        assert not snapshots.take().disagreements
        place.change(_other_half)
        look = snapshots.take()
        assert {key[1:] for key in look.disagreements} == {(1, 0)}


@pytest.mark.parametrize("start", range(7))
def test_a_device_lies_where_it_was_put(place: Machine, start: int) -> None:
    place.change(lambda node: node.gpus[0].create("1g.5gb", start))
    (device,) = only_gpu(place.look()).devices
    assert device.placement == Placement(start, 1)


def _other_half(node: Node) -> None:
    """Another profile under the same ids, and so under the same UUID."""
    node.gpus[0].destroy(1)
    assert node.gpus[0].create("3g.20gb", 0).id == 1
