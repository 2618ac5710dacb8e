"""A real cluster, whichever KUBECONFIG names, by kubectl: kind, k3s, or a large one.

One node is labelled and tainted for simulated GPUs, and is as it was afterwards. The image must be there or
pullable. What can be said by variables:

MIGPLUGIN_E2E_IMAGE    the image (default: the manifests' own)
MIGPLUGIN_E2E_UPGRADE  the image that the upgrade goes to (default: the same)
MIGPLUGIN_E2E_NODE     the node (default: the first that takes pods and shows no GPU)
"""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from tests.e2e.steps import manifests as shipped
from tests.manifests.render import TOOLS

Document = dict[str, Any]
WITHIN = 180.0
LOOK_EVERY = 1.0
NAME, NAMESPACE = "migplugin", "migplugin-simulated"
TAINT = "migplugin/simulated"


class RealCluster:
    def __init__(self, node: str) -> None:
        self._node = node
        self._image = os.environ.get("MIGPLUGIN_E2E_IMAGE", "")
        self._applied = False

    @classmethod
    @contextlib.asynccontextmanager
    async def prepared(cls) -> AsyncIterator[Self]:
        """The cluster, with one node labelled and tainted meanwhile."""
        node = os.environ.get("MIGPLUGIN_E2E_NODE") or _choose(
            json.loads(await kubectl("get", "nodes", "-o=json"))
        )
        there = await kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "-o=name")
        assert not there, f"{NAMESPACE} is there already, and may be somebody's; delete it first"
        cluster = cls(node)
        await kubectl("label", "node", node, "migplugin/simulated=true", "--overwrite")
        await kubectl("taint", "node", node, f"{TAINT}:NoSchedule", "--overwrite")
        try:
            yield cluster
        finally:
            await cluster.remove(shipped())
            await kubectl("taint", "node", node, f"{TAINT}:NoSchedule-")
            await kubectl("label", "node", node, "migplugin/simulated-")

    async def apply(self, manifests: list[Document]) -> None:
        if self._applied:
            self._image = os.environ.get("MIGPLUGIN_E2E_UPGRADE", self._image)
        self._applied = True
        for document in manifests:
            if self._image and document["kind"] in {"DaemonSet", "Deployment"}:
                spec = document["spec"]["template"]["spec"]
                for container in (*spec.get("initContainers", []), *spec["containers"]):
                    container["image"] = self._image
        await kubectl("apply", "--server-side", "-f=-", documents=manifests)
        await self._rolled_out(f"daemonset/{NAME}")
        await self._rolled_out("deployment/example")

    async def restart(self) -> None:
        await kubectl("rollout", "restart", f"daemonset/{NAME}", f"--namespace={NAMESPACE}")
        await self._rolled_out(f"daemonset/{NAME}")

    async def migplugin(self, *words: str) -> str:
        return await self._in_agent("migplugin", *words)

    async def run(self, name: str, resource: str) -> None:
        (example,) = [d for d in shipped() if d["kind"] == "Deployment"]
        spec = example["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        if self._image:
            container["image"] = self._image
        limits = {key: value for key, value in container["resources"]["limits"].items() if "/" not in key}
        container["resources"]["limits"] = {**limits, resource: 1}
        metadata = {"name": name, "namespace": NAMESPACE}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        await kubectl("apply", "--server-side", "-f=-", documents=[pod])
        await self._ready(f"pod/{name}")

    async def delete(self, name: str) -> None:
        await kubectl("delete", f"pod/{name}", f"--namespace={NAMESPACE}", f"--timeout={WITHIN:g}s")

    async def environment(self, name: str) -> Mapping[str, str]:
        pod = json.loads(await kubectl("get", f"pod/{name}", f"--namespace={NAMESPACE}", "-o=json"))
        assert pod["status"]["phase"] == "Running"
        assert [status["restartCount"] for status in pod["status"]["containerStatuses"]] == [0]
        text = await kubectl("exec", f"--namespace={NAMESPACE}", name, "--", "env")
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    async def examples(self) -> list[Mapping[str, str]]:
        found = await kubectl(
            *("get", "pods", f"--namespace={NAMESPACE}", "-l=app=example", "-o=name"),
            "--field-selector=status.phase=Running",
        )
        return [await self.environment(name.removeprefix("pod/")) for name in found.split()]

    async def until_allocatable(self, counts: Mapping[str, int]) -> None:
        shown: dict[str, str] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WITHIN):
                while True:
                    node = json.loads(await kubectl("get", "node", self._node, "-o=json"))
                    shown = node["status"]["allocatable"]
                    if all(int(shown.get(name, "0")) == count for name, count in counts.items()):
                        return
                    await asyncio.sleep(LOOK_EVERY)
        raise AssertionError(f"{self._node} shows {shown}, expected {dict(counts)}")

    async def remove(self, manifests: list[Document]) -> None:
        with contextlib.suppress(AssertionError):  # it may never have run
            await self._in_agent("/bin/sh", "-c", "rm -rf /var/lib/migplugin/simulated/*")
        await kubectl("delete", "--ignore-not-found", f"--timeout={WITHIN:g}s", "-f=-", documents=manifests)

    async def _in_agent(self, *words: str) -> str:
        selector = f"--field-selector=spec.nodeName={self._node},status.phase=Running"
        label = "-l=app.kubernetes.io/name=migplugin"
        names = await kubectl("get", "pods", f"--namespace={NAMESPACE}", label, selector, "-o=name")
        assert names, f"no pod of the agent runs on {self._node}"
        return await kubectl(
            "exec", f"--namespace={NAMESPACE}", names.split()[0], f"--container={NAME}", "--", *words
        )

    async def _rolled_out(self, what: str) -> None:
        await kubectl("rollout", "status", what, f"--namespace={NAMESPACE}", f"--timeout={WITHIN:g}s")

    async def _ready(self, what: str) -> None:
        await kubectl(
            "wait", "--for=condition=Ready", what, f"--namespace={NAMESPACE}", f"--timeout={WITHIN:g}s"
        )


def _choose(nodes: Document) -> str:
    for node in nodes["items"]:
        taints = [taint["key"] for taint in node["spec"].get("taints", []) if taint["key"] != TAINT]
        shown = node["status"]["allocatable"].items()
        gpus = [name for name, count in shown if name.startswith("nvidia.com/") and count != "0"]
        if not taints and not gpus and not node["spec"].get("unschedulable"):
            return str(node["metadata"]["name"])
    raise AssertionError("no node without a taint and without GPUs; name one by MIGPLUGIN_E2E_NODE")


async def kubectl(*words: str, documents: list[Document] | None = None) -> str:
    """What kubectl prints. AssertionError with its own words where it fails."""
    program = TOOLS / "kubectl" if (TOOLS / "kubectl").exists() else shutil.which("kubectl")
    assert program, "KUBECONFIG is set, and there is no kubectl: neither of .ci/tools nor on the PATH"
    process = await asyncio.create_subprocess_exec(
        *(program, *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    everything = {"apiVersion": "v1", "kind": "List", "items": documents or []}
    out, err = await process.communicate(json.dumps(everything).encode() if documents else None)
    assert process.returncode == 0, f"kubectl {' '.join(words)}: {err.decode()}"
    return out.decode()
