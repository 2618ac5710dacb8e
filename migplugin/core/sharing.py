"""Time-slicing: which devices are offered several times over, the `sharing.timeSlicing` section.

A shared device is offered as replicas, ids `<uuid>::<n>`, which have its health and its topology:
they are one device, and nothing keeps the containers that hold them apart.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from migplugin.core.inventory import DeviceId, Inventory
from migplugin.core.naming import resource_name, short
from migplugin.core.resource import NVIDIA, ResourceName, is_valid
from migplugin.errors import InputError

ALL = "all"
SHARED = ".shared"
# The kubelet reads lists of at most 4 MiB: 56 devices a thousand times are just below it.
MAX_REPLICAS = 1000

_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_REFERENCE = re.compile(rf"\d+(?::\d+)?|(?:GPU|MIG)-{_UUID}|MIG-GPU-{_UUID}/\d+/\d+", re.IGNORECASE)

_SECTION = "sharing.timeSlicing"


@dataclass(frozen=True, slots=True)
class Shared:
    """Devices of `name` are offered `replicas` times each, as `rename` if that is given.

    `devices` is ALL, how many, or which: `0` and a GPU's UUID mean the GPU and all that is on it, `0:1`, a
    MIG device's UUID and the old `MIG-GPU-<uuid>/<gi>/<ci>` one MIG device.
    """

    name: ResourceName
    replicas: int
    rename: ResourceName | None = None
    devices: str | int | tuple[str, ...] = ALL


@dataclass(frozen=True, slots=True)
class TimeSlicing:
    resources: tuple[Shared, ...] = ()
    rename_by_default: bool = False
    fail_requests_greater_than_one: bool = False

    def name_of(self, shared: Shared) -> ResourceName:
        """What the replicas are called."""
        if shared.rename is not None:
            return shared.rename
        return ResourceName(shared.name + SHARED) if self.rename_by_default else shared.name


def time_slicing(document: Mapping[str, Any], domain: str = NVIDIA) -> TimeSlicing:
    """What the section `sharing.timeSlicing` asks for; its shape is checked, its values are not.

    Raises InputError.
    """
    if not document:
        return TimeSlicing()
    rename_by_default = _switch(document, "renameByDefault")
    fail_greater = _switch(document, "failRequestsGreaterThanOne")
    given = document.get("resources")
    if not given:
        raise InputError(f"{_SECTION}.resources: {short(given)}: expected at least one resource to share")
    slicing = TimeSlicing(tuple(_resources(given, domain)), rename_by_default, fail_greater)
    for number, shared in enumerate(slicing.resources):
        name = slicing.name_of(shared)
        if not is_valid(name):
            raise InputError(
                f"{_SECTION}.resources[{number}].name: {shared.name!r}: with renameByDefault it becomes "
                f"{name!r}, which is too long for the kubelet: give it a rename"
            )
    return slicing


def chosen(
    shared: Shared,
    ids: Collection[DeviceId],
    inventory: Inventory,
    already: Collection[DeviceId],
    whole: Collection[DeviceId],
) -> tuple[frozenset[DeviceId], tuple[str, ...]]:
    """Which of the devices `ids` are shared, and which references mean none of them.

    A count keeps to devices that are shared `already`, and takes those that pods hold `whole` last: sharing
    a device that somebody has to himself would have to wait for him.
    """
    if shared.devices == ALL:
        return frozenset(ids), ()
    if isinstance(shared.devices, int):
        ordered = sorted(ids, key=lambda id_: (id_ not in already, id_ in whole))
        return frozenset(ordered[: shared.devices]), ()
    meant = _by_reference(inventory)
    found = {reference: meant.get(reference.lower(), frozenset()) & set(ids) for reference in shared.devices}
    missing = tuple(reference for reference, devices in found.items() if not devices)
    return frozenset().union(*found.values()), missing


def _by_reference(inventory: Inventory) -> Mapping[str, frozenset[DeviceId]]:
    meant: dict[str, frozenset[DeviceId]] = {}
    for gpu in inventory.gpus:
        everything = frozenset({DeviceId(gpu.uuid), *(device.uuid for device in gpu.devices)})
        meant[str(gpu.index)] = meant[gpu.uuid.lower()] = everything
        for device in gpu.devices:
            one = frozenset({device.uuid})
            legacy = f"MIG-{gpu.uuid}/{device.gi}/{device.ci}"
            meant |= dict.fromkeys((f"{gpu.index}:{device.index}", device.uuid.lower(), legacy.lower()), one)
    return meant


def _resources(given: Collection[Any], domain: str) -> Iterator[Shared]:
    for number, item in enumerate(given):
        path = f"{_SECTION}.resources[{number}]"
        resource = item or {}
        replicas = resource.get("replicas")
        if not _is_whole(replicas) or not 2 <= replicas <= MAX_REPLICAS:
            raise InputError(
                f"{path}.replicas: {short(replicas)}: expected a whole number from 2 to {MAX_REPLICAS}"
            )
        rename = resource.get("rename")
        yield Shared(
            resource_name(resource.get("name"), domain, f"{path}.name"),
            replicas,
            None if rename is None or rename == "" else resource_name(rename, domain, f"{path}.rename"),
            _devices(resource.get("devices"), f"{path}.devices"),
        )


def _devices(given: object, path: str) -> str | int | tuple[str, ...]:
    if given is None or given == ALL:
        return ALL
    if _is_whole(given) and given > 0:
        return given
    if not isinstance(given, list) or not given:
        raise InputError(f"{path}: {short(given)}: expected all, how many, or a list of indices and UUIDs")
    return tuple(dict.fromkeys(_reference(item, f"{path}[{number}]") for number, item in enumerate(given)))


def _reference(given: object, path: str) -> str:
    text = str(given) if _is_whole(given) else given
    if not isinstance(text, str) or not _REFERENCE.fullmatch(text):
        raise InputError(
            f"{path}: {short(given)}: expected an index such as 0 or 0:1, GPU-<uuid>, MIG-<uuid> "
            "or MIG-GPU-<uuid>/<gi>/<ci>"
        )
    return text


def _switch(document: Mapping[str, Any], key: str) -> bool:
    given = document.get(key)
    if given is None:
        return False
    if not isinstance(given, bool):
        raise InputError(f"{_SECTION}.{key}: {short(given)}: expected true or false")
    return given


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
