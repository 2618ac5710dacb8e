"""The CDI document of this node: what a runtime adds to a container that asks for a device by name.

Vendor, class and names are those of NVIDIA's plugin, so that answers which the kubelet has checkpointed
resolve after a change from one to the other. Every MIG device and every GPU with MIG off is in it,
whatever the strategy offers: what a pod holds must resolve when its container restarts. What else a
container needs (control nodes, the driver's libraries and programs) is common to all of them.

A capability node is written with its type and numbers: on the host that of a fresh instance does not
exist until somebody makes it, and so the runtime makes it inside the container without looking.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from migplugin.core.inventory import DeviceId, Inventory, MigDevice

VENDOR = "k8s.device-plugin.nvidia.com"
CLASS = "gpu"
KIND = f"{VENDOR}/{CLASS}"
FILE_NAME = f"{VENDOR}-{CLASS}.json"

CONTROL_NODES = ("/dev/nvidia-modeset", "/dev/nvidia-uvm-tools", "/dev/nvidia-uvm", "/dev/nvidiactl")
BINARIES = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
    "nvidia-imex",
    "nvidia-imex-ctl",
)
SOCKETS = ("/run/nvidia-persistenced/socket", "/run/nvidia-fabricmanager/socket", "/tmp/nvidia-mps")  # noqa: S108
FIRMWARE = "lib/firmware/nvidia/{version}/gsp*.bin"
FILE_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")
SOCKET_OPTIONS = ("nosuid", "nodev", "rbind", "rprivate", "noexec")
# Links beside a library that ldconfig does not make, by the library's name without its version.
LINKS = {
    "libcuda.so": ("libcuda.so.1::{dir}/libcuda.so",),
    "libGLX_nvidia.so": ("libGLX_nvidia.so.{version}::{dir}/libGLX_indirect.so.0",),
    "libnvidia-opticalflow.so": ("libnvidia-opticalflow.so.1::{dir}/libnvidia-opticalflow.so",),
}
DEFAULT_CAPABILITY_MODE = 0o444
ENVIRONMENT = ("NVIDIA_VISIBLE_DEVICES=void",)

ALL_HOOKS = "all"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the driver's files say. All paths are as the host's driver root has them, from a `/` of its own.

    `caps_major` is the major number of capability nodes, None where /proc/devices does not say it;
    `drm` maps PCI addresses to the GPU's nodes below /dev/dri.
    """

    caps_major: int | None = None
    drm: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    binaries: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """`driver_root` and `dev_root` are directories of the host; `hook` is the host's program, "" for none.

    `simulated` leaves out what the runtime would make nodes by: the number is somebody else's on a real node.
    """

    driver_root: str = "/"
    dev_root: str = "/"
    hook: str = ""
    disabled_hooks: frozenset[str] = frozenset()
    by_index: bool = False
    simulated: bool = False


def is_used(strategies: Collection[str]) -> bool:
    """Whether some container may be told its devices by CDI."""
    return any(strategy.startswith("cdi-") for strategy in strategies)


def is_alone(strategies: Collection[str]) -> bool:
    """Whether every container is told its devices by CDI only."""
    return is_used(strategies) and all(strategy.startswith("cdi-") for strategy in strategies)


def document(inventory: Inventory, facts: Facts, options: Options) -> Mapping[str, Any] | None:
    """The document, or None where there is no device: without one it would be invalid (CDI's schema)."""
    devices = list(_devices(inventory, facts, options))
    if not devices:
        return None
    common = _edits(
        [_node(path, options) for path in CONTROL_NODES if path in inventory.control_nodes],
        env=_environment(facts),
        mounts=_mounts(facts, options),
        hooks=list(_common_hooks(inventory.driver_version, facts, options)),
    )
    return {
        "cdiVersion": _version([*devices, {"name": VENDOR, "containerEdits": common}]),
        "kind": KIND,
        "devices": devices,
        "containerEdits": common,
    }


def unresolvable(inventory: Inventory, options: Options) -> Mapping[DeviceId, str]:
    """Why a device cannot be in the document, for each that cannot."""
    found = {}
    for _, device in inventory.devices():
        if device.gi_minor is None or device.ci_minor is None:
            found[device.uuid] = "the driver has no capability for it, a container could not use it"
        elif not options.by_index and not _NAME.fullmatch(device.uuid):
            found[device.uuid] = (
                "its id cannot be a name in CDI; use another --device-list-strategy or a newer driver"
            )
    return found


def lacking(facts: Facts, inventory: Inventory) -> tuple[str, ...]:
    """What a container will miss although the document is valid, a sentence each."""
    found = []
    if not facts.libraries:
        found.append(
            f"no libraries of driver {inventory.driver_version} below the driver root, containers get device "
            "nodes only: mount the host's driver root and set --driver-root-ctr-path"
        )
    if facts.caps_major is None and any(gpu.devices for gpu in inventory.gpus):
        found.append(
            "no line nvidia-caps in /proc/devices, so a MIG device works only once its nodes are on the host"
        )
    return tuple(found)


def names(inventory: Inventory, options: Options) -> Mapping[DeviceId, str]:
    """The name in the document of every device that is in it: NVIDIA's, by the strategy of ids."""
    left_out = unresolvable(inventory, options)
    found = {
        DeviceId(gpu.uuid): str(gpu.index) if options.by_index else gpu.uuid
        for gpu in inventory.gpus
        if not gpu.mig_enabled
    }
    for gpu, device in inventory.devices():
        if device.uuid not in left_out:
            found[device.uuid] = f"{gpu.index}:{device.index}" if options.by_index else device.uuid
    return found


def missing(
    inventory: Inventory,
    options: Options,
    *,
    wanted: Mapping[str, Any] | None,
    there: Mapping[str, Any] | None,
) -> frozenset[DeviceId]:
    """The devices that are not in `there`, the document on disk, as they are in `wanted`."""
    new, old = _by_name(wanted), _by_name(there)
    return frozenset(id_ for id_, name in names(inventory, options).items() if old.get(name) != new.get(name))


def standing(before: Inventory | None, now: Inventory) -> Inventory:
    """`now`, with GPUs that do not answer as they were in `before`: what they hold is not gone."""
    if before is None or not now.broken:
        return now
    answering = {gpu.uuid for gpu in now.gpus}
    broken = {gpu.uuid for gpu in now.broken}
    # A broken GPU that does not even tell its uuid may be any that is missed.
    missed = [
        gpu for gpu in before.gpus if gpu.uuid not in answering and (gpu.uuid in broken or None in broken)
    ]
    gpus = sorted((*now.gpus, *missed), key=lambda gpu: gpu.index)
    return Inventory(now.driver_version, tuple(gpus), now.broken, now.control_nodes, now.unreadable)


def capability_path(minor: int) -> str:
    return f"/dev/nvidia-caps/nvidia-cap{minor}"


def _devices(inventory: Inventory, facts: Facts, options: Options) -> Iterator[Json]:
    named = names(inventory, options)
    for gpu in inventory.gpus:
        gpu_node = _node(f"/dev/nvidia{gpu.minor}", options)
        drm = facts.drm.get(gpu.pci_address, ())
        graphics = [_node(path, options) for path in drm]
        links = list(_by_path_hooks(gpu.pci_address, drm, options))
        if not gpu.mig_enabled:
            yield _device(named[DeviceId(gpu.uuid)], [gpu_node, *graphics], links)
        for device in gpu.devices:
            if device.uuid in named:
                nodes = [gpu_node, *_capabilities(device, facts, options)]
                if "+gfx" in device.profile:
                    yield _device(named[device.uuid], nodes + graphics, links)
                else:
                    yield _device(named[device.uuid], nodes, [])


def _device(name: str, nodes: list[Json], hooks: list[Json]) -> Json:
    return {"name": name, "containerEdits": _edits(nodes, hooks=hooks)}


def _capabilities(device: MigDevice, facts: Facts, options: Options) -> Iterator[Json]:
    for minor, mode in ((device.gi_minor, device.gi_mode), (device.ci_minor, device.ci_mode)):
        assert minor is not None, "unresolvable() names such a device"
        node = _node(capability_path(minor), options)
        if facts.caps_major is not None and not options.simulated:
            node |= {
                "type": "c",
                "major": facts.caps_major,
                "minor": minor,
                "fileMode": DEFAULT_CAPABILITY_MODE if mode is None else mode,
            }
        yield node


def _node(path: str, options: Options) -> Json:
    host = below(options.dev_root, path)
    # The host's path needs a newer CDI and says nothing where it is the container's.
    return {"path": path} if host == path else {"path": path, "hostPath": host}


def below(root: str, path: str) -> str:
    """The path of the host for `path` as `root` has it."""
    return root.rstrip("/") + path


def _mounts(facts: Facts, options: Options) -> list[Json]:
    files = [(path, FILE_OPTIONS) for path in (*facts.libraries, *facts.firmware, *facts.binaries)]
    files += [(path, SOCKET_OPTIONS) for path in facts.sockets]
    return [
        {"hostPath": below(options.driver_root, path), "containerPath": path, "options": list(flags)}
        for path, flags in files
    ]


def _environment(facts: Facts) -> list[str]:
    directories = dict.fromkeys(_directory(path) for path in facts.libraries if _stem(path) == "libcuda.so")
    told = [f"NVIDIA_CTK_LIBCUDA_DIR={':'.join(directories)}"] if directories else []
    return [*told, *ENVIRONMENT]


def _common_hooks(version: str, facts: Facts, options: Options) -> Iterator[Json]:
    if not facts.libraries:
        return
    links = [
        link.format(dir=_directory(path), version=version)
        for path in facts.libraries
        for link in LINKS.get(_stem(path), ())
    ]
    if links:
        yield from _hook("create-symlinks", (a for link in links for a in ("--link", link)), options)
    if any(_stem(path) == "libcuda.so" for path in facts.libraries):
        yield from _hook("enable-cuda-compat", (f"--host-driver-version={version}",), options)
    folders = sorted({_directory(path) for path in facts.libraries})
    yield from _hook("update-ldcache", (a for folder in folders for a in ("--folder", folder)), options)
    yield from _hook("disable-device-node-modification", (), options)


def _by_path_hooks(pci_address: str, drm: Iterable[str], options: Options) -> Iterator[Json]:
    links = []
    for path in drm:
        name = PurePosixPath(path).name
        kind = "card" if name.startswith("card") else "render"
        links += ["--link", f"../{name}::/dev/dri/by-path/pci-{pci_address}-{kind}"]
    if links:
        yield from _hook("create-symlinks", links, options)


def _hook(name: str, arguments: Iterable[str], options: Options) -> Iterator[Json]:
    if not options.hook or options.disabled_hooks & {name, ALL_HOOKS}:
        return
    program = PurePosixPath(options.hook).name
    # nvidia-ctk has the hooks one level down.
    first = [program, "hook"] if program == "nvidia-ctk" else [program]
    yield {"hookName": "createContainer", "path": options.hook, "args": [*first, name, *arguments]}


def _edits(
    nodes: list[Json],
    *,
    env: list[str] | None = None,
    mounts: list[Json] | None = None,
    hooks: list[Json] | None = None,
) -> Json:
    every = {"env": env, "deviceNodes": nodes, "mounts": mounts, "hooks": hooks}
    return {key: value for key, value in every.items() if value}


def _by_name(found: Mapping[str, Any] | None) -> dict[str, Any]:
    devices = (found or {}).get("devices")
    listed = devices if isinstance(devices, list) else []
    return {device["name"]: device for device in listed if isinstance(device, dict) and "name" in device}


def _version(parts: list[Json]) -> str:
    """The lowest version of CDI that has everything in `parts`: old runtimes read no newer one."""
    by_digit = any(not part["name"][0].isalpha() for part in parts)
    nodes = (node for part in parts for node in part["containerEdits"].get("deviceNodes", ()))
    return "0.5.0" if by_digit or any("hostPath" in node for node in nodes) else "0.3.0"


def _directory(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _stem(path: str) -> str:
    """`libcuda.so` of `/usr/lib64/libcuda.so.590.48.01`."""
    name, dot_so, _ = PurePosixPath(path).name.partition(".so.")
    return name + dot_so.rstrip(".")
