from collections.abc import Iterator

import pytest

from migplugin.nvml import events
from tests.nvml.machine import Machine, machine


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a real GPU is there only when asked for, with `-m gpu`."""
    if "gpu" in str(config.getoption("markexpr")):
        return
    real = [item for item in items if item.get_closest_marker("gpu")]
    if real:
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a session waits for the event thread: not for half a second, a hundred times over."""
    monkeypatch.setattr(events, "WAIT_MS", 20)


@pytest.fixture
def place() -> Iterator[Machine]:
    """One A100 with MIG on and nothing on it."""
    with machine("1xa100-40gb=") as made:
        yield made
