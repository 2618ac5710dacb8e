"""What can be wrong with a device or a GPU, as values: what came, what that has made of it, and what was.

`health` says how one follows from the other.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from migplugin.core.inventory import DeviceId, GpuUuid, MigDevice
from migplugin.core.xid import xid

Subject: TypeAlias = DeviceId | GpuUuid


@dataclass(frozen=True, slots=True)
class Fault:
    """An XID event, repeated `count` times; `gi` and `ci` are None where it concerns the whole GPU or GI."""

    gpu: GpuUuid
    gi: int | None
    ci: int | None
    xid: int
    count: int
    first: float
    last: float


class Instance(NamedTuple):
    """What makes a MIG device the same as before: its UUID can come back on another profile (nvml.md 3.5)."""

    uuid: DeviceId
    gi: int
    ci: int
    profile: str


@dataclass(frozen=True, slots=True)
class Sickness:
    """Why something is unfit: the XIDs that came, in order, the first at `since` and one more at `last`.

    `device` is the MIG device as it was when the first came; None of a whole GPU. `idle_since` is since when
    nothing speaks against its recovery; `stays` that it has had its chance.
    """

    gpu: GpuUuid
    device: Instance | None
    xids: tuple[int, ...]
    since: float
    last: float
    idle_since: float | None = None
    stays: bool = False

    @property
    def is_contained(self) -> bool:
        return all(xid(code).is_contained for code in self.xids)

    @property
    def cause(self) -> str:
        first, *more = self.xids
        told = [str(xid(first)), *(f"XID {code}" if code >= 0 else str(xid(code)) for code in more)]
        return " and ".join((", ".join(told[:-1]), told[-1])) if more else told[0]

    @property
    def reason(self) -> str:
        return f"{self.cause}, {self.until}"

    @property
    def until(self) -> str:
        if self.stays:
            return "again within an hour: until a person acts" + (
                " or it is made anew" if self.device else ""
            )
        ways = ["its GPU is reset" if self.device is None else "it is made anew"]
        ways.append(
            "nobody has held it for a while" if self.is_contained else "the driver wants nothing done"
        )
        return f"until {' or '.join(ways)}"


class Sign(NamedTuple):
    """What the driver has against something, and since when it is seen to."""

    text: str
    since: float


class Past(NamedTuple):
    """What was sick, by UUID, and of what, until `ended`: shown to people, and acted on by nobody."""

    id: Subject
    cause: str
    ended: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """That something got well, and of what."""

    at: float
    sickness: Sickness


@dataclass(frozen=True, slots=True)
class Change:
    """Something fell sick or got well: a sentence for the log."""

    subject: Subject
    gpu: GpuUuid
    sick: bool
    reason: str


def instance_of(device: MigDevice) -> Instance:
    return Instance(device.uuid, device.gi, device.ci, device.profile)
