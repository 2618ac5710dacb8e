"""Nodes to test with: NVIDIA's tables for three products, and pods that hold devices."""

from collections.abc import Mapping, Sequence

from migplugin.core.decide import Key, Source, Usage
from migplugin.core.inventory import (
    DeviceId,
    Gpu,
    GpuInstance,
    GpuProfile,
    GpuUuid,
    Inventory,
    MigDevice,
    Placement,
)
from migplugin.core.resource import ResourceName


def profiles(*rows: tuple[str, int, int, int, int, Sequence[int], int]) -> tuple[GpuProfile, ...]:
    return tuple(
        GpuProfile(name, id_, slices, mib, most, tuple(Placement(start, size) for start in starts))
        for name, id_, slices, mib, most, starts, size in rows
    )


# Name, id, compute slices, MiB, instances, starts, size (nvml.md 3.3).
A100 = profiles(
    ("1g.5gb", 19, 1, 4864, 7, range(7), 1),
    ("1g.5gb+me", 20, 1, 4864, 1, range(7), 1),
    ("1g.10gb", 15, 1, 9856, 4, (0, 2, 4, 6), 2),
    ("2g.10gb", 14, 2, 9856, 3, (0, 2, 4), 2),
    ("3g.20gb", 9, 3, 19968, 2, (0, 4), 4),
    ("4g.20gb", 5, 4, 19968, 1, (0,), 4),
    ("7g.40gb", 0, 7, 40192, 1, (0,), 8),
)
A30 = profiles(
    ("1g.6gb", 14, 1, 5952, 4, range(4), 1),
    ("1g.6gb+me", 21, 1, 5952, 1, range(4), 1),
    ("2g.12gb", 5, 2, 11968, 2, (0, 2), 2),
    ("2g.12gb+me", 6, 2, 11968, 1, (0, 2), 2),
    ("4g.24gb", 0, 4, 24000, 1, (0,), 4),
)
RTX_PRO_6000 = profiles(
    ("1g.24gb", 14, 1, 24192, 4, (0, 3, 6, 9), 3),
    ("1g.24gb+me", 21, 1, 24192, 1, (0, 3, 6, 9), 3),
    ("1g.24gb+gfx", 47, 1, 24192, 4, (0, 3, 6, 9), 3),
    ("1g.24gb+me.all", 65, 1, 24192, 1, (0, 3, 6, 9), 3),
    ("1g.24gb-me", 67, 1, 24192, 4, (0, 3, 6, 9), 3),
    ("2g.48gb", 5, 2, 48512, 2, (0, 6), 6),
    ("2g.48gb+gfx", 35, 2, 48512, 2, (0, 6), 6),
    ("2g.48gb+me.all", 64, 2, 48512, 1, (0, 6), 6),
    ("2g.48gb-me", 66, 2, 48512, 2, (0, 6), 6),
    ("4g.96gb", 0, 4, 97280, 1, (0,), 12),
    ("4g.96gb+gfx", 32, 4, 97280, 1, (0,), 12),
)
PRODUCTS = {
    "NVIDIA A100-SXM4-40GB": (A100, 8, 40960),
    "NVIDIA A30": (A30, 4, 24576),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (RTX_PRO_6000, 12, 98304),
}
A100_40GB, A30_24GB, RTX_PRO = PRODUCTS


def uuid(gpu: int, gi: int | None = None, ci: int = 0) -> str:
    if gi is None:
        return f"GPU-b8f62ae7-5c2a-5c83-8cae-a2fc01e7dc0{gpu}"
    return f"MIG-{gpu}{gi:02d}{ci}a1f3-77ad-5d0e-9e5c-4d1b7e3c09{gpu}{gi % 10}"


def gpu(
    index: int,
    *instances: tuple[int, str, int, int] | tuple[int, str, int, int, tuple[str, ...]],
    product: str = A100_40GB,
    mig: bool | None = True,
    pending: bool | None = None,
) -> Gpu:
    """A GPU with `instances` of (gi, profile, start, size[, profiles of its compute instances])."""
    table, slices, memory = PRODUCTS[product]
    key = GpuUuid(uuid(index))
    mib = {profile.name: profile.memory_mib for profile in table}
    gis: list[GpuInstance] = []
    devices: list[MigDevice] = []
    for gi, profile, start, size, *compute in instances:
        place = Placement(start, size)
        gis.append(GpuInstance(gi, profile, place))
        for ci, name in enumerate(compute[0] if compute else (profile,)):
            id_ = DeviceId(uuid(index, gi, ci))
            minors = (len(devices) * 9 + 30, len(devices) * 9 + 31)
            devices.append(MigDevice(id_, key, len(devices), gi, ci, name, place, mib[profile], 14, *minors))
    return Gpu(
        key,
        index,
        index,
        f"0000:{index * 4 + 7:02x}:00.0",
        index // 4,
        product,
        memory,
        mig,
        mig if pending is None else pending,
        slices if mig is not None else 0,
        table if mig is not None else (),
        tuple(gis),
        tuple(devices),
    )


SEVENTHS = gpu(0, *((gi, "1g.5gb", slot, 1) for slot, gi in enumerate((7, 8, 9, 10, 11, 12, 13))))
ASSORTED = gpu(1, (2, "3g.20gb", 4, 4), (3, "2g.10gb", 0, 2), (9, "1g.5gb", 2, 1), (10, "1g.5gb", 3, 1))


def inventory(*gpus: Gpu) -> Inventory:
    return Inventory("590.48.01", gpus)


def key(resource: str, id_: str) -> Key:
    return ResourceName(f"nvidia.com/{resource}"), DeviceId(id_)


def usage(
    holders: Mapping[Key, str] | None = None,
    *,
    began: float = 0.0,
    unseen: frozenset[Key] = frozenset(),
    checkpoint: Source = Source.OK,
    pod_resources: Source = Source.OK,
) -> Usage:
    """Pod-resources names `holders`; the checkpoint names them and the `unseen`."""
    listed = frozenset(holders or ()) if pod_resources is Source.OK else frozenset()
    written = frozenset(holders or ()) | unseen if checkpoint is Source.OK else frozenset()
    names: dict[DeviceId, tuple[str, ...]] = {}
    for (_, id_), holder in (holders or {}).items() if listed else ():
        names[id_] = (*names.get(id_, ()), holder)
    return Usage(began, checkpoint, pod_resources, listed | written, listed, names)
