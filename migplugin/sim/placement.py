"""Where instances may lie: the placement and capacity rules of the driver, as pure functions.

Stated here a second time on purpose: the plugin's planner has its own copy, and each is a witness
against the other. Three rules, all models of published behaviour:

* a GPU instance lies on one of its profile's placements, disjoint from every other;
* it is refused when its profile's count, or the GPU's media engines, are used up;
* the driver's own choice is the start that leaves the most (profile, start) pairs possible, and the
  lowest of those. Every published creation log comes back from this rule; counting distinct starts
  instead of pairs fails one of them.

Compute instances follow the same choice within the slices of their GPU instance, where any contiguous
run of slices will do. That reproduces every published count and listing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from migplugin.sim.profiles import CiProfile, GiProfile, Product


@dataclass(frozen=True, slots=True)
class Held:
    """A GPU instance that is there: its profile and its first memory slot."""

    profile: GiProfile
    start: int

    @property
    def end(self) -> int:
        return self.start + self.profile.placement_size


def free_starts(profile: GiProfile, held: Sequence[Held]) -> tuple[int, ...]:
    """The placements of `profile` that overlap nothing."""
    size = profile.placement_size
    return tuple(s for s in profile.placements if all(s + size <= h.start or h.end <= s for h in held))


def allowance(product: Product, profile: GiProfile, held: Sequence[Held]) -> int:
    """How many more of `profile` its own count and the media engines allow, wherever they would lie."""
    room = profile.max_instances - sum(h.profile is profile for h in held)
    if product.engines_known:
        used = [sum(column) for column in zip(*(h.profile.engines.rationed for h in held), strict=True)]
        for have, taken, wanted in zip(
            product.full.engines.rationed, used or [0] * 4, profile.engines.rationed, strict=True
        ):
            if wanted:
                room = min(room, (have - taken) // wanted)
    return max(room, 0)


def remaining(product: Product, profile: GiProfile, held: Sequence[Held]) -> int:
    """How many more of `profile` fit now: NVML's remaining capacity.

    Counting free starts is exact because the placements of one profile never overlap each other.
    """
    return min(len(free_starts(profile, held)), allowance(product, profile, held))


def choose_start(product: Product, profile: GiProfile, held: Sequence[Held]) -> int | None:
    """The start the driver takes for a new `profile`, or None if there is no room."""
    if not remaining(product, profile, held):
        return None

    def pairs_left(start: int) -> int:
        after = [*held, Held(profile, start)]
        return sum(len(free_starts(other, after)) for other in product.profiles)

    return _least_harm(free_starts(profile, held), pairs_left)


def ci_placements(profile: GiProfile, ci: CiProfile) -> tuple[int, ...]:
    return tuple(range(profile.slices - ci.slices + 1))


def ci_free_starts(profile: GiProfile, ci: CiProfile, taken: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Starts of `ci` within its GPU instance, where `taken` are the (start, size) of those already there."""
    spans = tuple(taken)
    return tuple(
        s
        for s in ci_placements(profile, ci)
        if all(s + ci.slices <= start or start + size <= s for start, size in spans)
    )


def ci_remaining(profile: GiProfile, ci: CiProfile, taken: Iterable[tuple[int, int]]) -> int:
    """How many more of `ci` fit: free runs of slices, each filled from its start."""
    count = 0
    edge = 0
    for start in ci_free_starts(profile, ci, taken):
        if start >= edge:
            count += 1
            edge = start + ci.slices
    return min(count, ci.max_instances)


def choose_ci_start(profile: GiProfile, ci: CiProfile, taken: Iterable[tuple[int, int]]) -> int | None:
    """The start the driver takes for a new compute instance, or None if there is no room."""
    spans = tuple(taken)

    def pairs_left(start: int) -> int:
        after = (*spans, (start, ci.slices))
        return sum(len(ci_free_starts(profile, other, after)) for other in profile.ci_profiles)

    return _least_harm(ci_free_starts(profile, ci, spans), pairs_left)


def _least_harm(starts: Iterable[int], pairs_left: Callable[[int], int]) -> int | None:
    return max(starts, key=lambda start: (pairs_left(start), -start), default=None)


def gi_id(product: Product, start: int, size: int, *, swapped: bool) -> int:
    """The GPU-instance id of a placement: a node of the buddy tree.

    0 is the whole GPU, 1-2 its halves, 3-6 quarters, 7-14 eighths. Some A100s number the upper half
    first (`swapped`: GI 1 lies at 4:4 and GI 11 at 0:1), which is why nobody may derive one from the
    other.
    """
    parts = product.memory_slots // size
    if swapped and parts > 1:
        start = (start + product.memory_slots // 2) % product.memory_slots
    return parts - 1 + start // size


def slots(start: int, size: int) -> str:
    """A placement as the driver's tools print it: first slot, colon, size."""
    return f"{start}:{size}"
