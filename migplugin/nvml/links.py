"""How near whole GPUs are to each other, as NVIDIA counts it (nvidia-device-plugin.md 5).

Wires do not change while a driver runs: each pair is asked once a session, and only pairs of GPUs that
can be given whole. Of n GPUs that is at most 36 (n - 1) + n (n - 1) / 2 calls on the first look and none on
the others: 280 for eight GPUs with every NVLink up. What the driver does not tell has no entry.
"""

import logging
from collections.abc import Sequence
from itertools import combinations

import pynvml

from migplugin.core.inventory import Gpu, GpuUuid
from migplugin.errors import DriverError
from migplugin.nvml import binding
from migplugin.nvml.binding import Handle
from migplugin.nvml.codes import LOST

log = logging.getLogger(__name__)

NVLINK = 100
WORTH = {
    pynvml.NVML_TOPOLOGY_INTERNAL: 60,
    pynvml.NVML_TOPOLOGY_SINGLE: 50,
    pynvml.NVML_TOPOLOGY_MULTIPLE: 40,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: 30,
    pynvml.NVML_TOPOLOGY_NODE: 20,
    pynvml.NVML_TOPOLOGY_SYSTEM: 10,
}


class Links:
    """What the driver told in this session."""

    def __init__(self) -> None:
        self._ends: dict[GpuUuid, list[str]] = {}
        self._worth: dict[tuple[GpuUuid, GpuUuid], int] = {}

    def forget(self) -> None:
        self._ends.clear()
        self._worth.clear()

    def between(self, gpus: Sequence[tuple[Gpu, Handle]]) -> dict[tuple[GpuUuid, GpuUuid], int]:
        """What each pair of those GPUs that have MIG off is worth, in their order. Never fails."""
        whole = [(gpu, handle) for gpu, handle in gpus if not gpu.mig_enabled]
        found = {}
        for (one, its_handle), (other, handle) in combinations(whole, 2):
            pair = (one.uuid, other.uuid)
            if pair not in self._worth:
                self._ask(pair, its_handle, handle, other.pci_address)
            worth = self._worth.get(pair)
            if worth:
                found[pair] = worth
        return found

    def _ask(self, pair: tuple[GpuUuid, GpuUuid], one: Handle, other: Handle, at: str) -> None:
        try:
            links = self._ends_of(pair[0], one).count(at)
            self._worth[pair] = NVLINK * links or WORTH.get(binding.common_ancestor(one, other), 0)
        except DriverError as exc:
            log.debug("how near GPUs are is not told", extra={"gpus": pair, "error": str(exc)})
            if exc.code not in LOST:
                # One that is lost can come back, and is not looked at until then.
                self._worth[pair] = 0

    def _ends_of(self, uuid: GpuUuid, handle: Handle) -> list[str]:
        ends = self._ends.get(uuid)
        if ends is None:
            ends = []
            try:
                ends = binding.nvlinked(handle)
            except DriverError as exc:
                if exc.code in LOST:
                    raise
                log.debug("NVLinks are not told", extra={"gpu": uuid, "error": str(exc)})
            self._ends[uuid] = ends
        return ends
