"""What is tested is what is shipped, and it has one version everywhere."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import migplugin
from migplugin import __version__

ROOT = Path(__file__).parents[1]
TESTED = Path(os.environ.get("MIGPLUGIN_TESTED", "/nonexistent"))

of_the_wheel = pytest.mark.skipif(
    not TESTED.exists(), reason="these are the files of the source tree; make test runs the wheel's"
)


def files(package: Path) -> dict[str, bytes]:
    found = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(package)): path.read_bytes() for path in found}


@of_the_wheel
def test_what_the_tests_import_is_the_wheel_and_it_is_no_older_than_this_tree() -> None:
    package = Path(migplugin.__file__).parent
    assert package.is_relative_to(TESTED)
    assert files(package) == files(ROOT / "migplugin")
    assert importlib.metadata.version("migplugin") == __version__


@of_the_wheel
@pytest.mark.parametrize("words", [(sys.executable, "-m", "migplugin"), ("migplugin",), ("config-manager",)])
def test_the_programs_that_tests_start_are_those_of_the_wheel(words: tuple[str, ...]) -> None:
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONVERBOSE": "1"}
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True, env=env)
    imported = {Path(path) for path in re.findall(r"(/\S*/migplugin/__init__\.py)\b", done.stderr)}
    assert imported == {Path(migplugin.__file__)}


def test_one_version_is_named_everywhere() -> None:
    chart = yaml.safe_load((ROOT / "manifests/helm/migplugin/Chart.yaml").read_text())
    (image,) = yaml.safe_load((ROOT / "manifests/components/image/kustomization.yaml").read_text())["images"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    named = {
        "Chart.yaml version": chart["version"],
        "Chart.yaml appVersion": chart["appVersion"],
        "components/image newTag": image["newTag"],
        "CHANGELOG.md": headings[0],
    }
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Dockerfile"):
        for number, found in enumerate(re.findall(r"(?:migplugin:|VERSION=)(\d[\w.]*\d)", path.read_text())):
            named[f"{path.name} {number}"] = found
    assert named == dict.fromkeys(named, __version__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__), "a chart wants a version that is semantic"


def test_every_file_that_the_threat_notes_lean_on_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / "docs/threats.md").read_text()))
    assert len(named) > 10
    for path in named:
        assert (ROOT / "migplugin" / path).exists(), path


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), (document.name, target)
