"""Names of MIG profiles: `[<c>c.]<g>g.<memory>gb[+attribute|-attribute]`.

A profile's name is what the driver calls it. We read its parts where it has the usual form, to
compare sizes, and compute a name only for drivers too old to say one. A name of an unknown form
is still a name: the device behind it is served like any other.
"""

import math
import re
from dataclasses import dataclass

_USUAL = re.compile(r"(?:(?P<c>\d+)c\.)?(?P<g>\d+)g\.(?P<gb>\d+)gb(?P<attributes>(?:[+-][a-z0-9.,]+)*)")
_NOT_IN_RESOURCE_NAMES = re.compile(r"[^-A-Za-z0-9_.]")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a usual name: slices of the compute and the GPU instance, memory in GB as named."""

    compute_slices: int
    gpu_slices: int
    memory_gb: int
    attributes: str


def parse(name: str) -> Parts | None:
    """The parts of `name`, or None where it has not the usual form."""
    match = _USUAL.fullmatch(name)
    if match is None:
        return None
    g = int(match["g"])
    return Parts(int(match["c"] or g), g, int(match["gb"]), match["attributes"])


def size_key(name: str) -> tuple[int, int, int, str]:
    """Sorts names from small to large; those of unknown form come last."""
    parts = parse(name)
    if parts is None:
        return (1 << 30, 0, 0, name)
    return (parts.gpu_slices, parts.memory_gb, parts.compute_slices, name)


def of_compute_instance(gpu_profile: str, compute_slices: int) -> str:
    """The name of a compute instance of `compute_slices` slices in a GPU instance of `gpu_profile`.

    `c.` is left out where the compute instance fills the GPU instance (nvml.md 4), and where the
    profile's name has no usual form to compare with.
    """
    parts = parse(gpu_profile)
    if parts is None or compute_slices in {0, parts.gpu_slices}:
        return gpu_profile
    return f"{compute_slices}c.{gpu_profile}"


def of_gpu_instance(name: str) -> str:
    """The profile of the GPU instance that a device of profile `name` lies in: `name` without its `1c.`."""
    compute, _, rest = name.partition("c.")
    return rest if compute.isdigit() and rest else name


def computed(
    gpu_slices: int, compute_slices: int, memory_mib: int, total_bytes: int, attribute: str = ""
) -> str:
    """The name that NVIDIA's formula gives, for drivers that say none.

    `attribute` is "" or begins with its sign ("+me"). Halves are rounded away from zero, which
    Python's round() does not do: 22.5 is 23 on a B200 (nvml.md 4).
    """
    eighths = math.ceil(memory_mib * 2**20 / total_bytes * 8)
    gb = math.floor(eighths / 8 * math.ceil(total_bytes / 2**30) + 0.5)
    return of_compute_instance(f"{gpu_slices}g.{gb}gb{attribute}", compute_slices)


def from_driver(text: str) -> str:
    """The profile in what NVML calls a profile or a MIG device, or "" where there is none.

    "MIG 1g.5gb" and "NVIDIA A100-SXM4-40GB MIG 1c.3g.20gb" are the two forms (nvml.md 3.1, 3.3).
    """
    _, found, name = text.rpartition("MIG ")
    return name.strip() if found else ""


def resource_suffix(name: str) -> str:
    """`mig-<profile>` with every character that Kubernetes refuses, `+` first of all, as a dot."""
    return "mig-" + _NOT_IN_RESOURCE_NAMES.sub(".", name)
