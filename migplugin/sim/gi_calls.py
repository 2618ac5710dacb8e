"""NVML's calls about GPU instances: their profiles, their places, and making and destroying them.

Every id argument is a profile's `info.id`; only the two ProfileInfo calls take the enum. What nvml.h
calls "requires privileged user" needs the config privilege.
"""

from migplugin.sim import placement
from migplugin.sim.call import HANDLE, POINTER, UINT, Call, Exports
from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu
from migplugin.sim.privilege import CONFIG
from migplugin.sim.profiles import GI_PROFILE_COUNT, GiProfile
from migplugin.sim.session import GiHandle, GpuHandle, find_gi
from migplugin.sim.structs import (
    CAPABILITY_GFX,
    GI_PROFILE_INFO_V2,
    GI_PROFILE_INFO_V3,
    GiInfo,
    GiProfileInfo,
    GiProfileInfoV2,
    GiProfileInfoV3,
    Placement,
)

EXPORTS = Exports()


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
    call.put_placements(out, count, profile.placements, profile.placement_size)


@EXPORTS.add("nvmlDeviceGetGpuInstanceRemainingCapacity", HANDLE, UINT, POINTER)
def gi_remaining(call: Call, device: int | None, profile_id: int, out: int | None) -> None:
    gpu = call.mig_gpu(device)
    call.require(CONFIG)
    call.put(out, placement.remaining(gpu.product, _profile_by_id(call, gpu, profile_id), gpu.held))


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
    with call.change(gpu) as now:
        now.destroy_gi(find_gi(now, gi.id, gi.serial).id)


@EXPORTS.add("nvmlDeviceGetGpuInstances", HANDLE, UINT, POINTER, POINTER)
def gpu_instances(
    call: Call, device: int | None, profile_id: int, out: int | None, count: int | None
) -> None:
    gpu = call.mig_gpu(device)
    call.require(CONFIG)
    profile = _profile_by_id(call, gpu, profile_id)
    found = sorted((gi for gi in gpu.instances if gi.profile == profile.gi_profile_id), key=lambda gi: gi.id)
    call.put_handles(out, count, (GiHandle.of(gpu, gi) for gi in found))


@EXPORTS.add("nvmlDeviceGetGpuInstanceById", HANDLE, UINT, POINTER)
def gpu_instance_by_id(call: Call, device: int | None, gi_id: int, out: int | None) -> None:
    gpu = call.mig_gpu(device)
    call.require(CONFIG)
    call.put_handle(out, call.session.handle(GiHandle.of(gpu, gpu.gi(gi_id))))


@EXPORTS.add("nvmlGpuInstanceGetInfo", HANDLE, POINTER)
def gi_info(call: Call, handle: int | None, out: int | None) -> None:
    gpu, gi = call.gi(handle)
    info = call.struct(out, GiInfo)
    info.device = call.session.handle(GpuHandle(gpu.uuid))
    info.id, info.profile_id = gi.id, gi.profile
    info.placement.start, info.placement.size = gi.start, gpu.profile(gi).placement_size


def _queryable(call: Call, device: int | None) -> Gpu:
    """The GPU, if its profiles may be asked for: older drivers want MIG on first."""
    if call.node.switches.profile_queries == "mig-on":
        return call.mig_gpu(device)
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


def _create_gi(
    call: Call, device: int | None, profile_id: int, where: Placement | None, out: int | None
) -> None:
    gpu = call.mig_gpu(device)
    call.require(CONFIG)
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
    with call.change(gpu) as now:
        gi = now.create_gi(profile_id, where.start if where else None, where.size if where else None)
    call.put_handle(out, call.session.handle(GiHandle.of(gpu, gi)))
