"""What the two probes say, from values that the agent's parts give.

Liveness fails only for what a restart heals: an event loop that no longer turns, a gRPC server that
no longer answers. A driver that hangs, a lost GPU, a kubelet that is away: restarting would lose the
warm state and heal nothing. Readiness is what a rollout waits for: this kubelet knows every resource
that we have, and has taken its list.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping

from migplugin.telemetry.http import Page, verdict

BEAT_EVERY = 1.0
STUCK_AFTER = 10.0


class Probes:
    """`stage` is what the agent is waiting for before it serves; then `serving` says what to ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage = "starting"
        self._clock = clock
        self._beat = clock()
        self._states: Callable[[], Mapping[str, bool]] | None = None
        self._dead: Callable[[], Collection[str]] = tuple
        self._trouble: Callable[[], str] = str

    @property
    def pages(self) -> Mapping[str, Callable[[], Page]]:
        return {"/healthz": self.alive, "/readyz": self.ready}

    def serving(
        self,
        states: Callable[[], Mapping[str, bool]],
        dead: Callable[[], Collection[str]],
        trouble: Callable[[], str] = str,
    ) -> None:
        """From now on: `states` tells of each offered resource whether this kubelet has its list, `dead`
        names those whose server does not answer, and `trouble` says what is wrong with the driver, or "". All
        are called in another thread.
        """
        self._states, self._dead, self._trouble = states, dead, trouble

    def stopping(self) -> None:
        self.stage, self._states, self._dead = "stopping", None, tuple

    async def beat(self) -> None:
        """Shows that the event loop turns, until cancelled."""
        while True:
            self._beat = self._clock()
            await asyncio.sleep(BEAT_EVERY)

    def alive(self) -> Page:
        still = self._clock() - self._beat
        if still > STUCK_AFTER:
            return verdict(False, f"the event loop has not turned for {still:.0f} s")
        if dead := sorted(self._dead()):
            return verdict(False, f"no gRPC server answers for {', '.join(dead)}")
        return verdict(True, "the event loop turns")

    def ready(self) -> Page:
        if self._states is None:
            return verdict(False, self.stage)
        states = self._states()
        missing = sorted(name for name, known in states.items() if not known)
        if missing:
            return verdict(False, f"the kubelet has not taken the list of {', '.join(missing)}")
        served = f"the kubelet has {', '.join(sorted(states))}" if states else "nothing to serve"
        trouble = self._trouble()
        return verdict(True, f"{served}; the driver does not answer: {trouble}" if trouble else served)
