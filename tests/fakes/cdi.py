"""What a runtime demands of a CDI document: the schema of CDI 0.5.0, as tables."""

import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9_.:-]*[A-Za-z0-9]")
KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]")
ENV = re.compile(r"[^=]+=.*")

# Keys with their types; the required ones first.
Table = tuple[Mapping[str, type], Mapping[str, type]]

DOCUMENT: Table = ({"cdiVersion": str, "kind": str, "devices": list}, {"containerEdits": dict})
DEVICE: Table = ({"name": str, "containerEdits": dict}, {})
EDITS: Table = ({}, {"env": list, "deviceNodes": list, "mounts": list, "hooks": list})
NODE: Table = (
    {"path": str},
    {"hostPath": str, "type": str, "major": int, "minor": int, "fileMode": int, "permissions": str},
)
MOUNT: Table = ({"hostPath": str, "containerPath": str}, {"options": list})
HOOK: Table = ({"hookName": str, "path": str}, {"args": list, "env": list, "timeout": int})
HOOKS = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}


def check(document: Mapping[str, Any]) -> None:
    """Raises AssertionError where a runtime would refuse `document`, or its version is not the lowest."""
    _keys("document", document, DOCUMENT)
    assert KIND.fullmatch(document["kind"]), document["kind"]
    assert document["devices"], "invalid spec, no devices"
    names = [device["name"] for device in document["devices"]]
    assert len(set(names)) == len(names), "two devices of one name"
    every = []
    for device in document["devices"]:
        _keys("device", device, DEVICE)
        assert NAME.fullmatch(device["name"]), device["name"]
        assert device["containerEdits"], "invalid device, empty device edits"
        every.append(device["containerEdits"])
    every.append(document.get("containerEdits", {}))
    for edits in every:
        _check_edits(edits)
    newer = any("hostPath" in node for edits in every for node in edits.get("deviceNodes", ()))
    newer = newer or any(not name[0].isalpha() for name in names)
    assert document["cdiVersion"] == ("0.5.0" if newer else "0.3.0")


def _check_edits(edits: Mapping[str, Any]) -> None:
    _keys("containerEdits", edits, EDITS)
    for text in edits.get("env", ()):
        assert ENV.fullmatch(text), text
    for node in edits.get("deviceNodes", ()):
        _keys("deviceNode", node, NODE)
        assert node.get("type", "c") in {"b", "c", "u", "p"}
        assert node["path"].startswith("/")
        assert node.get("hostPath", "/").startswith("/")
        # A runtime that finds a type looks at no host path, and then needs the numbers.
        assert ("type" in node) == ("major" in node) == ("minor" in node)
        assert 0 <= node.get("fileMode", 0) <= 0o777
    paths = [node["path"] for node in edits.get("deviceNodes", ())]
    assert len(set(paths)) == len(paths)
    for mount in edits.get("mounts", ()):
        _keys("mount", mount, MOUNT)
        assert mount["hostPath"].startswith("/")
        assert mount["containerPath"].startswith("/")
    for hook in edits.get("hooks", ()):
        _keys("hook", hook, HOOK)
        assert hook["hookName"] in HOOKS
        assert hook["path"].startswith("/")


def _keys(what: str, found: Mapping[str, Any], table: Table) -> None:
    required, optional = table
    assert required.keys() <= found.keys(), f"{what} without {required.keys() - found.keys()}"
    allowed = {**required, **optional}
    for key, value in found.items():
        assert key in allowed, f"{what} with {key}"
        assert isinstance(value, allowed[key]), f"{what}: {key} is {value!r}"
