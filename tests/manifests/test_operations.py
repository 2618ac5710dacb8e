"""docs/operations.md has every ERROR and WARNING line that the agent can print, and no other."""

import ast
import re
from collections.abc import Iterator

from tests.manifests.render import ROOT

TEXT = (ROOT / "docs/operations.md").read_text()
LOUD = {"warning", "error", "exception", "critical"}


def printed() -> Iterator[tuple[str, str]]:
    """The phrase and the level of each call of a logger that is loud, in the whole program."""
    for path in sorted((ROOT / "migplugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "log"):
                continue
            if node.func.attr in LOUD:
                phrase = ast.literal_eval(node.args[0])
                yield phrase, "WARNING" if node.func.attr == "warning" else "ERROR"
            elif node.func.attr == "log":
                yield "fell sick", "WARNING"  # the one line whose level depends
                assert "fell sick" in path.read_text()


def told(level: str) -> set[str]:
    """The phrases in the tables below the headings of this level."""
    parts = re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]
    mine = [part for part in parts if part.startswith(level) and "attention" not in part.splitlines()[0]]
    return {phrase for part in mine for phrase in re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)}


def test_every_error_is_told() -> None:
    assert told("ERROR") == {phrase for phrase, level in printed() if level == "ERROR"}


def test_every_warning_is_told() -> None:
    assert told("WARNING") == {phrase for phrase, level in printed() if level == "WARNING"} - {"attention"}


def test_every_path_that_the_documents_name_is_there() -> None:
    for document in ("operations.md", "simulation.md"):
        text = (ROOT / "docs" / document).read_text()
        named = set(re.findall(r"`?((?:manifests/)?(?:overlays|components|base)/[\w./-]*\w)", text))
        assert named
        for path in named:
            assert (ROOT / "manifests" / path.removeprefix("manifests/")).exists(), path
