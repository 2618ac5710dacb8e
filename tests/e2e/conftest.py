import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def root() -> Iterator[Path]:
    """The file system of a node, in short: paths of sockets are not long."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="e2e-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
