"""What the loops need of the edges; mypy proves in `app` that the edges fit."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from migplugin.core.allocation import EditOptions
from migplugin.core.decide import Usage
from migplugin.core.health import Health
from migplugin.core.inventory import DeviceId, Inventory
from migplugin.core.sickness import Fault


class Driver(Protocol):
    @property
    def events_work(self) -> bool:
        """Whether the driver tells of every change of geometry by itself."""

    @property
    def overdue_at(self) -> float | None:
        """When, on the monotonic clock, the driver counts as hung if nothing happens; None: it does not."""

    async def look(self, *, suspect: bool = False, processes_of: AbstractSet[str] = frozenset()) -> Inventory:
        """Everything the driver says now; `suspect` where an event said that something changed. Whether
        something runs on them is asked of those ids alone.

        Raises DriverError, of which DriverTimeout means that it did not answer in time.
        """

    def faults(self) -> tuple[Fault, ...]:
        """The XIDs since the last call, merged by scope."""


class UsageSource(Protocol):
    async def read(self, began: float) -> Usage:
        """Who holds what; `began` is the time before the call, on `World.now`'s clock. Raises nothing."""


class HealthRecord(Protocol):
    def load(self, now: float) -> Health:
        """The health that an agent before this one left; `now` is on `World.now`'s clock. Raises nothing."""

    def save(self, health: Health) -> bool:
        """Whether `health` is remembered beyond the end of this process; cheap where nothing changed. Raises
        nothing.
        """


@dataclass(frozen=True, slots=True)
class Readiness:
    """`unready` says why no container can have a device yet; not `complete`: worth another try soon."""

    unready: Mapping[DeviceId, str] = field(default_factory=dict)
    complete: bool = True


class Preparation(Protocol):
    async def prepare(self, inventory: Inventory, edits: EditOptions) -> Readiness:
        """Makes what containers will need of these devices, before they are offered. Raises nothing."""
