"""NVML's calls about MIG as a whole: the mode, and the MIG devices that clients see.

A MIG device is a compute instance with its GPU instance. It has a handle like a GPU's, found by an index
that may have gaps and is no identity.
"""

from migplugin.sim.call import HANDLE, POINTER, UINT, Call, Exports, Mig
from migplugin.sim.codes import Code
from migplugin.sim.privilege import ADMIN
from migplugin.sim.session import GpuHandle, MigHandle
from migplugin.sim.structs import DeviceAttributes

EXPORTS = Exports()


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
            call.put_handle(out, call.session.handle(MigHandle.of(gpu, gi, ci)))
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
