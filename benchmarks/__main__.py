"""Measures migplugin beside the floor, in alternating blocks; a table, and JSON in bench-results/.

    python -m benchmarks [--quick]

Ratios are of neighbours in time: on a noisy machine both of a pair are disturbed alike. Medians with
quartiles; nothing is thrown away.
"""

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from benchmarks.peers import (
    DEVICES,
    NODE,
    REPLICAS,
    RESOURCE,
    Peer,
    floor,
    floor_shared,
    ours,
    ours_shared,
    started,
)
from migplugin.sim.driver import Simulation
from migplugin.sim.store import Store

QUICK = "--quick" in sys.argv
COLD_STARTS = 3 if QUICK else 9
BLOCKS, CALLS = (5, 20) if QUICK else (30, 50)
CHANGES = 5 if QUICK else 30
IDLE_SECONDS = 5 if QUICK else 30

Row = dict[str, object]


async def main() -> None:
    rows: list[Row] = []
    with Simulation.open(NODE) as simulation:
        state = simulation.state_dir
        rows += await cold_starts(state)
        async with started("floor", floor, state) as base, started("migplugin", ours, state) as us:
            rows += [
                paired("Allocate p50, 1 caller", await blocks(base, us, one_caller), "ms", 1.15),
                paired("Allocate p50, 16 callers", await blocks(base, us, sixteen_callers), "ms", None),
            ]
            rows += await memory_and_idle(base, us)
            rows += [await geometry_changes(us, state)]
        many = DEVICES * REPLICAS
        async with (
            started("floor", floor_shared, state, many) as base,
            started("migplugin", ours_shared, state, many) as us,
        ):
            allocate = await blocks(base, us, one_caller_of_replicas)
            prefer = await blocks(base, us, preferring)
            rows += [
                paired(f"Allocate p50, {many:,} replicas", allocate, "ms", None),
                paired(f"GetPreferredAllocation p50, {many:,} replicas", prefer, "ms", 3.0),
            ]
    report(rows)


async def cold_starts(state: Path) -> list[Row]:
    pairs = []
    for number in range(COLD_STARTS):
        progress(f"cold start {number + 1} of {COLD_STARTS}")
        times = {}
        for name, command in (("floor", floor), ("migplugin", ours))[:: 1 if number % 2 else -1]:
            async with started(name, command, state) as peer:
                times[name] = peer.cold_start * 1000
        pairs.append((times["floor"], times["migplugin"]))
    return [paired("cold start to the first list", pairs, "ms", 1.6)]


async def blocks(
    base: Peer, us: Peer, measure: Callable[[Peer], Awaitable[list[float]]]
) -> list[tuple[float, float]]:
    """The median call of each of two neighbouring blocks, and the tail over all of them in `TAILS`."""
    await measure(base)
    await measure(us)
    pairs = []
    tails: dict[str, list[float]] = {base.name: [], us.name: []}
    for number in range(BLOCKS):
        progress(f"{measure.__name__}: block {number + 1} of {BLOCKS}")
        medians = {}
        for peer in (base, us)[:: 1 if number % 2 else -1]:
            times = await measure(peer)
            medians[peer.name] = statistics.median(times) * 1000
            tails[peer.name] += times
        pairs.append((medians[base.name], medians[us.name]))
    TAILS[measure.__name__] = (p99(tails[base.name]) * 1000, p99(tails[us.name]) * 1000)
    return pairs


TAILS: dict[str, tuple[float, float]] = {}
TAIL_NAMES = {
    "one_caller": "Allocate p99, 1 caller",
    "sixteen_callers": "Allocate p99, 16 callers",
    "one_caller_of_replicas": "Allocate p99, 5,600 replicas",
    "preferring": "GetPreferredAllocation p99, 5,600 replicas",
}


async def one_caller(peer: Peer) -> list[float]:
    return [await timed(peer, number) for number in range(CALLS)]


async def one_caller_of_replicas(peer: Peer) -> list[float]:
    return await one_caller(peer)


async def preferring(peer: Peer) -> list[float]:
    times = []
    for _ in range(max(CALLS // 5, 2)):
        began = time.perf_counter()
        await peer.prefer(4)
        times.append(time.perf_counter() - began)
    return times


async def sixteen_callers(peer: Peer) -> list[float]:
    async def caller(first: int) -> list[float]:
        return [await timed(peer, first + number) for number in range(max(CALLS // 16, 1))]

    return [t for times in await asyncio.gather(*map(caller, range(16))) for t in times]


async def timed(peer: Peer, number: int) -> float:
    began = time.perf_counter()
    await peer.allocate(peer.ids[number % len(peer.ids)])
    return time.perf_counter() - began


async def geometry_changes(us: Peer, state: Path) -> Row:
    """From the end of another process's change to the kubelet's list, both ways."""
    times = []
    store = Store(state)
    for number in range(CHANGES):
        progress(f"geometry change {number + 1} of {CHANGES}")
        gpu = number % 8
        with store.change() as node:
            gi, _ = node.gpus[gpu].mig_devices()[0]
            node.gpus[gpu].destroy(gi.id)
        began = time.perf_counter()
        await us.kubelet.until(lambda k: k.allocatable(RESOURCE) == DEVICES - 1, timeout=10.0)
        times.append((time.perf_counter() - began) * 1000)
        with store.change() as node:
            node.gpus[gpu].create("1g.5gb")
        began = time.perf_counter()
        await us.kubelet.until(lambda k: k.allocatable(RESOURCE) == DEVICES, timeout=10.0)
        times.append((time.perf_counter() - began) * 1000)
    low, middle, high = quartiles(times)
    return {"what": "geometry change to the kubelet's list", "unit": "ms", "migplugin": middle,
            "quartiles": [low, high], "aim": "<= 300", "met": middle <= 300}  # fmt: skip


async def memory_and_idle(base: Peer, us: Peer) -> list[Row]:
    progress(f"idle for {IDLE_SECONDS} s")
    before = {peer.name: usage(peer) for peer in (base, us)}
    await asyncio.sleep(IDLE_SECONDS)
    after = {peer.name: usage(peer) for peer in (base, us)}
    cpu = {n: (after[n][0] - before[n][0]) / IDLE_SECONDS * 100 for n in after}
    switches = {n: (after[n][1] - before[n][1]) / IDLE_SECONDS for n in after}
    rss = {peer.name: resident_mib(peer) for peer in (base, us)}
    return [
        plain("resident memory", rss, "MiB", "floor + 15", rss[us.name] <= rss[base.name] + 15),
        plain("idle CPU", cpu, "%", "floor + 0.1", cpu[us.name] <= cpu[base.name] + 0.1),
        plain("idle context switches", switches, "/s", None, None),
    ]


def usage(peer: Peer) -> tuple[float, int]:
    """CPU seconds and context switches of all threads so far: by schedstat, in ns, not in ticks of 10 ms."""
    seconds, switches = 0.0, 0
    for task in Path(f"/proc/{peer.process.pid}/task").iterdir():
        seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return seconds, switches


def resident_mib(peer: Peer) -> float:
    for line in Path(f"/proc/{peer.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no VmRSS")


def paired(what: str, pairs: Sequence[tuple[float, float]], unit: str, aim: float | None) -> Row:
    low, middle, high = quartiles([b / a for a, b in pairs])
    return {
        "what": what,
        "unit": unit,
        "floor": statistics.median(a for a, _ in pairs),
        "migplugin": statistics.median(b for _, b in pairs),
        "ratio": middle,
        "quartiles": [low, high],
        "aim": None if aim is None else f"<= {aim} x",
        "met": None if aim is None else middle <= aim,
    }


def plain(what: str, values: dict[str, float], unit: str, aim: str | None, met: bool | None) -> Row:
    return {"what": what, "unit": unit, "floor": values["floor"], "migplugin": values["migplugin"],
            "aim": aim, "met": met}  # fmt: skip


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def report(rows: list[Row]) -> None:
    for name, (base, us) in TAILS.items():
        rows.append(plain(TAIL_NAMES[name], {"floor": base, "migplugin": us}, "ms", None, None))
    print(f"\n{'':<44}{'floor':>10}{'migplugin':>11}  {'':<4}{'ratio':>6}  {'quartiles':<14}{'aim':<13}")
    for row in rows:
        spread = "" if "quartiles" not in row else "{:.2f} - {:.2f}".format(*row["quartiles"])  # type: ignore[misc]
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]  # type: ignore[index]
        print(
            f"{row['what']:<44}{number(row.get('floor')):>10}{number(row['migplugin']):>11}  {row['unit']:<4}"
            f"{number(row.get('ratio')):>6}  {spread:<14}{row['aim'] or '':<13}{verdict}"
        )
    where = Path("bench-results")
    where.mkdir(exist_ok=True)
    path = where / time.strftime("%Y%m%d-%H%M%S.json")
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
    path.write_text(json.dumps({"machine": machine, "quick": QUICK, "rows": rows}, indent=2))
    print(f"\n{path}")


def number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


asyncio.run(main())
