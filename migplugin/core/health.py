"""Health as a state: what faults have made of each device, since when, why, and until what.

`fold` takes the state, the faults that came and the inventory in force when they came, and gives the
next state. A fault concerns whom its code says (`xid`): a whole GPU, or the instances that the event names.
What it makes sick is remembered by UUID, and for a MIG device with what it was when the fault came.
So no fault goes over to a later instance with the same ids, or even the same UUID: one
that was seen to be absent, or to have become another, is a new one when it returns. A GPU that only does
not answer is not absent, and keeps its sick. A whole GPU that is sick has only sick devices, also those that
are made on it later.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from migplugin.core.inventory import DeviceId, Gpu, GpuUuid, Inventory, MigDevice
from migplugin.core.xid import TABLE, Checks, xid

UNLISTED = 999
MOST_XIDS_TOLD = 8

Subject: TypeAlias = DeviceId | GpuUuid


@dataclass(frozen=True, slots=True)
class Fault:
    """An XID event, repeated `count` times; `gi` and `ci` are None where it concerns the whole GPU or GI."""

    gpu: GpuUuid
    gi: int | None
    ci: int | None
    xid: int
    count: int
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Sickness:
    """Why something is unfit: the XIDs that came, in order, the first at `since` and one more at `last`.

    `device` is the MIG device as it was when the first came; None of a whole GPU.
    """

    gpu: GpuUuid
    device: MigDevice | None
    xids: tuple[int, ...]
    since: float
    last: float

    @property
    def reason(self) -> str:
        first, *more = self.xids
        others = f" and XID {', '.join(map(str, more))}" if more else ""
        return f"{xid(first)}{others}, {self.until}"

    @property
    def until(self) -> str:
        return "until its GPU is reset" if self.device is None else "until it is made anew"


@dataclass(frozen=True, slots=True)
class Change:
    """Something fell sick or got well: a sentence for the log."""

    subject: Subject
    gpu: GpuUuid
    sick: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """`sick` is by MIG UUID, or by GPU UUID for a whole GPU.

    `counts` are of all XIDs that ever came, by code. `gpus` is each GPU as it last answered, for faults of
    one that no longer does.
    """

    sick: Mapping[Subject, Sickness] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    gpus: Mapping[GpuUuid, Gpu] = field(default_factory=dict)

    def why(self, id_: DeviceId, gpu: GpuUuid) -> str:
        """Why the device `id_` on `gpu` is unfit, or ""."""
        whole, own = self.sick.get(gpu), self.sick.get(id_)
        found = whole or own
        return "" if found is None else found.reason


def fold(
    health: Health, inventory: Inventory | None, faults: tuple[Fault, ...], checks: Checks
) -> tuple[Health, tuple[Change, ...]]:
    """The next state, and what changed. `faults` came while `inventory` was in force."""
    if inventory is None:
        return health, ()
    gpus = _known(health, inventory)
    kept = {id_: sickness for id_, sickness in health.sick.items() if not _is_over(sickness, inventory, gpus)}
    changes = [
        Change(id_, sickness.gpu, sick=False, reason=f"gone or made anew; was sick of {sickness.reason}")
        for id_, sickness in health.sick.items()
        if id_ not in kept
    ]
    counts = dict(health.counts)
    for fault in faults:
        code = fault.xid if fault.xid in TABLE else UNLISTED
        counts[code] = counts.get(code, 0) + fault.count
        if not checks.make_sick(xid(fault.xid)):
            continue
        for id_, device in _concerned(fault, inventory, gpus):
            before = kept.get(id_)
            kept[id_] = _worse(before, fault, device)
            if before is None:
                changes.append(Change(id_, fault.gpu, sick=True, reason=kept[id_].reason))
    return Health(kept, counts, gpus), tuple(changes)


def _known(health: Health, inventory: Inventory) -> Mapping[GpuUuid, Gpu]:
    """Each GPU that is there as it is or, where it does not answer now, as it was."""
    silent = {gpu.uuid for gpu in inventory.broken}
    kept = {uuid: gpu for uuid, gpu in health.gpus.items() if uuid in silent or None in silent}
    return kept | {gpu.uuid: gpu for gpu in inventory.gpus}


def _is_over(sickness: Sickness, inventory: Inventory, gpus: Mapping[GpuUuid, Gpu]) -> bool:
    """Whether what was sick is no longer there: its GPU left, or the instance was seen to be no more."""
    gpu = gpus.get(sickness.gpu)
    if gpu is None:
        return not _may_be_broken(sickness.gpu, inventory)
    if sickness.device is None:
        return False
    return all(_identity(device) != _identity(sickness.device) for device in gpu.devices)


def _may_be_broken(gpu: GpuUuid, inventory: Inventory) -> bool:
    return any(broken.uuid in {None, gpu} for broken in inventory.broken)


def _identity(device: MigDevice) -> tuple[DeviceId, int, int, str]:
    # A UUID can come back with another profile (nvml.md 3.5).
    return device.uuid, device.gi, device.ci, device.profile


def _concerned(
    fault: Fault, inventory: Inventory, gpus: Mapping[GpuUuid, Gpu]
) -> list[tuple[Subject, MigDevice | None]]:
    """Whom the fault makes sick: a whole GPU, or MIG devices; nobody where it names what is not there."""
    gpu = gpus.get(fault.gpu)
    if gpu is None and not _may_be_broken(fault.gpu, inventory):
        return []
    if fault.gi is None or xid(fault.xid).concerns_gpu or (gpu is not None and not gpu.mig_enabled):
        return [(fault.gpu, None)]
    return [
        (device.uuid, device)
        for device in (gpu.devices if gpu is not None else ())
        if device.gi == fault.gi and fault.ci in {None, device.ci}
    ]


def _worse(before: Sickness | None, fault: Fault, device: MigDevice | None) -> Sickness:
    if before is None:
        return Sickness(fault.gpu, device, (fault.xid,), fault.first, fault.last)
    more = fault.xid not in before.xids and len(before.xids) < MOST_XIDS_TOLD
    xids = (*before.xids, fault.xid) if more else before.xids
    return replace(before, xids=xids, last=max(before.last, fault.last))
