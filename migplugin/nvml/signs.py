"""What the driver says of the fitness of GPUs and devices when it is asked, and has said before.

That it does not know a question, from the first time on, is an answer: None. That it once fails to answer
what it has answered before is none, and would make sick ones well: then what it said last still holds, for
as long as the same driver is loaded.
"""

from migplugin.core.inventory import Signs
from migplugin.nvml import binding
from migplugin.nvml.binding import REMAP_FAILED, REMAP_PENDING, Handle

ERRORS = -1  # beside the numbers of fields: the counter of uncorrected memory errors


class Fitness:
    """Asks, on the thread that owns NVML."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], int] = {}

    def forget(self) -> None:
        """Another driver is loaded."""
        self._told.clear()

    def of_gpu(self, handle: Handle, uuid: str, *, mig: bool) -> Signs:
        """Raises DriverError where the GPU is said to be lost."""
        wanted = (binding.RECOVERY_ACTION, REMAP_PENDING, REMAP_FAILED)
        told = binding.fields(handle, *wanted)
        action, pending, failed = (self._remembered(uuid, number, told.get(number)) for number in wanted)
        # With MIG on, the driver counts them for each instance and refuses the sum (nvml.h).
        errors = None if mig else binding.uncorrected_errors(handle)
        return Signs(
            action=action,
            remap_pending=None if pending is None else bool(pending),
            remap_failed=None if failed is None else bool(failed),
            uncorrected=None if mig else self._remembered(uuid, ERRORS, errors),
        )

    def errors_of(self, mig_handle: Handle, uuid: str) -> int | None:
        """Uncorrected memory errors of a MIG device. Raises DriverError where its GPU is said to be lost."""
        return self._remembered(uuid, ERRORS, binding.uncorrected_errors_of_instance(mig_handle))

    def _remembered(self, uuid: str, question: int, told: int | None) -> int | None:
        if told is not None:
            self._told[uuid, question] = told
        return self._told.get((uuid, question))
