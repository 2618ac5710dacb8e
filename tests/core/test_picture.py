"""The picture, as golden files a person can read: what `migplugin status` prints.

`GOLDEN=write pytest tests/core/test_picture.py` writes them anew; then look at them.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from migplugin.core.decide import Memory, Options, Source, Usage, World, decide
from migplugin.core.inventory import BrokenGpu, Gpu, GpuUuid, Inventory, Signs
from migplugin.core.picture import draw
from migplugin.core.resource import ResourceName, Strategy
from migplugin.core.sickness import Fault
from migplugin.core.status import AgentFacts, Status, status
from tests.core.examples import A30_24GB, ASSORTED, RTX_PRO, SEVENTHS, gpu, inventory, key, usage, uuid

GOLDEN = Path(__file__).parents[1] / "golden" / "status"
SGR = re.compile(r"\033\[\d+m")


def of(seen: Inventory | None, used: Usage | None = None, **more: object) -> Status:
    world = World(1.0, seen, usage=used or usage(), **more)  # type: ignore[arg-type]
    return status(world, decide(world), node="gpu-node-7")


def demo() -> Status:
    pods = {
        key("mig-3g.20gb", uuid(1, 2)): "ml/train-7:main",
        key("mig-1g.5gb", uuid(0, 9)): "notebooks/jupyter-anna:notebook",
    }
    return of(inventory(SEVENTHS, ASSORTED), usage(pods))


def gone_but_held() -> Status:
    """An agent, five minutes after GPU 1 was carved anew under a pod."""
    held = usage({key("mig-3g.20gb", uuid(1, 2)): "ml/train-7:main"}, began=301.0)
    before = World(0.0, inventory(ASSORTED), usage=usage())
    world = replace(
        before,
        now=1.0,
        inventory=inventory(gpu(1, (1, "4g.20gb", 0, 4), (9, "1g.5gb", 4, 1))),
        usage=held,
        memory=decide(before).memory,
        leases={key("mig-4g.20gb", uuid(1, 1)): 0.9},
    )
    world = replace(world, now=301.0, memory=decide(world).memory)
    names = ("mig-1g.5gb", "mig-2g.10gb", "mig-3g.20gb", "mig-4g.20gb")
    facts = AgentFacts(
        {ResourceName(f"nvidia.com/{name}"): "registered" for name in names},
        {ResourceName("nvidia.com/mig-3g.20gb"): 2},
    )
    return status(world, decide(world), node="gpu-node-7", agent=facts)


def broken() -> Status:
    before = World(0.0, inventory(SEVENTHS, ASSORTED), usage=usage())
    lost = (
        BrokenGpu(1, GpuUuid(uuid(1)), "nvmlDeviceGetMigMode: GPU is lost"),
        BrokenGpu(2, None, "no answer"),
    )
    seen = Inventory("590.48.01", (SEVENTHS,), lost)
    world = replace(before, now=1.0, inventory=seen, memory=decide(before).memory)
    return status(world, decide(world), node="gpu-node-7")


def no_privilege() -> Status:
    def bare(full: Gpu) -> Gpu:
        devices = tuple(replace(device, placement=None) for device in full.devices)
        return replace(full, memory_mib=0, memory_slices=0, profiles=(), instances=(), devices=devices)

    why = (
        "the driver refuses to tell placements and GPU instances to this container: "
        "give it CAP_SYS_ADMIN and NVIDIA_MIG_MONITOR_DEVICES=all, or privileged"
    )
    shared = gpu(0, (1, "3g.20gb", 0, 4, ("1c.3g.20gb", "2c.3g.20gb")), (9, "1g.5gb", 4, 1))
    return of(Inventory("590.48.01", (bare(shared), bare(gpu(1))), unreadable=(why,)))


def shared_instances() -> Status:
    split = gpu(
        0,
        (1, "4g.20gb", 0, 4, ("1c.4g.20gb", "1c.4g.20gb", "2c.4g.20gb")),
        (2, "3g.20gb", 4, 4, ("1c.3g.20gb", "1c.3g.20gb")),
    )
    one_of_two = gpu(1, (1, "2g.10gb", 0, 2, ("1c.2g.10gb",)), (5, "2g.10gb", 4, 2, ()))
    sevenths = gpu(2, (0, "7g.40gb", 0, 8, ("1c.7g.40gb",) * 7))
    pods = {key("mig-1c.3g.20gb", uuid(0, 2, 1)): "ml/infer-0:server"}
    return of(inventory(split, one_of_two, sevenths), usage(pods))


def sick() -> Status:
    """The driver has been silent for longer than the grace; a pod has one device."""
    held = usage({key("mig-2g.10gb", uuid(1, 3)): "ml/train-7:main"}, began=100.0)
    before = World(0.0, inventory(ASSORTED), usage=held)
    world = replace(
        before, now=100.0, driver_failed=10.0, driver_error="NVML did not come back within 15 s",
        memory=decide(before).memory,
    )  # fmt: skip
    return status(world, decide(world), node="gpu-node-7")


def faults() -> Status:
    """An agent, after an error in one device, one on a whole GPU, and the driver's wish about a third."""
    wishing = replace(gpu(2, (9, "1g.5gb", 0, 1)), signs=Signs(1))
    seen = inventory(SEVENTHS, gpu(1), wishing)
    before = World(0.0, seen, usage=usage())
    came = (
        Fault(SEVENTHS.uuid, 9, 0, 94, 1, 1.0, 1.0),
        Fault(GpuUuid(uuid(1)), None, None, 79, 1, 100.0, 100.0),
    )
    world = replace(before, now=181.0, faults=came, memory=decide(before).memory)
    names = ("mig-1g.5gb",)
    facts = AgentFacts({ResourceName(f"nvidia.com/{name}"): "registered" for name in names})
    return status(world, decide(world), node="gpu-node-7", agent=facts)


def long_names() -> Status:
    pods = {
        key("mig-3g.20gb", uuid(1, 2)): "a-long-namespace/" + "a-pod-with-a-name-of-its-own-" * 3 + ":main",
        key("mig-1g.5gb", uuid(1, 9)): "x/\033[31mred\n:main",
    }  # fmt: skip
    odd = replace(ASSORTED, product="NVIDIA " + "Very " * 20 + "Long", pci_address="0000:\x9b31m")
    return replace(of(inventory(odd), usage(pods)), node="node.example." * 12)


def two_holders() -> Status:
    used = usage({key("mig-3g.20gb", uuid(1, 2)): "ml/a:main"})
    (id_,) = used.holders
    return of(inventory(ASSORTED), replace(used, holders={id_: ("ml/a:main", "ml/b:main")}))


NODES = {
    "demo": demo,
    "empty": lambda: of(inventory(gpu(0))),
    "mig-off": lambda: of(
        inventory(
            gpu(0, mig=False), gpu(1, mig=False, pending=True), gpu(2, mig=None), gpu(3, pending=False)
        ),
        usage({key("gpu", uuid(0)): "ml/train-7:main"}),
    ),
    "strategy-none": lambda: of(inventory(ASSORTED), options=Options(Strategy.NONE)),
    "strategy-single": lambda: of(inventory(ASSORTED, gpu(0, mig=False)), options=Options(Strategy.SINGLE)),
    "broken": broken,
    "no-privilege": no_privilege,
    "gone-but-held": gone_but_held,
    "shared-instances": shared_instances,
    "sick": sick,
    "faults": faults,
    "a30": lambda: of(
        inventory(gpu(0, (3, "1g.6gb", 0, 1), (2, "2g.12gb", 2, 2), product=A30_24GB)),
        usage({key("mig-1g.6gb", uuid(0, 3)): "ml/a:b"}),
    ),
    "rtx-pro-6000": lambda: of(
        inventory(gpu(0, (3, "1g.24gb+me.all", 0, 3), (5, "1g.24gb-me", 6, 3), product=RTX_PRO))
    ),
    "no-gpu": lambda: of(inventory()),
    "no-driver": lambda: of(
        None,
        usage(unseen=frozenset({key("mig-1g.5gb", "MIG-x")})),
        driver_failed=0.5,
        driver_error="libnvidia-ml.so.1 not found: use the nvidia runtime class, or mount the driver root",
    ),
    "no-kubelet": lambda: of(
        inventory(ASSORTED), usage(checkpoint=Source.FAILED, pod_resources=Source.ABSENT)
    ),
    "long-names": long_names,
    "two-holders": two_holders,
}  # fmt: skip
VARIANTS = [
    *((name, 100, True) for name in NODES),
    ("demo", 80, True),
    ("demo", 120, True),
    ("demo", 60, True),
    ("demo", 40, True),
    ("demo", 80, False),
    ("shared-instances", 80, False),
    ("rtx-pro-6000", 80, True),
    ("long-names", 80, True),
]


@pytest.mark.parametrize(("name", "width", "unicode"), VARIANTS)
def test_it_looks_like_this(name: str, width: int, unicode: bool) -> None:
    text = draw(NODES[name](), width=width, color=False, unicode=unicode) + "\n"
    path = GOLDEN / f"{name}-{width}{'' if unicode else '-ascii'}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), "GOLDEN=write writes it anew"


@pytest.mark.parametrize("name", NODES)
def test_no_line_is_too_long_and_no_box_is_broken(name: str) -> None:
    document = NODES[name]()
    for width in (*range(40, 161, 7), 80, 100, 120):
        for unicode in (True, False):
            check(draw(document, width=width, color=False, unicode=unicode), width, unicode)


def check(text: str, width: int, unicode: bool) -> None:
    wall, top, bottom = ("│", "┌", "└") if unicode else ("|", "      +-", "      +-")
    inside = None
    for line in text.split("\n"):
        assert len(line) <= width
        assert line == line.rstrip()
        assert unicode or line.isascii()
        assert line.isprintable()
        if inside is None and line.strip().startswith(top.strip()):
            inside = len(line)
        elif inside is not None:
            assert len(line) == inside
            assert line.strip()[0] == line[-1] or line.strip().startswith(bottom.strip())
            if line.strip().startswith(bottom.strip()):
                inside = None
            else:
                assert line[-1] == wall
    assert inside is None, "a box without an end"


@pytest.mark.parametrize("name", NODES)
def test_colour_adds_nothing_to_read(name: str) -> None:
    document = NODES[name]()
    colored = draw(document, width=100, color=True, unicode=True)
    plain = draw(document, width=100, color=False, unicode=True)
    assert [line.rstrip() for line in SGR.sub("", colored).split("\n")] == plain.split("\n")
    assert "\033[0m" in colored


def test_a_width_that_makes_no_sense_is_taken_as_the_nearest_that_does() -> None:
    assert draw(demo(), width=-5, color=False, unicode=True) == draw(
        demo(), width=40, color=False, unicode=True
    )
    assert draw(demo(), width=9999, color=False, unicode=True) == draw(
        demo(), width=160, color=False, unicode=True
    )


@given(
    text=st.text(max_size=60),
    slices=st.integers(0, 20),
    width=st.integers(40, 130),
    places=st.lists(st.tuples(st.integers(-1, 12), st.integers(0, 5)), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_driver_says_is_drawn(
    text: str, slices: int, width: int, places: list[tuple[int, int]]
) -> None:
    instances = [(n, "1g.5gb", start, size) for n, (start, size) in enumerate(places)]
    odd = replace(gpu(0, *instances), product=text, memory_slices=slices, pci_address=text)
    renamed = tuple(replace(device, profile=text) for device in odd.devices)
    document = of(Inventory(text, (replace(odd, devices=renamed),), (BrokenGpu(1, None, text),)))
    check(draw(replace(document, node=text), width=width, color=False, unicode=True), width, unicode=True)


def test_nothing_is_drawn_of_nothing() -> None:
    world = World(0.0, memory=Memory())
    text = draw(status(world, decide(world)), width=80, color=False, unicode=True)
    assert text.splitlines()[0].startswith("this node   driver -")


def test_a_note_says_how_the_picture_was_come_by() -> None:
    text = draw(demo(), width=60, color=False, unicode=True, note="nobody was asked: " + "because " * 9)
    head = text.split("\n\n")[0].splitlines()
    assert head[1].startswith("nobody was asked: because")
    assert len(head) > 2
    assert max(map(len, head)) <= 60
