"""Opening and closing a session, and what NVML says about the system and about its own error codes."""

from migplugin.sim.call import INT, POINTER, UINT, Call, Exports
from migplugin.sim.codes import Code

EXPORTS = Exports()

CUDA_VERSION = 13000


@EXPORTS.add("nvmlInit nvmlInit_v2")
def init(call: Call) -> None:
    call.session.open()


@EXPORTS.add("nvmlInitWithFlags", UINT)
def init_with_flags(call: Call, _flags: int) -> None:
    call.session.open()


@EXPORTS.add("nvmlShutdown")
def shutdown(call: Call) -> None:
    call.session.close()


@EXPORTS.add("nvmlSystemGetDriverVersion", POINTER, UINT)
def driver_version(call: Call, buffer: int | None, length: int) -> None:
    call.put_text(buffer, length, call.node.switches.driver_version)


@EXPORTS.add("nvmlSystemGetNVMLVersion", POINTER, UINT)
def nvml_version(call: Call, buffer: int | None, length: int) -> None:
    call.put_text(buffer, length, f"13.{call.node.switches.driver_version}")


@EXPORTS.add("nvmlSystemGetCudaDriverVersion nvmlSystemGetCudaDriverVersion_v2", POINTER)
def cuda_version(call: Call, version: int | None) -> None:
    call.put(version, CUDA_VERSION)


@EXPORTS.add("nvmlSystemGetProcessName", UINT, POINTER, UINT)
def process_name(call: Call, pid: int, buffer: int | None, length: int) -> None:
    for gpu in call.node.gpus:
        for process, _, _ in gpu.processes:
            if process.pid == pid:
                call.put_text(buffer, length, process.name)
                return
    call.refuse(Code.NOT_FOUND, f"no process {pid}")


# What is known by name only is refused by name: a caller that probes for it gets the code that
# hardware without the feature gives, and not a missing symbol.
@EXPORTS.add("nvmlDeviceGetTemperature", POINTER, UINT, POINTER)
@EXPORTS.add(
    "nvmlDeviceGetPowerUsage nvmlDeviceGetEnforcedPowerLimit nvmlDeviceGetNumaNodeId", POINTER, POINTER
)
@EXPORTS.add("nvmlDeviceGetRemappedRows", POINTER, POINTER, POINTER, POINTER, POINTER)
@EXPORTS.add("nvmlDeviceGetNvLinkState", POINTER, UINT, POINTER)
@EXPORTS.add("nvmlDeviceSetPersistenceMode", POINTER, INT)
def not_supported(call: Call, device: int | None, *_rest: int | None) -> None:
    call.device(device)
    call.refuse(Code.NOT_SUPPORTED)
