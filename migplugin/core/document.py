"""The configuration file as values: what `configfile` reads, `settings` and the core take from here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says.

    `values` by dotted path (`flags.migStrategy`), the two sections that are more than values, and
    `findings`, one sentence for each thing in the file that is not understood.
    """

    source: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    sharing: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
