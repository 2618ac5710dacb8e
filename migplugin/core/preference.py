"""Which devices we would rather see taken: the answer to the kubelet's GetPreferredAllocation.

*Packed* takes the fewest physical GPUs, and of those that do, the ones with most other use, so that
whole GPUs stay free. *Distributed* takes the most, and of those the ones with least. Both look at the
GPU first and then at the devices on it, which matters for replicas. Whole GPUs are chosen by how near they
are to each other: by NVLink where the driver tells of it, else by NUMA node.

The kubelet waits for the answer in its sync loop and asks with every free id, thousands where devices
are shared: ids are counted for each device and looked up, never sorted. Nothing here fails, since an
error would fail the pod (kubelet.md 1.6).
"""

import heapq
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TypeVar

from migplugin.core.allocation import Offer, Offers
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.resource import Device, ResourceName, is_replica

PACKED, DISTRIBUTED = "packed", "distributed"

# What a pair of GPUs without NVLink is worth; with k links it is 100 k (nvidia-device-plugin.md 5).
SAME_NODE, OTHER_NODE = 20, 10
MOST_SETS = 1000

K = TypeVar("K", bound=Hashable)


def prefer(
    resource: ResourceName, available: Collection[str], must: Iterable[str], size: int, offers: Offers
) -> tuple[str, ...]:
    """Which `size` of the `available` ids of `resource` to take, all of `must` among them.

    The same for the same ids, in whatever order they come. Ids that are not known to be fit are taken
    last, and a size that cannot be reached gives all there is.
    """
    needed = tuple(dict.fromkeys(must))
    missing = size - len(needed)
    if missing <= 0:
        return needed
    offer = offers.resources.get(resource) or Offer({})
    # Ids are made, looked up and dropped one by one, which a set of thousands of them would not allow.
    taken = set(offer.fit_ids.difference(available))
    taken.update(offer.fit_ids.intersection(needed))
    room = _room(offer, taken)
    chosen = list(needed)
    for id_, count in _choose(resource, room, needed, missing, offer, offers).items():
        chosen += _first(count, offer.fit[id_], taken)
    if len(chosen) < size:
        # Only if there is not enough that is known.
        chosen += sorted(set(available).difference(chosen))[: size - len(chosen)]
    return tuple(chosen)


def _room(offer: Offer, taken: AbstractSet[DeviceId]) -> dict[DeviceId, int]:
    """How many ids of each device are free, where any is, in the order of the offer."""
    if len(taken) < len(offer.fit_ids) / 4:
        held = Counter(offer.devices[id_].device.id for id_ in taken)
    else:
        is_taken = taken.__contains__
        held = Counter({id_: sum(map(is_taken, ids)) for id_, ids in offer.fit.items()})
    return {id_: len(ids) - held[id_] for id_, ids in offer.fit.items() if len(ids) > held[id_]}


def _first(count: int, ids: Iterable[DeviceId], taken: AbstractSet[DeviceId]) -> list[DeviceId]:
    return list(islice((id_ for id_ in ids if id_ not in taken), count))


def _choose(
    resource: ResourceName,
    room: Mapping[DeviceId, int],
    needed: Collection[str],
    missing: int,
    offer: Offer,
    offers: Offers,
) -> dict[DeviceId, int]:
    """How many ids of which device to take, in the order of `room`."""
    devices = {id_: offer.devices[offer.fit[id_][0]].device for id_ in room}
    chosen = [offer.devices[DeviceId(id_)].device for id_ in needed if id_ in offer.devices]
    replicated = any(is_replica(ids[0]) for ids in offer.fit.values())
    if not replicated and all(device.is_whole for device in devices.values()):
        nearest = _Nearest(list(devices.values()), chosen, offers.links)
        taken = dict.fromkeys(nearest.choose(missing, _held_nodes(offer, room)), 1)
    else:
        policy = offers.policy or (DISTRIBUTED if replicated else PACKED)
        choose = _distributed if policy == DISTRIBUTED else _packed
        own = {id_: len(ids) - room.get(id_, 0) for id_, ids in offer.fit.items()}
        use = _other_use(resource, offers)
        for id_, count in own.items():
            use[offer.devices[offer.fit[id_][0]].device.gpu] += count
        on_gpu: Counter[GpuUuid] = Counter()
        for id_, count in room.items():
            on_gpu[devices[id_].gpu] += count
        taken = {}
        for gpu, count in choose(missing, on_gpu, use, Counter(device.gpu for device in chosen)).items():
            here = {id_: number for id_, number in room.items() if devices[id_].gpu == gpu}
            on_device = Counter(device.id for device in chosen if device.gpu == gpu)
            taken |= choose(count, here, own, on_device)
    return {id_: taken[id_] for id_ in room if taken.get(id_)}


def _other_use(resource: ResourceName, offers: Offers) -> Counter[GpuUuid]:
    """How many ids of other resources are held on each GPU; of this one, `available` tells it better."""
    return Counter(
        {
            gpu: sum(count for name, count in held.items() if name != resource)
            for gpu, held in offers.use.items()
        }
    )


def _held_nodes(offer: Offer, room: Mapping[DeviceId, int]) -> Counter[int | None]:
    devices = (offer.devices[ids[0]].device for id_, ids in offer.fit.items() if id_ not in room)
    return Counter(device.numa_node for device in devices)


def _packed(
    missing: int, room: Mapping[K, int], use: Mapping[K, int], chosen: Mapping[K, int]
) -> dict[K, int]:
    """How many to take from which: those `chosen` already first, then the fewest, then the most used.

    Of equals the tightest, and then the first.
    """
    taken: dict[K, int] = {}
    ranked = sorted(room, key=lambda key: (-use.get(key, 0), room[key]))
    for key in [key for key in ranked if key in chosen]:
        taken[key] = min(room[key], missing)
        missing -= taken[key]
        ranked.remove(key)
    while missing > 0 and ranked:
        largest = sorted((room[key] for key in ranked), reverse=True)
        fewest = _fewest(largest, missing)
        others, all_of_them = sum(largest[: fewest - 1]), sum(largest[:fewest])
        least = largest[fewest - 1]
        for key in ranked:
            # With this one, do the largest of the others still make it?
            most = all_of_them if room[key] >= least else others + room[key]
            if most >= min(missing, all_of_them):
                break
        taken[key] = min(room[key], missing)
        missing -= taken[key]
        ranked.remove(key)
    return taken


def _fewest(largest: Iterable[int], missing: int) -> int:
    """How many of `largest` it takes to hold `missing`, or how many there are."""
    number, total = 0, 0
    for number, count in enumerate(largest, 1):  # noqa: B007  the last number is the answer
        total += count
        if total >= missing:
            break
    return number


def _distributed(
    missing: int, room: Mapping[K, int], use: Mapping[K, int], chosen: Mapping[K, int]
) -> dict[K, int]:
    """How many to take from which: one of each before two of any, and always from the least used."""
    taken: dict[K, int] = {}
    order = {key: number for number, key in enumerate(room)}
    heap = [
        (min(chosen.get(key, 0), 1), use.get(key, 0), chosen.get(key, 0), order[key], key) for key in room
    ]
    heapq.heapify(heap)
    while missing > 0 and heap:
        _, used, picks, number, key = heap[0]
        taken[key] = taken.get(key, 0) + 1
        missing -= 1
        if taken[key] < room[key]:
            heapq.heapreplace(heap, (1, used + 1, picks + 1, number, key))
        else:
            heapq.heappop(heap)
    return taken


@dataclass(frozen=True, slots=True)
class _Nearest:
    """Whole GPUs that are free, those that are taken in any case, and what the driver says of links."""

    free: list[Device]
    chosen: list[Device]
    links: Mapping[tuple[GpuUuid, GpuUuid], int]

    def choose(self, missing: int, held: Mapping[int | None, int]) -> list[DeviceId]:
        """The `missing` GPUs that are nearest to each other and to those chosen, or all there are."""
        missing = min(missing, len(self.free))
        if not self.links:
            return self._by_node(missing, held)
        if math.comb(len(self.free), missing) <= MOST_SETS:
            best = max(combinations(range(len(self.free)), missing), key=self._worth)
            return [self.free[number].id for number in best]
        return self._one_by_one(missing)

    def _by_node(self, missing: int, held: Mapping[int | None, int]) -> list[DeviceId]:
        room = Counter(device.numa_node for device in self.free)
        chosen = Counter(device.numa_node for device in self.chosen)
        counts = _packed(missing, room, held, chosen)
        return [
            device.id
            for node, count in counts.items()
            for device in [device for device in self.free if device.numa_node == node][:count]
        ]

    def _worth(self, numbers: tuple[int, ...]) -> tuple[int, int]:
        """How near the set is, and of equals how near what it leaves."""
        taken = set(numbers)
        mine = [self.free[number] for number in numbers]
        rest = [device for number, device in enumerate(self.free) if number not in taken]
        return self._nearness([*self.chosen, *mine]), self._nearness(rest)

    def _one_by_one(self, missing: int) -> list[DeviceId]:
        """Near enough where the sets are too many: each time the one that is nearest to those so far.

        With nothing to begin with, of whatever beginning comes out best.
        """
        begun = [[]] if self.chosen else [[device] for device in self.free]
        found = max((self._grown(taken, missing) for taken in begun), key=self._nearness)
        return [device.id for device in found]

    def _grown(self, taken: list[Device], missing: int) -> list[Device]:
        left = [device for device in self.free if device not in taken]
        near = [sum(self._pair(device, other) for other in [*self.chosen, *taken]) for device in left]
        while len(taken) < missing:
            number = near.index(max(near))
            nearest = left.pop(number)
            del near[number]
            near = [worth + self._pair(device, nearest) for worth, device in zip(near, left, strict=True)]
            taken = [*taken, nearest]
        return taken

    def _nearness(self, devices: list[Device]) -> int:
        return sum(self._pair(one, other) for one, other in combinations(devices, 2))

    def _pair(self, one: Device, other: Device) -> int:
        link = self.links.get((one.gpu, other.gpu), 0) or self.links.get((other.gpu, one.gpu), 0)
        same = one.numa_node is not None and one.numa_node == other.numa_node
        return link or (SAME_NODE if same else OTHER_NODE)
