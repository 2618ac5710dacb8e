"""NVML's event calls. A set remembers, for each GPU and type, where the journal ended when it registered.

So what happened before is not delivered, and nothing after it is missed while nobody waits. Waiting
blocks in poll(2) without the GIL and returns within milliseconds of another process's change. A lost
GPU answers at once, every time: it is for the caller not to spin.
"""

import time

from migplugin.sim.call import HANDLE, POINTER, UINT, ULONGLONG, Call, Exports
from migplugin.sim.codes import Code, EventType
from migplugin.sim.model import Gpu, Node
from migplugin.sim.privilege import MONITOR
from migplugin.sim.records import WHOLE, Event
from migplugin.sim.session import EventSet, GpuHandle, Session
from migplugin.sim.structs import EventData
from migplugin.sim.watch import Watch

EXPORTS = Exports()

BASIC = (
    EventType.SINGLE_BIT_ECC | EventType.DOUBLE_BIT_ECC | EventType.PSTATE | EventType.XID | EventType.CLOCK
)


@EXPORTS.add("nvmlEventSetCreate", POINTER)
def event_set_create(call: Call, out: int | None) -> None:
    if not out:
        call.refuse(Code.INVALID_ARGUMENT, "a NULL pointer")
    created = EventSet(Watch(call.session.store.state_dir), seen=call.node.record.last_seq)
    call.put_handle(out, call.session.handle(created))


@EXPORTS.add("nvmlEventSetFree", HANDLE)
def event_set_free(call: Call, handle: int | None) -> None:
    _event_set(call, handle).watch.close()
    call.session.forget(handle or 0)


@EXPORTS.add("nvmlDeviceGetSupportedEventTypes", HANDLE, POINTER)
def supported_event_types(call: Call, device: int | None, out: int | None) -> None:
    call.put_wide(out, _supported(call.gpu(device)))


@EXPORTS.add("nvmlDeviceRegisterEvents", HANDLE, ULONGLONG, HANDLE)
def register_events(call: Call, device: int | None, types: int, handle: int | None) -> None:
    """One type that is not supported, and none is registered. GPU handles only."""
    registered = _event_set(call, handle)
    gpu = call.gpu(device)
    if types & ~_supported(gpu) or not types:
        call.refuse(Code.NOT_SUPPORTED, f"event types {types:#x}")
    since = registered.since.setdefault(gpu.uuid, {})
    for kind in (1 << bit for bit in range(64) if types >> bit & 1):
        since.setdefault(kind, call.node.record.last_seq)


@EXPORTS.add("nvmlEventSetWait_v2", HANDLE, POINTER, UINT)
def event_set_wait(call: Call, handle: int | None, out: int | None, timeout_ms: int) -> None:
    waiting = _event_set(call, handle)
    data = call.struct(out, EventData)
    deadline = time.monotonic() + timeout_ms / 1000
    while True:
        # A call in flight must see what changes while it waits: the node is read anew each time.
        node = call.session.store.read()
        call.session.check(node)
        event = _next(call, node, waiting)
        if event is not None:
            _fill(data, event, call.session)
            return
        if any(gpu.record.lost for gpu in node.gpus if gpu.uuid in waiting.since):
            call.refuse(Code.GPU_IS_LOST)
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.watch.wait(left):
            call.refuse(Code.TIMEOUT)


def _event_set(call: Call, handle: int | None) -> EventSet:
    target = call.session.target(handle)
    if not isinstance(target, EventSet):
        call.refuse(Code.INVALID_ARGUMENT, "not an event set")
    return target


def _supported(gpu: Gpu) -> int:
    events = gpu.node.switches.events
    if events == "none":
        return 0
    mig = events == "all" or (events == "mig-when-enabled" and gpu.record.mig_current)
    return BASIC | (EventType.MIG_CONFIG_CHANGE if mig else 0)


def _next(call: Call, node: Node, waiting: EventSet) -> Event | None:
    """The oldest event that the set is registered for and the caller may see."""
    if node.record.last_seq == waiting.seen:
        return None
    for event in call.session.store.events_after(waiting.seen):
        waiting.seen = event.seq
        since = waiting.since.get(event.gpu, {}).get(event.type)
        gpu = node.by_uuid.get(event.gpu)
        if gpu is None or since is None or event.seq <= since or not event.type & _supported(gpu):
            continue
        # Without privilege only what affects the whole device is reported (nvml.h, nvmlEventSetWait_v2).
        if event.gi == WHOLE or call.may(MONITOR):
            return event
    # The journal may have been cut: do not read it again for what it no longer holds.
    waiting.seen = max(waiting.seen, node.record.last_seq)
    return None


def _fill(data: EventData, event: Event, session: Session) -> None:
    data.device = session.handle(GpuHandle(event.gpu))
    data.event_type, data.event_data = event.type, event.data
    data.gpu_instance_id, data.compute_instance_id = event.gi, event.ci
