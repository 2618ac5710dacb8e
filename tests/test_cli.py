"""What a person sees who types something wrong, or whose terminal goes away: one line, and a code."""

import subprocess
import sys

import pytest

PROGRAM = (sys.executable, "-m", "migplugin")
STATUS = ("status", "--simulate=1xa30=1g.6gb")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("serve", "--mig-strateg=none"), "no such option '--mig-strateg'"),
        (("serve", "now"), "got unexpected extra argument (now)"),
        (("sreve",), "no such command 'sreve'"),
        (("status", "-o", "yaml"), "invalid value for '-o' / '--output': 'yaml' is not one of"),
        (("sim", "create"), "missing argument 'GPU'"),
        (("sim", "--state", "/nonexistent", "show"), "there is no simulated driver in /nonexistent"),
    ],
)
def test_wrong_words_are_one_line_that_says_what_to_do(words: tuple[str, ...], said: str) -> None:
    ran = subprocess.run((*PROGRAM, *words), capture_output=True, text=True, check=False)
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("state: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"migplugin: {said}")
    assert "--help" in lines[0] or "make one with" in lines[0]
    assert ran.returncode == (1 if "/nonexistent" in words else 2)


def test_no_words_at_all_are_answered_with_help() -> None:
    ran = subprocess.run(PROGRAM, capture_output=True, text=True, check=False)
    assert "Commands:" in ran.stdout + ran.stderr


def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ran = subprocess.run((*PROGRAM, *STATUS), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.stderr.splitlines()[-1] == "migplugin: cannot write the output: no space left on device"
    assert "Traceback" not in ran.stderr
    assert ran.returncode == 1


@pytest.mark.parametrize("shell", ["{} >&-", "{} | true", "{} 2>&-"])
def test_output_that_nobody_reads_is_no_traceback(shell: str) -> None:
    command = shell.format(" ".join((*PROGRAM, *STATUS)))
    ran = subprocess.run(("sh", "-c", command), capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr
