"""The status document drawn for a person: what sits where on each GPU, what is free, what is wrong.

Each GPU with MIG on is a strip of its memory slices, to scale, since that is what decides whether one
more instance fits. Nothing is said by colour alone: every state is a sign and a word. What is not
known is drawn as `-` or said in a sentence, never left to look like "none". The strip gives way to
a list where the driver told no placements or the terminal is too narrow for it.

Text from outside is reduced to printable ASCII first: it can break neither a box nor a terminal.
"""

import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from migplugin.core.inventory import Placement
from migplugin.core.status import (
    BY_AGENT,
    HEALTHY,
    UNHEALTHY,
    DeviceStatus,
    GpuStatus,
    InstanceStatus,
    MissingDevice,
    ResourceStatus,
    Status,
)

INDENT = 6
NARROWEST, WIDEST = 40, 160
SLICE_NARROWEST, SLICE_WIDEST = 6, 14
COLUMN_NARROWEST = 4
TITLE_NARROWEST, CUT_NARROWEST, UUID_SHORT = 16, 10, 13

PLAIN, BOLD, DIM, GOOD, BAD, WARN = "", "1", "2", "32", "31", "33"


@dataclass(frozen=True, slots=True)
class Glyphs:
    """`upper` and `lower` are the joints of a border: left, between, right."""

    good: str
    bad: str
    warning: str
    times: str
    ellipsis: str
    horizontal: str
    vertical: str
    divider: str
    upper: tuple[str, str, str]
    lower: tuple[str, str, str]


UNICODE = Glyphs(
    "✔", "✘", "▲", "\N{MULTIPLICATION SIGN}", "…", "─", "│", "┊", ("┌", "┬", "┐"), ("└", "┴", "┘")
)
ASCII = Glyphs("+", "x", "!", "x", "~", "-", "|", ":", ("+", "+", "+"), ("+", "+", "+"))


@dataclass(frozen=True, slots=True)
class Say:
    """The same said at different lengths, longest first, and how it looks."""

    texts: tuple[str, ...]
    style: str = PLAIN


@dataclass(frozen=True, slots=True)
class Cell:
    """One box of a strip: a heading, and below it, side by side, what each of its devices says.

    `size` is in memory slices. The heading's last item goes to the right where both fit on one line.
    """

    size: int
    heading: tuple[Say, ...]
    columns: tuple[tuple[Say, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Pen:
    """What is drawn with: never beyond `width` columns."""

    width: int
    color: bool
    glyphs: Glyphs

    def line(self, *parts: Say) -> str:
        """One line of the longest texts, cut at the width."""
        drawn, left = "", self.width
        for part in parts:
            text = self.cut(part.texts[0], left)
            left -= len(text)
            drawn += f"\033[{part.style}m{text}\033[0m" if self.color and part.style and text else text
        return drawn.rstrip()

    def cut(self, text: str, width: int) -> str:
        if len(text.rstrip()) <= width:
            return text[:width]
        return text[: width - 1] + self.glyphs.ellipsis if width > 0 else ""

    def fit(self, said: Say, width: int, *, right: bool = False) -> Say:
        """The longest text that fits, else the shortest one cut; padded to exactly `width`."""
        text = next((text for text in said.texts if len(text) <= width), said.texts[-1])
        text = self.cut(text, width)
        return Say((text.rjust(width) if right else text.ljust(width),), said.style)

    def paragraph(
        self, text: str, style: str = PLAIN, *, indent: int = INDENT, hang: int = 0
    ) -> Iterator[str]:
        """`text` on as many lines as it needs, `indent` columns in, the further ones `hang` more."""
        for line in textwrap.wrap(
            text, self.width - indent, subsequent_indent=" " * hang, break_on_hyphens=False
        ):
            yield self.line(Say((" " * indent,)), Say((line,), style))


def draw(status: Status, *, width: int, color: bool, unicode: bool, note: str = "") -> str:
    """`status` as lines of at most `width` columns, taken as 40 at least and 160 at most.

    `note` says below the head how it was come by.
    """
    pen = Pen(min(max(width, NARROWEST), WIDEST), color, UNICODE if unicode else ASCII)
    parts = [
        _header(status, note, pen),
        *(_gpu(gpu, status, pen) for gpu in status.gpus),
        _devices(status, pen),
        _resources(status.resources, pen),
        _notes(status, pen),
    ]
    return "\n\n".join(text for text in ("\n".join(part) for part in parts) if text)


def draw_sick(status: Status, *, width: int, color: bool, unicode: bool, note: str = "") -> str:
    """Who is sick in `status`, why, since when and until what, and who was. UUIDs are whole."""
    pen = Pen(min(max(width, NARROWEST), WIDEST), color, UNICODE if unicode else ASCII)
    rows = [
        Row(
            (
                Say(("-" if sick.gpu_index is None else str(sick.gpu_index),)),
                Say((_clean(sick.profile or "whole GPU"),)),
                Say(("-" if sick.sick_for is None else f"{_duration(sick.sick_for)} ago",)),
                Say((_clean(sick.id),), BAD),
            ),
            _clean(f"{sick.reason}, {sick.until}"),
        )
        for sick in status.sick
    ]
    hint = "migplugin health clear ID takes one for well again, once its cause is gone"
    parts = [
        _header(status, note, pen),
        _table(SICK_TITLES, rows, pen, shorten=()) if rows else iter(("no device is sick",)),
        pen.paragraph(hint, DIM, indent=0) if any(sick.clearable for sick in status.sick) else iter(()),
        *(
            pen.paragraph(_clean(f"{past.id} was sick until {past.ended}: {past.reason}"), DIM, indent=0)
            for past in status.history
        ),
    ]
    return "\n\n".join(text for text in ("\n".join(part) for part in parts) if text)


def _header(status: Status, note: str, pen: Pen) -> Iterator[str]:
    yield pen.line(
        Say((_clean(status.node) if status.node else "this node",), BOLD),
        Say((f"   driver {_clean(status.driver_version or '-')}",)),
        Say((f"   strategy {_clean(status.strategy)}",)),
        Say(("   as the agent sees it" if status.seen_by == BY_AGENT else "   seen without the agent",)),
    )
    yield from pen.paragraph(_clean(note), DIM, indent=0, hang=2)
    if status.driver_error is not None:
        last = "; what follows is what it said last" if status.gpus else ""
        text = f"{pen.glyphs.bad} the driver does not answer: {_clean(status.driver_error)}{last}"
        yield from pen.paragraph(text, BAD, indent=0, hang=2)
    elif not status.gpus:
        yield "no NVIDIA GPU on this node"


def _gpu(gpu: GpuStatus, status: Status, pen: Pen) -> Iterator[str]:
    if gpu.broken is not None:
        yield pen.line(Say((f"GPU {gpu.index}",), BOLD), Say((f"  {_clean(gpu.uuid or '')}",)))
        yield from pen.paragraph(f"{pen.glyphs.bad} broken: {_clean(gpu.broken)}", BAD, hang=2)
        listed = sum(device.gpu_index == gpu.index and not device.gone for device in status.missing)
        if listed:
            stay = "1 device of it stays" if listed == 1 else f"{listed} devices of it stay"
            yield from pen.paragraph(f"{stay} listed as unhealthy")
        return
    yield from _gpu_title(gpu, pen)
    for sick in status.sick:
        if sick.id == gpu.uuid and gpu.whole is None:
            text = _reason(sick.reason, sick.sick_for, sick.until)
            yield from pen.paragraph(f"{pen.glyphs.bad} the whole GPU is sick: {text}", BAD, hang=2)
    if gpu.whole is not None:
        offered = Say((f"{' ' * INDENT}the whole GPU is {_clean(gpu.whole.resources[0])}   ",))
        state = _state(gpu.whole, pen)
        yield pen.line(offered, state, Say((f"   {_holder(gpu.whole).texts[0]}",)))
    elif not gpu.mig_enabled:
        yield from pen.paragraph("the whole GPU is not offered")
    if gpu.mig_enabled or gpu.instances:
        yield from _instances(gpu, status, pen)


def _gpu_title(gpu: GpuStatus, pen: Pen) -> Iterator[str]:
    size = [f"{gpu.memory_mib} MiB"] if gpu.memory_mib else []  # not told without privilege, with MIG on
    facts = [*size, _mig_mode(gpu)]
    places = [instance.placement for instance in gpu.instances]
    if gpu.mig_enabled and gpu.memory_slices and None not in places:
        used = sum(place.size for place in places if place)
        facts.append(f"{used} of {gpu.memory_slices} memory slices used")
    said = "   " + "   ".join(facts)
    title = f"GPU {gpu.index}  {_clean(gpu.product or '-')}"
    yield pen.line(Say((pen.cut(title, max(pen.width - len(said), TITLE_NARROWEST)),), BOLD), Say((said,)))
    where = [_clean(gpu.uuid or "-"), _clean(gpu.pci_address or "-")]
    where += [f"minor {gpu.minor}"] if gpu.minor is not None else []
    where += [f"NUMA {gpu.numa_node}"] if gpu.numa_node is not None else []
    yield pen.line(Say((" " * INDENT,)), Say(("  ".join(where),), DIM))


def _mig_mode(gpu: GpuStatus) -> str:
    if gpu.mig_enabled is None:
        return "not MIG capable"
    now = "MIG on" if gpu.mig_enabled else "MIG off"
    if gpu.mig_pending is None or gpu.mig_pending == gpu.mig_enabled:
        return now
    return f"{now}, {'on' if gpu.mig_pending else 'off'} after a GPU reset"


def _instances(gpu: GpuStatus, status: Status, pen: Pen) -> Iterator[str]:
    """The strip, or a list where a strip cannot be drawn, and what still fits."""
    slices = gpu.memory_slices or 0
    width = min((pen.width - INDENT - 1) // slices, SLICE_WIDEST) if slices else 0
    if slices and width >= SLICE_NARROWEST and _lies_on_grid(gpu):
        yield from _strip(gpu, slices, width, pen)
    elif gpu.instances:
        if any(instance.placement is None for instance in gpu.instances):
            why = ": see the warnings below" if status.warnings else ""
            yield from pen.paragraph(f"placement unknown, the driver does not tell it{why}")
        for instance in gpu.instances:
            yield from _listed(instance, pen)
    else:
        yield from pen.paragraph("no GPU instance")
    if gpu.fits is not None:
        # A non-breaking space keeps a count with its profile where the line wraps.
        fits = [f"{_clean(fit.profile)}\N{NO-BREAK SPACE}{pen.glyphs.times}{fit.count}" for fit in gpu.fits]
        text = f"still fits: {' or '.join(fits) or 'nothing'}"
        for line in pen.paragraph(text, hang=len("still fits: ")):
            yield line.replace("\N{NO-BREAK SPACE}", " ")
    elif gpu.mig_enabled:
        yield from pen.paragraph("still fits: unknown without placements")


def _lies_on_grid(gpu: GpuStatus) -> bool:
    """Whether every instance has its place on the grid, one beside the other."""
    end = 0
    for instance in gpu.instances:
        place = instance.placement
        if place is None or place.start < end or place.size < 1:
            return False
        end = place.start + place.size
    return end <= (gpu.memory_slices or 0)


def _strip(gpu: GpuStatus, slices: int, width: int, pen: Pen) -> Iterator[str]:
    """Boxes to scale, `width` columns for each memory slice."""
    cells = list(_cells(gpu, slices, pen))
    rooms = [cell.size * width - 1 for cell in cells]
    # Boxes read as one picture where their lines are level: a heading on one line in all of them, or on two.
    level = all(
        sum(len(said.texts[0]) + 1 for said in cell.heading) <= room + 1
        for cell, room in zip(cells, rooms, strict=True)
    )
    boxes = [list(_box(cell, room, level, pen)) for cell, room in zip(cells, rooms, strict=True)]
    height = max(map(len, boxes))
    glyphs, margin, wall = pen.glyphs, Say((" " * INDENT,)), Say((pen.glyphs.vertical,))
    yield pen.line(margin, Say(("".join(f" {slot}".ljust(width) for slot in range(slices)),), DIM))
    yield pen.line(margin, Say((_border(glyphs.upper, glyphs.horizontal, rooms),)))
    for row in range(height):
        inside = [
            part
            for box, room in zip(boxes, rooms, strict=True)
            for part in (wall, *(box[row] if row < len(box) else (Say((" " * room,)),)))
        ]
        yield pen.line(margin, *inside, wall)
    yield pen.line(margin, Say((_border(glyphs.lower, glyphs.horizontal, rooms),)))


def _border(joints: tuple[str, str, str], horizontal: str, rooms: Iterable[int]) -> str:
    left, between, right = joints
    return left + between.join(horizontal * room for room in rooms) + right


def _cells(gpu: GpuStatus, slices: int, pen: Pen) -> Iterator[Cell]:
    end = 0
    for instance in gpu.instances:
        place = instance.placement
        assert place is not None
        if place.start > end:
            yield _empty(place.start - end)
        yield _cell(instance, place, pen)
        end = place.start + place.size
    if end < slices:
        yield _empty(slices - end)


def _empty(size: int) -> Cell:
    return Cell(size, (Say(("empty",), DIM),))


def _cell(instance: InstanceStatus, place: Placement, pen: Pen) -> Cell:
    heading = (Say((_clean(instance.profile) or "-",), BOLD), Say((f"GI {instance.gi}",)))
    if not instance.devices:
        return Cell(place.size, heading, ((Say(("no compute instance", "no CI"), DIM),),))
    return Cell(place.size, heading, tuple(_column(device, instance, pen) for device in instance.devices))


def _column(device: DeviceStatus, instance: InstanceStatus, pen: Pen) -> tuple[Say, ...]:
    """What one device says inside its GPU instance's box."""
    lines = []
    if device.profile != instance.profile or len(instance.devices) > 1:
        profile = _clean(device.profile)
        ci = f"CI {device.ci}"
        lines.append(Say((f"{profile}  {ci}", f"{profile.partition('.')[0]} {ci}", ci)))
    state = _state(device, pen)
    if device.health == HEALTHY and device.held is not None:
        holder, sign = _holder(device).texts, pen.glyphs.good
        signed = [f"{sign} {text}" for text in holder]
        lines.append(Say((*signed, holder[-1], signed[-1]), state.style))
    else:
        lines.append(state)
        lines += [_holder(device)] if device.held else []
    return tuple(lines)


def _box(cell: Cell, room: int, level: bool, pen: Pen) -> Iterator[tuple[Say, ...]]:
    """The lines of one box, each exactly `room` columns wide."""
    if level and len(cell.heading) > 1:
        first, last = cell.heading
        used = len(first.texts[0])
        yield first, pen.fit(last, room - used, right=True)
    else:
        for said in cell.heading:
            yield (pen.fit(said, room),)
    count = len(cell.columns)
    if not count:
        return
    widths = [(room - count + 1) // count] * count
    widths[-1] = room - sum(widths[:-1]) - count + 1
    if widths[0] < COLUMN_NARROWEST:
        yield (pen.fit(Say((f"{count} compute instances", f"{count} CI")), room),)
        return
    for row in range(max(map(len, cell.columns))):
        parts: list[Say] = []
        for column, width in zip(cell.columns, widths, strict=True):
            parts += [Say((pen.glyphs.divider,), DIM)] if parts else []
            parts.append(pen.fit(column[row] if row < len(column) else Say(("",)), width))
        yield tuple(parts)


def _listed(instance: InstanceStatus, pen: Pen) -> Iterator[str]:
    """An instance as lines of a list, where there is no strip."""
    where = "" if instance.placement is None else f"  slices {_slices(instance.placement)}"
    margin = " " * INDENT
    if not instance.devices:
        yield pen.line(
            Say((f"{margin}GI {instance.gi}  {_clean(instance.profile)}  no compute instance{where}",))
        )
    for device in instance.devices:
        ci = f" CI {device.ci}" if device.profile != instance.profile or len(instance.devices) > 1 else ""
        name = f"{margin}GI {instance.gi}{ci}  {_clean(device.profile)}  "
        yield pen.line(Say((name,)), _state(device, pen), Say((f"  {_holder(device).texts[0]}{where}",)))


def _state(device: DeviceStatus, pen: Pen) -> Say:
    if device.health == HEALTHY:
        return Say((f"{pen.glyphs.good} healthy", f"{pen.glyphs.good} fit", "fit"), GOOD)
    if device.health == UNHEALTHY:
        return Say((f"{pen.glyphs.bad} unhealthy", f"{pen.glyphs.bad} sick", "sick"), BAD)
    return Say(("not offered", "no offer", "-"), DIM)


def _holder(device: DeviceStatus | MissingDevice) -> Say:
    """Who holds a device, "-" where that is not known."""
    if device.held is None:
        return Say(("-",))
    if not device.held:
        fit = isinstance(device, DeviceStatus) and device.health == HEALTHY
        return Say(("free" if fit else "nobody",))
    holders = [_clean(holder) for holder in device.holders or ()]
    if not holders:
        return Say(("held",))
    more = f" +{len(holders) - 1}" if len(holders) > 1 else ""
    pod = holders[0].rpartition(":")[0] or holders[0]
    shorter = (f"{holders[0]}{more}", f"{pod}{more}", f"{pod.partition('/')[2] or pod}{more}")
    return Say((", ".join(holders), *shorter))


def _slices(place: Placement | None) -> str:
    if place is None:
        return "-"
    return f"{place.start}-{place.start + place.size - 1}" if place.size > 1 else f"{place.start}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; `below` is said once after the last of several rows that say the same."""

    cells: tuple[Say, ...]
    below: str = ""


DEVICE_TITLES = ("GPU", "GI/CI", "PROFILE", "SLICES", "HEALTH", "HOLDER", "RESOURCE", "UUID")
SICK_TITLES = ("GPU", "WHAT", "SINCE", "UUID")
RESOURCE_TITLES = ("RESOURCE", "TOTAL", "HEALTHY", "HELD", "LEASED", "REFUSED", "KUBELET")


def _devices(status: Status, pen: Pen) -> Iterator[str]:
    rows = []
    for gpu in status.gpus:
        devices = [gpu.whole] if gpu.whole is not None else []
        devices += [device for instance in gpu.instances for device in instance.devices]
        rows += [_device_row(gpu, device, pen) for device in devices]
    rows += [_missing_row(device, pen) for device in status.missing]
    yield from _table(DEVICE_TITLES, rows, pen, shorten=("RESOURCE", "UUID"), cut="HOLDER")


def _device_row(gpu: GpuStatus, device: DeviceStatus, pen: Pen) -> Row:
    cells = (
        Say((str(gpu.index),)),
        Say(("-" if device.gi is None else f"{device.gi}/{device.ci}",)),
        Say((_clean(device.profile) or "-",)),
        Say((_slices(device.placement),)),
        _state(device, pen),
        _holder(device),
        _resource(device.resources[0] if device.resources else "-"),
        _uuid(device.uuid, pen),
    )
    return Row(cells, _reason(device.reason, device.unhealthy_for, device.until))


def _missing_row(device: MissingDevice, pen: Pen) -> Row:
    bad = pen.glyphs.bad
    cells = (
        Say(("-" if device.gpu_index is None else str(device.gpu_index),)),
        Say(("-",)),
        Say((_clean(device.profile) or "-",)),
        Say(("-",)),
        Say((f"{bad} gone" if device.gone else f"{bad} unhealthy",), BAD),
        _holder(device),
        _resource(device.resource),
        _uuid(device.uuid, pen),
    )
    return Row(cells, _reason(device.reason, device.unhealthy_for))


def _uuid(uuid: str, pen: Pen) -> Say:
    text = _clean(uuid)
    return Say((text, pen.cut(text, UUID_SHORT)))


def _resource(name: str) -> Say:
    text = _clean(name)
    return Say((text, text.partition("/")[2] or text))


def _reason(reason: str | None, seconds: float | None, until: str | None = None) -> str:
    if not reason:
        return ""
    since = [f"for {_duration(seconds)}"] if seconds is not None else []
    return _clean(", ".join((reason, *since, *filter(None, (until,)))))


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def _resources(resources: Sequence[ResourceStatus], pen: Pen) -> Iterator[str]:
    rows = [
        Row(
            (
                Say((_clean(resource.name), _clean(resource.name.partition("/")[2]))),
                Say((str(resource.total),)),
                Say((str(resource.healthy),), BAD if resource.healthy < resource.total else PLAIN),
                *(
                    Say(("-" if count is None else str(count),))
                    for count in (resource.held, resource.leased, resource.refused_allocations)
                ),
                Say((_clean(resource.registration or "-"),)),
            )
        )
        for resource in resources
    ]
    yield from _table(RESOURCE_TITLES, rows, pen, shorten=("RESOURCE",), numbers=range(1, 6))


def _table(
    titles: tuple[str, ...],
    rows: Sequence[Row],
    pen: Pen,
    *,
    shorten: tuple[str, ...],
    cut: str = "",
    numbers: Collection[int] = (),
) -> Iterator[str]:
    """Columns as wide as they need to be; where that is too wide, those of `shorten` say it shorter, in turn.

    Then `cut` gives way, as far as it can be read, and what is still too long is lost on the right.
    """
    if not rows:
        return
    columns = dict(zip(titles, zip(*(row.cells for row in rows), strict=True), strict=True))
    widths = {
        title: max(len(title), *(len(said.texts[0]) for said in column)) for title, column in columns.items()
    }

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - pen.width

    for title in shorten:
        if excess() > 0:
            widths[title] = max(len(title), *(min(map(len, said.texts)) for said in columns[title]))
    if cut and excess() > 0:
        room = max(widths[cut] - excess(), CUT_NARROWEST)
        widths[cut] = max(len(cut), *(len(pen.fit(said, room).texts[0].rstrip()) for said in columns[cut]))

    def line(cells: Iterable[Say]) -> str:
        parts: list[Say] = []
        for n, (said, room) in enumerate(zip(cells, widths.values(), strict=True)):
            parts += [Say(("  ",))] if parts else []
            parts.append(pen.fit(said, room, right=n in numbers))
        return pen.line(*parts)

    yield line(Say((title,), BOLD) for title in titles)
    for row, following in pairwise((*rows, Row(()))):
        yield line(row.cells)
        if row.below and row.below != following.below:
            yield from pen.paragraph(row.below, DIM)


def _notes(status: Status, pen: Pen) -> Iterator[str]:
    for warning in status.warnings:
        yield from pen.paragraph(f"{pen.glyphs.warning} {_clean(warning)}", WARN, indent=0, hang=2)
    note = _unknown_usage(status)
    if note:
        yield from pen.paragraph(note, indent=0, hang=2)


def _unknown_usage(status: Status) -> str:
    """What cannot be said about who holds what, and why; "" where all can."""
    checkpoint, listed = status.usage.checkpoint == "ok", status.usage.pod_resources == "ok"
    silent = "is not there" if status.usage.pod_resources == "absent" else "does not answer"
    if checkpoint and listed:
        return ""
    if listed:
        return "- free devices are not known: the kubelet's checkpoint cannot be read"
    if checkpoint and status.usage.pod_resources == "absent":
        return "- holders have no names: the kubelet's pod-resources socket is not there"
    if checkpoint:
        return "- free devices and names of holders are not known: pod-resources does not answer"
    return f"- holders are not known: the kubelet's checkpoint cannot be read and pod-resources {silent}"


def _clean(text: str) -> str:
    return "".join(char if " " <= char <= "~" else "?" for char in text)
