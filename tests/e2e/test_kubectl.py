"""The story by kubectl's words, on a make-believe API server in front of the stand-in kubelet.

It cannot say that a real cluster would take those words. It says that they are the right ones in the
right order, and that the cluster is left as it was.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kubectl
from tests.e2e.standin import NODE, StandIn, standing_in
from tests.e2e.steps import story

LABEL, TAINT = "migplugin/simulated=true", "migplugin/simulated:NoSchedule"


class Server:
    """Answers what tests/e2e/kubectl.py asks, and nothing else."""

    def __init__(self, cluster: StandIn) -> None:
        self.cluster = cluster
        self.marks: set[str] = set()
        self.manifests: list[dict[str, Any]] = []
        self.images: list[str] = []

    async def __call__(self, *words: str, documents: list[dict[str, Any]] | None = None) -> str:
        verb, *rest = [word for word in words if not word.startswith("--timeout=")]
        answer = await getattr(self, f"on_{verb}")([word for word in rest if word != "-f=-"], documents or [])
        return str(answer or "")

    async def on_get(self, words: list[str], _: object) -> str:
        what = words[0]
        if what == "namespace":
            return f"namespace/{words[1]}" if self.manifests else ""
        if what == "pods" and any("nodeName" in word for word in words):
            return "pod/agent\n" if self.manifests else ""
        if what == "pods":
            return "".join(f"pod/{name}\n" for name in self.cluster.names if name.startswith("example-"))
        if what.startswith("pod/"):
            await self.cluster.environment(what.removeprefix("pod/"))  # it runs
            status = {"phase": "Running", "containerStatuses": [{"restartCount": 0}]}
            return json.dumps({"status": status})
        node = {
            "metadata": {"name": NODE},
            "spec": {},
            "status": {
                "allocatable": {k: str(v) for k, v in self.cluster.kubelet.node()["allocatable"].items()}
            },
        }
        return json.dumps(node if what == "node" else {"items": [node]})

    async def on_label(self, words: list[str], _: object) -> None:
        self._mark(words)

    async def on_taint(self, words: list[str], _: object) -> None:
        self._mark(words)

    def _mark(self, words: list[str]) -> None:
        assert words[:2] == ["node", NODE]
        if words[2].endswith("-"):
            self.marks = {mark for mark in self.marks if not mark.startswith(words[2][:-1])}
        else:
            self.marks.add(words[2])

    async def on_apply(self, words: list[str], documents: list[dict[str, Any]]) -> None:
        assert words == ["--server-side"]
        assert self.marks == {LABEL, TAINT}
        if documents[0]["kind"] != "Pod":
            self.manifests = documents
            return
        (pod,) = documents
        (container,) = pod["spec"]["containers"]
        self.images.append(container["image"])
        (resource,) = (name for name in container["resources"]["limits"] if "/" in name)
        await self.cluster.run(pod["metadata"]["name"], resource)

    async def on_rollout(self, words: list[str], _: object) -> None:
        assert words[-1] == "--namespace=migplugin-simulated"
        if words[0] == "restart":
            await self.cluster.restart()
        else:
            await self.cluster.apply(self.manifests)

    async def on_wait(self, words: list[str], _: object) -> None:
        assert words[0] == "--for=condition=Ready"

    async def on_exec(self, words: list[str], _: object) -> str:
        place, command = words[: words.index("--")], words[words.index("--") + 1 :]
        if command == ["env"]:
            variables = await self.cluster.environment(place[1])
            return "".join(f"{name}={value}\n" for name, value in variables.items())
        assert place[1:] == ["pod/agent", "--container=migplugin"]
        if command[0] == "migplugin":
            return await self.cluster.migplugin(*command[1:])
        assert command == ["/bin/sh", "-c", "rm -rf /var/lib/migplugin/simulated/*"]
        return ""

    async def on_delete(self, words: list[str], documents: list[dict[str, Any]]) -> None:
        if documents:
            self.manifests = []
            await self.cluster.remove(documents)
        else:
            await self.cluster.delete(words[0].removeprefix("pod/"))


async def test_the_story_is_told_by_kubectl_and_leaves_the_cluster_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGPLUGIN_E2E_IMAGE", "one:1")
    monkeypatch.setenv("MIGPLUGIN_E2E_UPGRADE", "one:2")
    monkeypatch.delenv("MIGPLUGIN_E2E_NODE", raising=False)
    async with standing_in(root) as standin:
        server = Server(standin)
        monkeypatch.setattr(kubectl, "kubectl", server)
        async with kubectl.RealCluster.prepared() as cluster:
            await story(cluster)
        assert (server.marks, server.manifests) == (set(), [])
        assert standin.names == []
        assert server.images[:2] == ["one:1", "one:2"], "the pods of before and of after the upgrade"


async def test_a_simulation_of_somebody_else_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing_in(root) as standin:
        server = Server(standin)
        server.manifests = [{"kind": "Namespace"}]
        monkeypatch.setattr(kubectl, "kubectl", server)
        with pytest.raises(AssertionError, match="migplugin-simulated is there already"):
            async with kubectl.RealCluster.prepared():
                pass
        assert server.marks == set()
