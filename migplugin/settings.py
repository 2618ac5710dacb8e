"""What can be set, and where from: flag > environment > configuration file > default.

One table, `TABLE`, drives the flags, the environment, the file's keys, the types and the README. A setting that is
named like one of NVIDIA's plugin means the same as there (nvidia-device-plugin.md 1.1).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migplugin.core.document import Document
from migplugin.errors import InputError

SERVE, STATUS, CLEAR = "serve", "status", "clear"
DEFAULT = "default"  # as the source of a value

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)?")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. An empty `host` is every address, port 0 any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds. `sources` says where each value came from, `findings` what was not understood."""

    mig_strategy: str
    fail_on_init_error: bool | None
    device_discovery_strategy: str
    device_list_strategy: tuple[str, ...]
    device_id_strategy: str
    pass_device_specs: bool
    shared_devices_allocation_policy: str
    driver_root: str
    dev_root: str
    driver_root_ctr_path: Path
    cdi_root: Path
    cdi_annotation_prefix: str
    nvidia_cdi_hook_path: str
    cdi_feature_flags: tuple[str, ...]
    cdi_disable_hooks: tuple[str, ...]
    gdrcopy_enabled: bool
    gds_enabled: bool
    mofed_enabled: bool
    mps_root: str
    imex_channel_ids: tuple[str, ...]
    imex_required: bool
    resource_domain: str
    disable_healthchecks: str
    enable_healthchecks: str
    kubelet_socket: Path
    pod_resources_socket: Path
    control_socket: Path | None
    poll_interval: float | None
    removal_delay: float
    driver_grace: float
    health_recovery_after: float
    state_dir: str
    nvml_timeout: float
    proc_root: Path
    sysfs_root: Path
    simulate: str
    force_simulate: bool
    http_listen: Address | None
    config_file: str
    strict_config: bool
    log_format: str
    log_level: str
    document: Document = field(default_factory=Document)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def host_dev_root(self) -> str:
        """The host's directory that contains dev/: as in NVIDIA's plugin, the driver root unless set."""
        return self.dev_root or self.driver_root


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `default` is written as a person would; "" stands for unset.

    `key` is where the configuration file has it: NVIDIA's own path, or below `migplugin`.
    """

    name: str
    env: tuple[str, ...]
    key: str
    default: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    aliases: tuple[str, ...] = ()
    commands: frozenset[str] = frozenset({SERVE})
    has_flag: bool = True
    kind: type = str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand alone, meaning true."""
        return self.kind is bool


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


def parse_optional_path(text: str) -> Path | None:
    return parse_path(text) if text else None


def parse_root(text: str) -> str:
    if text and not text.startswith("/"):
        raise ValueError("expected an absolute path")
    return text


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_discovery(text: str) -> str:
    if text == "tegra":
        raise ValueError("Tegra is not supported; expected auto or nvml")
    return one_of("auto", "nvml")(text)


def parse_imex(text: str) -> tuple[str, ...]:
    channels = parse_list(text.strip("[]"))
    if channels:
        raise ValueError("IMEX channels are not served here, expected none; NVIDIA's DRA driver has them")
    return channels


def parse_address(text: str) -> Address | None:
    """The address of ":9401", "127.0.0.1:9401" or "[::1]:9401"; "" is unset. Raises ValueError."""
    if text == "":
        return None
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError('expected an address such as ":9401", "127.0.0.1:9401" or "[::1]:9401"')
    return Address(host, int(port))


def parse_domain(text: str) -> str:
    if len(text) > 253 or not _DOMAIN.fullmatch(text):
        raise ValueError('expected a domain in lower case such as "nvidia.com"')
    if text == "kubernetes.io" or text.endswith(".kubernetes.io"):
        raise ValueError("the kubelet refuses resources below kubernetes.io")
    return text


_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LIST_STRATEGIES = ("envvar", "volume-mounts", "cdi-annotations", "cdi-cri")
_BOTH = frozenset({SERVE, STATUS})
_ALL = _BOTH | {CLEAR}
_PLUGIN = "flags.plugin."
_OURS = "migplugin."

TABLE: tuple[Setting, ...] = (
    Setting(
        "mig_strategy", ("MIG_STRATEGY",), "flags.migStrategy", "mixed", one_of("none", "single", "mixed"), "STRATEGY",
        "Which resources MIG devices become: `mixed` offers `nvidia.com/mig-<profile>` for each profile and "
        "`nvidia.com/gpu` for GPUs with MIG off, `single` offers MIG devices of one profile as `nvidia.com/gpu`, "
        "`none` offers whole GPUs only.",
        commands=_BOTH,
    ),
    Setting(
        "fail_on_init_error", ("FAIL_ON_INIT_ERROR",), "flags.failOnInitError", "", parse_optional_bool, "BOOL",
        "Exit with code 3 when NVML or its driver is not there at start. Unset or false: wait until it is.",
        kind=bool,
    ),
    Setting(
        "device_discovery_strategy", ("DEVICE_DISCOVERY_STRATEGY",), "flags.deviceDiscoveryStrategy", "auto",
        parse_discovery, "STRATEGY",
        "How devices are found; there is one way here, `auto` and `nvml` both mean it.",
    ),
    Setting(
        "device_list_strategy", ("DEVICE_LIST_STRATEGY",), _PLUGIN + "deviceListStrategy", "envvar",
        some_of(*_LIST_STRATEGIES), "LIST",
        "How a container is told its devices: `envvar` sets `NVIDIA_VISIBLE_DEVICES`, `volume-mounts` mounts one "
        "file for each, `cdi-annotations` and `cdi-cri` name them by CDI; several separated by commas.",
        kind=list,
    ),
    Setting(
        "device_id_strategy", ("DEVICE_ID_STRATEGY",), _PLUGIN + "deviceIDStrategy", "uuid", one_of("uuid", "index"),
        "STRATEGY",
        "What a container is told of each device: its `uuid` or its `index`. After a re-carve an index is another "
        "pod's MIG device, so `index` warns at start.",
    ),
    Setting(
        "pass_device_specs", ("PASS_DEVICE_SPECS",), _PLUGIN + "passDeviceSpecs", "false", parse_bool, "BOOL",
        "Also name the device nodes to the kubelet, for containers that run without the NVIDIA runtime.",
        kind=bool,
    ),
    Setting(
        "shared_devices_allocation_policy", ("SHARED_DEVICES_ALLOCATION_POLICY",),
        _PLUGIN + "sharedDevicesAllocationPolicy", "", one_of("", "packed", "distributed"), "POLICY",
        "Which devices we would rather see taken: `packed` on the fewest GPUs, or `distributed`. Unset: MIG devices "
        "are packed, time-slicing replicas distributed.",
    ),
    Setting(
        "driver_root", ("NVIDIA_DRIVER_ROOT",), "flags.nvidiaDriverRoot", "/", parse_root, "PATH",
        "The host's directory under which the NVIDIA driver is installed.",
        aliases=("--nvidia-driver-root",), commands=_BOTH,
    ),
    Setting(
        "dev_root", ("NVIDIA_DEV_ROOT",), "flags.nvidiaDevRoot", "", parse_root, "PATH",
        "The host's directory that contains `dev/`; unset: the driver root.",
        aliases=("--nvidia-dev-root",), commands=_BOTH,
    ),
    Setting(
        "driver_root_ctr_path", ("DRIVER_ROOT_CTR_PATH", "CONTAINER_DRIVER_ROOT"), _PLUGIN + "containerDriverRoot",
        "/driver-root", parse_path, "PATH",
        "Where the driver root is mounted for us; `libnvidia-ml.so.1` is looked for there first.",
        aliases=("--container-driver-root",), commands=_BOTH,
    ),
    Setting(
        "cdi_root", ("MIGPLUGIN_CDI_ROOT",), _OURS + "cdiRoot", "/var/run/cdi", parse_path, "PATH",
        "Where the CDI document of this node is written, if a `cdi-` strategy is on.",
        commands=_BOTH,
    ),
    Setting(
        "cdi_annotation_prefix", ("CDI_ANNOTATION_PREFIX",), _PLUGIN + "cdiAnnotationPrefix", "cdi.k8s.io/", str, "TEXT",
        "What the keys of CDI annotations begin with.",
    ),
    Setting(
        "nvidia_cdi_hook_path", ("NVIDIA_CDI_HOOK_PATH", "NVIDIA_CTK_PATH"), _PLUGIN + "nvidiaCTKPath",
        "/usr/bin/nvidia-ctk", parse_root, "PATH",
        "The host's nvidia-cdi-hook or nvidia-ctk, which the hooks of the CDI document call.",
        aliases=("--nvidia-ctk-path",), commands=_BOTH,
    ),
    Setting(
        "cdi_feature_flags", ("CDI_FEATURE_FLAGS",), _OURS + "cdiFeatureFlags", "", parse_list, "LIST",
        "Taken for NVIDIA's sake, without effect: they set how NVIDIA's library looks for files.",
        kind=list,
    ),
    Setting(
        "cdi_disable_hooks", ("CDI_DISABLE_HOOKS",), _OURS + "cdiDisableHooks", "", parse_list, "LIST",
        "Names of hooks to leave out of the CDI document, or `all`.",
        kind=list, commands=_BOTH,
    ),
    Setting(
        "gdrcopy_enabled", ("GDRCOPY_ENABLED",), "flags.gdrcopyEnabled", "false", parse_bool, "BOOL",
        "Ask the NVIDIA runtime for GDRCopy in each container.", kind=bool,
    ),
    Setting(
        "gds_enabled", ("GDS_ENABLED",), "flags.gdsEnabled", "false", parse_bool, "BOOL",
        "Ask the NVIDIA runtime for GPUDirect Storage in each container.", kind=bool,
    ),
    Setting(
        "mofed_enabled", ("MOFED_ENABLED",), "flags.mofedEnabled", "false", parse_bool, "BOOL",
        "Ask the NVIDIA runtime for MOFED in each container.", kind=bool,
    ),
    Setting(
        "mps_root", ("MPS_ROOT",), "flags.mpsRoot", "", parse_root, "PATH",
        "Taken for NVIDIA's sake, without effect: MPS is not possible on MIG devices.",
    ),
    Setting(
        "imex_channel_ids", ("IMEX_CHANNEL_IDS",), "imex.channelIDs", "", parse_imex, "LIST",
        "Must be empty: IMEX channels are not served here.", kind=list,
    ),
    Setting(
        "imex_required", ("IMEX_REQUIRED",), "imex.required", "false", parse_bool, "BOOL",
        "Taken for NVIDIA's sake, without effect, since there are no IMEX channels.", kind=bool,
    ),
    Setting(
        "resource_domain", ("MIGPLUGIN_RESOURCE_DOMAIN",), _OURS + "resourceDomain", "nvidia.com", parse_domain, "DOMAIN",
        "What stands before the slash of every resource name.",
        commands=_BOTH,
    ),
    Setting(
        "disable_healthchecks", ("DP_DISABLE_HEALTHCHECKS",), "", "", str, "LIST",
        "Which health checks are off: `all`, `xids`, or XID numbers separated by commas.",
        has_flag=False,
    ),
    Setting(
        "enable_healthchecks", ("DP_ENABLE_HEALTHCHECKS",), "", "", str, "LIST",
        "Which XIDs make a device unhealthy although they are off, or would leave it healthy: numbers, or `all`.",
        has_flag=False,
    ),
    Setting(
        "kubelet_socket", ("KUBELET_SOCKET",), "", "/var/lib/kubelet/device-plugins/kubelet.sock", parse_path, "PATH",
        "The kubelet's registration socket; its directory is where our sockets and the node lock go.",
        commands=_ALL,
    ),
    Setting(
        "pod_resources_socket", ("MIGPLUGIN_POD_RESOURCES_SOCKET",), "",
        "/var/lib/kubelet/pod-resources/kubelet.sock", parse_path, "PATH",
        "The kubelet's pod-resources socket, which tells who holds which device. Need not be mounted.",
        commands=_BOTH,
    ),
    Setting(
        "control_socket", ("MIGPLUGIN_CONTROL_SOCKET",), "", "/run/migplugin/agent.sock", parse_optional_path, "PATH",
        "Where the running agent answers `migplugin status` and `migplugin health`, for root alone; as a flag without "
        "a value: nowhere.",
        commands=_ALL,
    ),
    Setting(
        "poll_interval", ("MIGPLUGIN_POLL_INTERVAL",), _OURS + "pollInterval", "", parse_interval, "DURATION",
        "How often the driver is asked for changes without being told; unset: 60s where it tells of them by "
        "itself, 5s where it does not.",
        kind=float,
    ),
    Setting(
        "removal_delay", ("MIGPLUGIN_REMOVAL_DELAY",), _OURS + "removalDelay", "60s", parse_duration, "DURATION",
        "How long a device that is gone stays listed as Unhealthy, at least. Shorter than the default is for "
        "demos and tests: a kubelet that is just allocating a device crashes when it leaves the list.",
        kind=float,
    ),
    Setting(
        "driver_grace", ("MIGPLUGIN_DRIVER_GRACE",), _OURS + "driverGrace", "60s", parse_duration, "DURATION",
        "How long devices stay Healthy while the driver as a whole does not answer.",
        kind=float,
    ),
    Setting(
        "health_recovery_after", ("MIGPLUGIN_HEALTH_RECOVERY_AFTER",), _OURS + "healthRecoveryAfter", "5m",
        parse_duration, "DURATION",
        "How long no pod must have held a device with a contained memory error (XID 94), and the driver have wanted "
        "nothing done, before it is Healthy again without having been made anew. 0: never.",
        kind=float,
    ),
    Setting(
        "state_dir", ("MIGPLUGIN_STATE_DIR",), _OURS + "stateDir", "", parse_root, "PATH",
        "Where sick devices are remembered when the agent is started anew; unset: `migplugin` in the directory of the "
        "kubelet's socket. `migplugin health clear` has them forgotten.",
        commands=_ALL,
    ),
    Setting(
        "nvml_timeout", ("MIGPLUGIN_NVML_TIMEOUT",), _OURS + "nvmlTimeout", "15s", parse_timeout, "DURATION",
        "How long one look at the driver may take before it counts as not answering.",
        commands=_BOTH, kind=float,
    ),
    Setting(
        "proc_root", ("MIGPLUGIN_PROC_ROOT",), "", "/proc", parse_path, "PATH",
        "Where the host's `/proc` is seen, for MIG capabilities.",
        commands=_ALL,
    ),
    Setting(
        "sysfs_root", ("MIGPLUGIN_SYSFS_ROOT",), "", "/sys", parse_path, "PATH",
        "Where the host's `/sys` is seen, for NUMA nodes.",
        commands=_BOTH,
    ),
    Setting(
        "simulate", (), "", "", str, "SPEC|DIR",
        "Run on a simulated driver instead of a real one: a new node such as `1xa100-40gb=1g.5gb*7`, or a directory "
        "that `migplugin sim init` made. For trying and testing only.",
        commands=_BOTH,
    ),
    Setting(
        "force_simulate", (), "", "false", parse_bool, "BOOL",
        "Let `--simulate` serve also where a real driver is loaded. Without it such a node is refused, so that no "
        "real workload lands on a GPU that does not exist.",
        kind=bool,
    ),
    Setting(
        "http_listen", ("MIGPLUGIN_HTTP_LISTEN",), _OURS + "httpListen", "", parse_address, "ADDRESS",
        "Where `/healthz` and `/readyz` are answered for probes, such as `:9401` or `127.0.0.1:9401`; unset: nowhere.",
    ),
    Setting(
        "config_file", ("CONFIG_FILE",), "", "", str, "PATH",
        "A configuration file in NVIDIA's v1 format, YAML or JSON. It is followed: a change applies without a restart.",
        commands=_ALL,
    ),
    Setting(
        "strict_config", ("MIGPLUGIN_STRICT_CONFIG",), "", "false", parse_bool, "BOOL",
        "Take unknown and doubled keys of the configuration file for errors instead of warnings.",
        kind=bool, commands=_BOTH,
    ),
    Setting(
        "log_format", ("MIGPLUGIN_LOG_FORMAT",), "", "text", one_of("text", "json"), "FORMAT",
        "Log lines for people (`text`) or for machines (`json`).",
    ),
    Setting(
        "log_level", ("MIGPLUGIN_LOG_LEVEL",), _OURS + "logLevel", "info", one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "The least important lines to log.",
    ),
)  # fmt: skip


def resolve(flags: Mapping[str, str | None], env: Mapping[str, str]) -> Settings:
    """Settings from what was given: flag > environment > file > default.

    `flags` maps names of `Setting` to texts, None where not given. Raises InputError, naming the flag,
    variable or key, the value and what is allowed.
    """
    document = _document(flags, env)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in TABLE:
        source, text = _given(setting, flags, env, document)
        try:
            values[setting.name] = setting.parse(text)
        except ValueError as exc:
            raise InputError(f"{source}={text[:200]}: {exc}") from exc
        sources[setting.name] = source
    if values["strict_config"] and document.findings:
        raise InputError("; ".join(document.findings))
    return Settings(**values, document=document, sources=sources)


def _given(
    setting: Setting, flags: Mapping[str, str | None], env: Mapping[str, str], document: Document
) -> tuple[str, str]:
    """Where the value of a setting comes from, and its text."""
    flag = flags.get(setting.name)
    if flag is not None:
        return setting.flag, flag
    # As in NVIDIA's plugin, a variable that is set to nothing is not set.
    for name in setting.env:
        if env.get(name):
            return name, env[name]
    if setting.key in document.values:
        return f"{document.source}: {setting.key}", _text(setting, document)
    return DEFAULT, setting.default


def _text(setting: Setting, document: Document) -> str:
    """A value of the file as a flag would have it. Raises InputError where its type is wrong."""
    value = document.values[setting.key]
    if setting.kind is bool and isinstance(value, bool):
        return "true" if value else "false"
    if setting.kind is list and isinstance(value, list) and all(isinstance(v, str | int) for v in value):
        return ",".join(map(str, value))
    if setting.kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if setting.kind is not bool and isinstance(value, str):
        return value
    expected = {bool: "true or false", list: "text or a list", float: "a duration"}.get(setting.kind, "text")
    raise InputError(f"{document.source}: {setting.key}: {value!r}: expected {expected}")


def _document(flags: Mapping[str, str | None], env: Mapping[str, str]) -> Document:
    path = flags.get("config_file") or env.get("CONFIG_FILE") or ""
    if not path:
        return Document()
    from migplugin import configfile  # noqa: PLC0415  YAML is loaded where there is some

    ours = tuple(setting.key.removeprefix(_OURS) for setting in TABLE if setting.key.startswith(_OURS))
    document = configfile.read(Path(path), ours)
    if (document.sharing.get("mps") or {}).get("resources"):
        raise InputError(
            f"{document.source}: sharing.mps: MPS is not possible on MIG devices and not served here; use timeSlicing"
        )
    return document


def describe(settings: Settings) -> list[tuple[str, str, str]]:
    """Every setting as (name, value, where it came from), in the order of the table."""
    rows = []
    for setting in TABLE:
        value = getattr(settings, setting.name)
        text = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        rows.append(
            (setting.name, text.lower() if isinstance(value, bool) else text, settings.sources[setting.name])
        )
    return rows


def markdown_table() -> str:
    """The settings as the README shows them."""
    lines = ["| flag | environment | file | default | what it does |", "|---|---|---|---|---|"]
    for setting in TABLE:
        flags = (
            ", ".join(f"`{flag}`" for flag in (setting.flag, *setting.aliases)) if setting.has_flag else "-"
        )
        envs = ", ".join(f"`{name}`" for name in setting.env) or "-"
        key = f"`{setting.key}`" if setting.key else "-"
        default = f"`{setting.default}`" if setting.default else "unset"
        lines.append(f"| {flags} | {envs} | {key} | {default} | {setting.help} |")
    return "\n".join(lines) + "\n"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _nearest(text: str, allowed: tuple[str, ...]) -> str:
    import difflib  # noqa: PLC0415  only where something is wrong

    near = difflib.get_close_matches(text, allowed, 1)
    return f"; did you mean {near[0]}?" if near else ""
