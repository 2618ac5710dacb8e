"""Unix sockets by plain system calls: what is said about what is wrong with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.unixsocket import explain, identity, umask
from tests.fakes.sockets import left_behind, listening


def test_what_is_wrong_with_a_socket_is_said_in_one_line(short: Path) -> None:
    path = short / "kubelet.sock"
    assert "no such socket" in explain(path, "the kubelet")
    assert "no such directory" in explain(short / "x" / "kubelet.sock", "the kubelet")
    path.touch()
    assert "not a socket" in explain(path, "the kubelet")
    path.unlink()
    left_behind(path)
    assert "the kubelet that made this socket is gone" in explain(path, "the kubelet")
    path.unlink()
    with listening(path):
        assert explain(path, "the kubelet") == ""
    assert "too long" in explain(Path("/tmp") / ("x" * 120), "the kubelet")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_forbidden_socket_says_that_root_is_needed(short: Path) -> None:
    with listening(short / "kubelet.sock"):
        short.chmod(0o700)
        code = (
            "import os, sys; from pathlib import Path; from migplugin.unixsocket import explain\n"
            "os.setuid(65534); print(explain(Path(sys.argv[1]), 'the kubelet'))"
        )
        command = [sys.executable, "-c", code, str(short / "kubelet.sock")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "permission denied; run as root" in said


def test_a_socket_is_told_from_a_later_one_at_the_same_path(short: Path) -> None:
    path = short / "a.sock"
    assert identity(path) is None
    left_behind(path)
    first = identity(path)
    path.rename(short / "b.sock")
    left_behind(path)
    assert identity(path) != first is not None


def test_the_umask_is_as_it_was_afterwards(short: Path) -> None:
    with umask(0o022):
        with umask(0o177):
            left_behind(short / "a.sock")
        left_behind(short / "b.sock")
    assert [(short / name).stat().st_mode & 0o777 for name in ("a.sock", "b.sock")] == [0o600, 0o755]
