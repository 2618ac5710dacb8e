"""The simulated node drawn for a person: each GPU's memory slots and what lies in them, then its devices.

GPU 1  NVIDIA A100-SXM4-40GB  MIG on  0000:0f:00.0  minor 1  NUMA 1
       GPU-b8f62ae7-5c2a-5c83-8cae-a2fc01e7dc07
       0        1        2        3        4        5        6        7
       [2g.10gb        ][1g.5gb ][1g.5gb ][3g.20gb                          ]
"""

from collections.abc import Iterator
from typing import Any

from migplugin.sim import placement
from migplugin.sim.model import Gpu, Node
from migplugin.sim.records import WHOLE, CiRecord, GiRecord

INDENT = " " * 7
WIDTH = 72


def draw(node: Node) -> str:
    lines: list[str] = []
    for gpu in node.gpus:
        lines += [*_gpu_lines(gpu), ""]
    changed = [f"{name}={value}" for name, value in describe(node)["switches"].items()]
    lines.append(f"switches: {', '.join(changed) or 'all as they are by default'}")
    return "\n".join(lines)


def describe(node: Node) -> dict[str, Any]:
    """The same as plain data, for `-o json`. Switches are only those that differ from their defaults."""
    default = type(node.switches)()
    fields = [
        name for name in default.__struct_fields__ if getattr(default, name) != getattr(node.switches, name)
    ]
    return {
        "spec": node.record.spec,
        "seed": node.record.seed,
        "gpus": [_describe_gpu(gpu) for gpu in node.gpus],
        "switches": {name: getattr(node.switches, name) for name in fields},
    }


def _gpu_lines(gpu: Gpu) -> Iterator[str]:
    record = gpu.record
    mig = "on" if record.mig_current else "off"
    if record.mig_pending != record.mig_current:
        mig += f" (pending: {'on' if record.mig_pending else 'off'})"
    lost = "  LOST" if record.lost else ""
    yield (
        f"GPU {gpu.index:<2} {gpu.product.nvml_name}  MIG {mig}  {gpu.pci_address}  minor {gpu.minor}  "
        f"NUMA {gpu.numa}{lost}"
    )
    yield f"{INDENT}{gpu.uuid}"
    if record.mig_current:
        cell = WIDTH // gpu.product.memory_slots
        yield INDENT + "".join(f"{slot:<{cell}}" for slot in range(gpu.product.memory_slots)).rstrip()
        yield INDENT + _bar(gpu, cell)
    for gi in sorted(gpu.instances, key=lambda gi: gi.start):
        yield from _instance_lines(gpu, gi)
    for process in record.processes:
        yield f"{INDENT}in use by {process.name} ({process.pid})"


def _bar(gpu: Gpu, cell: int) -> str:
    starts = {gi.start: gi for gi in gpu.instances}
    drawn = ""
    slot = 0
    while slot < gpu.product.memory_slots:
        gi = starts.get(slot)
        size = gpu.profile(gi).placement_size if gi else 1
        label = gpu.profile(gi).name if gi else ""
        inner = size * cell - 2
        drawn += f"[{label[:inner]:<{inner}}]" if gi else f" {'.' * inner} "
        slot += size
    return drawn.rstrip()


def _instance_lines(gpu: Gpu, gi: GiRecord) -> Iterator[str]:
    profile = gpu.profile(gi)
    where = placement.slots(gi.start, profile.placement_size)
    if not gi.compute:
        held = "  held by a leaked handle" if gi.leaked else ""
        yield f"{INDENT}gi {gi.id:<2} {'':5} {profile.name:<14} {where:<5} no compute instance{held}"
    for ci in gi.compute:
        holders = [f"{process.name} ({process.pid})" for process in ci.processes]
        holders += ["a leaked handle"] if ci.leaked or gi.leaked else []
        busy = f"  held by {', '.join(holders)}" if holders else ""
        yield f"{INDENT}gi {gi.id:<2} ci {ci.id:<2} {gpu.ci_name(gi, ci):<14} {where:<5} {ci.uuid}{busy}"


def _describe_gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "product": gpu.product.cli_name,
        "name": gpu.product.nvml_name,
        "minor": gpu.minor,
        "pci_address": gpu.pci_address,
        "numa": gpu.numa,
        "lost": gpu.record.lost,
        "mig": {"current": gpu.record.mig_current, "pending": gpu.record.mig_pending},
        "processes": [
            {
                "pid": process.pid,
                "name": process.name,
                "gi": None if gi == WHOLE else gi,
                "ci": None if ci == WHOLE else ci,
            }
            for process, gi, ci in gpu.processes
        ],
        "instances": [
            {
                "gi": gi.id,
                "profile": gpu.profile(gi).name,
                "start": gi.start,
                "size": gpu.profile(gi).placement_size,
                "leaked": gi.leaked,
                "compute": [_describe_ci(gpu, gi, ci) for ci in gi.compute],
            }
            for gi in gpu.instances
        ],
    }


def _describe_ci(gpu: Gpu, gi: GiRecord, ci: CiRecord) -> dict[str, Any]:
    return {
        "ci": ci.id,
        "profile": gpu.ci_name(gi, ci),
        "start": ci.start,
        "size": ci.size,
        "uuid": ci.uuid,
        "index": gpu.mig_index(gi, ci),
        "leaked": ci.leaked,
    }
