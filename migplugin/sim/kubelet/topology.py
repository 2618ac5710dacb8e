"""NUMA hints, and the policies that merge them into one affinity for a container (scope: container).

A hint is a set of NUMA nodes that could serve one resource, preferred where no smaller set could.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from migplugin.sim.kubelet.pods import NotAdmitted

POLICIES = ("none", "best-effort", "restricted", "single-numa-node")

Mask = frozenset[int]


@dataclass(frozen=True, slots=True)
class Hint:
    """`nodes` is None where there is no affinity."""

    nodes: Mask | None
    preferred: bool


INDIFFERENT = (Hint(None, preferred=True),)
IMPOSSIBLE = (Hint(None, preferred=False),)


def hints(
    numa_nodes: Sequence[int],
    every: Iterable[Collection[int]],
    available: Iterable[Collection[int]],
    reusable: Iterable[Collection[int] | None],
    request: int,
) -> tuple[Hint, ...]:
    """Every set of nodes that could serve `request` devices.

    The three collections give the nodes of all listed devices, of the available ones, and of those that
    an init container leaves, which must all be taken (None: no topology at all).
    """
    every, available, reusable = list(every), list(available), list(reusable)
    smallest = len(numa_nodes)
    found: list[Mask] = []
    for mask in _masks(numa_nodes):
        if sum(not mask.isdisjoint(nodes) for nodes in every) >= request:
            smallest = min(smallest, len(mask))
        kept = [nodes for nodes in reusable if nodes is not None]
        if any(mask.isdisjoint(nodes) for nodes in kept):
            continue
        if len(kept) + sum(not mask.isdisjoint(nodes) for nodes in available) >= request:
            found.append(mask)
    return tuple(Hint(mask, preferred=len(mask) == smallest) for mask in found) or IMPOSSIBLE


def affinity(policy: str, numa_nodes: Sequence[int], by_resource: Sequence[tuple[Hint, ...]]) -> Mask | None:
    """The nodes to take devices from, None for no wish. Raises NotAdmitted where the policy refuses."""
    if policy == "none":
        return None
    if policy == "single-numa-node":
        by_resource = [tuple(filter(_is_single, found)) or IMPOSSIBLE for found in by_resource]
    everywhere = frozenset(numa_nodes)
    best = Hint(everywhere, preferred=False)
    for choice in itertools.product(*by_resource):
        merged = _merge(everywhere, choice)
        if merged.nodes and _rank(merged) < _rank(best):
            best = merged
    if policy in {"restricted", "single-numa-node"} and not best.preferred:
        raise NotAdmitted("Resources cannot be allocated with Topology locality", "TopologyAffinityError")
    return None if best.nodes == everywhere and policy == "single-numa-node" else best.nodes


def _merge(everywhere: Mask, choice: Sequence[Hint]) -> Hint:
    masks = [hint.nodes for hint in choice if hint.nodes is not None]
    preferred = all(hint.preferred for hint in choice) and len(set(masks)) <= 1
    return Hint(everywhere.intersection(*masks), preferred=preferred)


def _rank(hint: Hint) -> tuple[bool, int, list[int]]:
    """Preferred first, then the narrowest, then the lowest nodes."""
    return not hint.preferred, len(hint.nodes or ()), sorted(hint.nodes or ())


def _is_single(hint: Hint) -> bool:
    return hint.preferred and (hint.nodes is None or len(hint.nodes) == 1)


def _masks(numa_nodes: Sequence[int]) -> Iterable[Mask]:
    return (
        frozenset(nodes)
        for count in range(1, len(numa_nodes) + 1)
        for nodes in itertools.combinations(numa_nodes, count)
    )


def split(
    ids: Iterable[str], nodes_of: Callable[[str], Collection[int]], wanted: Mask
) -> tuple[set[str], set[str], set[str]]:
    """`ids` on a wanted node, on another node only, and on none."""
    aligned: set[str] = set()
    unaligned: set[str] = set()
    nowhere: set[str] = set()
    for id_ in ids:
        nodes = nodes_of(id_)
        part = nowhere if not nodes else unaligned if wanted.isdisjoint(nodes) else aligned
        part.add(id_)
    return aligned, unaligned, nowhere
