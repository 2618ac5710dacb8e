"""NVML's MIG calls: the mode, profiles, GPU instances, compute instances, and MIG devices.

Every id argument here is a profile's `info.id`; only the two ProfileInfo calls take the enum. What
nvml.h calls "requires privileged user" needs the config privilege, the mode needs CAP_SYS_ADMIN.
Where an out array has no length of its own, it is written without bounds, as the header has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_void_p, sizeof

from migplugin.sim import placement
from migplugin.sim.call import HANDLE, POINTER, UINT, Call, Exports, Mig
from migplugin.sim.codes import Code
from migplugin.sim.device_calls import mig_handle
from migplugin.sim.model import Gpu
from migplugin.sim.privilege import ADMIN, CONFIG
from migplugin.sim.profiles import CI_PROFILE_COUNT, GI_PROFILE_COUNT, CiProfile, GiProfile
from migplugin.sim.records import CiRecord, GiRecord
from migplugin.sim.session import CiHandle, GiHandle, GpuHandle, find_ci, find_gi
from migplugin.sim.structs import (
    CAPABILITY_GFX,
    CI_PROFILE_INFO_V2,
    GI_PROFILE_INFO_V2,
    GI_PROFILE_INFO_V3,
    CiInfo,
    CiProfileInfo,
    CiProfileInfoV2,
    DeviceAttributes,
    GiInfo,
    GiProfileInfo,
    GiProfileInfoV2,
    GiProfileInfoV3,
    Placement,
)

EXPORTS = Exports()

POINTER_SIZE = sizeof(c_void_p)


# -- mode and MIG devices ---------------------------------------------------------------------------


@EXPORTS.add("nvmlDeviceGetMigMode", HANDLE, POINTER, POINTER)
def get_mig_mode(call: Call, device: int | None, current: int | None, pending: int | None) -> None:
    gpu = call.gpu(device)
    call.put(current, gpu.record.mig_current)
    call.put(pending, gpu.record.mig_pending)


@EXPORTS.add("nvmlDeviceSetMigMode", HANDLE, UINT, POINTER)
def set_mig_mode(call: Call, device: int | None, mode: int, activation: int | None) -> None:
    """SUCCESS says that the request was taken; whether it is active is in the activation status."""
    gpu = call.gpu(device)
    if mode > 1 or not activation:
        call.refuse(Code.INVALID_ARGUMENT, f"mode {mode}")
    call.require(ADMIN)
    with call.session.store.change() as node:
        status = node.gpus[gpu.index].set_mig_mode(on=bool(mode))
    call.put(activation, status)


@EXPORTS.add("nvmlDeviceGetMaxMigDeviceCount", HANDLE, POINTER)
def max_mig_device_count(call: Call, device: int | None, out: int | None) -> None:
    gpu = call.gpu(device)
    call.put(out, gpu.product.compute_slices if gpu.record.mig_current else 0)


@EXPORTS.add("nvmlDeviceIsMigDeviceHandle", HANDLE, POINTER)
def is_mig_device_handle(call: Call, device: int | None, out: int | None) -> None:
    call.put(out, isinstance(call.device(device), Mig))


@EXPORTS.add("nvmlDeviceGetMigDeviceHandleByIndex", HANDLE, UINT, POINTER)
def mig_device_handle_by_index(call: Call, device: int | None, index: int, out: int | None) -> None:
    """NOT_FOUND is a gap, not the end. A GPU instance without compute instance is in no index."""
    live = call.gpu(device)
    gpu = call.session.believed(call.node).by_uuid[live.uuid]
    if index >= (gpu.product.compute_slices if live.record.mig_current else 0):
        call.refuse(Code.INVALID_ARGUMENT, f"index {index}")
    for gi, ci in gpu.mig_devices():
        if gpu.mig_index(gi, ci) == index:
            call.put_handle(out, call.session.handle(mig_handle(Mig(gpu, gi, ci))))
            return
    call.refuse(Code.NOT_FOUND, f"no MIG device {index} on GPU {gpu.index}")


@EXPORTS.add("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", HANDLE, POINTER)
def parent_handle(call: Call, device: int | None, out: int | None) -> None:
    call.put_handle(out, call.session.handle(GpuHandle(call.mig(device).gpu.uuid)))


@EXPORTS.add("nvmlDeviceGetGpuInstanceId", HANDLE, POINTER)
def gpu_instance_id(call: Call, device: int | None, out: int | None) -> None:
    call.put(out, call.mig(device).gi.id)


@EXPORTS.add("nvmlDeviceGetComputeInstanceId", HANDLE, POINTER)
def compute_instance_id(call: Call, device: int | None, out: int | None) -> None:
    call.put(out, call.mig(device).ci.id)


@EXPORTS.add("nvmlDeviceGetAttributes nvmlDeviceGetAttributes_v2", HANDLE, POINTER)
def attributes(call: Call, device: int | None, out: int | None) -> None:
    mig = call.mig(device, otherwise=Code.NOT_SUPPORTED)
    profile, ci = mig.gpu.profile(mig.gi), mig.gpu.ci_profile(mig.gi, mig.ci)
    found = call.struct(out, DeviceAttributes)
    found.multiprocessor_count = ci.sm_count
    found.shared_copy_engine_count = profile.engines.ce
    found.shared_decoder_count = profile.engines.dec
    found.shared_encoder_count = profile.engines.enc
    found.shared_jpeg_count = profile.engines.jpeg
    found.shared_ofa_count = profile.engines.ofa
    found.gpu_instance_slice_count = profile.slices
    found.compute_instance_slice_count = ci.slices
    found.memory_size_mb = profile.memory_mib


# -- GPU instance profiles --------------------------------------------------------------------------


@EXPORTS.add("nvmlDeviceGetGpuInstanceProfileInfo", HANDLE, UINT, POINTER)
def gi_profile_info(call: Call, device: int | None, enum: int, out: int | None) -> None:
    profile = _profile_by_enum(call, device, enum)
    _fill_gi_profile(call.struct(out, GiProfileInfo), profile)


@EXPORTS.add("nvmlDeviceGetGpuInstanceProfileInfoV", HANDLE, UINT, POINTER)
def gi_profile_info_v(call: Call, device: int | None, enum: int, out: int | None) -> None:
    _give_gi_profile_v(call, _profile_by_enum(call, device, enum), out)


@EXPORTS.add("nvmlDeviceGetGpuInstanceProfileInfoByIdV", HANDLE, UINT, POINTER)
def gi_profile_info_by_id(call: Call, device: int | None, profile_id: int, out: int | None) -> None:
    gpu = _queryable(call, device)
    _give_gi_profile_v(call, _profile_by_id(call, gpu, profile_id), out)


@EXPORTS.add("nvmlDeviceGetGpuInstancePossiblePlacements_v2", HANDLE, UINT, POINTER, POINTER)
def gi_placements(
    call: Call, device: int | None, profile_id: int, out: int | None, count: int | None
) -> None:
    """All placements of a profile, whatever is there now and whether or not MIG is on."""
    gpu = _queryable(call, device)
    call.require(CONFIG)
    profile = _profile_by_id(call, gpu, profile_id)
    _give_placements(call, [(s, profile.placement_size) for s in profile.placements], out, count)


@EXPORTS.add("nvmlDeviceGetGpuInstanceRemainingCapacity", HANDLE, UINT, POINTER)
def gi_remaining(call: Call, device: int | None, profile_id: int, out: int | None) -> None:
    gpu = _mig_on(call, device)
    call.require(CONFIG)
    call.put(out, placement.remaining(gpu.product, _profile_by_id(call, gpu, profile_id), gpu.held))


# -- GPU instances ----------------------------------------------------------------------------------


@EXPORTS.add("nvmlDeviceCreateGpuInstance", HANDLE, UINT, POINTER)
def create_gi(call: Call, device: int | None, profile_id: int, out: int | None) -> None:
    _create_gi(call, device, profile_id, None, out)


@EXPORTS.add("nvmlDeviceCreateGpuInstanceWithPlacement", HANDLE, UINT, POINTER, POINTER)
def create_gi_at(call: Call, device: int | None, profile_id: int, where: int | None, out: int | None) -> None:
    _create_gi(call, device, profile_id, call.struct(where, Placement), out)


@EXPORTS.add("nvmlGpuInstanceDestroy", HANDLE)
def destroy_gi(call: Call, handle: int | None) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    with _changed(call, gpu) as now:
        now.destroy_gi(find_gi(now, gi.id, gi.serial).id)


@EXPORTS.add("nvmlDeviceGetGpuInstances", HANDLE, UINT, POINTER, POINTER)
def gpu_instances(
    call: Call, device: int | None, profile_id: int, out: int | None, count: int | None
) -> None:
    gpu = _mig_on(call, device)
    call.require(CONFIG)
    profile = _profile_by_id(call, gpu, profile_id)
    found = sorted((gi for gi in gpu.instances if gi.profile == profile.gi_profile_id), key=lambda gi: gi.id)
    _give_handles(call, [call.session.handle(_gi_handle(gpu, gi)) for gi in found], out, count)


@EXPORTS.add("nvmlDeviceGetGpuInstanceById", HANDLE, UINT, POINTER)
def gpu_instance_by_id(call: Call, device: int | None, gi_id: int, out: int | None) -> None:
    gpu = _mig_on(call, device)
    call.require(CONFIG)
    call.put_handle(out, call.session.handle(_gi_handle(gpu, gpu.gi(gi_id))))


@EXPORTS.add("nvmlGpuInstanceGetInfo", HANDLE, POINTER)
def gi_info(call: Call, handle: int | None, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    info = call.struct(out, GiInfo)
    info.device = call.session.handle(GpuHandle(gpu.uuid))
    info.id, info.profile_id = gi.id, gi.profile
    info.placement.start, info.placement.size = gi.start, gpu.profile(gi).placement_size


# -- compute instance profiles ----------------------------------------------------------------------


@EXPORTS.add("nvmlGpuInstanceGetComputeInstanceProfileInfo", HANDLE, UINT, UINT, POINTER)
def ci_profile_info(call: Call, handle: int | None, enum: int, engines: int, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    profile = gpu.profile(gi)
    _fill_ci_profile(
        call.struct(out, CiProfileInfo), profile, _ci_profile_by_enum(call, profile, enum, engines)
    )


@EXPORTS.add("nvmlGpuInstanceGetComputeInstanceProfileInfoV", HANDLE, UINT, UINT, POINTER)
def ci_profile_info_v(call: Call, handle: int | None, enum: int, engines: int, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    profile = gpu.profile(gi)
    ci = _ci_profile_by_enum(call, profile, enum, engines)
    info = call.struct(out, CiProfileInfoV2)
    if info.version != CI_PROFILE_INFO_V2:
        call.refuse(Code.INVALID_ARGUMENT, f"version word {info.version:#x}")
    _fill_ci_profile(info, profile, ci)
    info.name = f"MIG {profile.ci_name(ci)}".encode()


@EXPORTS.add("nvmlGpuInstanceGetComputeInstanceRemainingCapacity", HANDLE, UINT, POINTER)
def ci_remaining(call: Call, handle: int | None, profile_id: int, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    profile = gpu.profile(gi)
    ci = _ci_profile_by_id(call, profile, profile_id)
    call.put(out, placement.ci_remaining(profile, ci, [(there.start, there.size) for there in gi.compute]))


@EXPORTS.add("nvmlGpuInstanceGetComputeInstancePossiblePlacements", HANDLE, UINT, POINTER, POINTER)
def ci_placements(
    call: Call, handle: int | None, profile_id: int, out: int | None, count: int | None
) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    profile = gpu.profile(gi)
    ci = _ci_profile_by_id(call, profile, profile_id)
    _give_placements(call, [(s, ci.slices) for s in placement.ci_placements(profile, ci)], out, count)


# -- compute instances ------------------------------------------------------------------------------


@EXPORTS.add("nvmlGpuInstanceCreateComputeInstance", HANDLE, UINT, POINTER)
def create_ci(call: Call, handle: int | None, profile_id: int, out: int | None) -> None:
    _create_ci(call, handle, profile_id, None, out)


@EXPORTS.add("nvmlGpuInstanceCreateComputeInstanceWithPlacement", HANDLE, UINT, POINTER, POINTER)
def create_ci_at(call: Call, handle: int | None, profile_id: int, where: int | None, out: int | None) -> None:
    _create_ci(call, handle, profile_id, call.struct(where, Placement), out)


@EXPORTS.add("nvmlComputeInstanceDestroy", HANDLE)
def destroy_ci(call: Call, handle: int | None) -> None:
    gpu, gi, ci = call.ci(handle)
    call.require(CONFIG)
    with _changed(call, gpu) as now:
        find_ci(now, gi.id, ci.id, ci.serial)
        now.destroy_ci(gi.id, ci.id)


@EXPORTS.add("nvmlGpuInstanceGetComputeInstances", HANDLE, UINT, POINTER, POINTER)
def compute_instances(
    call: Call, handle: int | None, profile_id: int, out: int | None, count: int | None
) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    profile = _ci_profile_by_id(call, gpu.profile(gi), profile_id)
    found = sorted((ci for ci in gi.compute if ci.profile == profile.id), key=lambda ci: ci.id)
    _give_handles(call, [call.session.handle(_ci_handle(gpu, gi, ci)) for ci in found], out, count)


@EXPORTS.add("nvmlGpuInstanceGetComputeInstanceById", HANDLE, UINT, POINTER)
def compute_instance_by_id(call: Call, handle: int | None, ci_id: int, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    call.put_handle(out, call.session.handle(_ci_handle(gpu, gi, gpu.ci(gi.id, ci_id))))


@EXPORTS.add("nvmlComputeInstanceGetInfo_v2", HANDLE, POINTER)
def ci_info(call: Call, handle: int | None, out: int | None) -> None:
    """`device` is the MIG device's handle, although nvml.h says "parent device": programs rely on it."""
    gpu, gi, ci = call.ci(handle)
    info = call.struct(out, CiInfo)
    info.device = call.session.handle(mig_handle(Mig(gpu, gi, ci)))
    info.gpu_instance = call.session.handle(_gi_handle(gpu, gi))
    info.id, info.profile_id = ci.id, ci.profile
    info.placement.start, info.placement.size = ci.start, ci.size


# -- shared by the above ----------------------------------------------------------------------------


def _gi_handle(gpu: Gpu, gi: GiRecord) -> GiHandle:
    return GiHandle(gpu.uuid, gi.id, gi.serial)


def _ci_handle(gpu: Gpu, gi: GiRecord, ci: CiRecord) -> CiHandle:
    return CiHandle(gpu.uuid, gi.id, ci.id, ci.serial)


def _mig_on(call: Call, device: int | None) -> Gpu:
    gpu = call.gpu(device)
    if not gpu.record.mig_current:
        call.refuse(Code.NOT_SUPPORTED, f"MIG is off on GPU {gpu.index}")
    return gpu


def _queryable(call: Call, device: int | None) -> Gpu:
    """The GPU, if its profiles may be asked for: older drivers want MIG on first."""
    if call.node.switches.profile_queries == "mig-on":
        return _mig_on(call, device)
    return call.gpu(device)


def _profile_by_enum(call: Call, device: int | None, enum: int) -> GiProfile:
    gpu = _queryable(call, device)
    if enum >= GI_PROFILE_COUNT:
        call.refuse(Code.INVALID_ARGUMENT, f"profile enum {enum}")
    profile = gpu.product.by_enum(enum)
    if profile is None:
        call.refuse(Code.NOT_SUPPORTED, f"{gpu.product.cli_name} has no profile {enum}")
    return profile


def _profile_by_id(call: Call, gpu: Gpu, profile_id: int) -> GiProfile:
    profile = gpu.product.by_id(profile_id)
    if profile is None:
        call.refuse(Code.INVALID_ARGUMENT, f"{gpu.product.cli_name} has no profile with id {profile_id}")
    return profile


def _ci_profile_by_enum(call: Call, profile: GiProfile, enum: int, engines: int) -> CiProfile:
    if enum >= CI_PROFILE_COUNT or engines:
        call.refuse(Code.INVALID_ARGUMENT, f"compute profile {enum}, engine profile {engines}")
    found = next((ci for ci in profile.ci_profiles if ci.enum == enum), None)
    if found is None:
        call.refuse(Code.NOT_SUPPORTED, f"{profile.name} has no compute profile {enum}")
    return found


def _ci_profile_by_id(call: Call, profile: GiProfile, profile_id: int) -> CiProfile:
    found = next((ci for ci in profile.ci_profiles if ci.id == profile_id), None)
    if found is None:
        code = Code.NOT_SUPPORTED if profile_id < CI_PROFILE_COUNT else Code.INVALID_ARGUMENT
        call.refuse(code, f"{profile.name} has no compute profile with id {profile_id}")
    return found


def _fill_gi_profile(info: GiProfileInfo | GiProfileInfoV2 | GiProfileInfoV3, profile: GiProfile) -> None:
    info.id = profile.gi_profile_id
    info.slice_count = profile.slices
    info.instance_count = profile.max_instances
    info.multiprocessor_count = profile.sm_count
    info.copy_engine_count = profile.engines.ce
    info.decoder_count = profile.engines.dec
    info.encoder_count = profile.engines.enc
    info.jpeg_count = profile.engines.jpeg
    info.ofa_count = profile.engines.ofa
    info.memory_size_mb = profile.memory_mib


def _give_gi_profile_v(call: Call, profile: GiProfile, out: int | None) -> None:
    info: GiProfileInfoV2 | GiProfileInfoV3 = call.struct(out, GiProfileInfoV2)
    version = info.version
    if version == GI_PROFILE_INFO_V2:
        info.is_p2p_supported = 0
    elif version == GI_PROFILE_INFO_V3:
        info = call.struct(out, GiProfileInfoV3)
        info.capabilities = CAPABILITY_GFX if "+gfx" in profile.name else 0
    else:
        call.refuse(Code.INVALID_ARGUMENT, f"version word {version:#x}")
    _fill_gi_profile(info, profile)
    info.name = f"MIG {profile.name}".encode()


def _fill_ci_profile(info: CiProfileInfo | CiProfileInfoV2, profile: GiProfile, ci: CiProfile) -> None:
    info.id = ci.id
    info.slice_count = ci.slices
    info.instance_count = ci.max_instances
    info.multiprocessor_count = ci.sm_count
    info.shared_copy_engine_count = profile.engines.ce
    info.shared_decoder_count = profile.engines.dec
    info.shared_encoder_count = profile.engines.enc
    info.shared_jpeg_count = profile.engines.jpeg
    info.shared_ofa_count = profile.engines.ofa


def _give_placements(call: Call, found: list[tuple[int, int]], out: int | None, count: int | None) -> None:
    """NULL asks for the count only. Else the array must be large enough, and nothing checks that it is."""
    call.put(count, len(found))
    if out:
        for slot, (start, size) in enumerate(found):
            entry = Placement.from_address(out + slot * sizeof(Placement))
            entry.start, entry.size = start, size


def _give_handles(call: Call, handles: list[int], out: int | None, count: int | None) -> None:
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL array")
    call.put(count, len(handles))
    for slot, handle in enumerate(handles):
        call.put_handle(out + slot * POINTER_SIZE, handle)


@contextmanager
def _changed(call: Call, gpu: Gpu) -> Iterator[Gpu]:
    """The GPU as it is under the lock, to be changed; afterwards this session knows of it."""
    with call.session.store.change() as node:
        yield node.by_uuid[gpu.uuid]
    call.session.saw_own_change(node, gpu.uuid)


def _create_gi(
    call: Call, device: int | None, profile_id: int, where: Placement | None, out: int | None
) -> None:
    gpu = _mig_on(call, device)
    call.require(CONFIG)
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
    with _changed(call, gpu) as now:
        gi = now.create_gi(profile_id, where.start if where else None, where.size if where else None)
    call.put_handle(out, call.session.handle(_gi_handle(gpu, gi)))


def _create_ci(
    call: Call, handle: int | None, profile_id: int, where: Placement | None, out: int | None
) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
    with _changed(call, gpu) as now:
        find_gi(now, gi.id, gi.serial)
        ci = now.create_ci(gi.id, profile_id, where.start if where else None, where.size if where else None)
    call.put_handle(out, call.session.handle(_ci_handle(gpu, gi, ci)))
