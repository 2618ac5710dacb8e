"""The pod-resources API, v1: which pod holds which devices, as far as the kubelet tells.

Three silences that a reader must know of. Ordinary init containers are left out. Until the API server
has answered a kubelet that was restarted, the list is empty, with success. And all clients together
share 100 calls a second, burst 10; the rest is turned away.
"""

import time
from collections.abc import Callable, Collection

import grpc
import grpc.aio

from migplugin._proto.podresources.v1 import api_pb2, api_pb2_grpc
from migplugin.sim.kubelet.checkpoint import NO_NODE
from migplugin.sim.kubelet.manager import DeviceManager
from migplugin.sim.kubelet.pods import Pod

QPS, BURST = 100.0, 10

Context = grpc.aio.ServicerContext[object, object]


class RateLimit:
    """A token bucket."""

    def __init__(self, qps: float, burst: int, clock: Callable[[], float]) -> None:
        self._qps = qps
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._seen = clock()

    def allows(self) -> bool:
        """Whether one more call may pass now; it is counted if so."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._seen) * self._qps)
        self._seen = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class PodResources(api_pb2_grpc.PodResourcesListerServicer):
    """`active_pods` answers None before the API server has."""

    def __init__(
        self,
        manager: DeviceManager,
        active_pods: Callable[[], Collection[Pod] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._active_pods = active_pods
        self._limit = RateLimit(QPS, BURST, clock)

    async def List(
        self, request: api_pb2.ListPodResourcesRequest, context: Context
    ) -> api_pb2.ListPodResourcesResponse:
        """Every active pod, with devices or without. Frees what dead pods held."""
        await self._pass(context)
        self._manager.release_dead()
        pods = self._active_pods() or ()
        return api_pb2.ListPodResourcesResponse(pod_resources=[self._pod(pod) for pod in pods])

    async def Get(
        self, request: api_pb2.GetPodResourcesRequest, context: Context
    ) -> api_pb2.GetPodResourcesResponse:
        await self._pass(context)
        for pod in self._active_pods() or ():
            if (pod.namespace, pod.name) == (request.pod_namespace, request.pod_name):
                return api_pb2.GetPodResourcesResponse(pod_resources=self._pod(pod))
        text = f"pod {request.pod_name} in namespace {request.pod_namespace} not found"
        return await context.abort(grpc.StatusCode.UNKNOWN, text)

    async def GetAllocatableResources(
        self, request: api_pb2.AllocatableResourcesRequest, context: Context
    ) -> api_pb2.AllocatableResourcesResponse:
        """Healthy devices, allocated or not."""
        await self._pass(context)
        return api_pb2.AllocatableResourcesResponse(
            devices=[
                entry
                for resource, device in self._manager.devices.healthy_devices()
                for entry in _entries(resource, device.id, device.nodes)
            ]
        )

    async def _pass(self, context: Context) -> None:
        if not self._limit.allows():
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")

    def _pod(self, pod: Pod) -> api_pb2.PodResources:
        return api_pb2.PodResources(
            name=pod.name,
            namespace=pod.namespace,
            containers=[
                api_pb2.ContainerResources(
                    name=container.name,
                    devices=[
                        entry
                        for resource, allocation in self._manager.ledger.of(pod.uid, container.name).items()
                        for node, ids in allocation.by_node.items()
                        for id_ in ids
                        for entry in _entries(resource, id_, None if node == NO_NODE else (node,))
                    ],
                )
                for container in pod.in_order()
                if not container.is_ordinary_init
            ],
        )


def _entries(resource: str, id_: str, nodes: tuple[int, ...] | None) -> list[api_pb2.ContainerDevices]:
    """One entry for each node: none at all for a topology that is there but empty."""
    if nodes is None:
        return [api_pb2.ContainerDevices(resource_name=resource, device_ids=[id_])]
    return [
        api_pb2.ContainerDevices(
            resource_name=resource,
            device_ids=[id_],
            topology=api_pb2.TopologyInfo(nodes=[api_pb2.NUMANode(ID=node)]),
        )
        for node in nodes
    ]
