"""What the shipped manifests render to, by the tools that `.ci/tools` installs."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
CHART = MANIFESTS / "helm/migplugin"
TOOLS = ROOT / ".tools/bin"
GOLDEN = Path(__file__).parents[1] / "golden/manifests"
KUBERNETES = [f"1.{minor}" for minor in range(28, 37)]
OVERLAYS = (
    "privileged",
    "gpu-operator",
    "gpu-operator-privileged",
    "openshift",
    "openshift-gpu-operator",
    "simulated",
)
NAMESPACE = {"simulated": "migplugin-simulated"}

Document = dict[str, Any]

needs_tools = pytest.mark.skipif(
    not (TOOLS.parent / "installed").exists(), reason="no helm and kubectl here; .ci/tools installs them"
)


class RenderFailed(Exception):
    """What the tool said."""


def run(*words: str | Path, text: str | None = None, cwd: Path = ROOT) -> str:
    """What a tool of ours prints. Raises RenderFailed."""
    # Nothing of this machine's: no cluster, no plugins, no proxies.
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/dev/null"}
    done = subprocess.run(
        [TOOLS / words[0], *words[1:]],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,
        cwd=cwd,
    )
    if done.returncode != 0:
        raise RenderFailed(done.stdout + done.stderr)
    return done.stdout


def kustomize(overlay: str = "") -> str:
    return run("kubectl", "kustomize", MANIFESTS / "overlays" / overlay if overlay else MANIFESTS)


def with_components(*names: str, **more: Any) -> str:
    """The base with these components, as a kustomization of somebody's own would have it."""
    with tempfile.TemporaryDirectory(dir=MANIFESTS, prefix=".test-") as folder:
        wanted = {
            "resources": ["../base"],
            "components": [f"../components/{name}" for name in names],
            **more,
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
        return run("kubectl", "kustomize", folder)


def helm(*words: str, namespace: str = "migplugin", values: Document | None = None, version: str = "") -> str:
    """What the chart renders as the release `migplugin`. `values` are a values file, `words` flags."""
    flags = ["--kube-version", version] if version else []
    return run(
        *("helm", "template", "migplugin", CHART, "--namespace", namespace),
        *("--values", "-", *flags, *words),
        text=json.dumps(values or {}),
    )


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def only(text: str, kind: str = "DaemonSet") -> Document:
    (found,) = [document for document in documents(text) if document["kind"] == kind]
    return found


def containers(document: Document) -> Iterator[Document]:
    pod = document["spec"]["template"]["spec"]
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def agent(document: Document) -> Document:
    (found,) = document["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def env(container: Document) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def without_order(value: Any) -> Any:
    """Lists whose items have names, and tolerations, in one order: theirs means nothing."""
    if isinstance(value, dict):
        return {key: without_order(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [without_order(item) for item in value]
        if all(isinstance(item, dict) and ({"name", "key"} & item.keys()) for item in items):
            return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
        return items
    return value


def invalid(documents: Iterable[Document], versions: Iterable[str]) -> list[str]:
    """What kubernetes-validate has against them, strictly, in each of these versions of Kubernetes."""
    program = (
        "import json, sys, kubernetes_validate as kv\n"
        "wanted = json.load(sys.stdin)\n"
        "for version in wanted['versions']:\n"
        "    for document in wanted['documents']:\n"
        "        try: kv.validate(document, version, strict=True)\n"
        "        except Exception as exc: print(version, document['kind'], str(exc).splitlines()[0])\n"
    )
    wanted = {"versions": list(versions), "documents": list(documents)}
    return run("../venv/bin/python", "-c", program, text=json.dumps(wanted)).splitlines()


def plain(error: RenderFailed) -> str:
    """What helm said, in one line."""
    return re.sub(r"\s+", " ", str(error))
