"""NVML's calls about devices: finding them, and what they are.

Many take a MIG device's handle as well. Those that on hardware answer for the GPU only refuse it here:
whoever wants a GPU's minor number or PCI address must ask the GPU.
"""

import ctypes
import re

from migplugin.sim.call import HANDLE, INT, POINTER, UINT, Call, Exports, Mig
from migplugin.sim.codes import Code
from migplugin.sim.model import Gpu, Node
from migplugin.sim.session import GpuHandle, MigHandle
from migplugin.sim.structs import FieldValue, PciInfo

EXPORTS = Exports()

BRAND_NVIDIA = 14
ARCHITECTURES = {"ampere": 7, "hopper": 9, "blackwell": 10}

TOPOLOGY_INTERNAL, TOPOLOGY_NODE, TOPOLOGY_SYSTEM = 0, 40, 50
NVLINKS = 18  # NVML_NVLINK_MAX_LINKS of the drivers that are simulated

VIRTUALIZATION = {"none": 0, "passthrough": 1, "vgpu": 2}  # nvmlGpuVirtualizationMode_t

FIELD_RESETLESS_MIG = 184
FIELD_MIG_QUERY_CAPABLE = 199
_VALUE_UINT = 1

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_GPU_UUID = re.compile(rf"GPU-{_UUID}")
_MIG_UUID = re.compile(rf"MIG-{_UUID}")
_LEGACY_UUID = re.compile(rf"MIG-(?P<gpu>GPU-{_UUID})/(?P<gi>\d+)/(?P<ci>\d+)", re.ASCII)
_BUS_ID = re.compile(
    r"(?P<domain>[0-9a-f]{4}|[0-9a-f]{8}):(?P<bus>[0-9a-f]{2}):(?P<device>[0-9a-f]{2})(\.0)?"
)


@EXPORTS.add("nvmlDeviceGetCount nvmlDeviceGetCount_v2", POINTER)
def count(call: Call, out: int | None) -> None:
    """Counts lost GPUs too: a loop over the indices meets their errors."""
    call.put(out, len(call.node.gpus))


@EXPORTS.add("nvmlDeviceGetHandleByIndex nvmlDeviceGetHandleByIndex_v2", UINT, POINTER)
def handle_by_index(call: Call, index: int, out: int | None) -> None:
    if index >= len(call.node.gpus):
        call.refuse(Code.INVALID_ARGUMENT, f"no GPU {index}")
    _give(call, call.node.gpus[index], out)


@EXPORTS.add("nvmlDeviceGetHandleByUUID", POINTER, POINTER)
def handle_by_uuid(call: Call, text: int | None, out: int | None) -> None:
    uuid = _text(call, text)
    if _GPU_UUID.fullmatch(uuid):
        if uuid not in call.node.by_uuid:
            call.refuse(Code.NOT_FOUND, f"no GPU {uuid}")
        _give(call, call.node.by_uuid[uuid], out)
        return
    legacy = _LEGACY_UUID.fullmatch(uuid)
    if not legacy and not _MIG_UUID.fullmatch(uuid):
        call.refuse(Code.INVALID_ARGUMENT, f"{uuid!r} is not a UUID")
    device = _find_mig(call.session.believed(call.node), uuid, legacy)
    if device is None:
        call.refuse(Code.NOT_FOUND, f"no MIG device {uuid}")
    call.reach(call.node.by_uuid[device.gpu.uuid])
    call.put_handle(out, call.session.handle(MigHandle.of(device.gpu, device.gi, device.ci)))


@EXPORTS.add("nvmlDeviceGetHandleByPciBusId nvmlDeviceGetHandleByPciBusId_v2", POINTER, POINTER)
def handle_by_pci_bus_id(call: Call, text: int | None, out: int | None) -> None:
    bus_id = _text(call, text).lower()
    match = _BUS_ID.fullmatch(bus_id)
    if not match:
        call.refuse(Code.INVALID_ARGUMENT, f"{bus_id!r} is not a PCI address")
    wanted = (int(match["domain"], 16), int(match["bus"], 16), int(match["device"], 16))
    for gpu in call.node.gpus:
        if wanted == (0, gpu.pci_bus, 0):
            _give(call, gpu, out)
            return
    call.refuse(Code.NOT_FOUND, f"no GPU at {bus_id}")


@EXPORTS.add("nvmlDeviceGetUUID", HANDLE, POINTER, UINT)
def uuid(call: Call, device: int | None, buffer: int | None, length: int) -> None:
    target = call.device(device)
    call.put_text(buffer, length, target.uuid if isinstance(target, Gpu) else target.ci.uuid)


@EXPORTS.add("nvmlDeviceGetName", HANDLE, POINTER, UINT)
def name(call: Call, device: int | None, buffer: int | None, length: int) -> None:
    target = call.device(device)
    if isinstance(target, Gpu):
        text = target.product.nvml_name
    else:
        text = f"{target.gpu.product.nvml_name} MIG {target.gpu.ci_name(target.gi, target.ci)}"
    call.put_text(buffer, length, text)


@EXPORTS.add("nvmlDeviceGetIndex", HANDLE, POINTER)
def index(call: Call, device: int | None, out: int | None) -> None:
    target = call.device(device)
    call.put(out, target.index if isinstance(target, Gpu) else target.gpu.mig_index(target.gi, target.ci))


@EXPORTS.add("nvmlDeviceGetMinorNumber", HANDLE, POINTER)
def minor_number(call: Call, device: int | None, out: int | None) -> None:
    call.put(out, call.gpu(device, otherwise=Code.NOT_SUPPORTED).minor)


@EXPORTS.add("nvmlDeviceGetVirtualizationMode", HANDLE, POINTER)
def virtualization_mode(call: Call, device: int | None, out: int | None) -> None:
    call.gpu(device, otherwise=Code.NOT_SUPPORTED)
    call.put(out, VIRTUALIZATION[call.node.switches.virtualization])


@EXPORTS.add("nvmlDeviceGetSerial", HANDLE, POINTER, UINT)
def serial(call: Call, device: int | None, buffer: int | None, length: int) -> None:
    call.put_text(buffer, length, call.gpu(device, otherwise=Code.NOT_SUPPORTED).record.serial_number)


@EXPORTS.add("nvmlDeviceGetPciInfo nvmlDeviceGetPciInfo_v2 nvmlDeviceGetPciInfo_v3", HANDLE, POINTER)
def pci_info(call: Call, device: int | None, out: int | None) -> None:
    _put_pci_info(call, call.gpu(device, otherwise=Code.NOT_SUPPORTED), out)


@EXPORTS.add("nvmlDeviceGetTopologyCommonAncestor", HANDLE, HANDLE, POINTER)
def topology_common_ancestor(call: Call, one: int | None, other: int | None, out: int | None) -> None:
    gpu, peer = call.gpu(one, otherwise=Code.NOT_SUPPORTED), call.gpu(other, otherwise=Code.NOT_SUPPORTED)
    if gpu.index == peer.index:
        call.put(out, TOPOLOGY_INTERNAL)
    else:
        call.put(out, TOPOLOGY_NODE if gpu.numa == peer.numa else TOPOLOGY_SYSTEM)


@EXPORTS.add("nvmlDeviceGetNvLinkState", HANDLE, UINT, POINTER)
def nvlink_state(call: Call, device: int | None, link: int, out: int | None) -> None:
    call.put(out, int(link < len(_nvlinks(call, device, link))))


@EXPORTS.add("nvmlDeviceGetNvLinkRemotePciInfo_v2", HANDLE, UINT, POINTER)
def nvlink_remote_pci_info(call: Call, device: int | None, link: int, out: int | None) -> None:
    ends = _nvlinks(call, device, link)
    if link >= len(ends):
        call.refuse(Code.NOT_SUPPORTED, f"link {link} is down")
    _put_pci_info(call, ends[link], out)


def _nvlinks(call: Call, device: int | None, link: int) -> list[Gpu]:
    """The other ends of a GPU's links, of which `link` can be one."""
    ends = call.gpu(device, otherwise=Code.NOT_SUPPORTED).nvlinks
    if not ends:
        call.refuse(Code.NOT_SUPPORTED, "a GPU without NVLink")
    if link >= NVLINKS:
        call.refuse(Code.INVALID_ARGUMENT, f"no link {link}")
    return ends


def _put_pci_info(call: Call, gpu: Gpu, out: int | None) -> None:
    info = call.struct(out, PciInfo)
    info.domain, info.bus, info.device = 0, gpu.pci_bus, 0
    info.pci_device_id = int(gpu.product.pci_device_ids[0], 16)
    info.pci_subsystem_id = 0x145F10DE
    info.bus_id = f"{0:08X}:{gpu.pci_bus:02X}:00.0".encode()
    info.bus_id_legacy = f"{0:04X}:{gpu.pci_bus:02X}:00.0".encode()


@EXPORTS.add("nvmlDeviceGetMemoryAffinity", HANDLE, UINT, POINTER, UINT)
def memory_affinity(call: Call, device: int | None, words: int, out: int | None, scope: int) -> None:
    gpu = call.gpu(device, otherwise=Code.NOT_SUPPORTED)
    if not out or not words or scope > 1:
        call.refuse(Code.INVALID_ARGUMENT)
    mask = 1 << gpu.numa if gpu.numa >= 0 else 0
    for word in range(words):
        call.put_wide(out + 8 * word, mask >> 64 * word & 0xFFFF_FFFF_FFFF_FFFF)


@EXPORTS.add("nvmlDeviceGetCudaComputeCapability", HANDLE, POINTER, POINTER)
def compute_capability(call: Call, device: int | None, major: int | None, minor: int | None) -> None:
    target = call.device(device)
    product = target.product if isinstance(target, Gpu) else target.gpu.product
    parts = product.compute_capability.split(".")
    call.put(major, int(parts[0]))
    call.put(minor, int(parts[1]))


@EXPORTS.add("nvmlDeviceGetBrand", HANDLE, POINTER)
def brand(call: Call, device: int | None, out: int | None) -> None:
    call.device(device)
    call.put(out, BRAND_NVIDIA)


@EXPORTS.add("nvmlDeviceGetArchitecture", HANDLE, POINTER)
def architecture(call: Call, device: int | None, out: int | None) -> None:
    target = call.device(device)
    product = target.product if isinstance(target, Gpu) else target.gpu.product
    call.put(out, ARCHITECTURES[product.arch])


@EXPORTS.add("nvmlDeviceGetPersistenceMode", HANDLE, POINTER)
def persistence_mode(call: Call, device: int | None, out: int | None) -> None:
    call.gpu(device)
    call.put(out, 1)


@EXPORTS.add("nvmlDeviceGetFieldValues", HANDLE, INT, POINTER)
def field_values(call: Call, device: int | None, wanted: int, out: int | None) -> None:
    gpu = call.gpu(device)
    if not out or wanted < 1:
        call.refuse(Code.INVALID_ARGUMENT)
    known = {
        FIELD_RESETLESS_MIG: int(not gpu.product.mode_enable_needs_reset),
        FIELD_MIG_QUERY_CAPABLE: int(call.node.switches.profile_queries == "always"),
        **gpu.record.fields,
    }
    for entry in (FieldValue * wanted).from_address(out):
        entry.timestamp = entry.latency_usec = 0
        if entry.field_id in known:
            entry.nvml_return, entry.value_type = Code.SUCCESS, _VALUE_UINT
            entry.value.uint_value = known[entry.field_id]
        else:
            entry.nvml_return = Code.NOT_SUPPORTED


def _give(call: Call, gpu: Gpu, out: int | None) -> None:
    call.put_handle(out, call.session.handle(GpuHandle(call.reach(gpu).uuid)))


def _text(call: Call, address: int | None) -> str:
    if not address:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL string")
    return ctypes.string_at(address).decode(errors="replace")


def _find_mig(node: Node, uuid: str, legacy: "re.Match[str] | None") -> Mig | None:
    """By its UUID, or by the old GPU/GI/CI form, which newer drivers still take."""
    for gpu in node.gpus:
        for gi, ci in gpu.mig_devices():
            named = legacy and (legacy["gpu"], legacy["gi"], legacy["ci"]) == (
                gpu.uuid,
                str(gi.id),
                str(ci.id),
            )
            if ci.uuid == uuid or named:
                return Mig(gpu, gi, ci)
    return None
