"""Every offered resource, served and registered, through every life of the kubelet.

One task per resource goes round: wait for a kubelet, look that nobody else serves this name, serve on
a new socket, register, stay until something ends it, stop, again. What ends it: the kubelet made a
new socket (a new incarnation), our own socket is gone from the directory, or the list stream ended
while the kubelet is there. Registering again starts with stopping the old server, since the kubelet
disconnects whoever is current when any stream of the resource ends (kubelet.md 1.5).

A resource is served for as long as it is offered. Its last list is sent by the decision, which
offers it empty for a minute; here nothing is ever taken from a list.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from migplugin._proto.deviceplugin.v1beta1 import api_pb2, api_pb2_grpc
from migplugin.aio import Cell, DirectoryWatch, first_of, keep_running
from migplugin.core.allocation import Offers
from migplugin.core.resource import ResourceName
from migplugin.errors import KubeletError
from migplugin.kubelet import sockets
from migplugin.kubelet.deviceplugin import DevicePlugin, Grant, Server
from migplugin.unixsocket import explain, is_served

log = logging.getLogger(__name__)

KUBELET = "the kubelet"

Incarnation = tuple[int, int, int]

REGISTER_TIMEOUT = 15.0  # the kubelet dials back for 10 s before it says why it could not
LISTED_WITHIN = 5.0
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
AWAY_PAUSE = 1.0
SETTLED_AFTER = 10.0  # a registration that held this long starts the pauses anew
WATCH_WITHIN = 0.5
LOOK_EVERY = 5.0  # inotify tells of a new kubelet at once; this is for the day when it does not
STOP_WITHIN = 1.0


class Manager:
    """Serves `offers` to the kubelet at `kubelet_socket`; `incarnation` tells others of a new kubelet.

    `registered` is set when it first knows a resource; `refused` counts the allocations that were.
    """

    def __init__(
        self,
        kubelet_socket: Path,
        offers: Cell[Offers],
        grant: Grant,
        *,
        preferred: Callable[[], bool],
    ) -> None:
        self.incarnation: Cell[Incarnation | None] = Cell(None)
        self.registered = asyncio.Event()
        self.refused: Counter[ResourceName] = Counter()
        self._socket = kubelet_socket
        self._offers = offers
        self._grant = grant
        self._preferred = preferred
        self._stopping = asyncio.Event()
        self._tasks: dict[ResourceName, asyncio.Task[None]] = {}
        self._servers: dict[ResourceName, tuple[Server, Incarnation]] = {}
        self._away = ""
        self._looked = asyncio.Event()

    async def run(self) -> None:
        """Serves until `stop`; afterwards all streams have ended and all our sockets are gone."""
        self._look()
        watch = asyncio.ensure_future(keep_running("fswatch", self._watch))
        try:
            version = -1
            while not self._stopping.is_set():
                if version != self._offers.version:
                    version = self._offers.version
                    self._follow(self._offers.value)
                await first_of(self._offers.after(version), self._stopping.wait(), timeout=LOOK_EVERY)
                self._look()
        finally:
            watch.cancel()
            tasks = (watch, *self._tasks.values())
            # Each ends by itself, but one that is just asking a hung kubelet would take its whole deadline.
            await asyncio.wait(tasks, timeout=STOP_WITHIN)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        self._stopping.set()

    def states(self) -> dict[str, bool]:
        """Of each offered resource whether this kubelet knows it and has taken its list. From any thread."""
        incarnation = self.incarnation.value
        servers = dict(self._servers)

        def is_known(resource: ResourceName) -> bool:
            server, known_to = servers.get(resource, (None, None))
            if server is None or known_to != incarnation:
                return False
            return server.plugin.listed.is_set() and not server.plugin.stream_ended.is_set()

        return {resource: is_known(resource) for resource in self._offers.value.resources}

    def registrations(self) -> dict[ResourceName, str]:
        """How each offered resource stands with the kubelet, in a word or two."""
        away = "no kubelet" if self._away or self.incarnation.value is None else "not registered"
        states = self.states()
        return {name: "registered" if states[name] else away for name in self._offers.value.resources}

    def dead(self) -> list[ResourceName]:
        """Registered resources at whose socket nobody listens any more. From any thread."""
        servers = [server for server, _ in tuple(self._servers.values())]
        return [s.plugin.resource for s in servers if s.is_reachable() and not is_served(s.path)]

    async def _watch(self) -> None:
        # Importing watchdog takes as long as registering: first things first.
        await asyncio.wait((asyncio.ensure_future(self.registered.wait()),), timeout=WATCH_WITHIN)
        await DirectoryWatch(self._socket.parent, self._look).run()

    def _look(self) -> None:
        """Notices a new kubelet, and lets every resource look whether its own socket is still there."""
        self.incarnation.set(_incarnation(self._socket))
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()

    def _follow(self, offers: Offers) -> None:
        for resource in offers.resources:
            task = self._tasks.get(resource)
            if task is None or task.done():
                self._tasks[resource] = asyncio.ensure_future(
                    keep_running(f"serve {resource}", lambda name=resource: self._serve(name))  # type: ignore[misc]
                )
        self._tasks = {name: task for name, task in self._tasks.items() if not task.done()}

    def _is_kubelet_there(self) -> bool:
        """Whether somebody answers at the kubelet's socket; where not, one line says so for all resources."""
        self._look()
        reason = explain(self._socket, KUBELET)
        if reason and reason != self._away:
            log.warning("no kubelet, waiting for it", extra={"reason": reason})
        self._away = reason
        return not reason and self.incarnation.value is not None

    def _is_wanted(self, resource: ResourceName) -> bool:
        return not self._stopping.is_set() and resource in self._offers.value.resources

    async def _serve(self, resource: ResourceName) -> None:
        """Goes round until the resource is offered no more."""
        pause, said = SHORTEST_PAUSE, ""
        loop = asyncio.get_running_loop()
        while self._is_wanted(resource):
            if not self._is_kubelet_there():
                await self._pause(AWAY_PAUSE)
                continue
            incarnation = self.incarnation.value
            began = loop.time()
            reason = ""
            try:
                await self._once(resource)
            except KubeletError as exc:
                reason = str(exc)
            if not self._is_wanted(resource):
                break
            if self.incarnation.value != incarnation or loop.time() - began > SETTLED_AFTER:
                pause = SHORTEST_PAUSE
            if self.incarnation.value != incarnation:
                continue
            if reason and reason != said:
                log.warning(
                    "not registered, will try again",
                    extra={"resource": resource, "reason": reason, "retry_in": pause},
                )
                said = reason
            await self._pause(pause * random.uniform(0.8, 1.2))  # noqa: S311  not a secret
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _pause(self, seconds: float) -> None:
        """At most `seconds`; a new kubelet, or the end, ends it."""
        await first_of(
            self.incarnation.after(self.incarnation.version), self._stopping.wait(), timeout=seconds
        )

    async def _once(self, resource: ResourceName) -> None:
        """One registration, from the look at the directory to whatever ends it.

        Raises KubeletError where it could not be made, or ended though the kubelet is there.
        """
        other = sockets.other_plugin(self._socket.parent, resource)
        if other is not None:
            raise KubeletError(
                f"NVIDIA's device plugin serves {resource} at {other}: two plugins drive a resource to 0, "
                "so remove the DaemonSet nvidia-device-plugin-daemonset (or its node label) first"
            )
        plugin = DevicePlugin(
            resource, self._offers, self._grant, preferred=self._preferred(), refused=self.refused
        )
        server = Server(plugin, self._socket.parent)
        incarnation = self.incarnation.value
        assert incarnation is not None, "asked for a kubelet first"
        try:
            await server.start()
            await self._register(server)
            self.registered.set()
            self._servers[resource] = server, incarnation
            log.info("registered", extra={"resource": resource, "socket": server.path.name})
            await self._stay(server, incarnation)
        finally:
            self._servers.pop(resource, None)
            # Also when cancelled: a stream left open, or a socket left behind, outlives us at the kubelet.
            await asyncio.shield(server.stop())

    async def _stay(self, server: Server, incarnation: Incarnation) -> None:
        """Returns when this registration has to end, and raises KubeletError when it ended by itself."""
        plugin = server.plugin
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LISTED_WITHIN):
                while not plugin.listed.is_set() and self._lives(server, incarnation):
                    await first_of(plugin.listed.wait(), self._looked.wait(), self._stopping.wait())
        if not plugin.listed.is_set() and self._lives(server, incarnation):
            raise KubeletError(f"{plugin.resource}: registered, but the kubelet did not ask for the list")
        while self._is_wanted(plugin.resource) and not plugin.stream_ended.is_set():
            if self.incarnation.value != incarnation or not server.is_reachable():
                log.info("the kubelet restarted, registering again", extra={"resource": plugin.resource})
                return
            await first_of(
                self._looked.wait(),
                plugin.stream_ended.wait(),
                self._stopping.wait(),
                self._offers.after(self._offers.version),
            )
        self._look()
        # Where nobody answers any more, that is said once for all resources.
        if self._lives(server, incarnation) and not explain(self._socket, KUBELET):
            raise KubeletError(f"{plugin.resource}: the kubelet ended the list stream")

    def _lives(self, server: Server, incarnation: Incarnation) -> bool:
        """Whether there is nothing that would end a registration with this kubelet."""
        known = self.incarnation.value == incarnation and server.is_reachable()
        return known and self._is_wanted(server.plugin.resource)

    async def _register(self, server: Server) -> None:
        resource = server.plugin.resource
        request = api_pb2.RegisterRequest(
            version="v1beta1", endpoint=server.path.name, resource_name=resource
        )
        options = (("grpc.default_authority", "localhost"),)
        async with grpc.aio.insecure_channel(f"unix:{self._socket}", options=options) as channel:
            try:
                await api_pb2_grpc.RegistrationStub(channel).Register(request, timeout=REGISTER_TIMEOUT)
            except grpc.aio.AioRpcError as exc:
                why = (
                    explain(self._socket, KUBELET)
                    or f"the kubelet refused: {exc.details() or exc.code().name}"
                )
                raise KubeletError(f"{resource}: {why}") from exc


def _incarnation(path: Path) -> Incarnation | None:
    """What tells one life of the kubelet from the next: its inode alone may be the same (kubelet.md 1.2)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns, found.st_mtime_ns
