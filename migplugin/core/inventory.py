"""Everything that NVML said at one moment, frozen.

What could not be read is None or empty, never a guess: a caller without privilege still gets its
MIG devices, only without placement. A GPU whose calls fail is not dropped but listed as broken,
so that nobody takes silence for absence.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NewType

GpuUuid = NewType("GpuUuid", str)
DeviceId = NewType("DeviceId", str)


@dataclass(frozen=True, slots=True)
class Placement:
    """First memory slice and length, in memory slices of the GPU."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A kind of GPU instance that one GPU offers; `id` means something on this GPU only (nvml.md 3.3)."""

    name: str
    id: int
    slices: int
    memory_mib: int
    max_instances: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class GpuInstance:
    gi: int
    profile: str
    placement: Placement | None


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A live compute instance in its GPU instance.

    `index` is its slot for NVML's ByIndex call: sparse, and no identity. `gi_minor` and `ci_minor` name
    the capability nodes. The rest makes no other device of it: their modes, None where the driver's files
    are hidden; `files`, whether its own are there, None where the tree cannot be seen; and `uncorrected`, the
    memory errors (ECC) that the driver counts against it, None where it does not.
    """

    uuid: DeviceId
    gpu: GpuUuid
    index: int
    gi: int
    ci: int
    profile: str
    placement: Placement | None
    memory_mib: int | None
    multiprocessors: int | None
    gi_minor: int | None
    ci_minor: int | None
    gi_mode: int | None = field(default=None, compare=False)
    ci_mode: int | None = field(default=None, compare=False)
    files: bool | None = field(default=None, compare=False)
    uncorrected: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Signs:
    """What the driver says of a GPU's fitness when it is asked; None where it does not know the question.

    `action` is what it wants done: 0 nothing, else a number of `ACTIONS` or a newer one. `uncorrected` counts
    the memory errors (ECC) since the driver was loaded or the GPU reset. An `action`, also none, outranks
    what is only pending.
    """

    action: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    uncorrected: int | None = None

    @property
    def complaint(self) -> str:
        """Why the GPU is unfit by these signs, or ""."""
        if self.action:
            return f"the driver wants of this GPU: {ACTIONS.get(self.action, f'action {self.action}')}"
        if self.remap_failed:
            return "remapping a memory row failed: this GPU needs its vendor"
        if self.remap_pending and self.action is None:
            return "a memory row waits to be remapped: reset this GPU"
        return ""


# NVML_FI_DEV_GET_GPU_RECOVERY_ACTION (nvml.h of driver 595; 6 and 7 of newer bindings).
ACTIONS = {
    1: "GPU reset",
    2: "node reboot",
    3: "drain P2P",
    4: "drain and reset",
    5: "recovery of the IMEX domain",
    6: "bus reset",
    7: "system reboot",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card.

    `mig_enabled` is the current mode (None: not MIG capable), `mig_pending` the one asked for. `minor`
    is N of /dev/nvidiaN and can differ from `index`. `memory_slices` is the length of the placement
    grid, 0 where placements are not known.
    """

    uuid: GpuUuid
    index: int
    minor: int
    pci_address: str
    numa_node: int | None
    product: str
    memory_mib: int
    mig_enabled: bool | None
    mig_pending: bool | None
    memory_slices: int = 0
    profiles: tuple[GpuProfile, ...] = ()
    instances: tuple[GpuInstance, ...] = ()
    devices: tuple[MigDevice, ...] = ()
    signs: Signs = field(default_factory=Signs)


@dataclass(frozen=True, slots=True)
class BrokenGpu:
    """A GPU whose calls fail; `uuid` is None where even that could not be read.

    `lost`: the driver says so in as many words, and then only a reset, or more, brings it back.
    """

    index: int
    uuid: GpuUuid | None
    reason: str
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Inventory:
    """`unreadable` says in one sentence each what the driver refused to tell, for example placements.

    `links` is how near pairs of GPUs are to each other, as NVIDIA counts it (nvidia-device-plugin.md 5).
    `running` are the ids of those, of whom that was asked, on which the driver sees a process. `module` tells
    one loading of the kernel module from another; None where sysfs does not show it.
    """

    driver_version: str
    gpus: tuple[Gpu, ...]
    broken: tuple[BrokenGpu, ...] = ()
    control_nodes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    links: Mapping[tuple[GpuUuid, GpuUuid], int] = field(default_factory=dict)
    running: frozenset[str] = frozenset()
    module: int | None = None

    def devices(self) -> Iterator[tuple[Gpu, MigDevice]]:
        """Every MIG device with its GPU, in order of GPU index, GPU instance and compute instance."""
        for gpu in self.gpus:
            for device in gpu.devices:
                yield gpu, device

    @property
    def gpu_count(self) -> int:
        return len(self.gpus) + len(self.broken)
