"""One look at everything: from NVML calls to a frozen Inventory.

A GPU whose calls fail becomes a BrokenGpu, and never hides the others. A call that is refused for lack
of privilege is an expected answer: what it would have told is taken from elsewhere or is None, and
one sentence says what is missing. What cannot change while a GPU stays in its mode (its name, place
and profiles) is asked once; what lives is asked every time.
"""

import logging
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
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
from migplugin.errors import DriverError
from migplugin.nvml import binding
from migplugin.nvml.binding import Attributes, GiInfo, GiProfileInfo, Handle
from migplugin.nvml.capabilities import Capabilities, control_nodes, numa_node
from migplugin.nvml.codes import ABSENT, Code

log = logging.getLogger(__name__)

T = TypeVar("T")

PRIVILEGE_MISSING = (
    "the driver refuses to tell placements and GPU instances to this container: give it CAP_SYS_ADMIN and "
    "NVIDIA_MIG_MONITOR_DEVICES=all, or run it privileged; MIG devices are served all the same"
)

# What the name of a profile ends in, by NVML's enum, for drivers that say no name (nvml.md 4).
_ATTRIBUTE = {7: "+me", 8: "+me", 10: "+gfx", 11: "+gfx", 12: "+gfx", 13: "-me", 14: "-me", 15: "+me.all", 16: "+me.all", 17: "+gfx"}  # fmt: skip  # noqa: E501

_REFUSED = {Code.NO_PERMISSION, *ABSENT}


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What does not change while a GPU stays in its MIG mode."""

    product: str
    pci_address: str
    numa_node: int | None
    memory_bytes: int
    profiles: tuple[GpuProfile, ...]
    infos: Mapping[int, GiProfileInfo]


@dataclass(frozen=True, slots=True)
class Look:
    """An inventory, and where it and the files disagree: (gpu, gi, ci) listed but not seen, or seen but
    not listed. `hidden` says whether a GPU's files cannot be seen at all.
    """

    inventory: Inventory
    disagreements: frozenset[tuple[GpuUuid, int, int]]
    hidden: bool


class Snapshots:
    """Takes looks, on the thread that owns NVML."""

    def __init__(self, proc_root: Path, sysfs_root: Path, dev_root: Path) -> None:
        self._capabilities = Capabilities(proc_root)
        self._sysfs_root = sysfs_root
        self._dev_root = dev_root
        self._fixed: dict[tuple[GpuUuid, bool | None], _Fixed] = {}
        self._uuids: dict[int, GpuUuid] = {}
        self._refused = False

    def forget(self) -> None:
        """A new session may be one with another driver. Which GPU had which index is kept, for lost ones."""
        self._fixed.clear()
        self._capabilities.forget()

    def take(self) -> Look:
        """Raises DriverError where the driver as a whole does not answer."""
        self._refused = False
        version = binding.driver_version()
        gpus: list[Gpu] = []
        broken: list[tuple[int, GpuUuid | None, str]] = []
        disagreements: set[tuple[GpuUuid, int, int]] = set()
        hidden = False
        for index in range(binding.gpu_count()):
            uuid: GpuUuid | None = None
            try:
                handle = binding.gpu(index)
                uuid = GpuUuid(binding.uuid(handle))
                gpu = self._gpu(handle, index, uuid)
            except DriverError as exc:
                broken.append((index, uuid, str(exc)))
                continue
            self._uuids[index] = uuid
            gpus.append(gpu)
            if gpu.mig_enabled:
                seen = self._capabilities.seen(gpu.minor)
                listed = {(device.gi, device.ci) for device in gpu.devices}
                hidden = hidden or seen is None
                disagreements |= {(uuid, gi, ci) for gi, ci in listed ^ (listed if seen is None else seen)}
                if not self._refused:
                    # Privileged, we were told every GPU instance: a device outside of them is not there.
                    disagreements |= {(uuid, d.gi, d.ci) for d in gpu.devices if d.placement is None}
        named = {gpu.uuid for gpu in gpus} | {uuid for _, uuid, _ in broken if uuid is not None}
        inventory = Inventory(
            driver_version=version,
            gpus=tuple(gpus),
            broken=tuple(BrokenGpu(i, uuid or self._last_uuid(i, named), why) for i, uuid, why in broken),
            control_nodes=control_nodes(self._dev_root),
            unreadable=(PRIVILEGE_MISSING,) if self._refused else (),
        )
        return Look(inventory, frozenset(disagreements), hidden)

    def _last_uuid(self, index: int, named: AbstractSet[GpuUuid]) -> GpuUuid | None:
        """Who a GPU was that does not even tell its UUID, unless that one was found elsewhere."""
        uuid = self._uuids.get(index)
        return None if uuid is None or uuid in named else uuid

    def _gpu(self, handle: Handle, index: int, uuid: GpuUuid) -> Gpu:
        minor = binding.minor(handle)
        mode = binding.mig_mode(handle)
        enabled, pending = (None, None) if mode is None else mode
        fixed = self._fixed.get((uuid, enabled))
        if fixed is None:
            fixed = self._fixed[uuid, enabled] = self._read_fixed(handle, capable=mode is not None)
        instances = self._instances(handle, fixed) if enabled else {}
        found = self._devices(handle, uuid, minor, fixed, instances) if enabled else ()
        grid = [placement.start + placement.size for p in fixed.profiles for placement in p.placements]
        return Gpu(
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
                GpuInstance(gi, self._profile_name(fixed, info.profile_id), Placement(info.start, info.size))
                for gi, info in sorted(instances.items())
            ),
            devices=tuple(sorted(found, key=lambda device: (device.gi, device.ci))),
        )

    def _read_fixed(self, handle: Handle, *, capable: bool) -> _Fixed:
        address = binding.pci_address(handle)
        # With MIG on, the memory of the whole GPU is told to the privileged only.
        memory = self._allowed(lambda: binding.memory_bytes(handle), 0)
        none: list[GiProfileInfo] = []
        infos = self._allowed(lambda: binding.gi_profiles(handle), none) if capable else none
        return _Fixed(
            product=binding.name(handle),
            pci_address=address,
            numa_node=numa_node(self._sysfs_root, address),
            memory_bytes=memory,
            profiles=tuple(self._profile(handle, info, memory) for info in infos),
            infos={info.id: info for info in infos},
        )

    def _profile(self, handle: Handle, info: GiProfileInfo, memory_bytes: int) -> GpuProfile:
        name = profiles.from_driver(info.name)
        if not name and memory_bytes:
            attribute = _ATTRIBUTE.get(info.enum, "")
            name = profiles.computed(info.slices, info.slices, info.memory_mib, memory_bytes, attribute)
        places: list[tuple[int, int]] = self._allowed(lambda: binding.placements(handle, info.id), [])
        return GpuProfile(
            name,
            info.id,
            info.slices,
            info.memory_mib,
            info.max_instances,
            tuple(Placement(start, size) for start, size in sorted(places)),
        )

    def _instances(self, handle: Handle, fixed: _Fixed) -> dict[int, GiInfo]:
        """Every live GPU instance by its id, also those without compute instance; none without privilege."""
        found: dict[int, GiInfo] = {}
        for profile in fixed.profiles:
            listed: list[GiInfo] = self._allowed(
                lambda profile=profile: binding.gis(handle, profile.id, profile.max_instances),  # type: ignore[misc]
                [],
            )
            found.update((info.id, info) for info in listed)
        return found

    def _devices(
        self, handle: Handle, uuid: GpuUuid, minor: int, fixed: _Fixed, instances: Mapping[int, GiInfo]
    ) -> list[MigDevice]:
        found = []
        for slot in range(binding.most_mig_devices(handle)):
            device = binding.mig_device(handle, slot)
            if device is not None:
                try:
                    found.append(self._device(handle, device, slot, uuid, minor, fixed, instances))
                except DriverError as exc:
                    # Gone between the listing and now, or half made: another event will follow.
                    if exc.code not in {Code.INVALID_ARGUMENT, Code.NOT_FOUND}:
                        raise
                    log.debug("MIG device left while we looked", extra={"gpu": uuid, "slot": slot})
        return found

    def _device(
        self,
        handle: Handle,
        device: Handle,
        slot: int,
        gpu: GpuUuid,
        minor: int,
        fixed: _Fixed,
        instances: Mapping[int, GiInfo],
    ) -> MigDevice:
        uuid = DeviceId(binding.uuid(device))
        gi, ci = binding.gi_id(device), binding.ci_id(device)
        attributes: Attributes | None = self._allowed(lambda: binding.attributes(device), None)
        info = instances.get(gi)
        return MigDevice(
            uuid=uuid,
            gpu=gpu,
            index=slot,
            gi=gi,
            ci=ci,
            profile=self._name(handle, device, fixed, info, ci, attributes),
            placement=None if info is None else Placement(info.start, info.size),
            memory_mib=None if attributes is None else attributes.memory_mib,
            multiprocessors=None if attributes is None else attributes.multiprocessors,
            gi_minor=self._capabilities.minor(minor, gi),
            ci_minor=self._capabilities.minor(minor, gi, ci),
        )

    def _name(
        self,
        handle: Handle,
        device: Handle,
        fixed: _Fixed,
        info: GiInfo | None,
        ci: int,
        attributes: Attributes | None,
    ) -> str:
        """The profile, as the driver calls it: of the GPU instance where it is told, else of the device."""
        of_gi = "" if info is None else self._profile_name(fixed, info.profile_id)
        if info is not None and profiles.parse(of_gi) is not None:
            slices: int | None = None if attributes is None else attributes.ci_slices
            if slices is None:
                slices = self._allowed(lambda: binding.ci_slices(binding.gi(handle, info.id), ci), None)
            if slices is not None:
                return profiles.of_compute_instance(of_gi, slices)
        by_driver = profiles.from_driver(binding.name(device))
        if by_driver:
            return by_driver
        if of_gi:
            return of_gi
        if attributes is not None and fixed.memory_bytes:
            a = attributes
            return profiles.computed(a.gi_slices, a.ci_slices, a.memory_mib, fixed.memory_bytes)
        raise DriverError(f"the driver names no profile for {binding.uuid(device)}", call="nvmlDeviceGetName")

    @staticmethod
    def _profile_name(fixed: _Fixed, profile_id: int) -> str:
        return next((profile.name for profile in fixed.profiles if profile.id == profile_id), "")

    def _allowed(self, function: Callable[[], T], otherwise: T) -> T:
        """What `function` answers; `otherwise`, remembered, where we may not ask or the driver cannot say."""
        try:
            return function()
        except DriverError as exc:
            if exc.code not in _REFUSED:
                raise
            self._refused = self._refused or exc.code == Code.NO_PERMISSION
            return otherwise
