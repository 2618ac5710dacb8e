"""The small file that keeps sick devices sick when the agent is started anew.

It lies in a directory of its own, since the kubelet empties its device-plugin directory of files at each
start. It is written when something fell sick or got well and never flushed: it must outlive the process,
not the machine. A file of before the last boot, or of before the driver was loaded, is history: said, and
not acted on, for either may have cured what is in it. Lost or corrupt: everything starts clean, and that
is said.
"""

import json
import logging
from pathlib import Path
from typing import Any

from migplugin.core.health import Health
from migplugin.core.health_record import record, restore

log = logging.getLogger(__name__)

NAME = "health.json"
MAX_BYTES = 16 << 20


class HealthFile:
    """One file in `directory`, which is made with it. `proc_root` tells which boot and driver it is of."""

    def __init__(self, directory: Path, proc_root: Path) -> None:
        self._path = directory / NAME
        self._proc_root = proc_root
        self._saved: dict[str, Any] | None = None
        self._told = False

    @property
    def path(self) -> Path:
        return self._path

    def load(self, now: float) -> Health:
        """What was saved by an agent before; healthy where that is not to be had, or is history."""
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(MAX_BYTES))
            health = restore(document.get("health"), now)
        except FileNotFoundError:
            log.info("no record of health, everything starts healthy", extra={"path": str(self._path)})
            return Health()
        except (OSError, ValueError, AttributeError) as exc:
            log.warning(
                "the record of health cannot be read, everything starts healthy",
                extra={"path": str(self._path), "reason": str(exc)},
            )
            return Health()
        if document.get("stamp") == self._stamp():
            for id_, sickness in health.sick.items():
                log.warning(
                    "still sick", extra={"device": id_, "gpu": sickness.gpu, "reason": sickness.reason}
                )
            return health
        for id_, sickness in health.sick.items():
            log.info(
                "was sick before the machine or the driver was started anew",
                extra={"device": id_, "gpu": sickness.gpu, "reason": sickness.reason},
            )
        return Health()

    def save(self, health: Health) -> None:
        """Raises nothing: where the file cannot be written, that is said once."""
        try:
            self.write(health)
        except OSError as exc:
            if not self._told:
                self._told = True
                log.warning(
                    "health cannot be recorded: a restart of the agent would take sick devices for healthy",
                    extra={"path": str(self._path), "reason": str(exc)},
                )

    def write(self, health: Health) -> None:
        """Saved, if it was not already. Raises OSError."""
        wanted = record(health)
        if wanted == self._saved:
            return
        scratch = self._path.with_suffix(".new")
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"stamp": self._stamp(), "health": wanted}, indent=1) + "\n")
        scratch.replace(self._path)
        self._saved, self._told = wanted, False

    def _stamp(self) -> dict[str, str]:
        """The boot, and the loaded driver: its version and, where we may see it, its address in the kernel.

        The kernel does not tell when a module was loaded; the address changes when it is loaded anew.
        """
        own, ours = "sys/kernel/random/boot_id", Path("/proc")
        modules = (line.split() for line in _read(self._proc_root / "modules").splitlines())
        address = next((words[5] for words in modules if len(words) > 5 and words[0] == "nvidia"), "")
        return {
            "boot": (_read(self._proc_root / own) or _read(ours / own)).strip(),
            "driver": _read(self._proc_root / "driver/nvidia/version").partition("\n")[0],
            "address": address,
        }


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
