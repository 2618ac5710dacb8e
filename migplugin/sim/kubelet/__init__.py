"""A stand-in kubelet: the device manager of Kubernetes 1.36 as it really behaves, its faults included.

The rule of this room: it does what the real one does and refuses what the real one refuses, down to the
texts, and it is never kinder. A plugin that would crash a kubelet crashes this one too. Where it is
stricter than the real one, the place says so.

    node         Kubelet: what a person starts, kills, asks and waits for; it outlives its own restarts
    plugins      registration, dial back, the list stream, the calls
    devices      what plugins list, health, capacity, the grace
    manager      the device manager of one life: admission, allocation, container starts
    topology     NUMA hints and the policies over them
    checkpoint   what is allocated, and the file that remembers it
    podresources the API that tells who holds what
    pods         the values: pods, their status, what a container got
"""

import os

# gRPC's core reports every peer that goes away as an error, and it reads this once, when first imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from migplugin.sim.kubelet.node import Kubelet, Registered
from migplugin.sim.kubelet.plugins import Listed
from migplugin.sim.kubelet.pods import (
    Container,
    ContainerEdits,
    DeviceNode,
    Mount,
    Panic,
    Pod,
    PodStatus,
    StartFailed,
)

__all__ = [
    "Container",
    "ContainerEdits",
    "DeviceNode",
    "Kubelet",
    "Listed",
    "Mount",
    "Panic",
    "Pod",
    "PodStatus",
    "Registered",
    "StartFailed",
]
