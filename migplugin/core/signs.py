"""What the driver and its files say of a device when they are asked, and what of that stands against it.

Its counts of uncorrected memory errors make faults where they grow; the rest are signs, there or not. What
`before` means is the answer of the look before.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from migplugin.core.inventory import DeviceId, Gpu, GpuUuid, Inventory
from migplugin.core.sickness import Change, Fault, Instance, Sign, Subject, instance_of
from migplugin.core.xid import UNCORRECTED_ECC


def errors(
    before: Mapping[Subject, int], inventory: Inventory, gpus: Mapping[GpuUuid, Gpu]
) -> Iterable[tuple[Subject, int]]:
    """How many uncorrected memory errors are counted of each now, and of GPUs that do not answer were."""
    answering = {gpu.uuid for gpu in inventory.gpus}
    for uuid, gpu in gpus.items():
        for id_, _, _, told in _counted(gpu):
            count = told if uuid in answering else before.get(id_)
            if count is not None:
                yield id_, count


def grown(
    before: Mapping[Subject, int], now: Mapping[Subject, int], inventory: Inventory, at: float
) -> Iterable[Fault]:
    """A fault for each that has more errors than before, where the driver tells no recovery action."""
    for gpu in inventory.gpus:
        for id_, gi, ci, _ in _counted(gpu) if gpu.signs.action is None else ():
            more = now.get(id_, 0) - before.get(id_, now.get(id_, 0))
            if more > 0:
                yield Fault(gpu.uuid, gi, ci, UNCORRECTED_ECC, more, at, at)


def _counted(gpu: Gpu) -> Iterable[tuple[Subject, int | None, int | None, int | None]]:
    """`gpu` and each instance on it, by UUID, GI and CI, with what is counted of it."""
    yield gpu.uuid, None, None, gpu.signs.uncorrected
    for device in gpu.devices:
        yield device.uuid, device.gi, device.ci, device.uncorrected


def filed(before: AbstractSet[Instance], gpus: Mapping[GpuUuid, Gpu]) -> Iterable[Instance]:
    """The instances whose files are seen, or were."""
    for gpu in gpus.values():
        for device in gpu.devices:
            if device.files or instance_of(device) in before:
                yield instance_of(device)


def complaints(
    before: Mapping[Subject, Sign],
    seen: AbstractSet[Instance],
    gpus: Mapping[GpuUuid, Gpu],
    now: float,
) -> Iterable[tuple[Subject, Sign]]:
    """What stands against GPUs, and against devices whose files were `seen` and no longer are."""
    found: dict[Subject, str] = {}
    for gpu in gpus.values():
        if gpu.signs.complaint:
            found[gpu.uuid] = gpu.signs.complaint
        for device in gpu.devices:
            if device.files is False and instance_of(device) in seen:
                found[device.uuid] = "its capability files are gone: no container could open it"
    for id_, text in found.items():
        known = before.get(id_)
        yield id_, Sign(text, now if known is None else known.since)


def changes(
    before: Mapping[Subject, Sign], after: Mapping[Subject, Sign], gpus: Iterable[Gpu]
) -> Iterable[Change]:
    """Which signs came or went; `gpus` are those of both looks."""
    owners = {device.uuid: gpu.uuid for gpu in gpus for device in gpu.devices}
    for id_ in sorted(before.keys() | after.keys()):
        old, new = before.get(id_), after.get(id_)
        gpu = owners.get(DeviceId(id_), GpuUuid(id_))
        if new is not None and (old is None or old.text != new.text):
            yield Change(id_, gpu, sick=True, reason=new.text)
        elif old is not None and new is None:
            yield Change(id_, gpu, sick=False, reason=f"no longer said: {old.text}")
