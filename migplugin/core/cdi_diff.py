"""Where two CDI documents would do different things to a container, in words.

Written for one question: does ours add what `nvidia-ctk cdi generate` adds? The order of things, the
options of mounts and what a runtime finds out by itself do not matter.
"""

from collections.abc import Mapping
from typing import Any

OURS, THEIRS = "only here", "only in nvidia-ctk's"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that one document has and the other has not."""
    mine, other = _devices(ours), _devices(theirs)
    found = [f"device {name}: {_whose(name in mine)}" for name in sorted(mine.keys() ^ other.keys())]
    for name in sorted(mine.keys() & other.keys()):
        found += _edits(f"device {name}", mine[name], other[name])
    found += _edits("common", ours.get("containerEdits", {}), theirs.get("containerEdits", {}))
    return found


def _devices(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    # NVIDIA's generator adds a device `all`, its plugin does not, and neither do we.
    devices = document.get("devices") or ()
    return {device["name"]: device.get("containerEdits", {}) for device in devices if device["name"] != "all"}


def _edits(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    mine, other = _things(ours), _things(theirs)
    found = [f"{where}: {thing}: {_whose(thing in mine)}" for thing in sorted(mine.keys() ^ other.keys())]
    found += [
        f"{where}: {thing}: {mine[thing]} here, {other[thing]} in nvidia-ctk's"
        for thing in sorted(mine.keys() & other.keys())
        if mine[thing] != other[thing]
    ]
    return found


def _things(edits: Mapping[str, Any]) -> dict[str, str]:
    """What the edits add, each with where it comes from."""
    things = {f"variable {text}": "" for text in edits.get("env") or ()}
    for node in edits.get("deviceNodes") or ():
        things[f"node {node['path']}"] = node.get("hostPath") or node["path"]
    for mount in edits.get("mounts") or ():
        things[f"mount {mount['containerPath']}"] = mount["hostPath"]
    for hook in edits.get("hooks") or ():
        words = list(hook.get("args") or ())[1:]
        words = words[1:] if words[:1] == ["hook"] else words
        things[f"hook {' '.join(words)}"] = ""
    return things


def _whose(here: bool) -> str:
    return OURS if here else THEIRS
