"""NVIDIA's chart and the gpu-operator with only the image changed: their command lines and variables, run.

The variables are those that the chart's templates make (nvidia-device-plugin.md 9).
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.settings import TABLE, resolve
from tests.app.conftest import PATIENCE, Machine, Start

BIN = Path(sys.executable).parent
CHART = {
    "MPS_ROOT": "/run/nvidia/mps",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "NVIDIA_MIG_MONITOR_DEVICES": "all",
}
# Every value that the chart can set, each as its template writes it; but NVIDIA_DEV_ROOT, which would move
# us from the simulated /dev to this machine's.
CHART_VALUES = {
    "MIG_STRATEGY": "mixed",
    "FAIL_ON_INIT_ERROR": "false",
    "PASS_DEVICE_SPECS": "true",
    "DEVICE_LIST_STRATEGY": "envvar",
    "DEVICE_ID_STRATEGY": "uuid",
    "NVIDIA_DRIVER_ROOT": "/",
    "NVIDIA_CDI_HOOK_PATH": "/usr/bin/nvidia-cdi-hook",
    "CDI_FEATURE_FLAGS": "enable-coherent-annotations",
    "GDRCOPY_ENABLED": "false",
    "GDS_ENABLED": "false",
    "MOFED_ENABLED": "false",
    "DEVICE_DISCOVERY_STRATEGY": "auto",
}
MANAGER = {
    "KUBECONFIG": "",
    "NODE_NAME": "node-1",
    "NODE_LABEL": "nvidia.com/device-plugin.config",
    "DEFAULT_CONFIG": "",
    "FALLBACK_STRATEGIES": "named,single",
}
INIT = {**MANAGER, "ONESHOT": "true", "SEND_SIGNAL": "false", "SIGNAL": "", "PROCESS_TO_SIGNAL": ""}
SIDECAR = {
    **MANAGER,
    "ONESHOT": "false",
    "SEND_SIGNAL": "true",
    "SIGNAL": "1",
    "PROCESS_TO_SIGNAL": "nvidia-device-plugin",
}

# What NVIDIA's plugin takes (nvidia-device-plugin.md 1.1), with a value that it would take.
FLAGS = {
    "mig-strategy": "single",
    "fail-on-init-error": "true",
    "driver-root": "/run/nvidia/driver",
    "nvidia-driver-root": "/run/nvidia/driver",
    "dev-root": "/",
    "nvidia-dev-root": "/",
    "pass-device-specs": "T",
    "device-list-strategy": "envvar,cdi-annotations",
    "device-id-strategy": "index",
    "gdrcopy-enabled": "true",
    "gds-enabled": "true",
    "mofed-enabled": "true",
    "cdi-annotation-prefix": "cdi.k8s.io/",
    "nvidia-cdi-hook-path": "/usr/bin/nvidia-cdi-hook",
    "nvidia-ctk-path": "/usr/bin/nvidia-ctk",
    "driver-root-ctr-path": "/driver-root",
    "container-driver-root": "/driver-root",
    "mps-root": "/run/nvidia/mps",
    "shared-devices-allocation-policy": "packed",
    "device-discovery-strategy": "nvml",
    "imex-channel-ids": "",
    "imex-required": "false",
    "kubelet-socket": "/var/lib/kubelet/device-plugins/kubelet.sock",
    "config-file": "",
    "cdi-feature-flags": "disable-nvsandboxutils",
    "cdi-disable-hooks": "all",
}
SWITCHES = [
    "fail-on-init-error",
    "pass-device-specs",
    "gdrcopy-enabled",
    "gds-enabled",
    "mofed-enabled",
    "imex-required",
]


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / words[0], *words[1:]],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={"PATH": os.environ["PATH"], **env},
    )


def config_map(root: Path, **files: str) -> Path:
    """A directory as the kubelet mounts a ConfigMap: links to links to the version in force."""
    mount = root / "available-configs"
    version = mount / "..2026_01_01"
    version.mkdir(parents=True)
    (mount / "..data").symlink_to(version.name)
    for name, text in files.items():
        (version / name).write_text(text)
        (mount / name).symlink_to(f"..data/{name}")
    return mount


async def plugin(node: Machine, *words: str, **env: str) -> None:
    agent = await node.run(
        *(str(BIN / "nvidia-device-plugin"), *node.simulated, *words),
        KUBELET_SOCKET=str(node.kubelet.socket),
        MIGPLUGIN_LOG_FORMAT="json",
        **env,
    )
    await agent.until_said("this is migplugin serve under another name", called="nvidia-device-plugin")


@pytest.mark.parametrize("values", [{}, CHART_VALUES])
async def test_the_variables_of_the_chart_serve_the_node(machine: Start, values: dict[str, str]) -> None:
    node = await machine()
    await plugin(node, **CHART, **values)
    await node.until(lambda _: node.allocatable("1g.5gb") == 9)
    assert len(node.agents[0].said("starting")) == 1


async def test_the_init_container_the_sidecar_and_the_plugin_share_one_file(
    machine: Start, root: Path
) -> None:
    node = await machine("1xa100-40gb=1g.5gb*7")
    mount = config_map(root, only="version: v1\nflags:\n  migStrategy: single\n")
    target = root / "config/config.yaml"
    target.parent.mkdir()
    paths = {"CONFIG_FILE_SRCDIR": str(mount), "CONFIG_FILE_DST": str(target)}
    assert command("config-manager", **INIT, **paths).returncode == 0
    sidecar = await node.run(str(BIN / "config-manager"), MIGPLUGIN_LOG_FORMAT="json", **SIDECAR, **paths)
    await sidecar.until_said("configuration linked", source=str(mount / "only"))
    await sidecar.until_said(
        "the choice by node label comes with partitioning; the agent follows the file by itself"
    )
    await plugin(node, **CHART, CONFIG_FILE=str(target))
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 7)
    assert sidecar.process.returncode is None, "it stays until it is told to go"
    assert await sidecar.end() == 0
    await sidecar.until_said("stopping", signal="SIGTERM")


async def test_the_operators_shell_script_starts_the_plugin(root: Path, machine: Start) -> None:
    node = await machine("1xa100-40gb")
    ready = root / "driver-ready"
    ready.write_text("NVIDIA_DRIVER_ROOT=/run/nvidia/driver\nDRIVER_ROOT_CTR_PATH=/driver-root\n")
    script = root / "entrypoint.sh"
    script.write_text(
        f"#!/bin/sh\nuntil [ -f {ready} ]; do sleep 1; done\n"
        f"set -o allexport\n. {ready}\nexec nvidia-device-plugin\n"
    )
    script.chmod(0o700)
    agent = await node.run(
        *("/bin/sh", "-c", str(script)),
        PATH=f"{BIN}:{os.environ['PATH']}",
        KUBELET_SOCKET=str(node.kubelet.socket),
        MIGPLUGIN_LOG_FORMAT="json",
        FAIL_ON_INIT_ERROR="true",
        DEVICE_LIST_STRATEGY="envvar",
    )
    line = await agent.until_said("starting")
    assert line["driver_root"] == "/run/nvidia/driver"
    await agent.until_said("no driver, and --fail-on-init-error asks to exit")
    assert await asyncio.wait_for(agent.process.wait(), PATIENCE) == 3


@pytest.mark.parametrize(("flag", "value"), FLAGS.items())
def test_every_flag_of_theirs_is_taken_by_name_or_alias_and_by_variable(flag: str, value: str) -> None:
    (setting,) = [row for row in TABLE if f"--{flag}" in (row.flag, *row.aliases)]
    resolve({setting.name: value}, {})
    for variable in setting.env:
        resolve({}, {variable: value})


@pytest.mark.parametrize("flag", SWITCHES)
def test_their_switches_stand_alone_or_with_gos_spellings(flag: str) -> None:
    (setting,) = [row for row in TABLE if f"--{flag}" in (row.flag, *row.aliases)]
    assert setting.is_switch
    for value in ("1", "t", "TRUE", "False", "0"):
        resolve({setting.name: value}, {})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--device-discovery-strategy=tegra"], "Tegra is not supported"),
        (["--imex-channel-ids=0"], "IMEX channels are not served here"),
        (["-mig-strategy=some"], "expected none, single or mixed"),
        (["--mps-roots=/x"], "no such option"),
    ],
)
def test_what_is_not_served_here_is_refused_with_a_reason(words: list[str], reason: str) -> None:
    done = command("nvidia-device-plugin", *words)
    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.parametrize("word", ["--version", "-v"])
def test_it_tells_its_version(word: str) -> None:
    done = command("nvidia-device-plugin", word)
    assert done.returncode == 0
    assert done.stdout.startswith("migplugin ")


@pytest.mark.parametrize(
    ("files", "chosen", "expected"),
    [
        (["a", "b"], "b", "b"),
        (["a", "default"], "", "default"),
        (["a"], "", "a"),
        (["a", "b"], "", None),
        ([], "", None),
    ],
)
def test_config_manager_takes_the_default_else_the_only_file_else_an_empty_one(
    root: Path, files: list[str], chosen: str, expected: str | None
) -> None:
    mount = config_map(root, **{name: f"version: v1  # {name}\n" for name in files})
    target = root / "config.yaml"
    target.symlink_to(root / "gone")  # what a former run left, dangling
    env = {**INIT, "DEFAULT_CONFIG": chosen, "CONFIG_FILE_SRCDIR": str(mount), "CONFIG_FILE_DST": str(target)}
    done = command("config-manager", **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2
    assert "the choice by node label comes with partitioning" in done.stderr
    assert ("WARNING" in done.stderr) == (len(files) > (expected is not None))
    if expected is None:
        assert not target.is_symlink()
        assert target.read_bytes() == b""
    else:
        assert target.readlink() == mount / expected
    resolve({"config_file": str(target)}, {})
    assert sorted(p.name for p in root.iterdir()) == ["available-configs", "config.yaml"]


def test_config_manager_follows_a_later_version_of_the_config_map(root: Path) -> None:
    mount = config_map(root, a="old")
    target = root / "config.yaml"
    command("config-manager", **INIT, CONFIG_FILE_SRCDIR=str(mount), CONFIG_FILE_DST=str(target))
    later = mount / "..2026_01_02"
    later.mkdir()
    (later / "a").write_text("new")
    (mount / "..data_tmp").symlink_to(later.name)
    (mount / "..data_tmp").replace(mount / "..data")
    assert target.read_text() == "new"


def test_config_manager_says_in_a_line_what_is_wrong(root: Path) -> None:
    mount = config_map(root, a="")
    paths = {"CONFIG_FILE_SRCDIR": str(mount), "CONFIG_FILE_DST": str(root / "config.yaml")}
    done = command("config-manager", **{**INIT, **paths, "DEFAULT_CONFIG": "b"})
    assert (done.returncode, done.stderr) == (
        2,
        f"config-manager: DEFAULT_CONFIG=b: no such file in {mount}, only a\n",
    )
    done = command("config-manager", **{**INIT, **paths, "CONFIG_FILE_SRCDIR": str(root / "none")})
    assert (done.returncode, done.stderr) == (
        2,
        f"config-manager: CONFIG_FILE_SRCDIR={root}/none: No such file or directory\n",
    )
    done = command("config-manager", **{**INIT, **paths, "CONFIG_FILE_DST": str(root / "no/where")})
    assert done.returncode == 2
    assert done.stderr.startswith("config-manager: CONFIG_FILE_DST=")
    words = ("--oneshot=true", f"--config-file-srcdir={mount}", f"--config-file-dst={root}/c")
    assert command("config-manager", *words).returncode == 0, "as Go takes it"
    done = command("config-manager", ONESHOT="true")
    assert done.returncode == 2
    assert "CONFIG_FILE_SRCDIR" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
async def test_config_manager_waits_for_a_signal_and_ends_with_0(
    machine: Start, root: Path, number: signal.Signals
) -> None:
    node = await machine("1xa100-40gb", running=False)
    paths = {"CONFIG_FILE_SRCDIR": str(config_map(root)), "CONFIG_FILE_DST": str(root / "config.yaml")}
    manager = await node.run(str(BIN / "config-manager"), MIGPLUGIN_LOG_FORMAT="json", **SIDECAR, **paths)
    await manager.until_said("configuration linked", source="empty")
    assert await manager.end(number) == 0
