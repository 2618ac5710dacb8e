"""The products the simulator can play, with their MIG profiles: data, read once from `mig_profiles.json`.

The file keeps the provenance of each row, and which of its numbers were filled by rule (`assumed`):
a made-up number may be shown, but it must never limit anything (see `Product.engines_known`).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from migplugin.errors import SimulatorError

TABLE = Path(__file__).with_name("mig_profiles.json")

GI_PROFILE_COUNT = 0x12  # NVML_GPU_INSTANCE_PROFILE_COUNT: the enum ends here
CI_PROFILE_COUNT = 0x9  # NVML_COMPUTE_INSTANCE_PROFILE_COUNT


class CiProfile(NamedTuple):
    """A size of compute instance within one kind of GPU instance. Every published listing has id == enum."""

    slices: int
    max_instances: int
    enum: int
    id: int
    sm_count: int


@dataclass(frozen=True, slots=True)
class Engines:
    ce: int
    dec: int
    enc: int
    jpeg: int
    ofa: int

    @property
    def rationed(self) -> tuple[int, int, int, int]:
        """Those that limit how many instances fit. Copy engines do not."""
        return (self.dec, self.enc, self.jpeg, self.ofa)


@dataclass(frozen=True, slots=True)
class GiProfile:
    """A kind of GPU instance on one product. `gi_profile_id` is NVML's `info.id`, not the enum."""

    name: str
    gi_profile_id: int
    gi_enum: int
    slices: int
    memory_mib: int
    sm_count: int
    max_instances: int
    placements: tuple[int, ...]
    placement_size: int
    placement_confidence: str
    engines: Engines
    ci_profiles: tuple[CiProfile, ...]
    confidence: str
    source: str
    assumed: tuple[str, ...]

    def ci_name(self, ci: CiProfile) -> str:
        """`1c.3g.20gb`, or the GPU instance's own name where the compute instance takes all of it."""
        return self.name if ci.slices == self.slices else f"{ci.slices}c.{self.name}"

    @property
    def whole(self) -> CiProfile:
        """The default compute instance: the one that takes every slice."""
        return next(ci for ci in self.ci_profiles if ci.slices == self.slices)


@dataclass(frozen=True, slots=True)
class Product:
    """One GPU model. `mode_enable_needs_reset` is None where no source says."""

    product: str
    cli_name: str
    nvml_name: str
    arch: str
    compute_capability: str
    pci_device_ids: tuple[str, ...]
    memory_total_mib: int
    compute_slices: int
    memory_slots: int
    mode_enable_needs_reset: bool | None
    mode_persistent_across_reboot: bool | None
    profiles: tuple[GiProfile, ...]

    @property
    def engines_known(self) -> bool:
        """Whether media engines may limit capacity: not where any count of them was assumed."""
        return not any("engines" in profile.assumed for profile in self.profiles)

    @property
    def full(self) -> GiProfile:
        """The profile that takes the whole GPU. Its engines are all there are."""
        return max(self.profiles, key=lambda profile: (profile.placement_size, -profile.gi_enum))

    @property
    def grain(self) -> int:
        """Memory slots under the smallest instance: 1, but 3 on the RTX boards' grid of twelve."""
        return min(profile.placement_size for profile in self.profiles)

    def by_id(self, gi_profile_id: int) -> GiProfile | None:
        return next((p for p in self.profiles if p.gi_profile_id == gi_profile_id), None)

    def by_enum(self, gi_enum: int) -> GiProfile | None:
        return next((p for p in self.profiles if p.gi_enum == gi_enum), None)

    def by_name(self, name: str) -> tuple[GiProfile, CiProfile] | None:
        """The pair of profiles behind a MIG device's name, such as `3g.20gb` or `1c.3g.20gb`."""
        for profile in self.profiles:
            for ci in profile.ci_profiles:
                if name in {profile.ci_name(ci), f"{ci.slices}c.{profile.name}"}:
                    return profile, ci
        return None

    @property
    def profile_names(self) -> tuple[str, ...]:
        return tuple(profile.name for profile in self.profiles)


@dataclass(frozen=True, slots=True)
class Refused:
    """A product that exists but cannot be played, because its tables are missing or contradict each other."""

    product: str
    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Table:
    products: tuple[Product, ...]
    not_simulatable: tuple[Refused, ...]


@functools.cache
def table() -> Table:
    try:
        return msgspec.json.decode(TABLE.read_bytes(), type=Table)
    except (OSError, msgspec.MsgspecError) as exc:
        raise SimulatorError(f"the simulator's own product table {TABLE} cannot be read: {exc}") from exc


def product(cli_name: str) -> Product:
    """The product of that name; SimulatorError if there is none (a person's input goes through `spec`)."""
    for candidate in table().products:
        if candidate.cli_name == cli_name:
            return candidate
    known = ", ".join(p.cli_name for p in table().products)
    raise SimulatorError(f"no simulated product is called {cli_name!r}; there are: {known}")
