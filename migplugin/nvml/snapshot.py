"""One look at everything: from NVML calls to a frozen Inventory.

A GPU whose calls fail becomes a BrokenGpu, and never hides the others. A call that is refused for lack
of privilege is an expected answer: what it would have told is taken from elsewhere or is None, and
one sentence says what is missing. What cannot change while a GPU stays in its mode (its name, place
and profiles) is asked once; what lives is asked every time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from migplugin.core import profile as profiles
from migplugin.core.inventory import (
    BrokenGpu,
    DeviceId,
    Gpu,
    GpuInstance,
    GpuProfile,
    GpuUuid,
    Inventory,
    MigDevice,
    Placement,
)
from migplugin.errors import DriverError, LibraryOutdated
from migplugin.nvml import binding, machine
from migplugin.nvml.binding import Attributes, GiInfo, GiProfileInfo, Handle
from migplugin.nvml.capabilities import Capabilities, control_nodes, loaded_module, numa_node
from migplugin.nvml.codes import ABSENT, GONE, LOST, Code
from migplugin.nvml.links import Links
from migplugin.nvml.signs import Fitness

log = logging.getLogger(__name__)

T = TypeVar("T")

PRIVILEGE_MISSING = (
    "the driver refuses to tell placements and GPU instances to this container: give it CAP_SYS_ADMIN and "
    "NVIDIA_MIG_MONITOR_DEVICES=all, or run it privileged; MIG devices are served all the same"
)

# What the name of a profile ends in, by NVML's enum, for drivers that say no name (nvml.md 4).
_ATTRIBUTE = {7: "+me", 8: "+me", 10: "+gfx", 11: "+gfx", 12: "+gfx", 13: "-me", 14: "-me", 15: "+me.all", 16: "+me.all", 17: "+gfx"}  # fmt: skip  # noqa: E501

_REFUSED = ABSENT | {Code.NO_PERMISSION}


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What does not change while a GPU stays in its MIG mode; `refused` if we were not told all of it."""

    product: str
    pci_address: str
    numa_node: int | None
    memory_bytes: int
    profiles: tuple[GpuProfile, ...]
    is_vgpu: bool
    refused: bool

    def name(self, profile_id: int) -> str:
        return next((profile.name for profile in self.profiles if profile.id == profile_id), "")


@dataclass(slots=True)
class _Reading:
    """One GPU while it is read. `told` says whether the driver told every GPU instance; `doubtful` are the
    listed (gi, ci) that contradict what else it says; `left` is what it says of a device that it has just
    listed and knows no more.
    """

    handle: Handle
    uuid: GpuUuid
    minor: int
    fixed: _Fixed
    instances: dict[int, GiInfo] = field(default_factory=dict)
    told: bool = True
    refused: bool = False
    doubtful: set[tuple[int, int]] = field(default_factory=set)
    left: DriverError | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """An inventory, and where it contradicts itself or the files: (gpu, gi, ci) listed but not seen, seen
    but not listed, or told to be two things. `hidden` says whether a GPU's files cannot be seen at all.
    """

    inventory: Inventory
    disagreements: frozenset[tuple[GpuUuid, int, int]]
    hidden: bool


class Snapshots:
    """Takes looks, on the thread that owns NVML; at processes only of the ids in `processes_of`."""

    def __init__(self, proc_root: Path, sysfs_root: Path, dev_root: Path) -> None:
        self._proc_root = proc_root
        self._capabilities = Capabilities(proc_root)
        self._sysfs_root = sysfs_root
        self._dev_root = dev_root
        self._fixed: dict[tuple[GpuUuid, bool | None], _Fixed] = {}
        self._uuids: dict[int, GpuUuid] = {}
        self._links = Links()
        self._fitness = Fitness()
        self._driver: tuple[str, int | None] | None = None
        self._running: set[str] = set()
        self.processes_of: AbstractSet[str] = frozenset()

    def forget(self) -> None:
        """A new session may be one with another driver. Which GPU had which index is kept, for lost ones."""
        self._fixed.clear()
        self._links.forget()
        self._capabilities.forget()

    def take(self) -> Look:
        """Raises DriverError where the driver as a whole does not answer."""
        version, module = binding.driver_version(), loaded_module(self._sysfs_root)
        if self._driver != (version, module):
            self._driver = version, module
            self._fitness.forget()
        self._running.clear()
        gpus: list[Gpu] = []
        handles: list[Handle] = []
        broken: list[tuple[int, GpuUuid | None, DriverError]] = []
        disagreements: set[tuple[GpuUuid, int, int]] = set()
        vgpus: list[GpuUuid] = []
        hidden = refused = False
        for index in range(binding.gpu_count()):
            uuid: GpuUuid | None = None
            try:
                handle = binding.gpu(index)
                uuid = self._uuids[index] = GpuUuid(binding.uuid(handle))
                gpu, reading, seen = self._gpu_and_files(handle, index, uuid)
            except LibraryOutdated:
                raise  # said of one GPU, but not of it alone
            except DriverError as exc:
                broken.append((index, uuid, exc))
                continue
            if reading.fixed.is_vgpu:
                vgpus.append(uuid)
            if gpu.mig_enabled:
                listed = _listed(gpu)
                hidden = hidden or seen is None
                refused = refused or reading.refused
                doubtful = reading.doubtful | (listed ^ (listed if seen is None else seen))
                disagreements |= {(uuid, gi, ci) for gi, ci in doubtful}
                if reading.left is not None and seen is not None and seen - listed:
                    # It exists, and the driver does not say what it is: that is no absence.
                    broken.append((index, uuid, reading.left))
                    continue
            gpus.append(_with_files(gpu, seen))
            handles.append(handle)
        named = {gpu.uuid for gpu in gpus} | {uuid for _, uuid, _ in broken if uuid is not None}
        inventory = Inventory(
            driver_version=version,
            gpus=tuple(gpus),
            broken=tuple(
                BrokenGpu(i, uuid or self._last_uuid(i, named), str(exc), lost=exc.code in LOST)
                for i, uuid, exc in broken
            ),
            control_nodes=control_nodes(self._dev_root),
            unreadable=(
                *self._unreadable(gpus, refused=refused),
                *(f"GPU {uuid} {machine.VGPU}" for uuid in vgpus),
            ),
            links=self._links.between(list(zip(gpus, handles, strict=True))),
            running=frozenset(self._running),
            module=module,
        )
        return Look(inventory, frozenset(disagreements), hidden)

    def _gpu_and_files(
        self, handle: Handle, index: int, uuid: GpuUuid
    ) -> tuple[Gpu, _Reading, frozenset[tuple[int, int]] | None]:
        """A GPU, and which instances its files show; once more where one came or went meanwhile."""
        gpu, reading = self._gpu(handle, index, uuid)
        seen = self._capabilities.seen(gpu.minor) if gpu.mig_enabled else None
        if reading.left is not None and seen is not None and seen - _listed(gpu):
            gpu, reading = self._gpu(handle, index, uuid)
            seen = self._capabilities.seen(gpu.minor) if gpu.mig_enabled else None
        return gpu, reading, seen

    def _unreadable(self, gpus: Iterable[Gpu], *, refused: bool) -> Iterator[str]:
        if refused:
            yield PRIVILEGE_MISSING
        if any(None in {device.gi_minor, device.ci_minor} for gpu in gpus for device in gpu.devices):
            yield (
                f"the driver's files below {self._proc_root}/driver do not tell the capability nodes of MIG "
                "devices: only the NVIDIA runtime can give a container the right ones, "
                "--pass-device-specs cannot; mount the host's /proc and name it with --proc-root"
            )

    def _last_uuid(self, index: int, named: AbstractSet[GpuUuid]) -> GpuUuid | None:
        """Who a GPU was that does not even tell its UUID, unless that one was found elsewhere."""
        uuid = self._uuids.get(index)
        return None if uuid is None or uuid in named else uuid

    def _gpu(self, handle: Handle, index: int, uuid: GpuUuid) -> tuple[Gpu, _Reading]:
        minor = binding.minor(handle)
        mode = binding.mig_mode(handle)
        enabled, pending = (None, None) if mode is None else mode
        reading = _Reading(handle, uuid, minor, self._fixed_of(handle, uuid, enabled))
        self._note_processes(handle, uuid)
        if enabled:
            self._read_instances(reading)
        found = self._devices(reading) if enabled else []
        fixed = reading.fixed
        grid = [placement.start + placement.size for p in fixed.profiles for placement in p.placements]
        by_device = {device.gi: profiles.of_gpu_instance(device.profile) for device in found}
        gpu = Gpu(
            uuid=uuid,
            index=index,
            minor=minor,
            pci_address=fixed.pci_address,
            numa_node=fixed.numa_node,
            product=fixed.product,
            memory_mib=fixed.memory_bytes >> 20,
            mig_enabled=enabled,
            mig_pending=pending,
            memory_slices=max(grid, default=0),
            profiles=fixed.profiles,
            instances=tuple(
                GpuInstance(
                    gi,
                    fixed.name(info.profile_id) or by_device.get(gi, ""),
                    Placement(info.start, info.size),
                )
                for gi, info in sorted(reading.instances.items())
            ),
            devices=tuple(sorted(found, key=lambda device: (device.gi, device.ci))),
            signs=self._fitness.of_gpu(handle, uuid, mig=bool(enabled)),
        )
        return gpu, reading

    def _fixed_of(self, handle: Handle, uuid: GpuUuid, enabled: bool | None) -> _Fixed:
        fixed = self._fixed.get((uuid, enabled))
        if fixed is None:
            fixed = _read_fixed(handle, self._sysfs_root, capable=enabled is not None)
            if not fixed.refused:
                # What was refused is asked for again: privilege can come later.
                self._fixed[uuid, enabled] = fixed
        return fixed

    def _note_processes(self, handle: Handle, uuid: str) -> None:
        if uuid in self.processes_of and binding.runs_something(handle):
            self._running.add(uuid)

    @staticmethod
    def _read_instances(gpu: _Reading) -> None:
        """Every live GPU instance by its id, also those without compute instance; none without privilege."""
        for profile in gpu.fixed.profiles:
            try:
                listed = binding.gis(gpu.handle, profile.id, profile.max_instances)
            except DriverError as exc:
                if exc.code not in _REFUSED | GONE:
                    raise
                gpu.told = False
                gpu.refused = exc.code == Code.NO_PERMISSION
                if gpu.refused:
                    return
                continue
            gpu.instances.update((info.id, info) for info in listed)

    def _devices(self, gpu: _Reading) -> list[MigDevice]:
        found = []
        for slot in range(binding.most_mig_devices(gpu.handle)):
            device = binding.mig_device(gpu.handle, slot)
            if device is not None:
                try:
                    found.append(self._device(gpu, device, slot))
                except DriverError as exc:
                    # Gone between the listing and now, or half made: another event will follow.
                    if exc.code not in GONE:
                        raise
                    gpu.left = exc
                    log.debug("MIG device left while we looked", extra={"gpu": gpu.uuid, "slot": slot})
        return found

    def _device(self, gpu: _Reading, device: Handle, slot: int) -> MigDevice:
        uuid = DeviceId(binding.uuid(device))
        self._note_processes(device, uuid)
        gi, ci = binding.gi_id(device), binding.ci_id(device)
        attributes: Attributes | None = binding.unless(_REFUSED, lambda: binding.attributes(device))
        info = self._instance_of(gpu, gi, ci)
        of_gi, of_ci = self._capabilities.node(gpu.minor, gi), self._capabilities.node(gpu.minor, gi, ci)
        return MigDevice(
            uuid=uuid,
            gpu=gpu.uuid,
            index=slot,
            gi=gi,
            ci=ci,
            profile=self._name(gpu, device, info, ci, attributes),
            placement=None if info is None else Placement(info.start, info.size),
            memory_mib=None if attributes is None else attributes.memory_mib,
            multiprocessors=None if attributes is None else attributes.multiprocessors,
            gi_minor=of_gi.minor,
            ci_minor=of_ci.minor,
            gi_mode=of_gi.mode,
            ci_mode=of_ci.mode,
            uncorrected=self._fitness.errors_of(device, uuid),
        )

    @staticmethod
    def _instance_of(gpu: _Reading, gi: int, ci: int) -> GiInfo | None:
        """The GPU instance of a listed device; where it is of a profile that we cannot ask for, by its id."""
        info = gpu.instances.get(gi)
        if info is not None or gpu.refused:
            return info
        try:
            info = gpu.instances[gi] = binding.gi_info(binding.gi(gpu.handle, gi))
        except DriverError as exc:
            if exc.code not in _REFUSED | GONE:
                raise
            gpu.refused = exc.code == Code.NO_PERMISSION
            if gpu.told and exc.code in GONE:
                # We were told every GPU instance, and its own is not there: the session tells old news.
                gpu.doubtful.add((gi, ci))
        return info

    @staticmethod
    def _name(
        gpu: _Reading, device: Handle, info: GiInfo | None, ci: int, attributes: Attributes | None
    ) -> str:
        """The profile, as the driver calls it: of the GPU instance where it is told, else of the device."""
        of_gi = "" if info is None else gpu.fixed.name(info.profile_id)
        by_driver = profiles.from_driver(binding.unless(_REFUSED, lambda: binding.name(device), ""))
        if info is not None and profiles.parse(of_gi) is not None:
            slices: int | None = None if attributes is None else attributes.ci_slices
            if slices is None:
                slices = binding.unless(
                    _REFUSED, lambda: binding.ci_slices(binding.gi(gpu.handle, info.id), ci)
                )
            if slices is not None:
                name = profiles.of_compute_instance(of_gi, slices)
                if by_driver not in {"", name}:
                    gpu.doubtful.add((info.id, ci))
                return name
        if by_driver or of_gi:
            return by_driver or of_gi
        if attributes is not None and gpu.fixed.memory_bytes:
            a = attributes
            return profiles.computed(a.gi_slices, a.ci_slices, a.memory_mib, gpu.fixed.memory_bytes)
        raise DriverError(f"the driver names no profile for {binding.uuid(device)}", call="nvmlDeviceGetName")


def _listed(gpu: Gpu) -> set[tuple[int, int]]:
    return {(device.gi, device.ci) for device in gpu.devices}


def _with_files(gpu: Gpu, seen: AbstractSet[tuple[int, int]] | None) -> Gpu:
    if seen is None:
        return gpu
    devices = (replace(device, files=(device.gi, device.ci) in seen) for device in gpu.devices)
    return replace(gpu, devices=tuple(devices))


def _read_fixed(handle: Handle, sysfs_root: Path, *, capable: bool) -> _Fixed:
    refused = False

    def allowed(function: Callable[[], T], otherwise: T) -> T:
        """What `function` answers; `otherwise` where we may not ask or the driver cannot say."""
        nonlocal refused
        try:
            return function()
        except DriverError as exc:
            if exc.code not in _REFUSED | GONE:
                raise
            refused = refused or exc.code == Code.NO_PERMISSION
            return otherwise

    def profile(info: GiProfileInfo) -> GpuProfile:
        name = profiles.from_driver(info.name) or info.name
        if not name and memory:
            attribute = _ATTRIBUTE.get(info.enum, "")
            name = profiles.computed(info.slices, info.slices, info.memory_mib, memory, attribute)
        places: list[tuple[int, int]] = allowed(lambda: binding.placements(handle, info.id), [])
        return GpuProfile(
            name,
            info.id,
            info.slices,
            info.memory_mib,
            info.max_instances,
            tuple(Placement(start, size) for start, size in sorted(places)),
        )

    address = binding.pci_address(handle)
    # With MIG on, the memory of the whole GPU is told to the privileged only.
    memory = allowed(lambda: binding.memory_bytes(handle), 0)
    none: list[GiProfileInfo] = []
    infos = allowed(lambda: binding.gi_profiles(handle), none) if capable else none
    return _Fixed(
        product=binding.name(handle),
        pci_address=address,
        numa_node=numa_node(sysfs_root, address),
        memory_bytes=memory,
        profiles=tuple(profile(info) for info in infos),
        is_vgpu=allowed(lambda: binding.is_vgpu(handle), False),
        refused=refused,
    )
