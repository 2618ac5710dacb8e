"""Runs the image that .ci/image built, as a node would: read-only, no capability, no new privileges.

    image_run.py OCI-LAYOUT BUNDLE

runc starts it against the stand-in kubelet, on a simulated driver: it must register, be ready, give a pod
its device and end by SIGTERM. NVIDIA's two names must be there, and /bin/sh. Prints size and start times,
and puts them into bench-results/image.json.
"""

import asyncio
import contextlib
import copy
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from migplugin.sim.kubelet import Container, Kubelet, Pod

LAYOUT, BUNDLE = Path(sys.argv[1]), Path(sys.argv[2])
NODE = "2xa100-40gb=1g.5gb*7"
RESOURCE, DEVICES = "nvidia.com/mig-1g.5gb", 14
KUBELET = "/var/lib/kubelet"
STARTS = 5
PATIENCE = 30.0


def fail(reason: str) -> None:
    sys.exit(f"image: {reason}")


def blobs() -> tuple[int, int]:
    """Bytes of the image as it is pulled, and number of its layers."""
    index = json.loads((LAYOUT / "index.json").read_text())
    manifest = blob(index["manifests"][0]["digest"])
    return sum(layer["size"] for layer in manifest["layers"]), len(manifest["layers"])


def blob(digest: str) -> dict:
    return json.loads((LAYOUT / "blobs" / digest.replace(":", "/")).read_text())


def unpacked(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_symlink())


def config(args: list[str], env: dict[str, str], mounts: dict[str, tuple[Path, str]]) -> dict:
    """The bundle's config.json as a restricted pod would have it; /tmp alone can be written, and `mounts`."""
    made = copy.deepcopy(TEMPLATE)
    process = made["process"]
    process["terminal"] = False
    process["args"] = args
    process["env"] += [f"{name}={value}" for name, value in env.items()]
    process["noNewPrivileges"] = True
    kinds = ("bounding", "effective", "inheritable", "permitted", "ambient")
    process["capabilities"] = {kind: [] for kind in kinds}
    made["root"] = {"path": "rootfs", "readonly": True}
    made["linux"]["namespaces"] = [n for n in made["linux"]["namespaces"] if n["type"] != "network"]
    made["mounts"] = [m for m in made["mounts"] if m["type"] not in {"cgroup", "cgroup2"}]
    made["mounts"].append(
        {
            "destination": "/tmp",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1777"],
        }
    )
    for destination, (source, mode) in mounts.items():
        options = ["rbind", mode]
        made["mounts"].append(
            {"destination": destination, "type": "bind", "source": str(source), "options": options}
        )
    return made


TEMPLATE = json.loads((BUNDLE / "config.json").read_text())
OWN = {name: value for name, _, value in (entry.partition("=") for entry in TEMPLATE["process"]["env"])}
ENTRYPOINT = TEMPLATE["process"]["args"]


@contextlib.asynccontextmanager
async def running(
    args: list[str], env: dict[str, str], mounts: dict[str, tuple[Path, str]]
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """A container, and the file with what it says; it is dead afterwards."""
    name = f"migplugin-ci-{os.getpid()}-{time.monotonic_ns()}"
    (BUNDLE / "config.json").write_text(json.dumps(config(args, env, mounts)))
    log = Path(tempfile.mkstemp(prefix="migimage-", dir="/tmp")[1])
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *("runc", "run", "--bundle", str(BUNDLE), name), stdout=file, stderr=file
        )
    try:
        yield process, log
    finally:
        if process.returncode is None:
            killed = await asyncio.create_subprocess_exec("runc", "delete", "--force", name)
            await killed.wait()
            await process.wait()
        log.unlink()


async def output(
    args: list[str], env: dict[str, str], mounts: dict[str, tuple[Path, str]]
) -> tuple[int, str]:
    async with running(args, env, mounts) as (process, log):
        code = await asyncio.wait_for(process.wait(), PATIENCE)
        return code, log.read_text()


async def started(args: list[str], env: dict[str, str], *, look: bool) -> float:
    """Seconds from `runc run` to the kubelet's first list. With `look`, everything else is tried too."""
    root = Path(tempfile.mkdtemp(prefix="migimage-", dir="/tmp"))
    try:
        async with Kubelet(root) as kubelet:
            mounts = {
                f"{KUBELET}/device-plugins": (kubelet.socket.parent, "rw"),
                f"{KUBELET}/pod-resources": (kubelet.pod_resources_socket.parent, "ro"),
            }
            began = time.perf_counter()
            async with running(args, env, mounts) as (process, log):
                try:
                    await kubelet.until(lambda k: k.allocatable(RESOURCE) == DEVICES, timeout=PATIENCE)
                except TimeoutError as exc:
                    fail(f"{args}: {exc}; it said:\n{log.read_text()}")
                took = time.perf_counter() - began
                if look:
                    await inspect(kubelet, log)
                process.send_signal(signal.SIGTERM)  # runc hands it on
                code = await asyncio.wait_for(process.wait(), PATIENCE)
                if code != 0:
                    fail(f"SIGTERM: exit code {code}; it said:\n{log.read_text()}")
                if left := [p.name for p in kubelet.socket.parent.glob("migplugin-*.sock")]:
                    fail(f"sockets left behind: {left}")
            return took
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def inspect(kubelet: Kubelet, log: Path) -> None:
    status = await kubelet.admit(Pod("p", (Container("main", {RESOURCE: 1}),)))
    if status.phase != "Running" or not status.containers["main"].envs["NVIDIA_VISIBLE_DEVICES"].startswith(
        "MIG-"
    ):
        fail(f"no device for a pod: {status}")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (port,) = [line["port"] for line in lines if line["message"] == "probes"]
    for path in ("/healthz", "/readyz"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        if b" 200 " not in answer.splitlines()[0]:
            fail(f"{path}: {answer!r}")
    if bad := [line for line in lines if line["level"] == "error" or "traceback" in line]:
        fail(f"errors in the log: {bad}")


async def names() -> None:
    """NVIDIA's names for it, a shell, what must not be there, and that nothing can be written."""
    code, said = await output(["nvidia-device-plugin", "--version"], {}, {})
    if code != 0 or not said.startswith("migplugin "):
        fail(f"nvidia-device-plugin --version: {code} {said}")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        source = Path(folder) / "configs"
        source.mkdir()
        (source / "a").write_text("version: v1\n")
        target = Path(folder) / "config"
        target.mkdir()
        code, said = await output(
            ["config-manager"],
            {
                "ONESHOT": "true",
                "CONFIG_FILE_SRCDIR": "/available-configs",
                "CONFIG_FILE_DST": "/config/config.yaml",
            },
            {"/available-configs": (source, "ro"), "/config": (target, "rw")},
        )
        if code != 0 or (target / "config.yaml").readlink() != Path("/available-configs/a"):
            fail(f"config-manager: {code} {said}")
    script = (
        "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status; touch /x 2>/dev/null && echo writable; "
        "for word in gcc cc nvidia-smi; do command -v $word; done; "
        "find / -xdev \\( -name 'libnvidia-ml*' -o -name 'libcuda*' \\) 2>/dev/null"
    )
    code, said = await output(["/bin/sh", "-c", script], {}, {})
    expected = ["CapBnd:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"]
    if sorted(said.split("\n")[:-1]) != expected:
        fail(f"inside: expected {expected}, found {said!r}")


async def main() -> None:
    pulled, layers = blobs()
    rows = {
        "image, pulled (MiB)": pulled / 2**20,
        "image, unpacked (MiB)": unpacked(BUNDLE / "rootfs") / 2**20,
        "of it ours (MiB)": unpacked(BUNDLE / "rootfs/opt/migplugin") / 2**20,
        "layers": layers,
    }
    await names()
    flags = [f"--simulate={NODE}", "--force-simulate", "--log-format=json", "--http-listen=127.0.0.1:0"]
    await started(
        ["nvidia-device-plugin", *flags], {"MIG_STRATEGY": "mixed", "MPS_ROOT": "/run/nvidia/mps"}, look=True
    )
    times = [await started([ENTRYPOINT[0], "serve", *flags], {}, look=not number) for number in range(STARTS)]
    rows["start: runc run to the kubelet's first list (ms, median)"] = statistics.median(times) * 1000
    rows["start, least (ms)"] = min(times) * 1000
    began = time.perf_counter()
    await output(["/bin/sh", "-c", "true"], {}, {})
    rows["of it runc with an empty program (ms)"] = (time.perf_counter() - began) * 1000
    for name, value in rows.items():
        print(f"{name:<60}{value:>10.1f}")
    results = Path("bench-results")
    results.mkdir(exist_ok=True)
    (results / "image.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("the image works read-only, without capabilities, under both names")


asyncio.run(main())
