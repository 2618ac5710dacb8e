"""What `state.json` holds, field by field. Plain data: the rules are in `model`, the file in `store`.

Everything a second process must agree on is here, so that nothing about the simulated driver lives in
anyone's memory: two programs that open one state directory share one driver. `version` is the format's.
"""

from typing import Literal

import msgspec

FORMAT = 1

WHOLE = 0xFFFFFFFF  # NVML's "not attributable": the event or process is the whole GPU's


class Failure(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An injected error: `code` for the call, on the GPU with index `gpu` or on every one."""

    code: int
    gpu: int | None = None


class Switches(msgspec.Struct, forbid_unknown_fields=True):
    """Where real drivers and nodes differ. `switches` says what each one means, to a person."""

    runtime_view: Literal["host", "container"] = "host"
    container_capabilities: Literal["none", "monitor", "config"] = "none"
    privilege: Literal["auto", "admin", "config", "monitor", "none"] = "auto"
    mig_index: Literal["compact", "sparse"] = "compact"
    gi_ids: Literal["ordered", "swapped"] = "ordered"
    stale_sessions: bool = False
    capability_nodes: Literal["prompt", "late"] = "prompt"
    process_list: Literal["host", "namespace"] = "host"
    events: Literal["all", "no-mig", "mig-when-enabled", "none"] = "all"
    profile_queries: Literal["always", "mig-on"] = "always"
    v2_profile_info: bool = True
    missing_symbols: list[str] = []
    mig_activation: Literal["now", "in-use", "reset-required"] = "now"
    uuid_format: Literal["modern", "legacy"] = "modern"
    uuid_reuse: bool = True
    minors: list[int] = []
    pci_order: Literal["ascending", "descending"] = "ascending"
    numa: list[int] = []
    nvlinks: list[tuple[int, int, int]] = []
    driver_loaded: bool = True
    driver_version: str = "580.95.05"
    cost: dict[str, float] = {}
    hang: list[str] = []
    fail: dict[str, Failure] = {}


class Process(msgspec.Struct):
    pid: int
    name: str
    memory_mib: int = 256


class CiRecord(msgspec.Struct):
    """A compute instance. `serial` is never used twice, so that a stale handle can be told from a new one.

    `uncorrected` are the memory errors (ECC) that the driver counts against it.
    """

    id: int
    profile: int
    start: int
    size: int
    uuid: str
    serial: int
    node_made: bool
    processes: list[Process] = []
    leaked: bool = False
    uncorrected: int = 0


class GiRecord(msgspec.Struct):
    id: int
    profile: int
    start: int
    serial: int
    node_made: bool
    compute: list[CiRecord] = []
    leaked: bool = False


class GpuRecord(msgspec.Struct):
    product: str
    uuid: str
    serial_number: str
    mig_current: bool
    mig_pending: bool
    lost: bool = False
    uncorrected: int = 0
    fields: dict[int, int] = {}
    processes: list[Process] = []
    instances: list[GiRecord] = []


class Event(msgspec.Struct, frozen=True):
    """One entry of the driver's journal. `seq` grows by one for each event the node ever posted."""

    seq: int
    gpu: str
    type: int
    data: int = 0
    gi: int = WHOLE
    ci: int = WHOLE


class NodeRecord(msgspec.Struct):
    """The whole node. `loads` counts the times that the driver was loaded, after which old sessions are dead.

    `outbox` repeats the events of the last change, see `store`.
    """

    version: int
    spec: str
    seed: str
    gpus: list[GpuRecord]
    switches: Switches
    last_seq: int = 0
    last_serial: int = 0
    loads: int = 1
    outbox: list[Event] = []
