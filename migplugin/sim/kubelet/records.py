"""`pods.json`: what the API server would still know after the kubelet's process has been killed."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from migplugin.sim.kubelet.pods import Pod, PodStatus


class _Record(msgspec.Struct):
    pod: Pod
    phase: str
    reason: str = ""
    message: str = ""


class _Document(msgspec.Struct):
    pods: list[_Record]
    resources: list[str]


class Records:
    """The pods with their status, without what their containers got, and the resources of the node object."""

    def __init__(self, root: Path) -> None:
        self._path = root / "pods.json"

    def save(self, pods: Iterable[tuple[Pod, PodStatus]], resources: Iterable[str]) -> None:
        records = [_Record(pod, status.phase, status.reason, status.message) for pod, status in pods]
        temporary = self._path.with_name(".pods.json.new")
        temporary.write_bytes(msgspec.json.encode(_Document(records, sorted(resources))))
        temporary.replace(self._path)

    def load(self) -> tuple[list[tuple[Pod, PodStatus]], list[str]]:
        with contextlib.suppress(FileNotFoundError):
            document = msgspec.json.decode(self._path.read_bytes(), type=_Document)
            pods = [
                (record.pod, PodStatus(record.phase, record.reason, record.message))
                for record in document.pods
            ]
            return pods, document.resources
        return [], []
