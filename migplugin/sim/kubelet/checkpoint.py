"""What is allocated to whom, and `kubelet_internal_checkpoint`, the file that remembers it.

The file is rewritten at an allocation and at every list message, and at nothing else: a pod that is
deleted stays in it until then. Device ids are kept by NUMA node, "-1" where a device has none, so a
device on two nodes is named twice. The checksum is ours (FNV-1a over the data): the real one hashes a
dump of Go structs, and nobody but the kubelet itself has reason to look at it.
"""

import base64
import binascii
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from migplugin._proto.deviceplugin.v1beta1 import api_pb2

NAME = "kubelet_internal_checkpoint"
NO_NODE = -1


@dataclass(frozen=True, slots=True)
class Allocation:
    """One resource of one container: the ids by NUMA node, and the answer that serves every start."""

    by_node: Mapping[int, tuple[str, ...]]
    response: api_pb2.ContainerAllocateResponse

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(id_ for ids in self.by_node.values() for id_ in ids)


@dataclass(slots=True)
class Ledger:
    """Every allocation: by pod UID, container name and resource name."""

    pods: dict[str, dict[str, dict[str, Allocation]]] = field(default_factory=dict)

    def add(self, uid: str, container: str, resource: str, allocation: Allocation) -> None:
        self.pods.setdefault(uid, {}).setdefault(container, {})[resource] = allocation

    def remove(self, uids: Iterable[str]) -> None:
        for uid in uids:
            self.pods.pop(uid, None)

    def of(self, uid: str, container: str) -> Mapping[str, Allocation]:
        """The container's allocations by resource."""
        return self.pods.get(uid, {}).get(container, {})

    def ids(self, uid: str, container: str, resource: str) -> frozenset[str]:
        allocation = self.of(uid, container).get(resource)
        return frozenset() if allocation is None else allocation.ids

    def devices(self) -> dict[str, set[str]]:
        """Every allocated id by resource."""
        found: dict[str, set[str]] = {}
        for containers in self.pods.values():
            for resources in containers.values():
                for resource, allocation in resources.items():
                    found.setdefault(resource, set()).update(allocation.ids)
        return found


class Checkpoint:
    """The file. `rng` decides the order of what Go keeps in maps and sets."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.path = directory / NAME
        self._rng = rng

    def write(self, ledger: Ledger, healthy: Mapping[str, Iterable[str]]) -> None:
        """Replaces the file at once and whole."""
        entries = [
            {
                "PodUID": uid,
                "ContainerName": container,
                "ResourceName": resource,
                "DeviceIDs": {str(node): list(ids) for node, ids in sorted(allocation.by_node.items())},
                "AllocResp": base64.b64encode(allocation.response.SerializeToString()).decode(),
            }
            for uid, containers in ledger.pods.items()
            for container, resources in containers.items()
            for resource, allocation in resources.items()
        ]
        self._rng.shuffle(entries)
        registered = {resource: self._shuffled(ids) for resource, ids in healthy.items()}
        data = {"PodDeviceEntries": entries or None, "RegisteredDevices": registered}
        document = _dump({"Data": data, "Checksum": _checksum(data)})
        temporary = self.path.with_name(f".{NAME}.new")
        temporary.write_bytes(document)
        temporary.chmod(0o600)
        temporary.replace(self.path)

    def read(self) -> tuple[Ledger, tuple[str, ...]]:
        """The allocations and the names of the registered resources; nothing where the file is absent or bad.

        The real kubelet, too, logs a damaged file and goes on without it.
        """
        try:
            document = json.loads(self.path.read_bytes())
            data = document["Data"]
            if document["Checksum"] != _checksum(data):
                return Ledger(), ()
            ledger = Ledger()
            for entry in data["PodDeviceEntries"] or ():
                by_node = {int(node): tuple(ids) for node, ids in entry["DeviceIDs"].items()}
                response = api_pb2.ContainerAllocateResponse.FromString(base64.b64decode(entry["AllocResp"]))
                ledger.add(
                    entry["PodUID"],
                    entry["ContainerName"],
                    entry["ResourceName"],
                    Allocation(by_node, response),
                )
            return ledger, tuple(data["RegisteredDevices"] or ())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error, DecodeError):
            return Ledger(), ()

    def _shuffled(self, ids: Iterable[str]) -> list[str]:
        order = sorted(ids)
        self._rng.shuffle(order)
        return order


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _checksum(data: Any) -> int:
    value = 0x811C9DC5
    for byte in json.dumps(data, separators=(",", ":"), sort_keys=True).encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def remove_sockets(directory: Path) -> None:
    """What a kubelet does to its directory when it starts: no socket at its top level survives."""
    for path in directory.iterdir():
        if path.is_socket():
            path.unlink(missing_ok=True)


def move_socket(bound: Path, path: Path) -> None:
    """Gives a bound socket another name, replacing what is there, so that watchers see it being created."""
    path.unlink(missing_ok=True)
    path.hardlink_to(bound)
    bound.unlink()
