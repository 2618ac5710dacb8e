"""NVML's return codes that we act on (nvml.h), and what to say of each."""

from enum import IntEnum


class Code(IntEnum):
    UNINITIALIZED = 1
    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    INSUFFICIENT_SIZE = 7
    DRIVER_NOT_LOADED = 9
    TIMEOUT = 10
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19
    INSUFFICIENT_RESOURCES = 23
    ARGUMENT_VERSION_MISMATCH = 25
    UNKNOWN = 999


_SAID = {
    Code.UNINITIALIZED: "NVML is not initialised",
    Code.INVALID_ARGUMENT: "invalid argument",
    Code.NOT_SUPPORTED: "not supported",
    Code.NO_PERMISSION: "no permission",
    Code.NOT_FOUND: "not found",
    Code.DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded",
    Code.FUNCTION_NOT_FOUND: "this driver does not have that function",
    Code.GPU_IS_LOST: "the GPU is lost: it has fallen off the bus or needs a reset",
    Code.RESET_REQUIRED: "the GPU needs a reset",
    Code.LIB_RM_VERSION_MISMATCH: (
        "libnvidia-ml and the loaded kernel driver are of different versions: restart the container, "
        "or reboot the node after a driver update"
    ),
    Code.IN_USE: "in use",
    Code.UNKNOWN: "unknown error inside the driver",
}

# The function does not exist here, or not for this device: an answer, not a failure.
ABSENT = frozenset({Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND})

# The GPU is out of reach until it is reset.
LOST = frozenset({Code.GPU_IS_LOST, Code.RESET_REQUIRED})

# What is said of an instance that was there a moment ago, or of an empty slot.
GONE = frozenset({Code.NOT_FOUND, Code.INVALID_ARGUMENT})


def describe(code: int) -> str:
    """What `code` means, for a sentence; numbers that we do not know stay numbers."""
    said = _SAID.get(code)  # type: ignore[call-overload]
    return f"{said} ({code})" if said else f"NVML error {code}"
