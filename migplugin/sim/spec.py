"""SPEC, the one-line description of a node: `2xa100-40gb`, or `1xa100-40gb=1g.5gb*7,1xa30=2g.12gb:1g.6gb`.

    <n>x<product>[=[<profile>[*<k>][:<profile>[*<k>]...]]][,...]

Without `=` MIG is off; with `=` alone it is on and empty. Profiles are created in the order written,
each where the driver would put it, so order matters as it does on hardware. A compute-level profile
(`1c.3g.20gb`) goes into the GPU instance that the entry just before it made while that one is of the
same profile and has room, else into a new one: `1c.3g.20gb*3` is one GPU instance with three compute
instances.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from migplugin.errors import InputError
from migplugin.sim import placement, profiles
from migplugin.sim.model import Gpu, Node, Refusal, new_node
from migplugin.sim.records import Switches

MAX_GPUS = 32  # the driver's static table of capability minors ends there

_GPUS = re.compile(r"(?P<n>\d+)x(?P<product>.+)", re.ASCII)
_PROFILE = re.compile(r"(?P<name>[^*]+)(\*(?P<k>.*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One profile of the spec, `count` times, and the column where it stands."""

    name: str
    count: int
    column: int


@dataclass(frozen=True, slots=True)
class Group:
    """`count` equal GPUs. `wanted` is None where MIG is off."""

    count: int
    product: profiles.Product
    wanted: tuple[Wanted, ...] | None


def parse(spec: str) -> tuple[Group, ...]:
    """The groups of `spec`, or InputError with the column, the text there and what is allowed."""
    if not spec.strip():
        raise InputError("the node spec is empty; write for instance '1xa100-40gb=1g.5gb*7'")
    groups = []
    column = 1
    for part in spec.split(","):
        groups.append(_group(part, column))
        column += len(part) + 1
    total = sum(group.count for group in groups)
    if total > MAX_GPUS:
        raise InputError(f"the node spec has {total} GPUs; a node has at most {MAX_GPUS}")
    return tuple(groups)


def build(
    spec: str,
    *,
    seed: str = "",
    switches: Switches | None = None,
    prepare: Callable[[Node], None] | None = None,
) -> Node:
    """The node that `spec` describes, deterministic in `spec` and `seed`. InputError if it cannot be.

    `prepare` gets the node while its GPUs are still empty, when every switch may be set.
    """
    groups = parse(spec)
    gpus = [(group.product, group.wanted is not None) for group in groups for _ in range(group.count)]
    node = new_node(spec, seed, gpus, switches or Switches())
    if prepare is not None:
        prepare(node)
    wanted = [group.wanted or () for group in groups for _ in range(group.count)]
    for gpu, profiles_wanted in zip(node.gpus, wanted, strict=True):
        _carve(gpu, profiles_wanted)
    node.make_nodes()  # what a node comes up with has been there for long
    return node


def _group(part: str, column: int) -> Group:
    head, equals, tail = part.partition("=")
    match = _GPUS.fullmatch(head)
    if not match or int(match["n"]) < 1:
        raise InputError(
            f"node spec, column {column}: {head!r} is not <number>x<product>, such as 2xa100-40gb"
        )
    product = _product(match["product"], column + match.start("product"))
    if not equals:
        return Group(int(match["n"]), product, None)
    if not tail:
        return Group(int(match["n"]), product, ())
    wanted = []
    at = column + len(head) + 1
    for entry in tail.split(":"):
        wanted.append(_wanted(entry, product, at))
        at += len(entry) + 1
    return Group(int(match["n"]), product, tuple(wanted))


def _product(name: str, column: int) -> profiles.Product:
    table = profiles.table()
    for product in table.products:
        if product.cli_name == name:
            return product
    for refused in table.not_simulatable:
        if name.lower() in {refused.product.lower(), *refused.names}:
            raise InputError(
                f"node spec, column {column}: {name!r} ({refused.product}) cannot be simulated: "
                f"{refused.reason}"
            )
    known = [product.cli_name for product in table.products]
    near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"node spec, column {column}: no product is called {name!r}; {hint}there are: {', '.join(known)}"
    )


def _wanted(entry: str, product: profiles.Product, column: int) -> Wanted:
    match = _PROFILE.fullmatch(entry)
    if not match:
        raise InputError(
            f"node spec, column {column}: expected a profile of {product.cli_name}, got {entry!r}; "
            f"there are: {', '.join(product.profile_names)}"
        )
    name, k = match["name"], match["k"]
    if k is not None and (not k.isdecimal() or int(k) < 1):
        raise InputError(
            f"node spec, column {column + match.start('k')}: {k!r} is not a count; write {name}*2 for two"
        )
    if product.by_name(name) is None:
        near = difflib.get_close_matches(name, product.profile_names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"node spec, column {column}: {product.cli_name} has no profile {name!r}; {hint}"
            f"there are: {', '.join(product.profile_names)}"
        )
    return Wanted(name, int(k or 1), column)


def _carve(gpu: Gpu, wanted: tuple[Wanted, ...]) -> None:
    for entry in wanted:
        for number in range(1, entry.count + 1):
            try:
                _add(gpu, entry.name)
            except Refusal as exc:
                raise InputError(
                    f"node spec, column {entry.column}: no room for {entry.name} number {number} on GPU "
                    f"{gpu.index} ({exc}); profiles are created as written, larger ones first may help"
                ) from exc


def _add(gpu: Gpu, name: str) -> None:
    pair = gpu.product.by_name(name)
    assert pair is not None
    profile, ci = pair
    last = gpu.instances[-1] if gpu.instances else None
    if ci.slices < profile.slices and last is not None and last.profile == profile.gi_profile_id:
        taken = [(there.start, there.size) for there in last.compute]
        if placement.choose_ci_start(profile, ci, taken) is not None:
            gpu.create_ci(last.id, ci.id)
            return
    gpu.create(name)
