"""The switches of the simulated driver: what each one means, and how a person sets one.

`cost`, `fail` and `hang` are keyed by C names. Lists are separated by commas. `hang` and `cost` take
`*` for every call.
"""

import difflib
import json
from typing import Any

import msgspec

from migplugin.errors import InputError
from migplugin.sim.records import Switches

MEANING = {
    "runtime_view": "which tree of files the node shows: the host's, or the NVIDIA runtime's tmpfs that hides"
    " instances",
    "container_capabilities": "what the container view passes through: nothing, mig/monitor, or mig/config too",
    "privilege": "auto: the caller's CAP_SYS_ADMIN, and whether it may open the mig/config and mig/monitor nodes;"
    " else what it has",
    "mig_index": "compact: MIG indices have no gaps; sparse: each place on the GPU has its index",
    "gi_ids": "swapped: the upper half of the GPU has the lower ids, as on some A100s (only while there are none)",
    "stale_sessions": "a session goes on listing destroyed devices, and sees no new ones, until shutdown and init",
    "capability_nodes": "late: the device nodes of new instances are missing until `sim nodes` makes them",
    "process_list": "namespace: processes of other PID namespaces are left out, with success",
    "events": "no-mig: no MIG-config-change events; mig-when-enabled: only on GPUs with MIG on; none: no events",
    "profile_queries": "mig-on: profiles cannot be queried while MIG is off, as before R555 or so",
    "v2_profile_info": "false: a driver without the profile-info calls that carry a name",
    "missing_symbols": "C names that this library does not export",
    "mig_activation": "what SetMigMode finds: a change active at once, a GPU in use, or a reset needed",
    "uuid_format": "legacy: MIG-GPU-<uuid>/<gi>/<ci>, as before R470",
    "uuid_reuse": "true: a device made again in the same place has its old UUID, as in NVIDIA's kernel module",
    "minors": "device minor of each GPU by index; empty: the index",
    "pci_order": "descending: the first index has the highest bus address",
    "numa": "NUMA node of each GPU by index, -1 for none; empty: the first half on node 0, the rest on node 1",
    "driver_loaded": "false: nvmlInit answers DRIVER_NOT_LOADED",
    "driver_version": "what the driver says it is",
    "cost": 'seconds that a call takes, as JSON: {"*": 0.001, "nvmlGpuInstanceDestroy": 1}',
    "hang": "C names of calls that do not come back until they leave this list",
    "fail": 'calls that fail, as JSON: {"nvmlDeviceGetName": {"gpu": 1, "code": 999}}; no gpu: on every one',
}


def set_switch(switches: Switches, name: str, text: str) -> None:
    """Set one switch from what a person typed, or raise InputError and change nothing."""
    name = name.replace("-", "_")
    if name not in MEANING:
        near = difflib.get_close_matches(name, MEANING, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(MEANING))}"
        raise InputError(f"no switch is called {name!r}; {hint}")
    try:
        value = _parse(getattr(Switches(), name), text)
        changed = msgspec.convert({**msgspec.to_builtins(switches), name: value}, Switches)
    except (ValueError, msgspec.ValidationError) as exc:
        raise InputError(
            f"switch {name}={text!r} is not understood: {exc}; it means: {MEANING[name]}"
        ) from exc
    setattr(switches, name, getattr(changed, name))


def _parse(default: object, text: str) -> Any:
    if isinstance(default, bool):
        words = {"true": True, "on": True, "yes": True, "1": True}
        words |= {"false": False, "off": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError("expected on or off")
        return words[text.lower()]
    if isinstance(default, list):
        parts = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
        return [int(part) if part.lstrip("-").isdigit() else part for part in parts]
    if isinstance(default, dict):
        return json.loads(text or "{}")
    return text
