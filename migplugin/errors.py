"""Every error that this program raises on purpose.

    MigpluginError              something foreseeable went wrong; the text is one line for a person
    ├── InputError              a flag, file, spec or argument is wrong (exit code 2)
    ├── DriverError             an NVML call was refused or did not answer
    │   ├── LibraryMissing      there is no libnvidia-ml.so.1 to load
    │   ├── DriverNotReady      the library is there, the driver behind it is not (yet)
    │   ├── LibraryOutdated     the loaded library is not that of the driver: only a new process has another
    │   └── DriverTimeout       an NVML call did not come back before its deadline
    ├── KubeletError            the kubelet's socket, directory or answer is not as it must be
    ├── AgentError              no agent answers at the control socket, or that socket cannot be made
    ├── CdiError                the CDI document cannot be written or removed
    ├── AllocationRefused       a device request that must not be granted
    └── SimulatorError          the simulated driver's state is missing, damaged or says no

Texts are lower case without a full stop: what failed, where, the value seen, what to do.
"""


class MigpluginError(Exception):
    """Base of all: its text is fit to be shown as it is."""


class InputError(MigpluginError):
    pass


class DriverError(MigpluginError):
    """`call` is the C name of the NVML function, `code` its return code (None where there was no answer)."""

    def __init__(self, message: str, *, call: str = "", code: int | None = None) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class LibraryMissing(DriverError):
    pass


class DriverNotReady(DriverError):
    pass


class LibraryOutdated(DriverError):
    pass


class DriverTimeout(DriverError):
    pass


class KubeletError(MigpluginError):
    pass


class AgentError(MigpluginError):
    pass


class CdiError(MigpluginError):
    pass


class AllocationRefused(MigpluginError):
    pass


class SimulatorError(MigpluginError):
    pass
