"""Health as a document, so that a restart of the agent makes nobody well.

Only what a restart must not change is in it: who is sick and of what, who got well of late, and with which
driver: `fold` ends all when it meets another. Times are of the machine's monotonic clock: they mean
something to every process until the machine starts again, and then the document is history anyway.
"""

from collections.abc import Mapping
from typing import Any

from migplugin.core.health import Health
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.sickness import Instance, Past, Recovery, Sickness, Subject

VERSION = 1


def record(health: Health) -> dict[str, Any]:
    return {
        "version": VERSION,
        "driver": health.driver,
        "module": health.module,
        "errors": {id_: count for id_, count in health.errors.items() if count},
        "history": [past._asdict() for past in health.history],
        "sick": [_sickness(sickness) for sickness in health.sick.values()],
        "recovered": [{"at": r.at, **_sickness(r.sickness)} for r in health.recovered.values()],
    }


def restore(document: object, now: float) -> Health:
    """The health that was recorded. Nobody has rested meanwhile. Raises ValueError, saying what is wrong."""
    if not isinstance(document, Mapping) or document.get("version") != VERSION:
        raise ValueError(f"not a record of version {VERSION}")
    try:
        sick = [_restored(entry, now) for entry in document["sick"]]
        recovered = [
            Recovery(min(float(entry["at"]), now), _restored(entry, now)) for entry in document["recovered"]
        ]
        history = tuple(
            Past(DeviceId(str(entry["id"])), str(entry["cause"]), str(entry["ended"]))
            for entry in document.get("history", ())
        )
        driver, module = str(document.get("driver", "")), document.get("module")
        module = None if module is None else int(module)
        errors: dict[Subject, int] = {
            DeviceId(str(id_)): int(count) for id_, count in document.get("errors", {}).items()
        }
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"not a record of health: {type(exc).__name__} {exc}") from exc
    return Health(
        {_subject(s): s for s in sick},
        {_subject(r.sickness): r for r in recovered},
        errors=errors,
        driver=driver,
        module=module,
        history=history,
    )


def _subject(sickness: Sickness) -> Subject:
    return sickness.gpu if sickness.device is None else sickness.device.uuid


def _sickness(sickness: Sickness) -> dict[str, Any]:
    return {
        "gpu": sickness.gpu,
        "device": None if sickness.device is None else sickness.device._asdict(),
        "xids": list(sickness.xids),
        "since": sickness.since,
        "last": sickness.last,
        "stays": sickness.stays,
    }


def _restored(entry: Mapping[str, Any], now: float) -> Sickness:
    device = entry["device"]
    xids = tuple(int(code) for code in entry["xids"])
    if not xids:
        raise ValueError("a sickness without a reason")
    return Sickness(
        GpuUuid(str(entry["gpu"])),
        None
        if device is None
        else Instance(
            DeviceId(str(device["uuid"])), int(device["gi"]), int(device["ci"]), str(device["profile"])
        ),
        xids,
        min(float(entry["since"]), now),
        min(float(entry["last"]), now),
        stays=bool(entry["stays"]),
    )
