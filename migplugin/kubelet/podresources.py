"""Who holds which device: the kubelet's checkpoint file, and its pod-resources API.

Two sources, neither whole. Pod-resources leaves out ordinary init containers, and after a kubelet
restart answers an empty list, with success, until the API server has answered the kubelet. The
checkpoint has both, and goes on naming deleted pods until the kubelet next rewrites it. So what
either of them names is held, and only where both are silent is a device free.
"""

import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from migplugin.core.decide import Key, Source, Usage
from migplugin.core.inventory import DeviceId
from migplugin.core.resource import ResourceName, is_ours

log = logging.getLogger(__name__)

CHECKPOINT_NAME = "kubelet_internal_checkpoint"
MAX_BYTES = 16 << 20
TIMEOUT = 5.0

Holders = dict[DeviceId, tuple[str, ...]]


class _Entry(msgspec.Struct):
    PodUID: str = ""
    ContainerName: str = ""
    ResourceName: str = ""
    DeviceIDs: dict[str, list[str] | None] | None = None


class _Data(msgspec.Struct):
    PodDeviceEntries: list[_Entry] | None = None


class _Checkpoint(msgspec.Struct):
    Data: _Data


_DECODER = msgspec.json.Decoder(_Checkpoint)


@dataclass(frozen=True, slots=True)
class UsageReader:
    """Reads both sources.

    An absent pod-resources directory is no failure: NVIDIA's DaemonSet does not mount it.
    """

    checkpoint: Path
    pod_resources_socket: Path

    async def read(self, began: float) -> Usage:
        """What both sources say now. `began` is the caller's clock before the call. Raises nothing."""
        by_checkpoint = self._read_checkpoint()
        listed = await self._list()
        named_by_list = frozenset() if listed is None else listed[0]
        absent = listed is None and _is_missing(self.pod_resources_socket.parent)
        return Usage(
            began=began,
            checkpoint=Source.FAILED if by_checkpoint is None else Source.OK,
            pod_resources=Source.OK if listed is not None else Source.ABSENT if absent else Source.FAILED,
            named=(by_checkpoint or frozenset()) | named_by_list,
            named_by_pod_resources=named_by_list,
            holders={} if listed is None else listed[1],
        )

    def _read_checkpoint(self) -> frozenset[Key] | None:
        """What the checkpoint names, or None where it cannot be read.

        A file that is not there yet names nothing: a kubelet writes it with its first registration.
        """
        try:
            with self.checkpoint.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as exc:
            if exc.errno == errno.ENOENT and self.checkpoint.parent.is_dir():
                return frozenset()
            log.debug("checkpoint unreadable", extra={"path": str(self.checkpoint), "reason": str(exc)})
            return None
        if len(content) > MAX_BYTES:
            return None
        try:
            entries = _DECODER.decode(content).Data.PodDeviceEntries or []
        except msgspec.MsgspecError as exc:
            log.debug("checkpoint unreadable", extra={"path": str(self.checkpoint), "reason": str(exc)})
            return None
        return frozenset(
            key
            for entry in entries
            for ids in (entry.DeviceIDs or {}).values()
            for key in _keys(entry.ResourceName, ids or ())
        )

    async def _list(self) -> tuple[frozenset[Key], Holders] | None:
        """What pod-resources names, and by whom it is held; None where it does not answer."""
        if not _may_be_there(self.pod_resources_socket):
            return None
        # Imported here because gRPC is most of what a short command would load.
        import grpc.aio  # noqa: PLC0415

        from migplugin._proto.podresources.v1 import api_pb2, api_pb2_grpc  # noqa: PLC0415

        options = (("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", MAX_BYTES))
        async with grpc.aio.insecure_channel(f"unix:{self.pod_resources_socket}", options=options) as channel:
            try:
                answer = await api_pb2_grpc.PodResourcesListerStub(channel).List(
                    api_pb2.ListPodResourcesRequest(), timeout=TIMEOUT
                )
            except grpc.aio.AioRpcError as exc:
                log.debug("pod-resources does not answer", extra={"reason": exc.details()})
                return None
        named: set[Key] = set()
        holders: Holders = {}
        for pod in answer.pod_resources:
            for container in pod.containers:
                for devices in container.devices:
                    keys = _keys(devices.resource_name, devices.device_ids)
                    named.update(keys)
                    for _, id_ in keys:
                        holder = f"{pod.namespace}/{pod.name}:{container.name}"
                        holders[id_] = tuple(dict.fromkeys((*holders.get(id_, ()), holder)))
        return frozenset(named), holders


def _keys(resource: str, ids: Iterable[str]) -> list[Key]:
    """The ids that can be ours: by the resource's name, or by their own (a resource can be renamed)."""
    name = ResourceName(resource)
    return [(name, DeviceId(id_)) for id_ in ids if is_ours(name) or id_.startswith(("GPU-", "MIG-"))]


def _may_be_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises where a directory may not be entered


def _is_missing(directory: Path) -> bool:
    """Whether `directory` is certainly not there; one that may not be looked at is there and silent."""
    try:
        directory.stat()
    except OSError as exc:
        return exc.errno in {errno.ENOENT, errno.ENOTDIR}
    return False
