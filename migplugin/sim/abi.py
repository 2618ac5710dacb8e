"""The simulated libnvidia-ml: C names whose attributes are real C functions, to be put under pynvml.

Each is a libffi closure, so a call crosses ctypes as it would into the real library: arguments are
converted, structs are laid out twice (by pynvml and by `structs`) and version words are checked.
Three things would be fatal and are taken care of here:

* an exception inside a closure is printed by ctypes and reads as 0, SUCCESS: everything becomes 999;
* a closure that is garbage-collected while C can still call it crashes: they live as long as the library;
* a string result must outlive the call: the buffers behind nvmlErrorString are kept too.

A name that the library lacks is an AttributeError, which pynvml turns into FUNCTION_NOT_FOUND.
"""

import ctypes
import logging
import time
from ctypes import CFUNCTYPE, c_int, c_void_p, create_string_buffer
from typing import Any

from migplugin.errors import SimulatorError
from migplugin.sim import ci_calls, device_calls, event_calls, gi_calls, mig_calls, system_calls, usage_calls
from migplugin.sim.call import Call, Export, Injected
from migplugin.sim.codes import TEXTS, Code
from migplugin.sim.model import Node, Refusal
from migplugin.sim.records import Switches
from migplugin.sim.session import Session
from migplugin.sim.store import Store
from migplugin.sim.watch import Watch

log = logging.getLogger(__name__)

EXPORTS: dict[str, Export] = {
    name: export
    for calls in (system_calls, device_calls, usage_calls, mig_calls, gi_calls, ci_calls, event_calls)
    for name, export in calls.EXPORTS.by_name.items()
}

_WITHOUT_SESSION = frozenset({"nvmlInit", "nvmlInit_v2", "nvmlInitWithFlags", "nvmlShutdown"})
_V2_PROFILE_INFO = frozenset(
    {
        "nvmlDeviceGetGpuInstanceProfileInfoV",
        "nvmlDeviceGetGpuInstanceProfileInfoByIdV",
        "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
    }
)


class Library:
    """What `pynvml.nvmlLib` is set to. One per process: it is one NVML session with its own handles."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._session = Session(store)
        self._closures: dict[str, Any] = {}
        self._texts: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._closed = False

    def close(self) -> None:
        """The driver behind it goes away: a thread that may still wait in it is no failure."""
        self._closed = True

    def __getattr__(self, name: str) -> Any:
        try:
            switches = self._store.read().switches
        except SimulatorError:  # a library keeps its symbols when the driver behind it goes away
            switches = Switches()
        missing = name in switches.missing_symbols or (
            name in _V2_PROFILE_INFO and not switches.v2_profile_info
        )
        if missing or not (name in EXPORTS or name == "nvmlErrorString"):
            raise AttributeError(f"the simulated libnvidia-ml has no symbol {name}")
        if name not in self._closures:
            made = self._error_string() if name == "nvmlErrorString" else self._closure(name)
            return self._closures.setdefault(name, made)
        return self._closures[name]

    def _closure(self, name: str) -> Any:
        export = EXPORTS[name]

        def entry(*arguments: int | None) -> int:
            try:
                self._enter(name, export, arguments)
            except (Refusal, Injected) as exc:
                return int(exc.code)
            except SimulatorError as exc:
                if not self._closed:
                    log.error("simulated driver failed", extra={"call": name, "error": str(exc)})  # noqa: TRY400
                return Code.UNKNOWN
            except BaseException:
                log.exception("simulated driver crashed", extra={"call": name})
                return Code.UNKNOWN
            return Code.SUCCESS

        return CFUNCTYPE(c_int, *export.argtypes)(entry)

    def _enter(self, name: str, export: Export, arguments: tuple[int | None, ...]) -> None:
        node = self._store.read()
        switches = node.switches
        if switches.hang and not {name, "*"}.isdisjoint(switches.hang):
            node = self._hang(name)
        if switches.cost:
            time.sleep(switches.cost.get(name, switches.cost.get("*", 0)))
            node = self._store.read()
        if name not in _WITHOUT_SESSION:
            if not self._session.references:
                raise Refusal(Code.UNINITIALIZED, f"{name} without nvmlInit")
            self._session.check(node)
        failure = switches.fail.get(name)
        if failure is not None and failure.gpu is None:
            raise Injected(failure.code)
        export.function(Call(name, self._session, node), *arguments)

    def _hang(self, name: str) -> Node:
        """Come back when the call has left the list of those that hang, or when the driver is taken away."""
        watch = Watch(self._store.state_dir)
        try:
            while True:
                node = self._store.read()
                if {name, "*"}.isdisjoint(node.switches.hang):
                    return node
                watch.wait(None)
        finally:
            watch.close()

    def _error_string(self) -> Any:
        def entry(code: int) -> int:
            if code not in self._texts:
                known = {int(key): text for key, text in TEXTS.items()}
                self._texts[code] = create_string_buffer(known.get(code, "Unknown Error").encode())
            return ctypes.addressof(self._texts[code])

        return CFUNCTYPE(c_void_p, c_int)(entry)
