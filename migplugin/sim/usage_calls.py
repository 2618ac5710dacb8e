"""NVML's calls about the use of devices: memory and its errors, utilisation and processes.

On the handle of a GPU with MIG on they tell about everybody there, which takes the monitor privilege.
A MIG device's memory is its GPU instance's, shared by all compute instances in it.
"""

import ctypes

from migplugin.sim.call import HANDLE, POINTER, UINT, Call, Exports, Mig
from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu
from migplugin.sim.privilege import MONITOR
from migplugin.sim.records import Process
from migplugin.sim.structs import MEMORY_V2, Memory, MemoryV2, ProcessInfo, Utilization

EXPORTS = Exports()

MIB = 1 << 20
UNCORRECTED, VOLATILE = 1, 0
DRAM, SRAM = 2, 7
IDLE_MIB = 5  # what an instance uses before anybody runs on it


@EXPORTS.add("nvmlDeviceGetMemoryInfo", HANDLE, POINTER)
def memory_info(call: Call, device: int | None, out: int | None) -> None:
    total, used = _memory(call, device)
    info = call.struct(out, Memory)
    info.total, info.used, info.free = total, used, total - used


@EXPORTS.add("nvmlDeviceGetMemoryInfo_v2", HANDLE, POINTER)
def memory_info_v2(call: Call, device: int | None, out: int | None) -> None:
    info = call.struct(out, MemoryV2)
    if info.version != MEMORY_V2:
        call.refuse(Code.ARGUMENT_VERSION_MISMATCH, f"version word {info.version:#x}")
    total, used = _memory(call, device)
    info.total, info.reserved, info.used, info.free = total, 0, used, total - used


@EXPORTS.add("nvmlDeviceGetTotalEccErrors", HANDLE, UINT, UINT, POINTER)
def total_ecc_errors(call: Call, device: int | None, kind: int, counter: int, out: int | None) -> None:
    """Of a GPU. With MIG on, the volatile ones are counted for each instance, and refused here (nvml.h)."""
    gpu = call.gpu(device, otherwise=Code.NOT_SUPPORTED)
    if gpu.record.mig_current and counter == VOLATILE:
        call.refuse(Code.NOT_SUPPORTED, "MIG is on")
    call.put_wide(out, gpu.record.uncorrected if kind == UNCORRECTED else 0)


@EXPORTS.add("nvmlDeviceGetMemoryErrorCounter", HANDLE, UINT, UINT, UINT, POINTER)
def memory_error_counter(
    call: Call, device: int | None, kind: int, counter: int, location: int, out: int | None
) -> None:
    """Of a MIG device: only what is uncorrected, volatile and not in DRAM."""
    target = call.device(device)
    if isinstance(target, Gpu):
        call.refuse(Code.NOT_SUPPORTED, "not simulated for a GPU")
    if (kind, counter) != (UNCORRECTED, VOLATILE) or location == DRAM:
        call.refuse(Code.NOT_SUPPORTED, "not counted for an instance")
    call.put_wide(out, target.ci.uncorrected if location == SRAM else 0)


@EXPORTS.add("nvmlDeviceGetUtilizationRates", HANDLE, POINTER)
def utilization_rates(call: Call, device: int | None, out: int | None) -> None:
    """Not on any handle of a GPU with MIG on."""
    gpu = call.gpu(device, otherwise=Code.NOT_SUPPORTED)
    if gpu.record.mig_current:
        call.refuse(Code.NOT_SUPPORTED, "MIG is on")
    rates = call.struct(out, Utilization)
    rates.gpu = rates.memory = 0


@EXPORTS.add(
    "nvmlDeviceGetComputeRunningProcesses_v2 nvmlDeviceGetComputeRunningProcesses_v3",
    HANDLE,
    POINTER,
    POINTER,
)
def compute_processes(call: Call, device: int | None, count: int | None, out: int | None) -> None:
    """A MIG device's own, or all of a GPU with their ids, which with MIG on takes privilege."""
    target = call.device(device)
    if isinstance(target, Mig):
        found = [(process, target.gi.id, target.ci.id) for process in _live(call, target)[0]]
    else:
        if target.record.mig_current:
            call.require(MONITOR)
        found = list(target.processes)
    if call.node.switches.process_list == "namespace":
        found = []
    _give_processes(call, found, count, out)


@EXPORTS.add(
    "nvmlDeviceGetGraphicsRunningProcesses_v2 nvmlDeviceGetGraphicsRunningProcesses_v3 "
    "nvmlDeviceGetMPSComputeRunningProcesses_v2 nvmlDeviceGetMPSComputeRunningProcesses_v3",
    HANDLE,
    POINTER,
    POINTER,
)
def other_processes(call: Call, device: int | None, count: int | None, out: int | None) -> None:
    call.device(device)
    _give_processes(call, [], count, out)


def _live(call: Call, device: Mig) -> tuple[list[Process], int]:
    """Who runs on the device now, and the MiB used in its GPU instance. On one that is gone: nobody."""
    for gi, ci in call.node.by_uuid[device.gpu.uuid].mig_devices():
        if ci.serial == device.ci.serial:
            return ci.processes, sum(p.memory_mib for other in gi.compute for p in other.processes)
    return [], 0


def _memory(call: Call, device: int | None) -> tuple[int, int]:
    """Total and used bytes. A MIG device's are its GPU instance's, shared by all compute instances there."""
    target = call.device(device)
    if isinstance(target, Mig):
        total = target.gpu.profile(target.gi).memory_mib
        used = IDLE_MIB + _live(call, target)[1]
    else:
        if target.record.mig_current:
            call.require(MONITOR)
        total = target.product.memory_total_mib
        idle = IDLE_MIB * max(1, len(target.instances))
        used = idle + sum(process.memory_mib for process, _, _ in target.processes)
    return total * MIB, min(used, total) * MIB


def _give_processes(
    call: Call, found: list[tuple[Process, int, int]], count: int | None, out: int | None
) -> None:
    if not count:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL count")
    room = ctypes.c_uint.from_address(count)
    given, room.value = room.value, len(found)
    if given < len(found):
        call.refuse(Code.INSUFFICIENT_SIZE, f"{len(found)} processes")
    if found and not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL array")
    for slot, (process, gi, ci) in enumerate(found):
        entry = ProcessInfo.from_address((out or 0) + slot * ctypes.sizeof(ProcessInfo))
        entry.pid, entry.used_gpu_memory = process.pid, process.memory_mib * MIB
        entry.gpu_instance_id, entry.compute_instance_id = gi, ci
