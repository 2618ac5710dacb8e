"""Follows the configuration while the agent runs: a changed file, or SIGHUP, applies without a restart.

A mounted ConfigMap changes by a swapped link in its directory, so the directory is watched and the
whole configuration resolved again: flags and variables still outrank the file. What cannot be taken
leaves the last good configuration in force and is said once. A few settings are read once, when parts
are built; a change of these is said, too.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from migplugin.aio import DirectoryWatch, first_of, keep_running
from migplugin.errors import InputError
from migplugin.settings import Settings, describe

log = logging.getLogger(__name__)

SETTLE = 0.1  # a ConfigMap's swap and an editor's save are several steps
NEEDS_RESTART = frozenset(
    {
        "cdi_disable_hooks",
        "cdi_root",
        "dev_root",
        "driver_root",
        "driver_root_ctr_path",
        "fail_on_init_error",
        "http_listen",
        "nvidia_cdi_hook_path",
        "nvml_timeout",
        "state_dir",
    }
)


class Reload:
    """Calls `apply` with each new configuration that can be taken. It may raise InputError, too."""

    def __init__(
        self, settings: Settings, resolve: Callable[[], Settings], apply: Callable[[Settings], None]
    ) -> None:
        self.settings = settings
        self._resolve = resolve
        self._apply = apply
        self._asked = asyncio.Event()
        self._refused = ""

    def ask(self) -> None:
        """Look again, soon."""
        self._asked.set()

    async def run(self) -> None:
        """Follows until cancelled."""
        watches = [
            asyncio.ensure_future(keep_running("config", DirectoryWatch(directory, self.ask).run))
            for directory in _directories(self.settings.config_file)
        ]
        try:
            while True:
                await self._asked.wait()
                await first_of(asyncio.sleep(SETTLE))
                self._asked.clear()
                self._look()
        finally:
            for watch in watches:
                watch.cancel()

    def _look(self) -> None:
        try:
            new = self._resolve()
            if new == self.settings:
                self._refused = ""
                return
            self._apply(new)
        except InputError as exc:
            if str(exc) != self._refused:
                log.error(  # noqa: TRY400  the fault is in the file, not here
                    "configuration not taken, the last good one stays", extra={"reason": str(exc)}
                )
            self._refused = str(exc)
            return
        self._refused = ""
        old = {name: value for name, value, _ in describe(self.settings)}
        changed = {name: value for name, value, _ in describe(new) if value != old[name]}
        log.info("configuration taken", extra={"source": new.config_file or None, **changed})
        if late := sorted(NEEDS_RESTART & changed.keys()):
            log.warning("these settings take effect with a restart", extra={"settings": late})
        for finding in new.document.findings:
            if finding not in self.settings.document.findings:
                log.warning("attention", extra={"reason": finding})
        self.settings = new


def _directories(config_file: str) -> set[Path]:
    """Where a change of the file shows: beside it and, if it is a link as config-manager makes it, there."""
    if not config_file:
        return set()
    path = Path(config_file)
    return {path.parent, (path.parent / path.readlink()).parent} if path.is_symlink() else {path.parent}
