"""Runs the agent on another architecture's Python, against the stand-in kubelet on a simulated driver.

    arm64_run.py SITE PROGRAM...

PROGRAM is that Python, SITE the directory with the installed wheels. The agent must register, write a CDI
document, answer its probes, give a pod its device and end by SIGTERM. Its times mean nothing.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from migplugin import __version__
from migplugin.sim.kubelet import Container, Kubelet, Pod

SITE, PROGRAM = sys.argv[1], sys.argv[2:]
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": SITE, "PYTHONDONTWRITEBYTECODE": "1"}
RESOURCE, DEVICES = "nvidia.com/mig-1g.5gb", 14
PATIENCE = 120.0
ASK = "import json, platform, grpc, migplugin; print(json.dumps([platform.machine(), migplugin.__version__]))"


def fail(reason: str) -> None:
    sys.exit(f"arm64: {reason}")


async def output(*words: str) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*PROGRAM, *words, stdout=pipe, stderr=pipe, env=ENV)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    if process.returncode != 0:
        fail(f"{words}: exit code {process.returncode}: {err.decode()}")
    return out.decode()


async def agent(root: Path, kubelet: Kubelet) -> None:
    log = root / "log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(*PROGRAM, "-m", "migplugin", "serve", "--simulate=2xa100-40gb=1g.5gb*7", "--force-simulate"),
            *(f"--kubelet-socket={kubelet.socket}", f"--pod-resources-socket={kubelet.pod_resources_socket}"),
            *("--http-listen=127.0.0.1:0", "--log-format=json", "--nvml-timeout=60s"),
            *(f"--cdi-root={root}/cdi", "--device-list-strategy=envvar,cdi-cri"),
            stderr=file,
            env=ENV,
        )
    try:
        await kubelet.until(lambda k: k.allocatable(RESOURCE) == DEVICES, timeout=PATIENCE)
        status = await kubelet.admit(Pod("p", (Container("main", {RESOURCE: 1}),)))
        if status.phase != "Running":
            fail(f"no device for a pod: {status}")
        (written,) = (root / "cdi").iterdir()
        named = json.loads(written.read_text())["devices"]
        if len(named) != DEVICES:
            fail(f"{written} names {len(named)} devices, expected {DEVICES}")
        (port,) = re.findall(r'"port": ?(\d+)', log.read_text())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: node\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        if b" 200 " not in answer.splitlines()[0]:
            fail(f"/readyz: {answer!r}")
        process.send_signal(signal.SIGTERM)
        if code := await asyncio.wait_for(process.wait(), PATIENCE):
            fail(f"SIGTERM: exit code {code}")
        if bad := [line for line in log.read_text().splitlines() if '"error"' in line or "raceback" in line]:
            fail(f"errors in the log: {bad}")
    except TimeoutError as exc:
        fail(f"{exc}; it said:\n{log.read_text()}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def main() -> None:
    if json.loads(await output("-c", ASK)) != ["aarch64", __version__]:
        fail("this is not the agent on aarch64")
    root = Path(tempfile.mkdtemp(dir="/tmp", prefix="migarm-"))
    try:
        async with Kubelet(root) as kubelet:
            await agent(root, kubelet)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("the agent serves a pod on arm64, under emulation")


asyncio.run(main())
