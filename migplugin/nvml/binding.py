"""pynvml, loaded and spoken to in one place.

Every function here is one NVML call with plain values going in and coming out, and with pynvml's traps
behind it (nvml.md 2): c_uint objects where numbers are meant, arrays that the library fills without
bounds, errors that are not NVMLError. A call that the driver refuses raises DriverError with its C name
and code; whether that matters is for the caller to know.

The library is a real libnvidia-ml.so.1, searched where the driver is mounted and loaded by its full path
before pynvml looks for it, or an object that stands in for one (the simulator).
"""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NewType, TypeVar

import pynvml

from migplugin.errors import DriverError, DriverNotReady, LibraryOutdated
from migplugin.nvml import machine
from migplugin.nvml.codes import ABSENT, GONE, LOST, Code, describe
from migplugin.nvml.library import Library, find

log = logging.getLogger(__name__)

Handle = NewType("Handle", object)

T = TypeVar("T")

DOUBLE_BIT_ECC = 0x2
XID_CRITICAL = 0x8
MIG_CONFIG_CHANGE = 0x100
UNCORRECTED, VOLATILE, SRAM = 1, 0, 7  # nvmlMemoryErrorType_t, nvmlEccCounterType_t, nvmlMemoryLocation_t
RECOVERY_ACTION, REMAP_PENDING, REMAP_FAILED = 230, 144, 145  # fields of nvmlDeviceGetFieldValues
WHOLE = 0xFFFFFFFF  # a GI or CI id that says: not one instance but all of them
LAST_KNOWN_GI_PROFILE = 0x11
LAST_KNOWN_CI_PROFILE = 8
NVLINKS = 18  # of one GPU at most
SLOTS_UNTOLD = 16  # MIG devices that are looked for where the driver does not say how many there can be
END_OF_PROFILES = 64  # a driver that never says where its profiles end is not asked for ever


@dataclass(frozen=True, slots=True)
class GiProfileInfo:
    """`name` is "" where the driver is too old to say one; `enum` is the number it was asked by."""

    enum: int
    id: int
    slices: int
    memory_mib: int
    max_instances: int
    name: str


@dataclass(frozen=True, slots=True)
class GiInfo:
    id: int
    profile_id: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Attributes:
    """Of one MIG device; slices of its GPU instance and of its compute instance."""

    multiprocessors: int
    gi_slices: int
    ci_slices: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Event:
    """`device` is the address that identifies a GPU handle within the session."""

    device: int
    kind: int
    data: int
    gi: int | None
    ci: int | None


def load(library: object | None = None, *, search: Path | None = None) -> Library:
    """Makes pynvml speak to `library`, or to the driver's own found below `search` or by its soname.

    Raises LibraryMissing, naming what can be done about it.
    """
    loaded = find(search) if library is None else Library(library)
    if library is None and (why := machine.unsupported()):
        log.warning("not a machine for MIG", extra={"reason": why})
    pynvml.nvmlLib = loaded.functions
    # pynvml keeps every function it has looked up, and a count of its users, for ever.
    pynvml._nvmlGetFunctionPointer_cache.clear()  # noqa: SLF001
    pynvml._nvmlLib_refcount = 0  # noqa: SLF001
    return loaded


def call(name: str, *args: Any, **options: Any) -> Any:
    """The answer of one NVML function. Raises DriverError with its C name and code."""
    try:
        return getattr(pynvml, name)(*args, **options)
    except pynvml.NVMLError as exc:
        code = int(exc.value)
    except (pynvml.NVMLLibraryMismatchError, AttributeError):
        # Of a function that this library, or this pynvml, does not have.
        code = Code.FUNCTION_NOT_FOUND
    except UnicodeDecodeError:
        # A GPU that answers no text where there must be one is broken, and breaks no other.
        code = Code.UNKNOWN
    if code == Code.LIB_RM_VERSION_MISMATCH:
        raise LibraryOutdated(f"{name}: {describe(code)}", call=name, code=code)
    if code == Code.DRIVER_NOT_LOADED:
        raise DriverNotReady(f"{name}: {describe(code)}", call=name, code=code)
    raise DriverError(f"{name}: {describe(code)}", call=name, code=code)


def unless(codes: frozenset[Code] | set[Code], function: Callable[[], Any], otherwise: Any = None) -> Any:
    """What `function` answers, or `otherwise` where the driver refuses with one of `codes`."""
    try:
        return function()
    except DriverError as exc:
        if exc.code not in codes:
            raise
        return otherwise


def init() -> None:
    call("nvmlInit")


def shutdown() -> None:
    call("nvmlShutdown")


def driver_version() -> str:
    return str(call("nvmlSystemGetDriverVersion"))


def gpu_count() -> int:
    """Also counts GPUs whose handle is then refused."""
    return int(call("nvmlDeviceGetCount"))


def gpu(index: int) -> Handle:
    return Handle(call("nvmlDeviceGetHandleByIndex", index))


def address(handle: object) -> int:
    """What identifies a handle within its session: handles themselves never compare equal."""
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)  # type: ignore[arg-type]


def uuid(handle: Handle) -> str:
    return str(call("nvmlDeviceGetUUID", handle))


def uuid_at(address: int) -> str:
    """The UUID of the device whose handle lies at `address` in this session."""
    return uuid(Handle(ctypes.cast(address, pynvml.c_nvmlDevice_t)))


def name(handle: Handle) -> str:
    return str(call("nvmlDeviceGetName", handle))


def minor(handle: Handle) -> int:
    return int(call("nvmlDeviceGetMinorNumber", handle))


def is_vgpu(handle: Handle) -> bool:
    """Whether this is a virtual GPU in a guest, and not one that is passed through whole."""
    mode = int(call("nvmlDeviceGetVirtualizationMode", handle))
    return mode == int(pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU)


def pci_address(handle: Handle) -> str:
    """As sysfs writes it: `0000:07:00.0`, lower case, a domain of four digits where that is enough."""
    text = str(call("nvmlDeviceGetPciInfo", handle).busId).lower()
    domain, _, rest = text.partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def common_ancestor(one: Handle, other: Handle) -> int:
    """How far up two GPUs meet, as an NVML_TOPOLOGY level: 0 is one board, 50 another CPU."""
    return int(call("nvmlDeviceGetTopologyCommonAncestor", one, other))


def nvlinked(handle: Handle) -> list[str]:
    """The PCI address at the other end of each NVLink that is up: of a GPU, or of a switch."""
    found = []
    try:
        for link in range(NVLINKS):
            if call("nvmlDeviceGetNvLinkState", handle, link) == pynvml.NVML_FEATURE_ENABLED:
                end = call("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
                # By its numbers: what the driver writes of an end that it cannot see need be no address.
                found.append(f"{end.domain:04x}:{end.bus:02x}:{end.device:02x}.0")
    except DriverError as exc:
        if exc.code not in {*ABSENT, Code.INVALID_ARGUMENT}:
            raise
    return found


def memory_bytes(handle: Handle) -> int:
    return int(call("nvmlDeviceGetMemoryInfo", handle).total)


def fields(handle: Handle, *wanted: int) -> dict[int, int]:
    """The values of those fields, all small numbers, that this driver knows of this GPU."""
    values = _if_told(lambda: call("nvmlDeviceGetFieldValues", handle, wanted)) or ()
    return {int(found.fieldId): _number(found) for found in values if found.nvmlReturn == 0}


def uncorrected_errors(handle: Handle) -> int | None:
    """Memory errors (ECC) of a GPU since the driver was loaded; None where that is not told."""
    return _if_told(lambda: int(call("nvmlDeviceGetTotalEccErrors", handle, UNCORRECTED, VOLATILE)))


def uncorrected_errors_of_instance(mig_handle: Handle) -> int | None:
    """The same of a MIG device, in its SRAM: of no other memory a driver says whose they were (nvml.h)."""
    return _if_told(
        lambda: int(call("nvmlDeviceGetMemoryErrorCounter", mig_handle, UNCORRECTED, VOLATILE, SRAM))
    )


def runs_something(handle: Handle) -> bool:
    """Whether the driver sees a compute process there. That it sees none means little: without the host's PID
    namespace it leaves out those of others, with success (nvml.md 3).
    """
    return bool(_if_told(lambda: call("nvmlDeviceGetComputeRunningProcesses", handle)))


def _if_told(function: Callable[[], T]) -> T | None:
    """What a question of fitness is answered.

    However the driver refuses, a GPU is not broken for that, unless it is said to be lost.
    """
    try:
        return function()
    except (DriverNotReady, LibraryOutdated):
        raise
    except DriverError as exc:
        if exc.code in LOST:
            raise
        return None


def _number(found: Any) -> int:
    if found.valueType in {pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, pynvml.NVML_VALUE_TYPE_SIGNED_INT}:
        return int(found.value.uiVal)
    return int(found.value.ullVal)


def mig_mode(handle: Handle) -> tuple[bool, bool] | None:
    """Current and pending mode; None where the GPU has no MIG."""
    mode = unless(ABSENT, lambda: call("nvmlDeviceGetMigMode", handle))
    return None if mode is None else (bool(mode[0]), bool(mode[1]))


def gi_profiles(handle: Handle) -> list[GiProfileInfo]:
    """Every GPU-instance profile of this GPU, in order of NVML's enum; empty where it does not tell.

    The enum is walked to the last number that we know, then on until the driver says that there are no
    more: a driver newer than this program may have more of them.
    """
    found = []
    for enum in range(END_OF_PROFILES):
        try:
            info = _versioned("nvmlDeviceGetGpuInstanceProfileInfo", handle, enum)
        except DriverError as exc:
            if exc.code == Code.INVALID_ARGUMENT and enum > LAST_KNOWN_GI_PROFILE:
                break
            if exc.code in {*ABSENT, Code.INVALID_ARGUMENT}:
                continue
            raise
        found.append(
            GiProfileInfo(
                enum,
                int(info.id),
                int(info.sliceCount),
                int(info.memorySizeMB),
                int(info.instanceCount),
                _text(getattr(info, "name", "")),
            )
        )
    return found


def placements(handle: Handle, profile_id: int) -> list[tuple[int, int]]:
    """Every possible (start, size) of a GPU-instance profile, taken or not."""
    count = ctypes.c_uint(0)
    call("nvmlDeviceGetGpuInstancePossiblePlacements", handle, profile_id, None, ctypes.byref(count))
    array = (pynvml.c_nvmlGpuInstancePlacement_t * _room(count.value))()
    call("nvmlDeviceGetGpuInstancePossiblePlacements", handle, profile_id, array, ctypes.byref(count))
    return [(int(p.start), int(p.size)) for p in array[: count.value]]


def gis(handle: Handle, profile_id: int, most: int) -> list[GiInfo]:
    """The live GPU instances of a profile, of which there are at most `most`; without those that leave
    while we ask.
    """
    count = ctypes.c_uint(0)
    array = (pynvml.c_nvmlGpuInstance_t * _room(most))()
    call("nvmlDeviceGetGpuInstances", handle, profile_id, array, ctypes.byref(count))
    found = [unless(GONE, lambda one=one: gi_info(Handle(one))) for one in array[: count.value]]  # type: ignore[misc]
    return [info for info in found if info is not None]


def _room(count: int) -> int:
    """How long an array must be that the driver fills without bounds, where it told `count`.

    Some report too little (A30), and more may come meanwhile: there is room to spare. None is believed that
    its GPU has thousands.
    """
    return min(max(2 * count, 64), 4096)


def gi(handle: Handle, gi_id: int) -> Handle:
    return Handle(call("nvmlDeviceGetGpuInstanceById", handle, gi_id))


def gi_info(gi_handle: Handle) -> GiInfo:
    info = call("nvmlGpuInstanceGetInfo", gi_handle)
    return GiInfo(int(info.id), int(info.profileId), int(info.placement.start), int(info.placement.size))


def ci_slices(gi_handle: Handle, ci_id: int) -> int | None:
    """How many compute slices a compute instance has; None where the driver does not tell."""
    ci = call("nvmlGpuInstanceGetComputeInstanceById", gi_handle, ci_id)
    profile_id = int(unless(ABSENT, lambda: call("nvmlComputeInstanceGetInfo", ci).profileId, -1))
    for enum in range(END_OF_PROFILES):
        try:
            info = _versioned("nvmlGpuInstanceGetComputeInstanceProfileInfo", gi_handle, enum, 0)
        except DriverError as exc:
            if exc.code == Code.INVALID_ARGUMENT and enum > LAST_KNOWN_CI_PROFILE:
                break
            if exc.code in {*ABSENT, Code.INVALID_ARGUMENT}:
                continue
            raise
        if int(info.id) == profile_id:
            return int(info.sliceCount)
    return None


def most_mig_devices(handle: Handle) -> int:
    """How many MIG devices the GPU can have; 0 with MIG off. Never how many it has."""
    try:
        return int(call("nvmlDeviceGetMaxMigDeviceCount", handle))
    except DriverError as exc:
        if exc.code not in ABSENT:
            raise
        return 0 if exc.code == Code.NOT_SUPPORTED else SLOTS_UNTOLD


def mig_device(handle: Handle, index: int) -> Handle | None:
    """The MIG device in slot `index`; None for an empty slot, after which others may follow."""
    return unless(GONE, lambda: Handle(call("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)))  # type: ignore[no-any-return]


def gi_id(mig_handle: Handle) -> int:
    return int(call("nvmlDeviceGetGpuInstanceId", mig_handle))


def ci_id(mig_handle: Handle) -> int:
    return int(call("nvmlDeviceGetComputeInstanceId", mig_handle))


def attributes(mig_handle: Handle) -> Attributes:
    found = call("nvmlDeviceGetAttributes", mig_handle)
    return Attributes(
        int(found.multiprocessorCount),
        int(found.gpuInstanceSliceCount),
        int(found.computeInstanceSliceCount),
        int(found.memorySizeMB),
    )


def new_event_set() -> Handle:
    return Handle(call("nvmlEventSetCreate"))


def free_event_set(events: Handle) -> None:
    call("nvmlEventSetFree", events)


def register(handle: Handle, kind: int, events: Handle) -> bool:
    """Whether this GPU sends events of `kind` into `events` now. Register one kind at a time: one that is
    not supported has nothing registered of all.
    """
    if not supported_events(handle) & kind:
        return False
    refused = {*ABSENT, Code.INVALID_ARGUMENT, Code.NO_PERMISSION}
    return bool(unless(refused, lambda: [call("nvmlDeviceRegisterEvents", handle, kind, events)], []))


def supported_events(handle: Handle) -> int:
    return int(unless(ABSENT, lambda: call("nvmlDeviceGetSupportedEventTypes", handle), 0))


def wait(events: Handle, timeout_ms: int) -> Event | None:
    """The next event, or None when none came in time. Blocks its thread only."""
    data = unless({Code.TIMEOUT}, lambda: call("nvmlEventSetWait", events, timeout_ms))
    if data is None:
        return None
    instance, compute = int(data.gpuInstanceId), int(data.computeInstanceId)
    return Event(
        address(data.device),
        int(data.eventType),
        int(data.eventData),
        None if instance == WHOLE else instance,
        None if compute == WHOLE else compute,
    )


def _versioned(function: str, *args: Any) -> Any:
    """The second version of a profile query, which carries a name, or the first where there is no second."""
    try:
        return call(function, *args, version=2)
    except DriverError as exc:
        if exc.code not in {Code.FUNCTION_NOT_FOUND, Code.ARGUMENT_VERSION_MISMATCH}:
            raise
        return call(function, *args, version=1)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
