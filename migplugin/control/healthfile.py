"""The small file that keeps sick devices sick when the agent is started anew.

It lies in a directory of its own, and the kubelet removes nothing but sockets from its own (kubelet.md 1.2).
It is written when something fell sick or got well and never flushed: it must outlive the process,
not the machine. A file of before the last boot is history: said, and not acted on, for that may have cured
what is in it; so may loading the driver anew, which the health itself knows. Lost or corrupt: everything
starts clean, and that is said.
"""

import json
import logging
from pathlib import Path
from typing import Any

from migplugin.core.health import Health, ended
from migplugin.core.health_record import record, restore

log = logging.getLogger(__name__)

NAME = "health.json"
MAX_BYTES = 16 << 20


class HealthFile:
    """One file in `directory`, which is made with it. `proc_root` tells which boot it is of.

    `unreadable` says why nothing could be loaded from it, "" where it could, or where there is none.
    """

    def __init__(self, directory: Path, proc_root: Path) -> None:
        self._path = directory / NAME
        self._proc_root = proc_root
        self._saved: dict[str, Any] | None = None
        self._told = False
        self.unreadable = ""

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
        except (OSError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
            self.unreadable = str(exc)
            log.warning(
                "the record of health cannot be read, everything starts healthy",
                extra={"path": str(self._path), "reason": str(exc)},
            )
            return Health()
        if document.get("boot") == self._boot():
            for id_, sickness in health.sick.items():
                log.warning(
                    "still sick", extra={"device": id_, "gpu": sickness.gpu, "reason": sickness.reason}
                )
            return health
        for id_, sickness in health.sick.items():
            log.info(
                "was sick before the machine was started anew",
                extra={"device": id_, "gpu": sickness.gpu, "reason": sickness.reason},
            )
        return ended(health, "the machine was started anew")

    def save(self, health: Health) -> bool:
        """Whether it is saved. Raises nothing: where the file cannot be written, that is said once."""
        try:
            self.write(health)
        except OSError as exc:
            if not self._told:
                self._told = True
                log.warning(
                    "health cannot be recorded: a restart of the agent would take sick devices for healthy",
                    extra={"path": str(self._path), "reason": str(exc)},
                )
            return False
        return True

    def write(self, health: Health) -> None:
        """Saved, if it was not already. Raises OSError."""
        wanted = record(health)
        if wanted == self._saved:
            return
        scratch = self._path.with_suffix(".new")
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"boot": self._boot(), "health": wanted}, indent=1) + "\n")
        scratch.replace(self._path)
        self._saved, self._told = wanted, False

    def _boot(self) -> str:
        own, ours = "sys/kernel/random/boot_id", Path("/proc")
        return (_read(self._proc_root / own) or _read(ours / own)).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
