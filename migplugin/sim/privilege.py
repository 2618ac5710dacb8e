"""What the caller may do, found out as the driver does: its capabilities, and which nodes it can open.

CAP_SYS_ADMIN allows everything. Without it, access to the `mig/config` capability allows what nvml.h
calls "requires privileged user", except the MIG mode, and access to `mig/monitor` allows to watch the
whole GPU. Both are device nodes under the state's present view, so `chmod` delegates them as on a real
node, and a container that was not given them has neither.
"""

import os
from pathlib import Path

from migplugin.sim.records import Switches

ADMIN = "admin"  # may change the MIG mode
CONFIG = "config"  # may list, create and destroy instances
MONITOR = "monitor"  # may see memory, processes and events of the whole GPU

CONFIG_MINOR = 1
MONITOR_MINOR = 2

_CAP_SYS_ADMIN = 21
_FORCED = {
    "admin": frozenset({ADMIN, CONFIG, MONITOR}),
    "config": frozenset({CONFIG}),
    "monitor": frozenset({MONITOR}),
    "none": frozenset[str](),
}


def privileges(switches: Switches, dev_root: Path) -> frozenset[str]:
    """The privileges of the calling thread, or those that the switch forces."""
    if switches.privilege != "auto":
        return _FORCED[switches.privilege]
    if _has_cap_sys_admin():
        return _FORCED["admin"]
    nodes = {CONFIG: CONFIG_MINOR, MONITOR: MONITOR_MINOR}
    return frozenset(name for name, minor in nodes.items() if _opens(dev_root, minor))


def _opens(dev_root: Path, minor: int) -> bool:
    node = dev_root / "dev" / "nvidia-caps" / f"nvidia-cap{minor}"
    return os.access(node, os.R_OK, effective_ids=True)


def _has_cap_sys_admin() -> bool:
    for line in Path("/proc/thread-self/status").read_bytes().splitlines():
        if line.startswith(b"CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False
