"""docs/operations.md has every ERROR and WARNING line that the agent can print, and no other."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.manifests.render import ROOT, env

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


def test_a_node_is_named_as_every_command_takes_it() -> None:
    # `node/x`, as -o name prints it, is what kubectl taint does not take.
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = document.read_text()
        assert not re.search(r"kubectl taint node/|get nodes? -o name|taint \"?\$NODE", text), document.name


def test_what_the_simulations_document_does_can_be_done_in_that_order(tmp_path: Path) -> None:
    text = (ROOT / "docs/simulation.md").read_text()
    words = [shlex.split(line, comments=True) for line in re.findall(r"^    sim (.+)$", text, re.MULTILINE)]
    assert len(words) > 5
    with (ROOT / "manifests/components/simulated/daemonset.yaml").open() as file:
        (init,) = yaml.safe_load(file)["spec"]["template"]["spec"]["initContainers"]
    for each in (["init", env(init)["SIMULATED_NODE"]], *words):
        done = subprocess.run(
            [sys.executable, "-m", "migplugin", "sim", "--state", str(tmp_path / "state"), *each],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (each, done.stderr)
