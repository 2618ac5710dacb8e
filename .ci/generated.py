"""Whether what is generated is what its source gives: stubs, lock files, README's settings table, the schema.

`--write` writes the table and the schema of the status document instead of comparing them.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- settings: made by `make derived` -->\n", "<!-- end of settings -->\n"


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


def schema() -> str:
    """docs/status.schema.json as `migplugin status --schema` prints it."""
    from migplugin.agentapi import document

    return document.schema() + "\n"


DERIVED = {"README.md": readme, "docs/status.schema.json": schema}


def main() -> None:
    if "--write" in sys.argv:
        for name, derive in DERIVED.items():
            (ROOT / name).write_text(derive())
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
    problems += [
        f"{name} differs from what migplugin/ gives; run `make derived`"
        for name, derive in DERIVED.items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text() != derive()
    ]
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    print("stubs, lock files, settings table and schema are what their sources give")


main()
