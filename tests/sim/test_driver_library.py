"""The simulated library through the real pynvml: every call, and every code that nvml.h and users report."""

import ctypes
from ctypes import byref, c_char, c_uint, create_string_buffer
from typing import Any

import pynvml
import pytest

from migplugin.sim import abi, profiles
from migplugin.sim.call import Export
from migplugin.sim.driver import Simulation
from migplugin.sim.records import Process
from tests.sim.driver_fixtures import (
    address,
    compute_instances,
    create,
    driver,
    gpu_instances,
    installed,
    placements,
    refused,
)

DEMO = "1xa100-40gb=1g.5gb*7,1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2"

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 2, 3, 4, 6
INSUFFICIENT_SIZE, GPU_IS_LOST, IN_USE, INSUFFICIENT_RESOURCES, UNKNOWN = 7, 15, 19, 23, 999
WHOLE = 0xFFFFFFFF


def test_nothing_works_before_init_and_after_the_last_shutdown() -> None:
    with driver() as d:
        gpu = d.gpu()
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
        assert pynvml.nvmlDeviceGetName(gpu) == "NVIDIA A100-SXM4-40GB"
        pynvml.nvmlShutdown()
        assert refused("nvmlDeviceGetCount") == 1
        assert refused("nvmlShutdown") == 1


def test_handles_die_with_their_session() -> None:
    with driver() as d:
        gpu = d.gpu()
        pynvml.nvmlShutdown()
        pynvml.nvmlInit()
        assert refused("nvmlDeviceGetName", gpu) == INVALID_ARGUMENT
        assert address(d.gpu()) != address(gpu)


def test_one_thing_has_one_handle_within_a_session() -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        assert address(d.gpu()) == address(d.gpu())
        assert address(d.mig()) == address(d.mig()) != address(d.gpu())


def test_a_number_that_is_no_handle_and_a_handle_of_the_wrong_kind_are_invalid() -> None:
    with driver("1xa100-40gb=1g.5gb"):
        gi = gpu_instances(pynvml.nvmlDeviceGetHandleByIndex(0), 19)[0]
        for wrong in (ctypes.c_void_p(12345), ctypes.c_void_p(None), gi):
            assert refused("nvmlDeviceGetName", wrong) == INVALID_ARGUMENT
        assert refused("nvmlGpuInstanceGetInfo", pynvml.nvmlDeviceGetHandleByIndex(0)) == INVALID_ARGUMENT


def test_system_calls_answer() -> None:
    with driver():
        assert pynvml.nvmlSystemGetDriverVersion() == "580.95.05"
        assert pynvml.nvmlSystemGetNVMLVersion() == "13.580.95.05"
        assert pynvml.nvmlSystemGetCudaDriverVersion() == 13000
        assert pynvml.nvmlSystemGetCudaDriverVersion_v2() == 13000


def test_error_strings_come_from_the_library_also_for_codes_pynvml_does_not_know() -> None:
    with driver():
        assert str(pynvml.NVMLError(19)) == "In use by another client"
        assert pynvml.nvmlErrorString(23) == "Insufficient Resources"
        assert pynvml.nvmlErrorString(4711) == "Unknown Error"
        assert pynvml.nvmlErrorString(0) == "Success"


def test_a_name_the_library_lacks_is_function_not_found() -> None:
    with driver() as d:
        assert refused("nvmlDeviceGetFanSpeed", d.gpu()) == 13
        assert not hasattr(d.simulation.library, "nvmlDeviceGetFanSpeed")


def test_an_exception_inside_a_call_is_unknown_and_never_success(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: Any) -> None:
        raise ZeroDivisionError

    with driver() as d:
        gpu = d.gpu()
        monkeypatch.setitem(
            abi.EXPORTS, "nvmlDeviceGetName", Export(crash, abi.EXPORTS["nvmlDeviceGetName"].argtypes)
        )
        assert refused("nvmlDeviceGetName", gpu) == UNKNOWN
        assert "simulated driver crashed" in caplog.text


def test_a_driver_that_is_taken_away_is_unknown_and_never_a_crash() -> None:
    with Simulation.open("1xa100-40gb") as simulation, installed(simulation.library):
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        simulation.close()
        assert refused("nvmlDeviceGetName", gpu) == UNKNOWN


def test_a_struct_by_value_is_refused_by_ctypes_where_the_real_library_would_crash() -> None:
    with driver("1xa100-40gb=") as d:
        place = pynvml.c_nvmlGpuInstancePlacement_t(0, 1)
        with pytest.raises(ctypes.ArgumentError):
            pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(d.gpu(), 19, place)


def test_null_pointers_are_an_argument_error_in_every_call() -> None:
    without = {"nvmlInitWithFlags", "nvmlSystemGetProcessName"}  # no pointer, or one that is read later
    with driver("1xa100-40gb=1g.5gb") as d:
        for name, export in abi.EXPORTS.items():
            if export.argtypes and name not in without:
                code = getattr(d.simulation.library, name)(*([0] * len(export.argtypes)))
                assert code == INVALID_ARGUMENT, name


def test_gpus_are_found_by_index_uuid_and_pci_address() -> None:
    with driver("2xa100-40gb") as d:
        assert pynvml.nvmlDeviceGetCount() == 2
        gpu = d.gpu(1)
        uuid, pci = pynvml.nvmlDeviceGetUUID(gpu), pynvml.nvmlDeviceGetPciInfo_v3(gpu)
        assert address(pynvml.nvmlDeviceGetHandleByUUID(uuid)) == address(gpu)
        for spelling in (pci.busId, pci.busIdLegacy, pci.busId.lower()):
            assert address(pynvml.nvmlDeviceGetHandleByPciBusId(spelling)) == address(gpu)
        assert refused("nvmlDeviceGetHandleByIndex", 2) == INVALID_ARGUMENT
        assert refused("nvmlDeviceGetHandleByPciBusId", "0000:ff:00.0") == NOT_FOUND
        assert refused("nvmlDeviceGetHandleByPciBusId", "somewhere") == INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("uuid", "code"),
    [
        ("GPU-00000000-0000-0000-0000-000000000000", NOT_FOUND),
        ("MIG-00000000-0000-0000-0000-000000000000", NOT_FOUND),
        ("MIG-GPU-00000000-0000-0000-0000-000000000000/7/0", NOT_FOUND),
        ("GPU-0", INVALID_ARGUMENT),
        ("MIG-GPU-00000000-0000-0000-0000-000000000000/7", INVALID_ARGUMENT),
        ("", INVALID_ARGUMENT),
    ],
)
def test_unknown_uuid_is_not_found_and_a_malformed_one_invalid(uuid: str, code: int) -> None:
    with driver("1xa100-40gb=1g.5gb"):
        assert refused("nvmlDeviceGetHandleByUUID", uuid) == code


def test_mig_device_is_found_by_its_uuid_and_by_the_old_form() -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        mig, gpu = d.mig(), d.gpu()
        uuid, gi = pynvml.nvmlDeviceGetUUID(mig), pynvml.nvmlDeviceGetGpuInstanceId(mig)
        assert address(pynvml.nvmlDeviceGetHandleByUUID(uuid)) == address(mig)
        legacy = f"MIG-{pynvml.nvmlDeviceGetUUID(gpu)}/{gi}/0"
        assert address(pynvml.nvmlDeviceGetHandleByUUID(legacy)) == address(mig)


def test_identity_of_a_gpu() -> None:
    with driver("2xa100-40gb") as d:
        gpu = d.gpu(1)
        assert pynvml.nvmlDeviceGetName(gpu) == "NVIDIA A100-SXM4-40GB"
        assert pynvml.nvmlDeviceGetUUID(gpu).startswith("GPU-")
        assert pynvml.nvmlDeviceGetIndex(gpu) == pynvml.nvmlDeviceGetMinorNumber(gpu) == 1
        assert pynvml.nvmlDeviceGetCudaComputeCapability(gpu) == (8, 0)
        assert pynvml.nvmlDeviceGetArchitecture(gpu) == pynvml.NVML_DEVICE_ARCH_AMPERE
        assert pynvml.nvmlDeviceGetBrand(gpu) == pynvml.NVML_BRAND_NVIDIA
        assert pynvml.nvmlDeviceGetPersistenceMode(gpu) == 1
        assert len(pynvml.nvmlDeviceGetSerial(gpu)) == 13
        assert list(pynvml.nvmlDeviceGetMemoryAffinity(gpu, 1, 0)) == [1 << 1]
        assert refused("nvmlDeviceGetNumaNodeId", gpu) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetTemperature", gpu, 0) == NOT_SUPPORTED
        pci = pynvml.nvmlDeviceGetPciInfo_v3(gpu)
        assert (pci.busId, pci.busIdLegacy) == ("00000000:0F:00.0", "0000:0F:00.0")
        assert (pci.domain, pci.bus, pci.device, pci.pciDeviceId) == (0, 0x0F, 0, 0x20B010DE)


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetMinorNumber",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetSerial",
        "nvmlDeviceGetUtilizationRates",
    ],
)
def test_what_only_the_gpu_knows_is_not_answered_on_a_mig_handle(call: str) -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        assert refused(call, d.mig()) == NOT_SUPPORTED


@pytest.mark.parametrize("call", ["nvmlDeviceGetName", "nvmlDeviceGetUUID"])
def test_text_that_does_not_fit_is_insufficient_size(call: str) -> None:
    with driver() as d:
        buffer = create_string_buffer(b"untouched")
        code = getattr(d.simulation.library, call)(d.gpu(), buffer, c_uint(5))
        assert (code, buffer.value) == (INSUFFICIENT_SIZE, b"untouched")


def test_field_values_tell_what_the_driver_can() -> None:
    with driver("1xa100-40gb,1xh100-80gb") as d:
        for index, resetless in ((0, 0), (1, 1)):
            values = pynvml.nvmlDeviceGetFieldValues(d.gpu(index), [184, 199, 1])
            assert [value.nvmlReturn for value in values] == [0, 0, NOT_SUPPORTED]
            assert [value.value.uiVal for value in values[:2]] == [resetless, 1]


def test_fields_can_be_made_known_and_a_reset_clears_what_a_reset_mends() -> None:
    with driver() as d:
        d.change(lambda node: node.gpus[0].record.fields.update({230: 1, 144: 1, 145: 1}))
        assert [v.value.uiVal for v in pynvml.nvmlDeviceGetFieldValues(d.gpu(), [230, 144, 145])] == [1, 1, 1]
        d.change(lambda node: node.gpus[0].reset())
        assert [v.value.uiVal for v in pynvml.nvmlDeviceGetFieldValues(d.gpu(), [230, 144, 145])] == [0, 0, 1]


def test_memory_of_a_gpu_without_mig_is_the_boards() -> None:
    with driver() as d:
        info = pynvml.nvmlDeviceGetMemoryInfo(d.gpu())
        assert info.total == 40960 << 20
        assert info.free + info.used == info.total
        second = pynvml.nvmlDeviceGetMemoryInfo(d.gpu(), version=pynvml.nvmlMemory_v2)
        assert (second.total, second.used) == (info.total, info.used)
        assert refused("nvmlDeviceGetMemoryInfo", d.gpu(), version=0x01000028) == 25


def test_memory_of_a_gpu_instance_is_shared_by_its_compute_instances() -> None:
    with driver("1xa100-40gb=1c.3g.20gb*2") as d:
        idle = pynvml.nvmlDeviceGetMemoryInfo(d.mig(1)).used
        assert 3 << 20 <= idle <= 11 << 20
        d.change(lambda node: node.gpus[0].instances[0].compute[0].processes.append(Process(1, "p", 100)))
        for index in (0, 1):
            info = pynvml.nvmlDeviceGetMemoryInfo(d.mig(index))
            assert (info.total, info.used) == (19968 << 20, idle + (100 << 20))


def test_utilization_is_not_supported_with_mig_on() -> None:
    with driver("1xa100-40gb,1xa100-40gb=") as d:
        assert pynvml.nvmlDeviceGetUtilizationRates(d.gpu(0)).gpu == 0
        assert refused("nvmlDeviceGetUtilizationRates", d.gpu(1)) == NOT_SUPPORTED


def test_processes_are_listed_with_their_ids_on_the_gpu_and_by_instance_on_mig_handles() -> None:
    with driver(DEMO) as d:
        d.change(lambda node: node.gpus[1].ci(2, 0).processes.append(Process(11, "a")))
        d.change(lambda node: node.gpus[1].ci(3, 0).processes.append(Process(12, "b", 64)))
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(d.gpu(1))
        assert [(p.pid, p.gpuInstanceId, p.computeInstanceId) for p in listed] == [(11, 2, 0), (12, 3, 0)]
        mine = pynvml.nvmlDeviceGetComputeRunningProcesses(d.mig(1, gpu=1))
        assert [(p.pid, p.usedGpuMemory) for p in mine] == [(12, 64 << 20)]
        assert pynvml.nvmlDeviceGetComputeRunningProcesses(d.gpu(0)) == []
        assert pynvml.nvmlDeviceGetGraphicsRunningProcesses(d.gpu(1)) == []
        assert pynvml.nvmlSystemGetProcessName(12) == "b"


def test_process_on_a_gpu_without_mig_has_no_instance() -> None:
    with driver() as d:
        d.change(lambda node: node.gpus[0].record.processes.append(Process(9, "p")))
        (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(d.gpu())
        assert (process.gpuInstanceId, process.computeInstanceId) == (WHOLE, WHOLE)


def test_mig_devices_are_listed_compactly_by_gpu_instance_id() -> None:
    with driver(DEMO) as d:
        found = [d.mig(index, gpu=1) for index in range(4)]
        assert [pynvml.nvmlDeviceGetGpuInstanceId(mig) for mig in found] == [2, 3, 9, 10]
        assert [pynvml.nvmlDeviceGetComputeInstanceId(mig) for mig in found] == [0] * 4
        assert [pynvml.nvmlDeviceGetIndex(mig) for mig in found] == [0, 1, 2, 3]
        assert [pynvml.nvmlDeviceGetName(mig).partition(" MIG ")[2] for mig in found] == [
            "3g.20gb", "2g.10gb", "1g.5gb", "1g.5gb",
        ]  # fmt: skip
        assert refused("nvmlDeviceGetMigDeviceHandleByIndex", d.gpu(1), 4) == NOT_FOUND
        assert refused("nvmlDeviceGetMigDeviceHandleByIndex", d.gpu(1), 7) == INVALID_ARGUMENT


def test_maximum_of_mig_devices_is_the_products_and_zero_with_mig_off() -> None:
    with driver("1xa100-40gb=1g.5gb,1xa100-40gb,1xa30=,1xrtxpro6000=") as d:
        assert [pynvml.nvmlDeviceGetMaxMigDeviceCount(d.gpu(i)) for i in range(4)] == [7, 0, 4, 4]


def test_gpu_instance_without_compute_instance_is_no_mig_device() -> None:
    with driver("1xa100-40gb=") as d:
        pynvml.nvmlDeviceCreateGpuInstance(d.gpu(), 19)
        assert d.mig_uuids() == []
        assert len(gpu_instances(d.gpu(), 19)) == 1


def test_handles_of_gpus_and_mig_devices_tell_what_they_are() -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        gpu, mig = d.gpu(), d.mig()
        assert pynvml.nvmlDeviceIsMigDeviceHandle(mig).value == 1
        assert pynvml.nvmlDeviceIsMigDeviceHandle(gpu).value == 0
        assert address(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)) == address(gpu)
        for call in ("GetGpuInstanceId", "GetComputeInstanceId", "GetDeviceHandleFromMigDeviceHandle"):
            assert refused(f"nvmlDevice{call}", gpu) == INVALID_ARGUMENT
        assert refused("nvmlDeviceGetAttributes_v2", gpu) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetMigMode", mig) == INVALID_ARGUMENT


def test_attributes_are_the_compute_instances_share_and_the_gpu_instances_memory() -> None:
    with driver("1xa100-40gb=2c.3g.20gb") as d:
        found = pynvml.nvmlDeviceGetAttributes_v2(d.mig())
        assert (found.multiprocessorCount, found.memorySizeMB) == (28, 19968)
        assert (found.gpuInstanceSliceCount, found.computeInstanceSliceCount) == (3, 2)
        assert (found.sharedCopyEngineCount, found.sharedDecoderCount) == (3, 2)
        assert (found.sharedEncoderCount, found.sharedJpegCount, found.sharedOfaCount) == (0, 0, 0)


def test_mode_is_changed_and_its_activation_told_apart() -> None:
    with driver() as d:
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [0, 0]
        assert pynvml.nvmlDeviceSetMigMode(d.gpu(), 1) == 0
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [1, 1]
        assert refused("nvmlDeviceSetMigMode", d.gpu(), 2) == INVALID_ARGUMENT
        d.change(lambda node: node.gpus[0].create("1g.5gb"))
        assert pynvml.nvmlDeviceSetMigMode(d.gpu(), 0) == IN_USE
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [1, 0]


def test_with_mig_off_instances_are_not_supported_but_profiles_are_told() -> None:
    with driver() as d:
        gpu = d.gpu()
        assert pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 0).name == "MIG 1g.5gb"
        assert len(placements(gpu, 19)) == 7
        assert refused("nvmlDeviceCreateGpuInstance", gpu, 19) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetGpuInstanceById", gpu, 0) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetGpuInstanceRemainingCapacity", gpu, 19) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetGpuInstances", gpu, 19, None, byref(c_uint())) == NOT_SUPPORTED


@pytest.mark.parametrize("product", profiles.table().products, ids=lambda p: p.cli_name)
def test_profiles_of_every_product_are_told_as_the_table_has_them(product: profiles.Product) -> None:
    with driver(f"1x{product.cli_name}=") as d:
        gpu = d.gpu()
        found = {}
        for enum in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            try:
                found[enum] = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, enum)
            except pynvml.NVMLError_NotSupported:
                continue
        assert refused("nvmlDeviceGetGpuInstanceProfileInfo", gpu, 0x12) == INVALID_ARGUMENT
        assert set(found) == {profile.gi_enum for profile in product.profiles}
        for profile in product.profiles:
            info = found[profile.gi_enum]
            assert (info.id, info.name) == (profile.gi_profile_id, f"MIG {profile.name}")
            assert (info.sliceCount, info.instanceCount) == (profile.slices, profile.max_instances)
            assert (info.multiprocessorCount, info.memorySizeMB) == (profile.sm_count, profile.memory_mib)
            engines = (
                info.copyEngineCount,
                info.decoderCount,
                info.encoderCount,
                info.jpegCount,
                info.ofaCount,
            )
            assert engines == (profile.engines.ce, *profile.engines.rationed)
            by_id = pynvml.nvmlDeviceGetGpuInstanceProfileInfoById(gpu, profile.gi_profile_id)
            assert by_id.name == info.name
            first = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, profile.gi_enum, version=1)
            assert (first.id, first.memorySizeMB, first.ofaCount) == (
                info.id,
                info.memorySizeMB,
                info.ofaCount,
            )
            expected = [(start, profile.placement_size) for start in profile.placements]
            assert placements(gpu, profile.gi_profile_id) == expected


class _V3(ctypes.Structure):
    """Version 3 of the profile info, which pynvml does not have."""

    _fields_ = (
        ("version", c_uint),
        ("numbers", c_uint * 9),
        ("memory", ctypes.c_ulonglong),
        ("name", c_char * 96),
        ("capabilities", c_uint),
    )


def test_profile_info_knows_versions_two_and_three_and_refuses_others() -> None:
    with driver("1xrtxpro6000=") as d:
        function = d.simulation.library.nvmlDeviceGetGpuInstanceProfileInfoV  # type: ignore[attr-defined]
        info = _V3(version=0x03000098)
        assert ctypes.sizeof(info) == 0x98
        assert function(d.gpu(), 0xA, byref(info)) == 0
        assert (info.name, info.numbers[0], info.memory, info.capabilities) == (
            b"MIG 1g.24gb+gfx",
            47,
            24192,
            2,
        )
        for version in (0, 0x01000098, 0x02000099, 0x04000098):
            assert function(d.gpu(), 0, byref(_V3(version=version))) == INVALID_ARGUMENT


def test_unknown_profile_id_is_an_invalid_argument_in_every_call() -> None:
    with driver("1xa30=") as d:
        gpu = d.gpu()
        for call, rest in (
            ("nvmlDeviceGetGpuInstanceProfileInfoById", ()),
            ("nvmlDeviceGetGpuInstanceRemainingCapacity", ()),
            ("nvmlDeviceGetGpuInstancePossiblePlacements", (None, byref(c_uint()))),
            ("nvmlDeviceGetGpuInstances", (None, byref(c_uint()))),
            ("nvmlDeviceCreateGpuInstance", ()),
        ):
            assert refused(call, gpu, 19, *rest) == INVALID_ARGUMENT, call


def test_gpu_instance_lives_from_create_to_destroy() -> None:
    with driver("1xa100-40gb=") as d:
        gpu = d.gpu()
        gi, _ = create(gpu, 9)
        info = pynvml.nvmlGpuInstanceGetInfo(gi)
        assert (info.id, info.profileId) == (2, 9)
        assert (info.placement.start, info.placement.size) == (4, 4)
        assert address(info.device) == address(gpu)
        assert address(pynvml.nvmlDeviceGetGpuInstanceById(gpu, 2)) == address(gi)
        assert [address(found) for found in gpu_instances(gpu, 9)] == [address(gi)]
        assert gpu_instances(gpu, 19) == []
        assert pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 9) == 1
        pynvml.nvmlGpuInstanceDestroy(gi)
        assert refused("nvmlGpuInstanceGetInfo", gi) == INVALID_ARGUMENT
        assert refused("nvmlGpuInstanceDestroy", gi) == INVALID_ARGUMENT
        assert refused("nvmlDeviceGetGpuInstanceById", gpu, 2) == NOT_FOUND


def test_stale_handle_stays_invalid_when_its_ids_come_back() -> None:
    with driver("1xa100-40gb=") as d:
        old, old_ci = create(d.gpu(), 9, 2)
        mig = d.mig()
        d.make_again(2, "3g.20gb")
        new = pynvml.nvmlDeviceGetGpuInstanceById(d.gpu(), 2)
        assert address(new) != address(old)
        assert refused("nvmlGpuInstanceGetInfo", old) == INVALID_ARGUMENT
        assert refused("nvmlComputeInstanceGetInfo", old_ci) == INVALID_ARGUMENT
        assert refused("nvmlDeviceGetUUID", mig) == INVALID_ARGUMENT


def test_creation_is_refused_where_there_is_no_room_and_where_no_placement_is() -> None:
    with driver("1xa100-40gb=") as d:
        gpu = d.gpu()
        create(gpu, 9, start=4)
        wrong = pynvml.c_nvmlGpuInstancePlacement_t(1, 4)
        call = "nvmlDeviceCreateGpuInstanceWithPlacement"
        assert refused(call, gpu, 9, byref(wrong)) == INVALID_ARGUMENT
        assert refused(call, gpu, 9, byref(pynvml.c_nvmlGpuInstancePlacement_t(0, 3))) == INVALID_ARGUMENT
        assert (
            refused(call, gpu, 9, byref(pynvml.c_nvmlGpuInstancePlacement_t(4, 4))) == INSUFFICIENT_RESOURCES
        )
        create(gpu, 9, start=0)
        assert refused("nvmlDeviceCreateGpuInstance", gpu, 19) == INSUFFICIENT_RESOURCES


def test_gpu_instance_with_compute_instances_is_in_use() -> None:
    with driver("1xa100-40gb=") as d:
        gi, ci = create(d.gpu(), 9, 2)
        assert refused("nvmlGpuInstanceDestroy", gi) == IN_USE
        pynvml.nvmlComputeInstanceDestroy(ci)
        d.change(lambda node: setattr(node.gpus[0].instances[0], "leaked", True))
        assert refused("nvmlGpuInstanceDestroy", gi) == IN_USE


def test_compute_instance_lives_from_create_to_destroy() -> None:
    with driver("1xa100-40gb=") as d:
        gi, ci = create(d.gpu(), 9, 1)
        info = pynvml.nvmlComputeInstanceGetInfo(ci)
        assert (info.id, info.profileId, info.placement.start, info.placement.size) == (0, 1, 0, 2)
        assert address(info.gpuInstance) == address(gi)
        assert address(info.device) == address(d.mig()), "the MIG device's handle, whatever nvml.h says"
        assert pynvml.nvmlDeviceGetName(info.device).endswith("MIG 2c.3g.20gb")
        assert address(pynvml.nvmlGpuInstanceGetComputeInstanceById(gi, 0)) == address(ci)
        assert [address(found) for found in compute_instances(gi, 1)] == [address(ci)]
        assert compute_instances(gi, 0) == []
        assert refused("nvmlGpuInstanceGetComputeInstanceById", gi, 1) == NOT_FOUND
        pynvml.nvmlComputeInstanceDestroy(ci)
        assert refused("nvmlComputeInstanceDestroy", ci) == INVALID_ARGUMENT
        assert d.mig_uuids() == []


def test_compute_instance_in_use_is_not_destroyed() -> None:
    with driver("1xa100-40gb=") as d:
        _, ci = create(d.gpu(), 19, 0)
        d.change(lambda node: node.gpus[0].ci(13, 0).processes.append(Process(5, "p")))
        assert refused("nvmlComputeInstanceDestroy", ci) == IN_USE
        d.change(lambda node: node.gpus[0].ci(13, 0).processes.clear())
        pynvml.nvmlComputeInstanceDestroy(ci)


def test_compute_profiles_of_a_gpu_instance() -> None:
    with driver("1xa100-40gb=") as d:
        gi, _ = create(d.gpu(), 9)
        told = {}
        for enum in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            try:
                told[enum] = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, enum, 0)
            except pynvml.NVMLError_NotSupported:
                continue
        assert {
            e: (i.id, i.name, i.sliceCount, i.instanceCount, i.multiprocessorCount) for e, i in told.items()
        } == {
            0: (0, "MIG 1c.3g.20gb", 1, 3, 14),
            1: (1, "MIG 2c.3g.20gb", 2, 1, 28),
            2: (2, "MIG 3g.20gb", 3, 1, 42),
        }
        assert (told[0].sharedCopyEngineCount, told[0].sharedDecoderCount) == (3, 2)
        call = "nvmlGpuInstanceGetComputeInstanceProfileInfo"
        assert refused(call, gi, 9, 0) == INVALID_ARGUMENT
        assert refused(call, gi, 0, 1) == INVALID_ARGUMENT
        first = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 2, 0, version=1)
        assert (first.id, first.multiprocessorCount) == (2, 42)


def test_compute_instances_have_room_and_places() -> None:
    with driver("1xa100-40gb=") as d:
        gi, _ = create(d.gpu(), 9, 1)
        remaining = pynvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity
        assert [remaining(gi, ci) for ci in (0, 1, 2)] == [1, 0, 0]
        count = c_uint()
        array = (pynvml.c_nvmlComputeInstancePlacement_t * 8)()
        pynvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(gi, 0, array, byref(count))
        assert [(p.start, p.size) for p in array[: count.value]] == [(0, 1), (1, 1), (2, 1)]
        with_placement = "nvmlGpuInstanceCreateComputeInstanceWithPlacement"
        place = pynvml.c_nvmlComputeInstancePlacement_t
        assert refused(with_placement, gi, 0, byref(place(0, 1))) == INSUFFICIENT_RESOURCES
        assert refused(with_placement, gi, 0, byref(place(3, 1))) == INVALID_ARGUMENT
        made = pynvml.nvmlGpuInstanceCreateComputeInstanceWithPlacement(gi, 0, byref(place(2, 1)))
        assert pynvml.nvmlComputeInstanceGetInfo(made).placement.start == 2
        assert refused("nvmlGpuInstanceCreateComputeInstance", gi, 0) == INSUFFICIENT_RESOURCES
        assert refused("nvmlGpuInstanceCreateComputeInstance", gi, 4) == NOT_SUPPORTED


ON_A_GPU: list[tuple[str, tuple[Any, ...]]] = [
    ("nvmlDeviceGetName", ()),
    ("nvmlDeviceGetUUID", ()),
    ("nvmlDeviceGetIndex", ()),
    ("nvmlDeviceGetMemoryInfo", ()),
    ("nvmlDeviceGetMigMode", ()),
    ("nvmlDeviceGetMaxMigDeviceCount", ()),
    ("nvmlDeviceGetPciInfo_v3", ()),
    ("nvmlDeviceGetMinorNumber", ()),
    ("nvmlDeviceGetGpuInstanceProfileInfo", (0,)),
    ("nvmlDeviceCreateGpuInstance", (19,)),
    ("nvmlDeviceGetComputeRunningProcesses_v3", ()),
    ("nvmlDeviceGetSupportedEventTypes", ()),
    ("nvmlDeviceGetFieldValues", ([184],)),
]


@pytest.mark.parametrize(("call", "rest"), ON_A_GPU)
def test_every_call_on_a_lost_gpu_says_so(call: str, rest: tuple[Any, ...]) -> None:
    with driver("2xa100-40gb=1g.5gb") as d:
        gpu, other = d.gpu(0), d.gpu(1)
        d.change(lambda node: setattr(node.gpus[0].record, "lost", True))
        assert refused(call, gpu, *rest) == GPU_IS_LOST
        getattr(pynvml, call)(other, *rest)


def test_lost_gpu_is_counted_but_not_to_be_had_and_comes_back() -> None:
    with driver("2xa100-40gb=1g.5gb") as d:
        gpu, mig, uuid = d.gpu(), d.mig(), d.mig_uuids()[0]
        gi = gpu_instances(gpu, 19)[0]
        d.change(lambda node: setattr(node.gpus[0].record, "lost", True))
        assert pynvml.nvmlDeviceGetCount() == 2
        assert refused("nvmlDeviceGetHandleByIndex", 0) == GPU_IS_LOST
        assert refused("nvmlDeviceGetHandleByUUID", uuid) == GPU_IS_LOST
        assert refused("nvmlDeviceGetUUID", mig) == GPU_IS_LOST
        assert refused("nvmlGpuInstanceGetInfo", gi) == GPU_IS_LOST
        d.change(lambda node: setattr(node.gpus[0].record, "lost", False))
        assert pynvml.nvmlDeviceGetUUID(mig) == uuid
