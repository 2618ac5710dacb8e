from collections.abc import Iterator

import pytest

from migplugin.nvml import events
from tests.nvml.machine import Machine, machine


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a session waits for the event thread: not for half a second, a hundred times over."""
    monkeypatch.setattr(events, "WAIT_MS", 20)


@pytest.fixture
def place() -> Iterator[Machine]:
    """One A100 with MIG on and nothing on it."""
    with machine("1xa100-40gb=") as made:
        yield made
