"""What plugins list, and what becomes of it when they go: health, capacity, endpoints, the grace.

A list message replaces everything known of its resource, and only the literal "Healthy" is healthy.
When a plugin is disconnected all its devices are unhealthy at once; when the grace has passed and it has
not come back, endpoint and counts are forgotten, and the node shows 0. The devices themselves are
remembered even then, as the real manager does.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from migplugin._proto.deviceplugin.v1beta1 import api_pb2
from migplugin.sim.kubelet.plugins import HEALTHY, CallFailed, Client, Listed


@dataclass(slots=True)
class Endpoint:
    """A resource's plugin as last registered; without client where only the checkpoint knows of it."""

    client: Client | None
    options: api_pb2.DevicePluginOptions
    stopped: bool = False
    expiry: asyncio.TimerHandle | None = None

    def live(self, resource: str) -> Client:
        """Raises CallFailed where the plugin is gone."""
        if self.stopped or self.client is None:
            raise CallFailed(f"endpoint {resource} has been stopped")
        return self.client


class Devices:
    """By resource: every listed device, the healthy and unhealthy ids, the endpoint (plugins.Receiver).

    `registered` are the resources of the checkpoint: they have no device until their plugin is back, and
    the grace for that begins now. `heard` may raise Panic, which `received` passes on.
    """

    def __init__(
        self,
        registered: Iterable[str],
        grace: float,
        *,
        heard: Callable[[str, tuple[Listed, ...]], None],
        expired: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self.all: dict[str, dict[str, Listed]] = {}
        self.healthy: dict[str, set[str]] = {}
        self.unhealthy: dict[str, set[str]] = {}
        self.endpoints: dict[str, Endpoint] = {}
        self._grace = grace
        self._heard = heard
        self._expired = expired
        self._changed = changed
        self._closed = False
        for resource in registered:
            self.healthy[resource] = set()
            self.unhealthy[resource] = set()
            endpoint = self.endpoints[resource] = Endpoint(None, api_pb2.DevicePluginOptions())
            self._start_grace(resource, endpoint)

    def close(self) -> None:
        """Nothing changes any more."""
        self._closed = True
        for endpoint in self.endpoints.values():
            if endpoint.expiry is not None:
                endpoint.expiry.cancel()

    def capacity(self) -> dict[str, int]:
        return {
            resource: len(self.healthy.get(resource, ())) + len(self.unhealthy.get(resource, ()))
            for resource in {**self.healthy, **self.unhealthy}
        }

    def allocatable(self) -> dict[str, int]:
        return {resource: len(self.healthy.get(resource, ())) for resource in self.capacity()}

    def health(self, resource: str) -> dict[str, str]:
        """Health by id, as listed; a device whose plugin is gone is Unhealthy whatever it said."""
        found = dict.fromkeys(sorted(self.healthy.get(resource, ())), HEALTHY)
        for id_ in sorted(self.unhealthy.get(resource, ())):
            listed = self.all[resource][id_].health
            found[id_] = listed if listed != HEALTHY else "Unhealthy"
        return found

    def healthy_devices(self) -> list[tuple[str, Listed]]:
        """Resource and device, as pod-resources calls them allocatable."""
        return [
            (resource, device)
            for resource, devices in self.all.items()
            for id_ in sorted(self.healthy.get(resource, set()) & devices.keys())
            for device in (devices[id_],)
        ]

    def is_aligned(self, resource: str) -> bool:
        """Whether any of its devices has a NUMA node."""
        return any(device.nodes for device in self.all.get(resource, {}).values())

    def connected(self, resource: str, client: Client, options: api_pb2.DevicePluginOptions) -> None:
        before = self.endpoints.get(resource)
        if before is not None and before.expiry is not None:
            before.expiry.cancel()
        self.endpoints[resource] = Endpoint(client, options)
        self._changed()

    def received(self, resource: str, devices: tuple[Listed, ...]) -> None:
        """Replaces all that is known of `resource`."""
        if self._closed:
            return
        self.all[resource] = {device.id: device for device in devices}
        self.healthy[resource] = {device.id for device in devices if device.health == HEALTHY}
        self.unhealthy[resource] = {device.id for device in devices if device.health != HEALTHY}
        self._heard(resource, devices)
        self._changed()

    def disconnected(self, resource: str) -> None:
        """Every device of `resource` is unhealthy from now on, and the grace begins."""
        endpoint = self.endpoints.get(resource)
        if endpoint is None or self._closed:
            return
        lost = self.healthy.get(resource, set())
        if resource in self.healthy:
            self.healthy[resource] = set()
        self.unhealthy[resource] = self.unhealthy.get(resource, set()) | lost
        self._start_grace(resource, endpoint)
        self._changed()

    def _start_grace(self, resource: str, endpoint: Endpoint) -> None:
        endpoint.stopped = True
        if endpoint.expiry is not None:
            endpoint.expiry.cancel()
        endpoint.expiry = asyncio.get_running_loop().call_later(self._grace, self._expire, resource, endpoint)

    def _expire(self, resource: str, endpoint: Endpoint) -> None:
        if self._closed or self.endpoints.get(resource) is not endpoint:
            return
        del self.endpoints[resource]
        self.healthy.pop(resource, None)
        self.unhealthy.pop(resource, None)
        self._expired()
        self._changed()
