"""Whether what is generated is what its source gives: stubs, lock files, the README's settings table.

`--write-readme` writes the table instead of comparing it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- settings: made by `make readme` -->\n", "<!-- end of settings -->\n"


def make(target: str, where: Path) -> None:
    command = ["make", "-s", "-o", ".venv/.installed", target, f"BIN={ROOT / '.venv/bin'}"]
    subprocess.run(command, cwd=where, check=True)


def differing(one: Path, other: Path) -> list[str]:
    names = {p.relative_to(base) for base in (one, other) for p in base.rglob("*.py*") if p.suffix != ".pyc"}
    return sorted(
        str(name)
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    )


def stubs(copy: Path) -> list[str]:
    make("protos", copy)
    return [
        f"migplugin/_proto/{name} differs from what protos/ gives; run `make protos`"
        for name in differing(ROOT / "migplugin/_proto", copy / "migplugin/_proto")
    ]


def versions(lock: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def locks(copy: Path) -> list[str]:
    make("locks", copy)
    problems = [
        f"{name} differs from what pyproject.toml gives; run `make locks`"
        for name in ("requirements.lock", "requirements-dev.lock")
        if (ROOT / name).read_bytes() != (copy / name).read_bytes()
    ]
    both = versions(ROOT / "requirements-dev.lock")
    for name, found in versions(ROOT / "requirements.lock").items():
        both.setdefault(name, set()).update(found)
    problems += [f"{name} is locked in two versions: {sorted(v)}" for name, v in both.items() if len(v) > 1]
    if "://" in (ROOT / "requirements.lock").read_text() + (ROOT / "requirements-dev.lock").read_text():
        problems.append("a lock file names a host")
    return problems


def readme() -> str:
    """README.md with the settings table as settings.py gives it."""
    from migplugin.settings import markdown_table

    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"README.md: no place for the settings table between {BEGIN!r} and {END!r}")
    return before + BEGIN + markdown_table() + END + after


def main() -> None:
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(readme())
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in (
            "Makefile",
            "pyproject.toml",
            "requirements.lock",
            "requirements-dev.lock",
            "README.md",
            "LICENSE",
        ):
            shutil.copy(ROOT / name, copy / name)
        for name in ("protos", "migplugin"):
            shutil.copytree(ROOT / name, copy / name)
        problems = stubs(copy) + locks(copy)
    if readme() != (ROOT / "README.md").read_text():
        problems.append("README.md: the settings table differs from settings.py; run `make readme`")
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print("stubs, lock files and the settings table are what their sources give")


main()
