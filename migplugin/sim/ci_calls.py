"""NVML's calls about compute instances: their profiles, their places, and making and destroying them.

Creating one is what makes a MIG device. Its placement is in compute slices within its GPU instance, not
in memory slices of the GPU.
"""

from migplugin.sim import placement
from migplugin.sim.call import HANDLE, POINTER, UINT, Call, Exports
from migplugin.sim.codes import Code
from migplugin.sim.privilege import CONFIG
from migplugin.sim.profiles import CI_PROFILE_COUNT, CiProfile, GiProfile
from migplugin.sim.session import CiHandle, GiHandle, MigHandle, find_ci, find_gi
from migplugin.sim.structs import CI_PROFILE_INFO_V2, CiInfo, CiProfileInfo, CiProfileInfoV2, Placement

EXPORTS = Exports()


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
    call.put_placements(out, count, placement.ci_placements(profile, ci), ci.slices)


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
    with call.change(gpu) as now:
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
    call.put_handles(out, count, (CiHandle.of(gpu, gi, ci) for ci in found))


@EXPORTS.add("nvmlGpuInstanceGetComputeInstanceById", HANDLE, UINT, POINTER)
def compute_instance_by_id(call: Call, handle: int | None, ci_id: int, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    call.put_handle(out, call.session.handle(CiHandle.of(gpu, gi, gpu.ci(gi.id, ci_id))))


@EXPORTS.add("nvmlComputeInstanceGetInfo_v2", HANDLE, POINTER)
def ci_info(call: Call, handle: int | None, out: int | None) -> None:
    """`device` is the MIG device's handle, although nvml.h says "parent device": programs rely on it."""
    gpu, gi, ci = call.ci(handle)
    info = call.struct(out, CiInfo)
    info.device = call.session.handle(MigHandle.of(gpu, gi, ci))
    info.gpu_instance = call.session.handle(GiHandle.of(gpu, gi))
    info.id, info.profile_id = ci.id, ci.profile
    info.placement.start, info.placement.size = ci.start, ci.size


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


def _create_ci(
    call: Call, handle: int | None, profile_id: int, where: Placement | None, out: int | None
) -> None:
    gpu, gi = call.gi(handle)
    call.require(CONFIG)
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
    with call.change(gpu) as now:
        find_gi(now, gi.id, gi.serial)
        ci = now.create_ci(gi.id, profile_id, where.start if where else None, where.size if where else None)
    call.put_handle(out, call.session.handle(CiHandle.of(gpu, gi, ci)))
