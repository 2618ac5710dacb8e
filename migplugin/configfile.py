"""The configuration file: NVIDIA's v1 format, YAML or JSON, read strictly but served leniently.

NVIDIA's plugin ignores what it does not know, so a misspelt key is a setting that silently is not set.
Here every unknown or doubled key is a finding, with its line and the nearest key that exists; the file is
served all the same. A wrong type is an error: then nothing of the file is taken.
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from migplugin.core.document import Document
from migplugin.errors import InputError

MAX_BYTES = 1 << 20  # a ConfigMap cannot be larger
MAX_DEPTH = 20
MAX_VALUES = (
    10_000  # a file of 1 MiB can hold 500,000, and by aliases any number: minutes in which nobody is served
)

# What the file may hold, as a tree; None ends a path, and a list holds the shape of its items.
SHAPE: Mapping[str, Any] = {
    "version": None,
    "flags": {
        "migStrategy": None,
        "failOnInitError": None,
        "mpsRoot": None,
        "nvidiaDriverRoot": None,
        "nvidiaDevRoot": None,
        "gdrcopyEnabled": None,
        "gdsEnabled": None,
        "mofedEnabled": None,
        "useNodeFeatureAPI": None,
        "deviceDiscoveryStrategy": None,
        "plugin": {
            "passDeviceSpecs": None,
            "deviceListStrategy": None,
            "deviceIDStrategy": None,
            "cdiAnnotationPrefix": None,
            "nvidiaCTKPath": None,
            "containerDriverRoot": None,
            "sharedDevicesAllocationPolicy": None,
        },
        "gfd": {
            "oneshot": None,
            "noTimestamp": None,
            "sleepInterval": None,
            "outputFile": None,
            "machineTypeFile": None,
        },
    },
    "resources": {
        "gpus": [{"pattern": None, "name": None}],
        "mig": [{"pattern": None, "name": None}],
    },
    "sharing": {
        name: {
            "renameByDefault": None,
            "failRequestsGreaterThanOne": None,
            "resources": [{"name": None, "rename": None, "devices": None, "replicas": None}],
        }
        for name in ("timeSlicing", "mps")
    },
    "imex": {"channelIDs": None, "required": None},
}


def read(path: Path, ours: tuple[str, ...] = ()) -> Document:
    """The document at `path`, which may have the keys `ours` below `migplugin`.

    Raises InputError where it cannot be read or is no such document.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise InputError(f"--config-file={path}: {(exc.strerror or str(exc)).lower()}") from exc
    if len(content) > MAX_BYTES:
        raise InputError(f"--config-file={path}: larger than {MAX_BYTES} bytes")
    return parse(content, str(path), ours)


def parse(content: bytes, source: str, ours: tuple[str, ...] = ()) -> Document:
    """The document in `content`. Raises InputError."""
    shape = {**SHAPE, "migplugin": dict.fromkeys(ours)}
    # In C where PyYAML has it, as its wheels do: in Python 1 MiB takes half a minute.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = content.decode()
        for number, _ in enumerate(yaml.parse(text, Loader=loader)):
            _count(number // 2, source)  # a list or mapping has a begin and an end
        node = yaml.compose(text, Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise InputError(f"{source}: not YAML or JSON: {_one_line(exc)}") from exc
    findings: list[str] = []
    plain = {} if node is None else _plain(node, "", findings, source, 0, itertools.count())
    if plain is None:
        plain = {}
    if not isinstance(plain, dict):
        raise InputError(f"{source}: expected a mapping at the top, not {type(plain).__name__}")
    if (version := plain.get("version", "v1")) not in ("v1", "", None):
        raise InputError(f"{source}: version: {version!r}: expected v1")
    _compare(plain, shape, "", findings, source)
    values: dict[str, Any] = {}
    for key in ("flags", "imex", "migplugin"):
        _flatten(plain.get(key), shape[key], key, values)
    return Document(source, values, plain.get("resources") or {}, plain.get("sharing") or {}, tuple(findings))


def _count(number: int, source: str) -> None:
    if number > MAX_VALUES:
        raise InputError(f"{source}: more than {MAX_VALUES} values, aliases as often as they are used")


def _plain(
    node: yaml.Node, path: str, findings: list[str], source: str, depth: int, seen: Iterator[int]
) -> Any:
    """Python values of a YAML tree; a key that comes twice is a finding, and its last value counts."""
    _count(next(seen), source)
    if depth > MAX_DEPTH:
        raise InputError(f"{source}: nested deeper than {MAX_DEPTH} levels at {path}")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError(f"{source}:{_line(key_node)}: {path or 'top'}: a key must be plain text")
            key = key_node.value
            if key in result:
                where = f"{source}:{_line(key_node)}: {_join(path, key)}"
                findings.append(f"{where}: given twice, the last one counts")
            result[key] = _plain(value_node, _join(path, key), findings, source, depth + 1, seen)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, f"{path}[{number}]", findings, source, depth + 1, seen)
            for number, item in enumerate(node.value)
        ]
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
        return node.value  # YAML 1.1 reads 1:0, a MIG device, as sixty
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as exc:
        raise InputError(f"{source}:{_line(node)}: {path}: {_one_line(exc)}") from exc


def _compare(found: Any, shape: Any, path: str, findings: list[str], source: str) -> None:
    if shape is None or found is None:
        return
    if isinstance(shape, list):
        if not isinstance(found, list):
            raise InputError(f"{source}: {path}: expected a list, not {_kind(found)}")
        for number, item in enumerate(found):
            _compare(item, shape[0], f"{path}[{number}]", findings, source)
        return
    if not isinstance(found, dict):
        raise InputError(f"{source}: {path}: expected a mapping, not {_kind(found)}")
    for key, value in found.items():
        if key in shape:
            _compare(value, shape[key], _join(path, key), findings, source)
            continue
        near = difflib.get_close_matches(key, shape, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(shape)}"
        findings.append(f"{source}: {_join(path, key)}: {_short(value)}: unknown key, ignored{hint}")


def _flatten(found: Any, shape: Any, path: str, into: dict[str, Any]) -> None:
    """The values at the ends of `shape`, whatever their type, by their path; null is not given."""
    if found is None:
        return
    if shape is None:
        into[path] = found
        return
    for key, value in found.items():
        if key in shape:
            _flatten(value, shape[key], _join(path, key), into)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(value: Any) -> str:
    return {list: "a list", dict: "a mapping", str: "text", bool: "a boolean"}.get(type(value), "a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200]
