"""The device manager of one kubelet life: who gets which device.

Allocation takes ids first and asks the plugin then, without holding the lists still meanwhile: a plugin
that drops an id in that time makes the real manager dereference nil (manager.go:923), and this one
panic. Ids that were taken come back only through the ledger, so an empty answer, which reaches neither
the ledger nor the error path, leaks them until the next time that a dead pod is cleared away.

The second panic is a re-admission after a restart that does not find an allocated device. The real
one needs NUMA information for it to happen (topology_hints.go:204); this one is stricter, since a
simulated node has none more often than not: any policy but "none" will do.
"""

import asyncio
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from migplugin._proto.deviceplugin.v1beta1 import api_pb2
from migplugin.sim.kubelet import topology
from migplugin.sim.kubelet.checkpoint import NO_NODE, Allocation, Checkpoint
from migplugin.sim.kubelet.devices import Devices
from migplugin.sim.kubelet.plugins import HEALTHY, CallFailed, Listed, is_extended_resource_name
from migplugin.sim.kubelet.pods import (
    Container,
    ContainerEdits,
    DeviceNode,
    Mount,
    NotAdmitted,
    Panic,
    Pod,
    StartFailed,
)
from migplugin.sim.kubelet.topology import Hint, Mask

Reusable = dict[str, set[str]]

# A CDI device by its full name, vendor/class=name: the runtime knows no other.
_QUALIFIED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*=[A-Za-z0-9][\w.:-]*")


@dataclass(frozen=True, slots=True)
class Rules:
    grace: float
    policy: str
    numa_nodes: tuple[int, ...]


class DeviceManager:
    """`active_pods` are the running pods that the API server told of, or None before it has answered."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rules: Rules,
        rng: random.Random,
        *,
        active_pods: Callable[[], Collection[Pod] | None],
        heard: Callable[[str, tuple[Listed, ...]], None],
        changed: Callable[[], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._rules = rules
        self._rng = rng
        self._active_pods = active_pods
        self._note = heard
        self._changed = changed
        self._admitting: Pod | None = None
        self._closed = False
        self.ledger, registered = checkpoint.read()
        self._allocated = self.ledger.devices()
        # Resources whose allocated devices have not been looked at since this life began.
        self._to_readmit = set(self._allocated)
        self.devices = Devices(
            registered, rules.grace, heard=self._heard, expired=self._write, changed=changed
        )

    def close(self) -> None:
        """Nothing changes any more, the checkpoint file included."""
        self._closed = True
        self.devices.close()

    def _heard(self, resource: str, devices: tuple[Listed, ...]) -> None:
        self._note(resource, devices)
        self._write()
        self.readmit()

    def _write(self) -> None:
        if not self._closed:
            self._checkpoint.write(self.ledger, self.devices.healthy)

    def readmit(self) -> None:
        """After a restart: running pods are admitted again once the API server and the plugin are there.

        Raises Panic where a device that is allocated to one of them is not listed.
        """
        pods = self._active_pods()
        if pods is None:
            return
        for resource in sorted(self._to_readmit & self.devices.all.keys()):
            self._to_readmit.discard(resource)
            if self._rules.policy == "none":
                continue
            for pod in pods:
                for container in pod.containers:
                    for id_ in sorted(self.ledger.ids(pod.uid, container.name, resource)):
                        if id_ not in self.devices.all[resource]:
                            raise Panic(
                                f"panic: nil pointer dereference (topology_hints.go:204): after a restart "
                                f"{resource} was listed without {id_}, which pod {pod.name} holds"
                            )

    def release_dead(self) -> None:
        """Forgets the pods that are not active any more. The checkpoint file is not rewritten."""
        active = self._active_pods()
        if active is None:
            return
        alive = {pod.uid for pod in active} | ({self._admitting.uid} if self._admitting else set())
        dead = self.ledger.pods.keys() - alive
        if dead:
            self.ledger.remove(dead)
            self._allocated = self.ledger.devices()

    async def admit(self, pod: Pod) -> None:
        """Gives every container its devices. Raises NotAdmitted or Panic; nothing is given back then."""
        self._admitting = pod
        try:
            reusable: Reusable = {}
            for container in pod.in_order():
                wanted = self._affinity(pod, container, reusable)
                await self._allocate(pod, container, reusable, wanted)
                for resource, allocation in self.ledger.of(pod.uid, container.name).items():
                    if container.is_ordinary_init:
                        reusable.setdefault(resource, set()).update(allocation.ids)
                    else:
                        reusable.get(resource, set()).difference_update(allocation.ids)
        except asyncio.CancelledError:
            self._allocated = self.ledger.devices()
            raise
        finally:
            self._admitting = None

    async def start(self, pod: Pod, container: Container) -> ContainerEdits:
        """What the container starts with, from the cache. Raises StartFailed, NotAdmitted or Panic."""
        missing = False
        for resource in self._limits(container):
            if not self._is_known(resource):
                continue
            await self._pre_start(pod, container, resource)
            missing = missing or not self.ledger.ids(pod.uid, container.name, resource)
        if missing:
            await self._allocate(pod, container, {}, None)
        edits = self.edits(pod, container.name)
        unresolvable = [name for name in edits.cdi_devices if not _QUALIFIED.fullmatch(name)]
        if unresolvable:
            raise StartFailed(
                f"CDI device injection failed: unresolvable CDI devices {', '.join(unresolvable)}",
                "CreateContainerError",
            )
        return edits

    def edits(self, pod: Pod, container: str) -> ContainerEdits:
        """The answers for all resources of a container, merged.

        The first one to set a variable, path or annotation wins, in random order; CDI devices are united.
        """
        envs: dict[str, str] = {}
        mounts: dict[str, Mount] = {}
        nodes: dict[str, DeviceNode] = {}
        annotations: dict[str, str] = {}
        cdi: dict[str, None] = {}
        held = self.ledger.of(pod.uid, container)
        for resource in self._unordered(held):
            answer = held[resource].response
            envs = {**answer.envs, **envs}
            for mount in answer.mounts:
                mounts.setdefault(
                    mount.container_path, Mount(mount.container_path, mount.host_path, mount.read_only)
                )
            for node in answer.devices:
                nodes.setdefault(
                    node.container_path, DeviceNode(node.container_path, node.host_path, node.permissions)
                )
            annotations = {**answer.annotations, **annotations}
            cdi.update(dict.fromkeys(device.name for device in answer.cdi_devices))
        return ContainerEdits(
            envs,
            tuple(mounts.values()),
            tuple(nodes.values()),
            annotations,
            tuple(cdi),
            {resource: sorted(allocation.ids) for resource, allocation in held.items()},
        )

    def _is_known(self, resource: str) -> bool:
        return resource in self.devices.healthy or resource in self._allocated

    def _limits(self, container: Container) -> Mapping[str, int]:
        """What it asks for, in any order, without what is no device (cpu, memory)."""
        limits = {
            resource: count
            for resource, count in container.requests.items()
            if count > 0 and is_extended_resource_name(resource)
        }
        return {resource: limits[resource] for resource in self._unordered(limits)}

    async def _pre_start(self, pod: Pod, container: Container, resource: str) -> None:
        endpoint = self.devices.endpoints.get(resource)
        if endpoint is None:
            raise StartFailed(f"endpoint not found in cache for a registered resource: {resource}")
        if not endpoint.options.pre_start_required:
            return
        ids = self.ledger.ids(pod.uid, container.name, resource)
        if not ids:
            raise StartFailed(
                f"no devices found allocated in local cache for pod {pod.uid}, container {container.name}, "
                f"resource {resource}"
            )
        try:
            await endpoint.live(resource).pre_start(self._unordered(ids))
        except CallFailed as exc:
            raise StartFailed(f"device plugin PreStartContainer rpc failed with err: {exc}") from exc

    def pod_health(self, pod: Pod, container: str) -> dict[str, dict[str, str]]:
        """`allocatedResourcesStatus`: by resource, the last listed health; Healthy once a device vanished."""
        return {
            resource: {
                id_: device.health if (device := self.devices.all.get(resource, {}).get(id_)) else HEALTHY
                for id_ in sorted(allocation.ids)
            }
            for resource, allocation in self.ledger.of(pod.uid, container).items()
        }

    def _affinity(self, pod: Pod, container: Container, reusable: Reusable) -> Mask | None:
        if self._rules.policy == "none":
            return None
        self.release_dead()
        limits = self._limits(container)
        by_resource = [
            self._hints(resource, count, reusable.get(resource, set())) for resource, count in limits.items()
        ]
        return topology.affinity(self._rules.policy, self._rules.numa_nodes, by_resource)

    def _hints(self, resource: str, count: int, reusable: set[str]) -> tuple[Hint, ...]:
        if not self.devices.is_aligned(resource):
            return topology.INDIFFERENT
        free = self.devices.healthy.get(resource, set()) - self._allocated.get(resource, set())
        if len(free | reusable) < count:
            return topology.IMPOSSIBLE
        devices = self.devices.all[resource]
        return topology.hints(
            self._rules.numa_nodes,
            [device.nodes or () for device in devices.values()],
            [devices[id_].nodes or () for id_ in free],
            [self._device(resource, id_).nodes for id_ in reusable],
            count,
        )

    async def _allocate(
        self, pod: Pod, container: Container, reusable: Reusable, wanted: Mask | None
    ) -> None:
        needs_write = False
        released = False
        for resource, count in self._limits(container).items():
            if not self._is_known(resource):
                # The real kubelet would run the pod without the device: there the scheduler stands before.
                raise NotAdmitted(_unexpected(f"cannot allocate unregistered device {resource}"))
            if not released:
                self.release_dead()
                released = True
            try:
                ids = await self._choose(
                    pod, container, resource, count, reusable.get(resource, set()), wanted
                )
                if not ids:
                    continue
                needs_write = True
                response = await self._ask(resource, ids)
            except CallFailed as exc:
                raise NotAdmitted(_unexpected(str(exc))) from exc
            by_node = self._by_node(resource, ids)
            self.ledger.add(pod.uid, container.name, resource, Allocation(by_node, response))
        if needs_write:
            self._write()
            self._changed()

    async def _ask(self, resource: str, ids: Collection[str]) -> api_pb2.ContainerAllocateResponse:
        endpoint = self.devices.endpoints.get(resource)
        try:
            if endpoint is None:
                raise CallFailed(f"unknown Device Plugin {resource}")
            answer = await endpoint.live(resource).allocate(self._unordered(ids))
        except BaseException:
            self._allocated = self.ledger.devices()
            raise
        if not answer.container_responses:
            # The ids stay taken, although nobody has them.
            raise CallFailed(f"no containers return in allocation response {str(answer).strip()}".rstrip())
        return answer.container_responses[0]

    def _by_node(self, resource: str, ids: Iterable[str]) -> dict[int, tuple[str, ...]]:
        by_node: dict[int, tuple[str, ...]] = {}
        for id_ in self._unordered(ids):
            for node in self._device(resource, id_).nodes or (NO_NODE,):
                by_node[node] = (*by_node.get(node, ()), id_)
        return by_node

    def _device(self, resource: str, id_: str) -> Listed:
        """A device that is being allocated, which must be listed: the real kubelet looks without asking."""
        device = self.devices.all.get(resource, {}).get(id_)
        if device is None:
            raise Panic(
                f"panic: nil pointer dereference (manager.go:923): {resource} lost {id_} from its list "
                "while it was being allocated"
            )
        return device

    async def _choose(
        self,
        pod: Pod,
        container: Container,
        resource: str,
        count: int,
        reusable: set[str],
        wanted: Mask | None,
    ) -> set[str]:
        """The ids to ask for, taken; empty where the container has them already."""
        held = self.ledger.ids(pod.uid, container.name, resource)
        if resource not in self.devices.healthy:
            raise CallFailed(f"cannot allocate unregistered device {resource}")
        if not self.devices.healthy[resource]:
            raise CallFailed(f"no healthy devices present; cannot allocate unhealthy devices {resource}")
        if not held <= self.devices.healthy[resource]:
            raise CallFailed(
                "previously allocated devices are no longer healthy; "
                f"cannot allocate unhealthy devices {resource}"
            )
        if held:
            return set()
        chosen: set[str] = set()

        def take(ids: Collection[str]) -> bool:
            """Takes of `ids` until there are enough."""
            for id_ in self._unordered(set(ids) - chosen):
                if len(chosen) == count:
                    break
                chosen.add(id_)
                self._allocated.setdefault(resource, set()).add(id_)
            return len(chosen) == count

        if take(reusable):
            return chosen
        available = self.devices.healthy[resource] - self._allocated.get(resource, set())
        if len(available) < count - len(chosen):
            raise CallFailed(
                f"requested number of devices unavailable for {resource}. "
                f"Requested: {count - len(chosen)}, Available: {len(available)}"
            )
        aligned: set[str] = set()
        unaligned: set[str] = set()
        nowhere = available
        if wanted is not None and self.devices.is_aligned(resource):
            aligned, unaligned, nowhere = topology.split(
                available, lambda id_: self.devices.all[resource][id_].nodes or (), wanted
            )
        if count - len(chosen) < len(aligned):
            preferred = await self._prefer(resource, aligned | chosen, chosen, count)
            take(preferred & aligned) or take(aligned)
        elif not take(aligned):
            preferred = await self._prefer(resource, available | chosen, chosen, count)
            take(preferred & available) or take(unaligned) or take(nowhere)
        if len(chosen) < count:
            raise CallFailed(
                f"unexpectedly allocated less resources than required. Requested: {count}, Got: {len(chosen)}"
            )
        return chosen

    async def _prefer(
        self, resource: str, available: Collection[str], must_include: Collection[str], count: int
    ) -> frozenset[str]:
        endpoint = self.devices.endpoints.get(resource)
        if endpoint is None:
            raise CallFailed(f"endpoint not found in cache for a registered resource: {resource}")
        if not endpoint.options.get_preferred_allocation_available:
            return frozenset()
        try:
            answer = await endpoint.live(resource).prefer(
                self._unordered(available), self._unordered(must_include), count
            )
        except CallFailed as exc:
            raise CallFailed(f"device plugin GetPreferredAllocation rpc failed with err: {exc}") from exc
        return answer or frozenset()

    def _unordered(self, ids: Iterable[str]) -> list[str]:
        """In the order of a Go map: any. The seed decides."""
        order = sorted(ids)
        self._rng.shuffle(order)
        return order


def _unexpected(message: str) -> str:
    return f"Allocate failed due to {message}, which is unexpected"
