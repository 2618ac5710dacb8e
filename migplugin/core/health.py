"""Health as a state: what faults and signs have made of each device, since when, why, and until what.

`fold` takes the state, the faults that came and what was known when they came, and gives the next state.
A fault concerns whom its code says (`xid`): a whole GPU, or the instances that the event names.
What it makes sick is remembered by UUID, and for a MIG device with what it was when the fault came.
So no fault goes over to a later instance with the same ids, or even the same UUID: one
that was seen to be absent, or to have become another, is a new one when it returns. A GPU that only does
not answer is not absent, and keeps its sick. A whole GPU that is sick has only sick devices, also those that
are made on it later.

Other ways to get well: what was only a contained error, when for `recovery_after` no pod holds the device
and the driver sees no process on it and wants nothing done; anything else when the driver, asked after the
fault, says that nothing need be done, and all on a GPU that was lost and answers again, which takes a reset.
What falls sick again within an hour of getting well stays sick until it is made anew, or a person
acts: whom they `clear` is well, and has its chance again.

Where the driver tells no such action, more uncorrected memory errors than before are a fault like a contained
error; how many there were at the first look was another's affair.

Signs are what the driver says without being told by an event, of a GPU or of one device. They need no
memory: it is sick for as long as they are there. Only that a device's files have vanished takes two
looks: in a container many are not shown at all (capabilities), and invisible is not vanished.

When the kernel module was loaded anew, or another one was, every GPU has been reset: all is over that came
before the look which found it.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from migplugin.core import signs as signs_of
from migplugin.core.inventory import DeviceId, Gpu, GpuUuid, Inventory
from migplugin.core.resource import device_of
from migplugin.core.sickness import (
    Change,
    Fault,
    Instance,
    Past,
    Recovery,
    Sickness,
    Sign,
    Subject,
    instance_of,
)
from migplugin.core.xid import RECOVERY_ACTION_CHANGED, TABLE, UNCORRECTED_ECC, Checks, xid
from migplugin.errors import InputError

RELOADED = "the driver was loaded anew"
UNLISTED = 999
MOST_XIDS_TOLD = 8
RELAPSE_WITHIN = 3600.0
# The driver may take a moment to know what is to be done about the error that it has just told.
BELIEVED_AFTER = 5.0
LOOK_EVERY = 10.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What was known when the faults came: the `inventory` in force and when the look at it began.

    `held` are the devices that a pod may hold, `held_known` when the read of them began; None where
    silence about a device does not mean that nobody holds it. `answers`: whether the driver does.
    """

    now: float
    inventory: Inventory | None = None
    looked: float = float("-inf")
    answers: bool = True
    held: AbstractSet[DeviceId] = frozenset()
    held_known: float | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """`sick` is by MIG UUID, or by GPU UUID for a whole GPU; so are `recovered`, of the last hour, and
    `signs`, what the driver has against it.

    `counts` are of all XIDs that ever came, by code. `gpus` is each GPU as it last answered, for faults of
    one that no longer does, and `lost` are those that are. `filed` are the instances whose files were seen,
    `errors` the uncorrected memory errors that the driver counted last.
    The driver is to be asked what it wants done about what came at `ask_after`. `driver` and `module` say
    which driver all this was with, "" before the first look. `history` is who was sick when last a driver was
    loaded anew or the machine started.
    """

    sick: Mapping[Subject, Sickness] = field(default_factory=dict)
    recovered: Mapping[Subject, Recovery] = field(default_factory=dict)
    signs: Mapping[Subject, Sign] = field(default_factory=dict)
    counts: Mapping[int, int] = field(default_factory=dict)
    gpus: Mapping[GpuUuid, Gpu] = field(default_factory=dict)
    lost: frozenset[GpuUuid] = frozenset()
    filed: frozenset[Instance] = frozenset()
    errors: Mapping[Subject, int] = field(default_factory=dict)
    ask_after: float = float("-inf")
    driver: str = ""
    module: int | None = None
    history: tuple[Past, ...] = ()

    def sickness(self, id_: DeviceId, gpu: GpuUuid) -> Sickness | None:
        """Of what the device `id_` on `gpu` is sick, if faults have made it so."""
        return self.sick.get(gpu) or self.sick.get(id_)

    def why(self, id_: DeviceId, gpu: GpuUuid) -> str:
        """Why the device `id_` on `gpu` is unfit, or ""."""
        found = self.sickness(id_, gpu)
        sign = self.signs.get(gpu) or self.signs.get(id_)
        return found.reason if found is not None else sign.text if sign is not None else ""


def fold(
    health: Health, scene: Scene, faults: tuple[Fault, ...], checks: Checks, recovery_after: float
) -> tuple[Health, tuple[Change, ...]]:
    """The next state, and what changed. With `recovery_after` 0 no time of idleness is enough."""
    inventory = scene.inventory
    if inventory is None:
        return health, ()
    gpus, reloaded = _known(health, inventory), _was_reloaded(health, inventory)
    before_now = {} if reloaded else health.errors
    errors = dict(signs_of.errors(before_now, inventory, gpus))
    reset = {id_ for id_, count in errors.items() if count < before_now.get(id_, 0)}
    sick: dict[Subject, Sickness] = {}
    recovered = {
        id_: recovery
        for id_, recovery in health.recovered.items()
        if scene.now < recovery.at + RELAPSE_WITHIN
        and not (reloaded or _is_over(recovery.sickness, inventory, gpus))
    }
    changes, past = [], list[Past]()
    for id_, before in health.sick.items():
        sickness = _rest(before, scene, gpus)
        if reloaded and before.last < scene.looked:
            well = RELOADED
            past.append(Past(id_, before.cause, RELOADED))
        elif _is_over(sickness, inventory, gpus):
            well = "gone or made anew"
        elif not any(checks.make_sick(xid(code)) for code in sickness.xids):
            well = "no longer checked for"
        elif well := _recovery(sickness, scene, health.lost, reset, recovery_after):
            recovered[id_] = Recovery(scene.now, sickness)
        else:
            sick[id_] = sickness
            continue
        changes.append(Change(id_, before.gpu, sick=False, reason=f"{well}; was {before.reason}"))

    counts, ask_after = dict(health.counts), health.ask_after
    for fault in (*faults, *signs_of.grown(before_now, errors, inventory, scene.now)):
        if fault.xid != UNCORRECTED_ECC:
            code = fault.xid if fault.xid in TABLE else UNLISTED
            counts[code] = counts.get(code, 0) + fault.count
        if not checks.make_sick(xid(fault.xid)):
            continue
        ask_after = max(ask_after, fault.last)
        if fault.xid == RECOVERY_ACTION_CHANGED and _action(gpus.get(fault.gpu)) is not None:
            continue  # what it says is asked, and then a sign or none
        for id_, device in _concerned(fault, inventory, gpus):
            known = sick.get(id_)
            sick[id_] = _worse(known, fault, device, stays=id_ in recovered)
            if known is None:
                changes.append(Change(id_, fault.gpu, sick=True, reason=sick[id_].reason))

    signs = dict(signs_of.complaints(health.signs, health.filed, gpus, scene.now)) if checks.signs else {}
    changes += signs_of.changes(health.signs, signs, (*health.gpus.values(), *gpus.values()))
    answering = {gpu.uuid for gpu in inventory.gpus}
    lost = {gpu.uuid for gpu in inventory.broken if gpu.lost and gpu.uuid is not None}
    now = Health(
        sick,
        recovered,
        signs,
        counts,
        gpus,
        lost=frozenset((health.lost & gpus.keys() | lost) - answering),
        filed=frozenset(signs_of.filed(health.filed, gpus)),
        errors=errors,
        ask_after=ask_after,
        driver=inventory.driver_version,
        module=inventory.module,
        history=tuple(past) or health.history,
    )
    return now, tuple(changes)


@dataclass(frozen=True, slots=True)
class Cleared:
    """`health` once a person has cleared what was `sick`, by id; `notes` say what is unfit all the same."""

    health: Health
    sick: Mapping[Subject, Sickness]
    notes: tuple[str, ...] = ()


def clear(health: Health, ids: Collection[str] | None) -> Cleared:
    """What was sick is well, and has its chance again. `ids` are of MIG devices and whole GPUs, None is all.

    Raises InputError where one of `ids` is not sick, or is so only because the driver says so.
    """
    chosen = set(health.sick) if ids is None else {_as_sick(health, id_) for id_ in ids}
    sick = {id_: sickness for id_, sickness in health.sick.items() if id_ in chosen}
    left = {id_: sickness for id_, sickness in health.sick.items() if id_ not in chosen}
    recovered = {} if ids is None else {i: r for i, r in health.recovered.items() if i not in chosen}
    notes = [
        f"{id_} stays unhealthy, since its GPU {sickness.gpu} is: {left[sickness.gpu].reason}"
        for id_, sickness in sick.items()
        if sickness.gpu in left
    ]
    gpus = {sickness.gpu for sickness in sick.values()}
    notes += [
        f"{id_} stays unhealthy for as long as that is true: {sign.text}"
        for id_, sign in sorted(health.signs.items())
        if ids is None or id_ in chosen or id_ in gpus
    ]
    history = () if ids is None else health.history
    return Cleared(replace(health, sick=left, recovered=recovered, history=history), sick, tuple(notes))


def _as_sick(health: Health, text: str) -> Subject:
    """Whom of the sick `text` names. Raises InputError."""
    id_ = device_of(text.strip())
    if id_ in health.sick:
        return id_
    gpu = next((g.uuid for g in health.gpus.values() for d in g.devices if d.uuid == id_), None)
    if gpu in health.sick:
        raise InputError(f"{id_} is not sick by itself, its GPU is: clear {gpu}")
    for subject in (id_, gpu):
        if subject is not None and (sign := health.signs.get(subject)):
            raise InputError(f"{id_} cannot be cleared: {sign.text}; that is over when it is no longer so")
    sick = f"sick are {', '.join(sorted(health.sick))}" if health.sick else "nobody is"
    raise InputError(f"{id_[:100]!r} is not sick; {sick}")


def wake_at(health: Health, recovery_after: float) -> list[float]:
    """The times when somebody gets well if nothing happens."""
    return [
        sickness.idle_since + recovery_after
        for sickness in health.sick.values()
        if recovery_after and sickness.idle_since is not None
    ]


def look_at(health: Health, looked: float) -> float | None:
    """When the driver is to be asked again, the last look having begun at `looked`.

    Only what it can answer: soon after a fault, then now and then while somebody waits for its word.
    """
    waiting = [
        looked + LOOK_EVERY if looked >= sickness.last + BELIEVED_AFTER else sickness.last + BELIEVED_AFTER
        for sickness in health.sick.values()
        if not sickness.stays
        and (sickness.is_contained or _action(health.gpus.get(sickness.gpu)) is not None)
    ]
    waiting += [looked + LOOK_EVERY for _ in health.signs]
    if looked < health.ask_after and any(_action(gpu) is not None for gpu in health.gpus.values()):
        waiting.append(health.ask_after)
    return min(waiting, default=None)


def ended(health: Health, why: str) -> Health:
    """`health` after something that has made everybody well: who was sick is history."""
    past = tuple(Past(id_, sickness.cause, why) for id_, sickness in health.sick.items())
    return Health(history=past or health.history)


def suspects(health: Health) -> frozenset[Subject]:
    """Of whom the driver is to be asked whether a process runs there: who gets well when left alone."""
    return frozenset(
        id_ for id_, sickness in health.sick.items() if sickness.is_contained and not sickness.stays
    )


def awaits_release(health: Health, recovery_after: float) -> Mapping[DeviceId, float]:
    """Whom pods must let go of, so that somebody gets well, and since when: the time of the last fault."""
    return {
        id_: sickness.last
        for sickness in health.sick.values()
        if recovery_after and sickness.is_contained and not sickness.stays and sickness.idle_since is None
        for id_ in _pinning(sickness, health.gpus.get(sickness.gpu))
    }


def _known(health: Health, inventory: Inventory) -> Mapping[GpuUuid, Gpu]:
    """Each GPU that is there as it is or, where it does not answer now, as it was."""
    silent = {gpu.uuid for gpu in inventory.broken}
    kept = {uuid: gpu for uuid, gpu in health.gpus.items() if uuid in silent or None in silent}
    return kept | {gpu.uuid: gpu for gpu in inventory.gpus}


def _was_reloaded(health: Health, inventory: Inventory) -> bool:
    """Whether another driver answers than the one before, or the same one anew."""
    modules = {health.module, inventory.module} - {None}
    return bool(health.driver) and (health.driver != inventory.driver_version or len(modules) > 1)


def _is_over(sickness: Sickness, inventory: Inventory, gpus: Mapping[GpuUuid, Gpu]) -> bool:
    """Whether what was sick is no longer there: its GPU left, or the instance was seen to be no more."""
    gpu = gpus.get(sickness.gpu)
    if gpu is None:
        return not _may_be_broken(sickness.gpu, inventory)
    if sickness.device is None:
        return False
    return all(instance_of(device) != sickness.device for device in gpu.devices)


def _may_be_broken(gpu: GpuUuid, inventory: Inventory) -> bool:
    return any(broken.uuid in {None, gpu} for broken in inventory.broken)


def _rest(sickness: Sickness, scene: Scene, gpus: Mapping[GpuUuid, Gpu]) -> Sickness:
    """With the time since when nobody holds it and the driver wants nothing done."""
    gpu = gpus.get(sickness.gpu)
    assert scene.inventory is not None
    rests = (
        sickness.is_contained
        and not sickness.stays
        and scene.answers
        and gpu in scene.inventory.gpus
        and not _action(gpu)
        and scene.held_known is not None
        and scene.held_known > sickness.last
        and not (scene.held | scene.inventory.running) & _pinning(sickness, gpu)
    )
    since = scene.now if sickness.idle_since is None else sickness.idle_since
    return replace(sickness, idle_since=since if rests else None)


def _pinning(sickness: Sickness, gpu: Gpu | None) -> frozenset[DeviceId]:
    """The ids of which a pod that holds one may use what is sick."""
    whole = DeviceId(sickness.gpu)
    if sickness.device is not None:
        return frozenset({whole, sickness.device.uuid})
    return frozenset({whole, *(device.uuid for device in (gpu.devices if gpu is not None else ()))})


def _recovery(
    sickness: Sickness,
    scene: Scene,
    lost: AbstractSet[GpuUuid],
    reset: AbstractSet[Subject],
    recovery_after: float,
) -> str:
    """Why it is well again, or ""."""
    assert scene.inventory is not None
    gpu = next((gpu for gpu in scene.inventory.gpus if gpu.uuid == sickness.gpu), None)
    if sickness.stays or gpu is None or not scene.answers:
        return ""
    if gpu.uuid in lost:
        return "its GPU was lost and is back"
    if (gpu.uuid if sickness.device is None else sickness.device.uuid) in reset:
        return "its memory errors are counted anew"
    if sickness.is_contained:
        since = sickness.idle_since
        rested = recovery_after and since is not None and scene.now >= since + recovery_after
        return f"nobody has held it for {recovery_after:g} s" if rested else ""
    said = scene.looked >= sickness.last + BELIEVED_AFTER
    return "the driver wants nothing done" if said and _action(gpu) == 0 else ""


def _action(gpu: Gpu | None) -> int | None:
    """What the driver wants done about the GPU: 0 is nothing, None that it cannot say."""
    return None if gpu is None else gpu.signs.action


def _concerned(
    fault: Fault, inventory: Inventory, gpus: Mapping[GpuUuid, Gpu]
) -> list[tuple[Subject, Instance | None]]:
    """Whom the fault makes sick: a whole GPU, or MIG devices; nobody where it names what is not there."""
    gpu = gpus.get(fault.gpu)
    if gpu is None and not _may_be_broken(fault.gpu, inventory):
        return []
    if fault.gi is None or xid(fault.xid).concerns_gpu or (gpu is not None and not gpu.mig_enabled):
        return [(fault.gpu, None)]
    return [
        (device.uuid, instance_of(device))
        for device in (gpu.devices if gpu is not None else ())
        if device.gi == fault.gi and fault.ci in {None, device.ci}
    ]


def _worse(before: Sickness | None, fault: Fault, device: Instance | None, *, stays: bool) -> Sickness:
    if before is None:
        return Sickness(fault.gpu, device, (fault.xid,), fault.first, fault.last, stays=stays)
    xids = before.xids
    if fault.xid not in xids and len(xids) < MOST_XIDS_TOLD:
        xids = (*xids, fault.xid)
    return replace(before, xids=xids, last=max(before.last, fault.last), idle_since=None)
