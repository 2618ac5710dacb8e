"""NVML's events: what is delivered to whom, and how fast another process's change gets here."""

import subprocess
import sys
import threading
import time
from typing import Any

import pynvml
import pytest

from migplugin.sim.codes import EventType
from tests.sim.driver_fixtures import Driver, address, create, driver, refused

XID, MIG = 0x8, 0x100
NOT_SUPPORTED, TIMEOUT, GPU_IS_LOST, INVALID_ARGUMENT = 3, 10, 15, 2
WHOLE = 0xFFFFFFFF


def _registered(gpu: Any, *types: int) -> Any:
    events = pynvml.nvmlEventSetCreate()
    for kind in types:
        pynvml.nvmlDeviceRegisterEvents(gpu, kind, events)
    return events


def _drain(events: Any) -> list[tuple[int, int, int, int]]:
    found: list[tuple[int, int, int, int]] = []
    while True:
        try:
            data = pynvml.nvmlEventSetWait_v2(events, 0)
        except pynvml.NVMLError_Timeout:
            return found
        found.append((data.eventType, data.eventData, data.gpuInstanceId, data.computeInstanceId))


def test_past_events_are_not_delivered_and_later_ones_are_kept_in_order() -> None:
    with driver() as d:
        d.change(lambda node: node.gpus[0].xid(31))
        events = _registered(d.gpu(), XID)
        assert _drain(events) == []
        d.change(lambda node: node.gpus[0].xid(48))
        d.xids(63, 64)
        assert [xid for _, xid, _, _ in _drain(events)] == [48, 63, 64]


def test_creating_a_mig_device_posts_two_events_and_destroying_it_two_more() -> None:
    with driver("1xa100-40gb=") as d:
        events = _registered(d.gpu(), MIG)
        gi, ci = create(d.gpu(), 19, 0)
        assert _drain(events) == [(MIG, 0, WHOLE, WHOLE)] * 2
        pynvml.nvmlComputeInstanceDestroy(ci)
        pynvml.nvmlGpuInstanceDestroy(gi)
        assert _drain(events) == [(MIG, 0, WHOLE, WHOLE)] * 2


def test_change_of_mode_posts_nothing() -> None:
    with driver() as d:
        events = _registered(d.gpu(), MIG)
        pynvml.nvmlDeviceSetMigMode(d.gpu(), 1)
        assert _drain(events) == []


def test_only_what_was_registered_is_delivered_per_gpu_and_type() -> None:
    with driver("2xa100-40gb=") as d:
        events = _registered(d.gpu(0), XID)
        pynvml.nvmlDeviceRegisterEvents(d.gpu(1), MIG, events)
        d.xids(79, gpu=0)
        d.xids(79, gpu=1)
        d.change(lambda node: [gpu.create("1g.5gb", compute=False) for gpu in node.gpus])
        assert [kind for kind, *_ in _drain(events)] == [XID, MIG]


def test_event_names_its_gpu_by_the_gpus_handle() -> None:
    with driver("2xa100-40gb") as d:
        events = pynvml.nvmlEventSetCreate()
        for index in (0, 1):
            pynvml.nvmlDeviceRegisterEvents(d.gpu(index), XID, events)
        d.change(lambda node: node.gpus[1].xid(79))
        data = pynvml.nvmlEventSetWait_v2(events, 1000)
        assert address(data.device) == address(d.gpu(1))


@pytest.mark.parametrize(("gi", "ci"), [(WHOLE, WHOLE), (13, WHOLE), (13, 0)])
def test_xid_carries_its_scope(gi: int, ci: int) -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        events = _registered(d.gpu(), XID)
        d.change(lambda node: node.gpus[0].xid(94, gi, ci))
        assert _drain(events) == [(XID, 94, gi, ci)]


@pytest.mark.parametrize("privilege", ["none", "config"])
def test_without_privilege_only_what_affects_the_whole_gpu_is_delivered(privilege: str) -> None:
    with driver("1xa100-40gb=1g.5gb", privilege=privilege) as d:
        events = _registered(d.gpu(), XID)
        d.change(lambda node: node.gpus[0].xid(94, 13, 0))
        d.change(lambda node: node.gpus[0].xid(79))
        assert _drain(events) == [(XID, 79, WHOLE, WHOLE)]


def test_mig_monitor_is_privilege_enough_for_events() -> None:
    with driver("1xa100-40gb=1g.5gb", privilege="monitor") as d:
        events = _registered(d.gpu(), XID)
        d.change(lambda node: node.gpus[0].xid(94, 13, 0))
        assert _drain(events) == [(XID, 94, 13, 0)]


@pytest.mark.parametrize(
    ("switch", "node", "mig", "xid"),
    [
        ("all", "1xa100-40gb", True, True),
        ("no-mig", "1xa100-40gb=", False, True),
        ("mig-when-enabled", "1xa100-40gb", False, True),
        ("mig-when-enabled", "1xa100-40gb=", True, True),
        ("none", "1xa100-40gb=", False, False),
    ],
)
def test_support_of_events_is_told_and_kept_to(switch: str, node: str, mig: bool, xid: bool) -> None:
    with driver(node, events=switch) as d:
        supported = pynvml.nvmlDeviceGetSupportedEventTypes(d.gpu())
        assert (bool(supported & MIG), bool(supported & XID)) == (mig, xid)
        events = pynvml.nvmlEventSetCreate()
        for kind, known in ((MIG, mig), (XID, xid)):
            if known:
                pynvml.nvmlDeviceRegisterEvents(d.gpu(), kind, events)
            else:
                assert refused("nvmlDeviceRegisterEvents", d.gpu(), kind, events) == NOT_SUPPORTED


def test_one_unsupported_type_registers_nothing_and_the_set_stays_usable() -> None:
    with driver("1xa100-40gb=", events="no-mig") as d:
        events = pynvml.nvmlEventSetCreate()
        assert refused("nvmlDeviceRegisterEvents", d.gpu(), XID | MIG, events) == NOT_SUPPORTED
        d.change(lambda node: node.gpus[0].xid(79))
        assert _drain(events) == []
        pynvml.nvmlDeviceRegisterEvents(d.gpu(), XID, events)
        d.change(lambda node: node.gpus[0].xid(79))
        assert len(_drain(events)) == 1


def test_mig_handles_and_foreign_handles_cannot_be_registered_or_waited_for() -> None:
    with driver("1xa100-40gb=1g.5gb") as d:
        events = pynvml.nvmlEventSetCreate()
        assert refused("nvmlDeviceRegisterEvents", d.mig(), XID, events) == INVALID_ARGUMENT
        assert refused("nvmlEventSetWait_v2", d.gpu(), 0) == INVALID_ARGUMENT
        pynvml.nvmlEventSetFree(events)
        assert refused("nvmlEventSetWait_v2", events, 0) == INVALID_ARGUMENT
        assert refused("nvmlEventSetFree", events) == INVALID_ARGUMENT


def test_wait_times_out_after_its_time_and_not_before() -> None:
    with driver() as d:
        events = _registered(d.gpu(), XID)
        begun = time.monotonic()
        assert refused("nvmlEventSetWait_v2", events, 60) == TIMEOUT
        assert 0.06 <= time.monotonic() - begun < 2


def test_unrelated_changes_do_not_end_a_wait() -> None:
    with driver() as d:
        events = _registered(d.gpu(), XID)
        with _elsewhere(d, lambda node: node.next_serial()):
            assert refused("nvmlEventSetWait_v2", events, 200) == TIMEOUT


def test_lost_gpu_is_told_at_once_and_every_time_after_what_came_before() -> None:
    with driver() as d:
        events = _registered(d.gpu(), XID)
        d.change(lambda node: node.gpus[0].xid(79))
        d.change(lambda node: setattr(node.gpus[0].record, "lost", True))
        assert pynvml.nvmlEventSetWait_v2(events, 5000).eventData == 79
        begun = time.monotonic()
        assert [refused("nvmlEventSetWait_v2", events, 5000) for _ in range(3)] == [GPU_IS_LOST] * 3
        assert time.monotonic() - begun < 2


def test_any_event_can_be_posted() -> None:
    with driver() as d:
        events = _registered(d.gpu(), EventType.CLOCK)
        d.change(lambda node: node.post(node.gpus[0], EventType.CLOCK, 7))
        assert _drain(events) == [(EventType.CLOCK, 7, WHOLE, WHOLE)]


class _elsewhere:  # noqa: N801  reads as a clause
    """While the block runs, a thread does `act` again and again, as another process would."""

    def __init__(self, d: Driver, act: Any) -> None:
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(d, act))

    def _run(self, d: Driver, act: Any) -> None:
        while not self.done.wait(0.005):
            d.change(act)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


POST_ON_COMMAND = """
import sys, time
from migplugin.sim.store import Store
store = Store(sys.argv[1])
store.read()
print("ready", flush=True)
for line in sys.stdin:
    with store.change() as node:
        node.gpus[0].xid(79)
    print(time.monotonic(), flush=True)
"""


def test_wait_wakes_within_milliseconds_of_another_process_and_holds_no_gil() -> None:
    """The waiter is a thread: while it blocks, this one must run freely, and the event must come fast."""
    with driver() as d:
        events = _registered(d.gpu(), XID)
        other = subprocess.Popen(
            [sys.executable, "-c", POST_ON_COMMAND, str(d.store.state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with other:
            assert other.stdin is not None
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            delays = []
            for _ in range(5):
                woken: list[float] = []
                waiting = threading.Event()

                def wait(woken: list[float] = woken, waiting: threading.Event = waiting) -> None:
                    waiting.set()
                    pynvml.nvmlEventSetWait_v2(events, 10_000)
                    woken.append(time.monotonic())

                waiter = threading.Thread(target=wait)
                waiter.start()
                assert waiting.wait(5)
                begun = time.monotonic()
                sum(range(200_000))  # would stand still for ten seconds under a held GIL
                assert time.monotonic() - begun < 5
                print("post", file=other.stdin, flush=True)
                posted = float(other.stdout.readline())
                waiter.join(10)
                delays.append(woken[0] - posted)
            other.stdin.close()
        assert sorted(delays)[2] < 0.1, f"woke after {delays} seconds"


def test_two_sessions_of_one_driver_each_get_every_event() -> None:
    with driver() as d:
        first, second = _registered(d.gpu(), XID), _registered(d.gpu(), XID)
        d.change(lambda node: node.gpus[0].xid(79))
        assert len(_drain(first)) == len(_drain(second)) == 1


def test_more_events_than_anyone_waited_for_are_all_there() -> None:
    with driver() as d:
        events = _registered(d.gpu(), XID)
        for _ in range(3):
            d.xids(*range(100))
        assert [xid for _, xid, _, _ in _drain(events)] == [*range(100)] * 3
