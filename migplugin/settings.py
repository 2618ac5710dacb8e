"""What can be set, and where from: flag > environment > default.

One table, `TABLE`, drives the flags, the environment, the types and the README. A setting that is
named like one of NVIDIA's plugin means the same as there (nvidia-device-plugin.md 1.1).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migplugin.errors import InputError

SERVE, STATUS = "serve", "status"

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    mig_strategy: str
    fail_on_init_error: bool | None
    device_list_strategy: tuple[str, ...]
    pass_device_specs: bool
    driver_root: str
    dev_root: str
    driver_root_ctr_path: Path
    kubelet_socket: Path
    pod_resources_socket: Path
    poll_interval: float | None
    removal_delay: float
    driver_grace: float
    nvml_timeout: float
    proc_root: Path
    sysfs_root: Path
    simulate: str
    log_format: str
    log_level: str

    @property
    def host_dev_root(self) -> str:
        """The host's directory that contains dev/: as in NVIDIA's plugin, the driver root unless set."""
        return self.dev_root or self.driver_root


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `default` is written as a person would; "" stands for unset."""

    name: str
    env: tuple[str, ...]
    default: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    aliases: tuple[str, ...] = ()
    commands: frozenset[str] = frozenset({SERVE})

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand alone, meaning true."""
        return self.parse in {parse_bool, parse_optional_bool}


def parse_bool(text: str) -> bool:
    """Go's spellings, as NVIDIA's flags and variables take them. Raises ValueError."""
    if text in {"1", "t", "T", "TRUE", "true", "True"}:
        return True
    if text in {"0", "f", "F", "FALSE", "false", "False"}:
        return False
    raise ValueError("expected true or false")


def parse_optional_bool(text: str) -> bool | None:
    return None if text == "" else parse_bool(text)


def parse_duration(text: str) -> float:
    """Seconds of "3s", "500ms", "1m30s" or a plain number of seconds. Raises ValueError."""
    position, seconds = 0, 0.0
    while match := _DURATION.match(text, position):
        if not match[2] and match[0] != text:
            break  # a number without a unit stands alone
        seconds += float(match[1]) * _UNITS[match[2] or ""]
        position = match.end()
    if not text or position != len(text) or seconds > 10 * 365 * 24 * 3600:
        raise ValueError('expected a duration such as "30s", "500ms" or "1m30s"')
    return seconds


def parse_interval(text: str) -> float | None:
    """A duration of at least 100 ms, so that nobody asks for a spin; "" is unset. Raises ValueError."""
    if text == "":
        return None
    seconds = parse_duration(text)
    if seconds < 0.1:
        raise ValueError("expected at least 100ms")
    return seconds


def parse_timeout(text: str) -> float:
    seconds = parse_duration(text)
    if seconds < 0.1:
        raise ValueError("expected at least 100ms")
    return seconds


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected {_or(allowed)}{_nearest(text, allowed)}")
        return text

    return parse


def some_of(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        for part in chosen:
            if part not in allowed:
                raise ValueError(f"{part!r}: expected one or more of {_or(allowed)}{_nearest(part, allowed)}")
        if not chosen:
            raise ValueError(f"expected one or more of {_or(allowed)}")
        return chosen

    return parse


def parse_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("expected an absolute path")
    return Path(text)


def parse_root(text: str) -> str:
    if text and not text.startswith("/"):
        raise ValueError("expected an absolute path")
    return text


_BOTH = frozenset({SERVE, STATUS})

TABLE: tuple[Setting, ...] = (
    Setting(
        "mig_strategy", ("MIG_STRATEGY",), "mixed", one_of("none", "single", "mixed"), "STRATEGY",
        "Which resources MIG devices become: `mixed` offers `nvidia.com/mig-<profile>` for each profile and "
        "`nvidia.com/gpu` for GPUs with MIG off, `single` offers MIG devices of one profile as `nvidia.com/gpu`, "
        "`none` offers whole GPUs only.",
        commands=_BOTH,
    ),
    Setting(
        "fail_on_init_error", ("FAIL_ON_INIT_ERROR",), "", parse_optional_bool, "BOOL",
        "Exit with code 3 when NVML or its driver is not there at start. Unset or false: wait until it is.",
    ),
    Setting(
        "device_list_strategy", ("DEVICE_LIST_STRATEGY",), "envvar", some_of("envvar", "volume-mounts"), "LIST",
        "How a container is told its devices: `envvar` sets `NVIDIA_VISIBLE_DEVICES`, `volume-mounts` mounts one "
        "file for each; several separated by commas.",
    ),
    Setting(
        "pass_device_specs", ("PASS_DEVICE_SPECS",), "false", parse_bool, "BOOL",
        "Also name the device nodes to the kubelet, for containers that run without the NVIDIA runtime.",
    ),
    Setting(
        "driver_root", ("NVIDIA_DRIVER_ROOT",), "/", parse_root, "PATH",
        "The host's directory under which the NVIDIA driver is installed.",
        aliases=("--nvidia-driver-root",),
    ),
    Setting(
        "dev_root", ("NVIDIA_DEV_ROOT",), "", parse_root, "PATH",
        "The host's directory that contains `dev/`; unset: the driver root.",
        aliases=("--nvidia-dev-root",), commands=_BOTH,
    ),
    Setting(
        "driver_root_ctr_path", ("DRIVER_ROOT_CTR_PATH", "CONTAINER_DRIVER_ROOT"), "/driver-root", parse_path, "PATH",
        "Where the driver root is mounted for us; `libnvidia-ml.so.1` is looked for there first.",
        aliases=("--container-driver-root",), commands=_BOTH,
    ),
    Setting(
        "kubelet_socket", ("KUBELET_SOCKET",), "/var/lib/kubelet/device-plugins/kubelet.sock", parse_path, "PATH",
        "The kubelet's registration socket; its directory is where our sockets and the node lock go.",
        commands=_BOTH,
    ),
    Setting(
        "pod_resources_socket", ("MIGPLUGIN_POD_RESOURCES_SOCKET",), "/var/lib/kubelet/pod-resources/kubelet.sock", parse_path,
        "PATH",
        "The kubelet's pod-resources socket, which tells who holds which device. Need not be mounted.",
        commands=_BOTH,
    ),
    Setting(
        "poll_interval", ("MIGPLUGIN_POLL_INTERVAL",), "", parse_interval, "DURATION",
        "How often the driver is asked for changes without being told; unset: 60s where it tells of them by "
        "itself, 5s where it does not.",
    ),
    Setting(
        "removal_delay", ("MIGPLUGIN_REMOVAL_DELAY",), "60s", parse_duration, "DURATION",
        "How long a device that is gone stays listed as Unhealthy, at least. Shorter than the default is for "
        "demos and tests: a kubelet that is just allocating a device crashes when it leaves the list.",
    ),
    Setting(
        "driver_grace", ("MIGPLUGIN_DRIVER_GRACE",), "60s", parse_duration, "DURATION",
        "How long devices stay Healthy while the driver as a whole does not answer.",
    ),
    Setting(
        "nvml_timeout", ("MIGPLUGIN_NVML_TIMEOUT",), "15s", parse_timeout, "DURATION",
        "How long one look at the driver may take before it counts as not answering.",
        commands=_BOTH,
    ),
    Setting(
        "proc_root", ("MIGPLUGIN_PROC_ROOT",), "/proc", parse_path, "PATH",
        "Where the host's `/proc` is seen, for MIG capabilities.",
        commands=_BOTH,
    ),
    Setting(
        "sysfs_root", ("MIGPLUGIN_SYSFS_ROOT",), "/sys", parse_path, "PATH",
        "Where the host's `/sys` is seen, for NUMA nodes.",
        commands=_BOTH,
    ),
    Setting(
        "simulate", (), "", str, "SPEC|DIR",
        "Run on a simulated driver instead of a real one: a new node such as `1xa100-40gb=1g.5gb*7`, or a directory "
        "that `migplugin sim init` made. For trying and testing only.",
        commands=_BOTH,
    ),
    Setting(
        "log_format", ("MIGPLUGIN_LOG_FORMAT",), "text", one_of("text", "json"), "FORMAT",
        "Log lines for people (`text`) or for machines (`json`).",
    ),
    Setting(
        "log_level", ("MIGPLUGIN_LOG_LEVEL",), "info", one_of("debug", "info", "warning", "error"), "LEVEL",
        "The least important lines to log.",
    ),
)  # fmt: skip


def resolve(flags: Mapping[str, str | None], env: Mapping[str, str]) -> Settings:
    """Settings from what was given. `flags` maps names of `Setting` to texts, None where not given.

    Raises InputError, naming the flag or variable, the value and what is allowed.
    """
    values = {}
    for setting in TABLE:
        source, text = setting.flag, flags.get(setting.name)
        if text is None:
            # As in NVIDIA's plugin, a variable that is set to nothing is not set.
            source = next((name for name in setting.env if env.get(name)), "")
            text = env[source] if source else setting.default
        try:
            values[setting.name] = setting.parse(text)
        except ValueError as exc:
            raise InputError(f"{source}={text[:200]}: {exc}") from exc
    return Settings(**values)


def markdown_table() -> str:
    """The settings as the README shows them."""
    lines = ["| flag | environment | default | what it does |", "|---|---|---|---|"]
    for setting in TABLE:
        flags = ", ".join(f"`{flag}`" for flag in (setting.flag, *setting.aliases))
        envs = ", ".join(f"`{name}`" for name in setting.env) or "-"
        default = f"`{setting.default}`" if setting.default else "unset"
        lines.append(f"| {flags} | {envs} | {default} | {setting.help} |")
    return "\n".join(lines) + "\n"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _nearest(text: str, allowed: tuple[str, ...]) -> str:
    import difflib  # noqa: PLC0415  only where something is wrong

    near = difflib.get_close_matches(text, allowed, 1)
    return f"; did you mean {near[0]}?" if near else ""
