"""A cluster of one node: the stand-in kubelet, and pods that are processes of this machine.

A pod is run from its rendered manifest as the kubelet and a runtime would: init containers first, command,
args, variables and mounts as they are written there, ready when its probe says so. There is no mount
namespace, so that this works everywhere: each path of a container is exchanged for what is mounted there,
or for a place in the container's own root, which is read-only and must still be empty at the end.
Capabilities are dropped where this process may do so.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

from migplugin.settings import TABLE, Settings, resolve
from migplugin.sim.kubelet import Container, Kubelet, Pod

Document = dict[str, Any]
PATIENCE = 30.0
PROBE_PERIOD = 0.05
BIN = Path(sys.executable).parent
NODE = "node-1"
LABELS = {"migplugin/simulated": "true", "kubernetes.io/hostname": NODE}
TAINT = ("migplugin/simulated", "NoSchedule")
OF_THE_NODE = ("/proc", "/sys")
CAP_SYS_ADMIN = 21


class Process:
    """One container as a process; what it says is kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: list[str] = []
        self._changed = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.said.append(line.decode().rstrip())
            self._changed.set()
        self._changed.set()

    async def ended(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), PATIENCE)
        await self._reader
        return code

    async def port(self) -> int:
        """Where its probes are answered: the agent says so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while self.process.returncode is None:
                    for line in self.said:
                        if found := re.search(r" probes .*port=(\d+)", line):
                            return int(found[1])
                    self._changed.clear()
                    await self._changed.wait()
        raise AssertionError(f"it does not answer probes; it said: {self.said}")

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()


class Sandbox:
    """The mounts of one container: where a path of it is on this machine."""

    def __init__(self, node: Path, template: Document, container: Document, image: Path) -> None:
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        self._image = image
        self._mounts = {
            mount["mountPath"]: _source(node, volumes[mount["name"]])
            for mount in container.get("volumeMounts", [])
        }

    def path(self, path: str) -> str:
        for mounted in sorted(self._mounts, key=len, reverse=True):
            if path == mounted or path.startswith(mounted + "/"):
                return str(self._mounts[mounted]) + path[len(mounted) :]
        return path if path.startswith(OF_THE_NODE) else f"{self._image}{path}"

    def text(self, text: str) -> str:
        """`text` with each path below a mount exchanged."""
        for mounted in sorted(self._mounts, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(mounted)}(?![\w.-])", str(self._mounts[mounted]), text)
        return text


def _source(node: Path, volume: Document) -> Path:
    if "configMap" in volume:
        return node / "configmaps" / str(volume["configMap"]["name"])
    if "emptyDir" in volume:
        empty = node / "emptydirs" / str(volume["name"])
        empty.mkdir(parents=True, exist_ok=True)
        empty.chmod(0o777)
        return empty
    host = node / str(volume["hostPath"]["path"]).lstrip("/")
    if volume["hostPath"]["type"] == "DirectoryOrCreate":
        host.mkdir(parents=True, exist_ok=True)
    assert host.is_dir(), f"FailedMount: {host} is not a directory"
    return host


class StandIn:
    """`root` is the node's file system, in short: paths of sockets are not long."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kubelet = Kubelet(root / "var/lib/kubelet")
        self._image = root / "image"
        self._image.mkdir()
        self._template: Document = {}
        self._agent: Process | None = None
        self._pods: dict[str, Pod] = {}

    @property
    def names(self) -> list[str]:
        """The pods that are there, but the agent's."""
        return list(self._pods)

    async def apply(self, manifests: list[Document]) -> None:
        kinds = {document["kind"]: document for document in manifests}
        config = kinds["ConfigMap"]
        directory = self.root / "configmaps" / config["metadata"]["name"]
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in config["data"].items():
            (directory / name).write_text(text)
        template = kinds["DaemonSet"]["spec"]["template"]
        assert kinds["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] == 0
        labels = template["metadata"]["labels"]
        assert kinds["DaemonSet"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if template != self._template:
            self._template = template
            await self.restart()
        deployment = kinds["Deployment"]["spec"]
        for number in range(deployment["replicas"]):
            (container,) = deployment["template"]["spec"]["containers"]
            _schedule(deployment["template"]["spec"])
            ((resource, count),) = (
                (name, count) for name, count in container["resources"]["limits"].items() if "/" in name
            )
            assert count == 1
            await self.run(f"example-{number}", resource)

    async def restart(self) -> None:
        await self._stop()
        _schedule(self._template["spec"])
        for container in self._template["spec"].get("initContainers", []):
            process = await self._start(container)
            assert await process.ended() == 0, process.said
        (container,) = self._template["spec"]["containers"]
        self._agent = await self._start(container)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            await self._until_probed(self._agent, container[probe]["httpGet"]["path"])

    async def migplugin(self, *words: str) -> str:
        (container,) = self._template["spec"]["containers"]
        process = await self._start({**container, "args": [*words]}, errors=False)
        assert await process.ended() == 0, process.said
        return "\n".join(process.said)

    async def status(self) -> Document:
        """What `migplugin status` says in the agent's container."""
        (container,) = self._template["spec"]["containers"]
        words = ["status", "--output=json", *container["args"][1:]]
        process = await self._start({**container, "args": words}, errors=False)
        assert await process.ended() == 0, process.said
        status = json.loads("\n".join(process.said))
        assert isinstance(status, dict)
        return status

    async def run(self, name: str, resource: str) -> None:
        if name in self._pods:
            return
        # A scheduler sends it when the node has one to spare.
        held = sum(resource in c.requests for pod in self.kubelet.pods() for c in pod.containers)
        await self.kubelet.until(lambda k: (k.allocatable(resource) or 0) > held, timeout=PATIENCE)
        pod = self._pods[name] = Pod(name, (Container("main", {resource: 1}),))
        status = await self.kubelet.admit(pod)
        assert status.phase == "Running", status

    async def delete(self, name: str) -> None:
        await self.kubelet.delete(self._pods.pop(name))

    async def environment(self, name: str) -> Mapping[str, str]:
        status = self.kubelet.status(self._pods[name])
        assert status.phase == "Running"
        return status.containers["main"].envs

    async def examples(self) -> list[Mapping[str, str]]:
        return [await self.environment(name) for name in self._pods if name.startswith("example-")]

    async def until_allocatable(self, counts: Mapping[str, int]) -> None:
        def shown(kubelet: Kubelet) -> bool:
            return all((kubelet.allocatable(name) or 0) == count for name, count in counts.items())

        try:
            await self.kubelet.until(shown, timeout=PATIENCE)
        except TimeoutError as exc:
            raise AssertionError(f"{exc}; the agent said: {self._agent and self._agent.said}") from exc

    async def remove(self, manifests: list[Document]) -> None:
        await self._stop()
        for name in list(self._pods):
            await self.delete(name)
        left = [path.name for path in self.kubelet.socket.parent.glob("migplugin-*.sock")]
        assert left == []
        assert list(self._image.iterdir()) == [], "its own root file system is read-only"

    async def kill(self) -> None:
        if self._agent is not None:
            await self._agent.kill()

    async def _stop(self) -> None:
        if self._agent is not None:
            agent, self._agent = self._agent, None
            agent.process.terminate()
            assert await agent.ended() == 0, agent.said
            assert not [line for line in agent.said if " ERROR " in line or "Traceback" in line], agent.said
            (container,) = self._template["spec"]["containers"]
            lacks = [line for line in agent.said if "CAP_SYS_ADMIN" in line]
            assert len(lacks) == (not is_admin(container["securityContext"])), agent.said

    async def _start(self, container: Document, *, errors: bool = True) -> Process:
        sandbox = Sandbox(self.root, self._template, container, self._image)
        given = {entry["name"]: _value(entry) for entry in container["env"]}
        env = {name: sandbox.text(value) for name, value in given.items()}
        if container["command"] == ["migplugin"]:
            env |= _own_paths(sandbox, given) | _own_port(container, given)
        words = [sandbox.text(word) for word in (*container["command"], *container["args"])]
        return Process(
            await asyncio.create_subprocess_exec(
                *(*confined(container["securityContext"]), shutil.which(words[0], path=str(BIN)) or words[0]),
                *words[1:],
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT if errors else asyncio.subprocess.DEVNULL,
                env={"PATH": f"{BIN}:{os.environ['PATH']}", **env},
            )
        )

    async def _until_probed(self, process: Process, path: str) -> None:
        port = await process.port()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not await _answers(port, path):
                    assert process.process.returncode is None, process.said
                    await asyncio.sleep(PROBE_PERIOD)
                return
        raise AssertionError(f"{path} did not say yes within {PATIENCE:g} s; the agent said: {process.said}")


def _schedule(spec: Document) -> None:
    """The scheduler's judgement of a pod for our node."""
    assert spec.get("nodeSelector", {}).items() <= LABELS.items()
    assert "affinity" not in spec
    key, effect = TAINT
    assert any(t.get("key") == key and t.get("effect", effect) == effect for t in spec["tolerations"])


def _value(entry: Document) -> str:
    if "value" in entry:
        return str(entry["value"])
    assert entry["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    return NODE


def _settings(env: Mapping[str, str]) -> Settings:
    return resolve({}, {name: value for name, value in env.items() if name != "CONFIG_FILE"})


def _own_paths(sandbox: Sandbox, env: Mapping[str, str]) -> dict[str, str]:
    """The agent's defaults for paths, as they are seen from its container."""
    settings = _settings(env)
    return {
        setting.env[0]: sandbox.path(str(getattr(settings, setting.name)))
        for setting in TABLE
        if isinstance(getattr(settings, setting.name), Path)
        and not str(getattr(settings, setting.name)).startswith(OF_THE_NODE)
    }


def _own_port(container: Document, env: Mapping[str, str]) -> dict[str, str]:
    """There is no network namespace either: any free port stands for the one that the probes ask."""
    address = _settings(env).http_listen
    assert address is not None
    assert [address.port] == [port["containerPort"] for port in container["ports"]]
    (variable,) = [setting.env[0] for setting in TABLE if setting.name == "http_listen"]
    return {variable: "127.0.0.1:0"}


async def _answers(port: int, path: str) -> bool:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {NODE}\r\n\r\n".encode())
        status = (await asyncio.wait_for(reader.read(), PATIENCE)).split(b"\r\n")[0]
    finally:
        writer.close()
    return b" 200 " in status


def confined(context: Document) -> list[str]:
    """Words before a command that leave it only the capabilities of this security context, if we may."""
    added = context["capabilities"]["add"]
    assert context["capabilities"]["drop"] == ["ALL"]
    return list(_setpriv(tuple(name.lower() for name in added)))


def is_admin(context: Document) -> bool:
    """Whether a container of this security context has CAP_SYS_ADMIN here."""
    code = "import re; print(re.search('CapEff:\\\\s*(.*)', open('/proc/self/status').read())[1])"
    words = (*confined(context), sys.executable, "-c", code)
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return bool(int(done.stdout, 16) >> CAP_SYS_ADMIN & 1)


@functools.cache
def _setpriv(capabilities: Iterable[str]) -> tuple[str, ...]:
    left = ",".join(["-all", *(f"+{capability}" for capability in capabilities)])
    words = ("setpriv", "--no-new-privs", f"--bounding-set={left}")
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return ()
    tried = subprocess.run(
        [*words, sys.executable, "-c", "import migplugin.cli"],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    return words if tried.returncode == 0 else ()


@contextlib.asynccontextmanager
async def standing_in(root: Path) -> AsyncIterator[StandIn]:
    cluster = StandIn(root)
    async with cluster.kubelet:
        try:
            yield cluster
        finally:
            await cluster.kill()
