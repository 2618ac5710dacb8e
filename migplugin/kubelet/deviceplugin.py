"""One resource, served: the gRPC side of the kubelet's DevicePlugin API.

Allocate and GetPreferredAllocation run inside the kubelet's sync loop, one at a time, with no deadline:
whatever waits here makes every pod of the node wait. So they answer from the Cell of offers and the
granted devices are remembered before the answer leaves, with no await in between: that is the proof
that a device which is being withdrawn is never handed out.

Stopping has an order. First the streams are told to end and return, then the server stops: a server
stopped under an open stream prints tracebacks, and a grace period only costs its whole length.
"""

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import grpc
import grpc.aio

from migplugin import unixsocket
from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.aio import Cell, first_of
from migplugin.core.allocation import CDI_ANNOTATIONS, Edits, Offer, Offers, edits
from migplugin.core.inventory import DeviceId
from migplugin.core.preference import prefer
from migplugin.core.resource import ResourceName
from migplugin.errors import AllocationRefused, KubeletError
from migplugin.kubelet import sockets

log = logging.getLogger(__name__)

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
MAX_REQUEST_BYTES = 1 << 20

Grant = Callable[[ResourceName, Collection[DeviceId]], None]


class DevicePlugin(api_pb2_grpc.DevicePluginServicer):
    """The RPCs of one resource. `grant` is told of every device that Allocate is about to hand out, and
    refusals are counted in `refused`.
    """

    def __init__(
        self,
        resource: ResourceName,
        offers: Cell[Offers],
        grant: Grant,
        *,
        preferred: bool,
        refused: Counter[ResourceName] | None = None,
    ) -> None:
        self.resource = resource
        self.listed = asyncio.Event()
        self.stream_ended = asyncio.Event()
        self.stopping = asyncio.Event()
        self._offers = offers
        self._grant = grant
        self._preferred = preferred
        self._refused = Counter() if refused is None else refused
        self._streams = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def GetDevicePluginOptions(
        self, request: api_pb2.Empty, context: object
    ) -> api_pb2.DevicePluginOptions:
        return api_pb2.DevicePluginOptions(get_preferred_allocation_available=self._preferred)

    async def ListAndWatch(
        self, request: api_pb2.Empty, context: object
    ) -> AsyncIterator[api_pb2.ListAndWatchResponse]:
        """The whole list, again at every change, until we stop. Never shorter because of us (DESIGN 5.4)."""
        self._streams += 1
        self._quiet.clear()
        version, offers = self._offers.version, self._offers.value
        sent: Offer | None = None
        try:
            while not self.stopping.is_set():
                offer = offers.resources.get(self.resource)
                if offer is not None and offer != sent:
                    yield as_list(offer)
                    sent = offer
                    self.listed.set()
                if self._offers.version == version:
                    await first_of(self._offers.after(version), self.stopping.wait())
                version, offers = self._offers.version, self._offers.value
        finally:
            self._streams -= 1
            if not self._streams:
                self._quiet.set()
            self.stream_ended.set()

    async def GetPreferredAllocation(
        self, request: api_pb2.PreferredAllocationRequest, context: object
    ) -> api_pb2.PreferredAllocationResponse:
        """A hint. Never an error, since that would fail the pod."""
        answer = api_pb2.PreferredAllocationResponse()
        for wanted in request.container_requests:
            chosen = prefer(
                self.resource,
                wanted.available_deviceIDs,
                wanted.must_include_deviceIDs,
                wanted.allocation_size,
                self._offers.value,
            )
            answer.container_responses.add(deviceIDs=chosen)
        return answer

    async def Allocate(
        self, request: api_pb2.AllocateRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> api_pb2.AllocateResponse:
        """The edits of each container, or an error that fails the pod: never an empty answer, which leaks."""
        answer = api_pb2.AllocateResponse()
        granted: list[DeviceId] = []
        try:
            if not request.container_requests:
                raise AllocationRefused(f"{self.resource}: a request without containers")
            offers = self._offers.value
            is_annotated = CDI_ANNOTATIONS in offers.edits.device_list_strategies
            for container in request.container_requests:
                ids = container.devices_ids
                token = _token() if is_annotated else ""
                answer.container_responses.append(as_response(edits(self.resource, ids, offers, token)))
                granted += map(DeviceId, ids)
        except AllocationRefused as exc:
            self._refused[self.resource] += 1
            log.warning("allocation refused", extra={"resource": self.resource, "reason": str(exc)})
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        self._grant(self.resource, granted)
        log.info("allocated", extra={"resource": self.resource, "devices": granted})
        return answer

    async def PreStartContainer(
        self, request: api_pb2.PreStartContainerRequest, context: object
    ) -> api_pb2.PreStartContainerResponse:
        return api_pb2.PreStartContainerResponse()

    async def end_streams(self, timeout: float = 1.0) -> None:  # noqa: ASYNC109
        """Lets every open ListAndWatch return."""
        self.stopping.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._quiet.wait(), timeout)


class Server:
    """A gRPC server for one resource on a socket of its own, new for every instance."""

    def __init__(self, plugin: DevicePlugin, directory: Path) -> None:
        self.plugin = plugin
        self.path = sockets.new_socket_path(directory, plugin.resource)
        # One stream and one call at a time is all that the kubelet has; a request is a few ids.
        self._server = grpc.aio.server(
            options=(("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0))
        )
        api_pb2_grpc.add_DevicePluginServicer_to_server(plugin, self._server)
        self._identity: tuple[int, int] | None = None

    async def start(self) -> None:
        """The server answers at `path`. Raises KubeletError where it cannot."""
        # Asked here because gRPC would put a line of its own on stderr.
        if reason := sockets.unusable(self.path.parent):
            raise KubeletError(reason)
        try:
            with unixsocket.umask(0o077):
                self._server.add_insecure_port(f"unix:{self.path}")
        except RuntimeError as exc:
            raise KubeletError(f"{self.path.parent}: no socket can be made in it; is its disk full?") from exc
        await self._server.start()
        self._identity = unixsocket.identity(self.path)

    def is_reachable(self) -> bool:
        """Whether our socket is still in the directory: a kubelet that starts removes them all."""
        return self._identity is not None and unixsocket.identity(self.path) == self._identity

    async def stop(self) -> None:
        await self.plugin.end_streams()
        await self._server.stop(0)
        if unixsocket.identity(self.path) == self._identity:
            # Where the directory has become read-only it stays behind, and nobody serves it.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def as_list(offer: Offer) -> api_pb2.ListAndWatchResponse:
    """The kubelet's form of an offer, in order of id. Made in place: there may be thousands of replicas."""
    answer = api_pb2.ListAndWatchResponse()
    topologies: dict[int, api_pb2.TopologyInfo] = {}
    for id_ in sorted(offer.devices):
        offered = offer.devices[id_]
        node = offered.device.numa_node
        if node is not None and node not in topologies:
            topologies[node] = api_pb2.TopologyInfo(nodes=[api_pb2.NUMANode(ID=node)])
        answer.devices.add(
            ID=id_,
            health=HEALTHY if offered.healthy else UNHEALTHY,
            # A topology that is there but empty hides the device from pod-resources (kubelet.md 1.7).
            topology=None if node is None else topologies[node],
        )
    return answer


def as_response(given: Edits) -> api_pb2.ContainerAllocateResponse:
    return api_pb2.ContainerAllocateResponse(
        envs=given.envs,
        mounts=[
            api_pb2.Mount(container_path=m.container_path, host_path=m.host_path, read_only=m.read_only)
            for m in given.mounts
        ],
        devices=[
            api_pb2.DeviceSpec(
                container_path=n.container_path, host_path=n.host_path, permissions=n.permissions
            )
            for n in given.nodes
        ],
        annotations=given.annotations,
        cdi_devices=[api_pb2.CDIDevice(name=name) for name in given.cdi_devices],
    )


def _token() -> str:
    """A random UUID, as NVIDIA's plugin has it in the key of its annotation."""
    import uuid  # noqa: PLC0415  slow to import, and not needed to register

    return str(uuid.UUID(bytes=os.urandom(16), version=4))
