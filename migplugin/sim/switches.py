"""The switches of the simulated driver: what each one means, and how a person sets one.

`cost`, `fail` and `hang` are keyed by C names; `hang` and `cost` take `*` for every call. Lists are
separated by commas.
"""

import difflib
import json
from collections import Counter
from typing import Any

import msgspec

from migplugin.errors import InputError
from migplugin.sim.abi import EXPORTS
from migplugin.sim.device_calls import NVLINKS
from migplugin.sim.files import GPUS
from migplugin.sim.model import Node
from migplugin.sim.records import Switches

MEANING = {
    "runtime_view": "host, or container: the files as the NVIDIA runtime shows them, with instances hidden",
    "container_capabilities": "what the container view passes in: nothing, mig/monitor, or mig/config too",
    "privilege": "auto: by the caller's CAP_SYS_ADMIN and access to mig/config and mig/monitor; or forced",
    "mig_index": "compact: MIG indices have no gaps; sparse: each place on the GPU has its own index",
    "gi_ids": "swapped: the upper half of the GPU has the lower ids, as on some A100s (while it is empty)",
    "stale_sessions": "on: a session lists the MIG devices of its start until it shuts down and inits again",
    "capability_nodes": "late: device nodes of new instances are missing until `sim nodes` makes them",
    "process_list": "namespace: processes of other PID namespaces are left out, with success",
    "events": "no-mig: none for MIG changes; mig-when-enabled: only on GPUs with MIG on; none: no events",
    "profile_queries": "mig-on: profiles cannot be queried while MIG is off, as on older drivers",
    "v2_profile_info": "off: a driver without the profile-info calls that carry a name",
    "missing_symbols": "C names that the library does not export",
    "mig_activation": "what a change of MIG mode meets: nothing, a GPU in use, or the need of a reset",
    "uuid_format": "legacy: new devices are MIG-GPU-<uuid>/<gi>/<ci>, as before R470",
    "uuid_reuse": "on: a device made again in the same place has its old UUID, as in NVIDIA's kernel module",
    "minors": "device minor of each GPU by index; empty: the index",
    "pci_order": "descending: the first index has the highest bus address",
    "numa": "NUMA node of each GPU by index, -1 for none; empty: half of them on node 0, the rest on 1",
    "nvlinks": "NVLinks between GPUs by index, as JSON: [[0, 3, 4], [1, 2, 4]] for two pairs of four links",
    "driver_loaded": "off: nvmlInit answers DRIVER_NOT_LOADED, open sessions and the driver's files are gone",
    "driver_version": "what the driver says it is; a change is an update, which no open session survives",
    "cost": 'seconds that calls take, as JSON: {"*": 0.001, "nvmlGpuInstanceDestroy": 1}',
    "hang": "C names of calls that do not come back until they leave this list",
    "fail": 'calls that fail, as JSON: {"nvmlDeviceGetName": {"gpu": 1, "code": 999}}; no gpu: on all',
}


def set_switch(node: Node, name: str, text: str) -> None:
    """Set one switch of `node` from what a person typed, or raise InputError and change nothing."""
    name = name.replace("-", "_")
    if name not in MEANING:
        raise InputError(f"no switch is called {name!r}; {_hint(name, MEANING)}")
    try:
        value = json.loads(text or "[]") if name == "nvlinks" else _parse(getattr(Switches(), name), text)
        changed = msgspec.convert({**msgspec.to_builtins(node.switches), name: value}, Switches)
        _check(node, name, getattr(changed, name))
    except (ValueError, msgspec.ValidationError) as exc:
        raise InputError(f"switch {name}={text!r}: {exc} ({MEANING[name]})") from exc
    setattr(node.switches, name, getattr(changed, name))


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


def _check(node: Node, name: str, value: Any) -> None:
    """What the type alone cannot say. Raises ValueError."""
    if name in {"minors", "numa"} and len(value) > len(node.gpus):
        raise ValueError(f"{len(value)} numbers for {len(node.gpus)} GPUs")
    if name == "minors" and value:
        minors = [*value, *range(len(value), len(node.gpus))]
        if len(set(minors)) < len(minors) or not set(minors) <= set(range(GPUS)):
            raise ValueError(f"minors must be different numbers from 0 to {GPUS - 1}, and would be {minors}")
    if name == "nvlinks":
        _check_nvlinks(value, len(node.gpus))
    if name == "gi_ids" and value != node.switches.gi_ids and any(gpu.instances for gpu in node.gpus):
        raise ValueError("there are GPU instances, and their ids would clash with new ones")
    if name in {"missing_symbols", "hang", "fail", "cost"}:
        for symbol in value:
            if symbol not in EXPORTS and not (symbol == "*" and name in {"hang", "cost"}):
                raise ValueError(f"the library has no {symbol!r}; {_hint(symbol, EXPORTS)}")


def _check_nvlinks(nvlinks: list[tuple[int, int, int]], gpus: int) -> None:
    used: Counter[int] = Counter()
    for one, other, count in nvlinks:
        if one == other or not {one, other} <= set(range(gpus)) or count < 1:
            raise ValueError(f"[{one}, {other}, {count}] is not two of {gpus} GPUs and a number of links")
        used += Counter({one: count, other: count})
    if max(used.values(), default=0) > NVLINKS:
        raise ValueError(f"a GPU has at most {NVLINKS} links")


def _hint(name: str, known: "dict[str, Any]") -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"
