"""The document on disk: whole or not at all, the same or replaced, and what is said where it cannot be."""

import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migplugin.core.cdi import FILE_NAME
from migplugin.errors import CdiError
from migplugin.kubelet.cdi import CdiFile, text


def document(count: int = 1) -> dict[str, Any]:
    return {"devices": [{"name": f"MIG-{number}"} for number in range(count)]}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_the_file_and_its_directories_are_there_for_everyone_to_read(tmp_path: Path) -> None:
    file = CdiFile(tmp_path / "run/cdi", FILE_NAME)
    file.put(document())
    assert file.path.name == "k8s.device-plugin.nvidia.com-gpu.json"
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("run", "run/cdi")} == {0o755}
    assert file.read() == json.loads(file.path.read_text()) == document()
    assert names(file.path.parent) == [FILE_NAME]


def test_the_same_document_is_not_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = CdiFile(tmp_path, FILE_NAME)
    with caplog.at_level(logging.INFO):
        file.put(document())
        before = file.path.stat()
        file.put(document())
        assert file.path.stat().st_ino == before.st_ino
        file.put(document(2))
    assert file.path.stat().st_ino != before.st_ino
    assert [record.getMessage() for record in caplog.records] == ["cdi document"] * 2


@pytest.mark.parametrize("stale", [b'{"devices": [{"name": "stale"}]}', b"\xff not json", b""])
def test_what_another_wrote_under_our_name_is_replaced(tmp_path: Path, stale: bytes) -> None:
    file = CdiFile(tmp_path, FILE_NAME)
    (tmp_path / "nvidia.com-gpu.json").write_bytes(stale)
    file.path.write_bytes(stale)
    file.put(document())
    assert file.path.read_text() == text(document())
    assert (tmp_path / "nvidia.com-gpu.json").read_bytes() == stale, "another's file is another's"


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(text(document()))
    file = CdiFile(tmp_path, FILE_NAME)
    file.path.symlink_to(elsewhere)
    file.put(document())
    assert not file.path.is_symlink()
    assert elsewhere.exists()


def test_a_document_that_not_everyone_may_read_is_written_again(tmp_path: Path) -> None:
    file = CdiFile(tmp_path, FILE_NAME)
    file.put(document())
    file.path.chmod(0o600)
    file.put(document())
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o644


def test_without_a_document_there_is_no_file_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = CdiFile(tmp_path / "cdi", FILE_NAME)
    with caplog.at_level(logging.INFO):
        file.put(None)
        assert not file.path.parent.exists()
        file.put(document())
        caplog.clear()
        file.put(None)
        file.put(None)
    assert not file.path.exists()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["cdi document removed"]


def test_a_directory_in_its_place_is_an_error_with_advice(tmp_path: Path) -> None:
    file = CdiFile(tmp_path, FILE_NAME)
    file.path.mkdir()
    assert file.read() is None
    for wanted in (document(), None):
        with pytest.raises(CdiError, match="something else is in its place, remove it"):
            file.put(wanted)
    file.path.rmdir()
    file.put(document())
    assert names(tmp_path) == [FILE_NAME]


def test_a_file_where_the_directory_should_be_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "cdi").write_text("")
    file = CdiFile(tmp_path / "cdi", FILE_NAME)
    with pytest.raises(CdiError, match="something else is in its place"):
        file.put(document())
    file.put(None)


WRITER = """
import os, sys
from pathlib import Path
from migplugin.kubelet import cdi
file = cdi.CdiFile(Path(sys.argv[1]), cdi_name := sys.argv[2])
real = getattr(os, sys.argv[3])
def die(*arguments):
    os.kill(os.getpid(), 9)
setattr(os, sys.argv[3], die)
file.put({"devices": [{"name": "new"}] * 1000})
"""


@pytest.mark.parametrize("call", ["fchmod", "fsync"])
def test_a_writer_that_is_killed_leaves_the_old_document_and_no_second_one(tmp_path: Path, call: str) -> None:
    file = CdiFile(tmp_path, FILE_NAME)
    file.put(document())
    killed = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), FILE_NAME, call], check=False)
    assert killed.returncode == -9
    assert file.read() == document()
    left = [name for name in names(tmp_path) if name != FILE_NAME]
    assert len(left) == 1
    assert not left[0].endswith((".json", ".yaml")), "a runtime would read it"
    file.put(document(2))
    assert names(tmp_path) == [FILE_NAME], "what it left is gone with the next one"
