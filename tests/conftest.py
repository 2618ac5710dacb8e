import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="mig-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
