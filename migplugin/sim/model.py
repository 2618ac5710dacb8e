"""The simulated node: GPUs, their GPU and compute instances, and every rule about changing them.

Pure Python over the plain data of `records`: no files, no clock, no randomness, so the same steps give
the same node, UUIDs included. What the driver would refuse is a `Refusal` with NVML's code, raised
before anything has changed. Every GI and CI created or destroyed posts one MIG-config-change event
(a change of mode posts none); the events of one change collect in `Node.journal` until `store`
publishes them.
"""

import uuid
from collections.abc import Iterator

from migplugin.errors import SimulatorError
from migplugin.sim import placement, profiles
from migplugin.sim.codes import Code, EventType
from migplugin.sim.records import (
    FORMAT,
    WHOLE,
    CiRecord,
    Event,
    GiRecord,
    GpuRecord,
    NodeRecord,
    Process,
    Switches,
)

RESET_CLEARS = frozenset({144, 230})  # NVML fields: a row remap that is pending, the recovery action

_NAMESPACE = uuid.UUID("6d696770-6c75-5369-8e00-6e766d6c0000")
_ACTIVATION = {"now": Code.SUCCESS, "in-use": Code.IN_USE, "reset-required": Code.RESET_REQUIRED}


class Refusal(SimulatorError):
    """The simulated driver says no, with the code that NVML would return."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Node:
    """All GPUs of one machine, by index, and the journal of what has changed since it was read."""

    def __init__(self, record: NodeRecord) -> None:
        self.record = record
        self.gpus = tuple(Gpu(self, index, gpu) for index, gpu in enumerate(record.gpus))
        self.by_uuid = {gpu.uuid: gpu for gpu in self.gpus}
        self.journal: list[Event] = []

    @property
    def switches(self) -> Switches:
        return self.record.switches

    def post(self, gpu: "Gpu", kind: int, data: int = 0, gi: int = WHOLE, ci: int = WHOLE) -> None:
        """Write an event into the journal; sessions that registered for it will see it."""
        self.record.last_seq += 1
        self.journal.append(Event(self.record.last_seq, gpu.uuid, kind, data, gi, ci))

    def next_serial(self) -> int:
        self.record.last_serial += 1
        return self.record.last_serial

    def gpu(self, index: int) -> "Gpu":
        if not 0 <= index < len(self.gpus):
            raise SimulatorError(f"there is no GPU {index}; this node has GPUs 0 to {len(self.gpus) - 1}")
        return self.gpus[index]

    def load_driver(self) -> None:
        """Another driver is in the kernel, or the same one anew: what the one before counted is forgotten.

        The instances stay, though no driver keeps them: as if something carved them again at once.
        """
        self.record.loads += 1
        for gpu in self.gpus:
            gpu.forget_errors()
            for _, ci in gpu.mig_devices():
                ci.uncorrected = 0

    def make_nodes(self) -> int:
        """Make the missing capability device nodes, as nvidia-modprobe does; how many were missing."""
        records: list[GiRecord | CiRecord] = []
        for gpu in self.gpus:
            for gi in gpu.instances:
                records += [gi, *gi.compute]
        late = [record for record in records if not record.node_made]
        for record in late:
            record.node_made = True
        return len(late)


class Gpu:
    """One GPU as a view over its record. Instances are created, found and destroyed here."""

    def __init__(self, node: Node, index: int, record: GpuRecord) -> None:
        self.node = node
        self.index = index
        self.record = record
        self.product = profiles.product(record.product)

    @property
    def uuid(self) -> str:
        return self.record.uuid

    @property
    def minor(self) -> int:
        minors = self.node.switches.minors
        return minors[self.index] if self.index < len(minors) else self.index

    @property
    def pci_bus(self) -> int:
        last = len(self.node.record.gpus) - 1
        place = self.index if self.node.switches.pci_order == "ascending" else last - self.index
        return 0x07 + 8 * place

    @property
    def pci_address(self) -> str:
        """As sysfs spells it; NVML writes the domain with eight digits, and capitals."""
        return f"0000:{self.pci_bus:02x}:00.0"

    @property
    def numa(self) -> int:
        nodes = self.node.switches.numa
        if self.index < len(nodes):
            return nodes[self.index]
        return 2 * self.index // len(self.node.record.gpus)

    @property
    def nvlinks(self) -> list["Gpu"]:
        """The GPU at the other end of each NVLink that is up."""
        ends = []
        for one, other, count in self.node.switches.nvlinks:
            if self.index in {one, other}:
                ends += [self.node.gpus[other if self.index == one else one]] * count
        return ends

    @property
    def instances(self) -> list[GiRecord]:
        return self.record.instances

    @property
    def held(self) -> list[placement.Held]:
        return [placement.Held(self.profile(gi), gi.start) for gi in self.instances]

    @property
    def processes(self) -> Iterator[tuple[Process, int, int]]:
        """Every process on this GPU with the ids of its GPU and compute instance."""
        for process in self.record.processes:
            yield process, WHOLE, WHOLE
        for gi in self.instances:
            for ci in gi.compute:
                for process in ci.processes:
                    yield process, gi.id, ci.id

    def profile(self, gi: GiRecord) -> profiles.GiProfile:
        profile = self.product.by_id(gi.profile)
        if profile is None:
            raise SimulatorError(
                f"{self.product.cli_name} has no profile with id {gi.profile}, which GI {gi.id} names"
            )
        return profile

    def ci_profile(self, gi: GiRecord, ci: CiRecord) -> profiles.CiProfile:
        return next(p for p in self.profile(gi).ci_profiles if p.id == ci.profile)

    def ci_name(self, gi: GiRecord, ci: CiRecord) -> str:
        return self.profile(gi).ci_name(self.ci_profile(gi, ci))

    def gi(self, gi_id: int) -> GiRecord:
        for gi in self.instances:
            if gi.id == gi_id:
                return gi
        raise Refusal(Code.NOT_FOUND, f"GPU {self.index} has no GPU instance {gi_id}")

    def ci(self, gi_id: int, ci_id: int) -> CiRecord:
        for ci in self.gi(gi_id).compute:
            if ci.id == ci_id:
                return ci
        raise Refusal(
            Code.NOT_FOUND, f"GPU instance {gi_id} of GPU {self.index} has no compute instance {ci_id}"
        )

    def mig_devices(self) -> list[tuple[GiRecord, CiRecord]]:
        """The live pairs of GPU and compute instance, sorted by their ids. A GI without CI is in none."""
        pairs = [(gi, ci) for gi in self.instances for ci in gi.compute]
        return sorted(pairs, key=lambda pair: (pair[0].id, pair[1].id))

    def mig_index(self, gi: GiRecord, ci: CiRecord) -> int:
        """The index under which NVML lists the device. Compact indices move when a neighbour leaves."""
        if self.node.switches.mig_index == "sparse":
            return gi.start // self.product.grain + ci.start
        pairs = [(g.id, c.id) for g, c in self.mig_devices()]
        return pairs.index((gi.id, ci.id))

    def create(self, name: str, start: int | None = None, *, compute: bool = True) -> GiRecord:
        """A new GPU instance of the profile called `name`, with one compute instance that takes all of it.

        A compute-level name (`1c.3g.20gb`) makes a compute instance of that size instead. With
        `compute=False` the GPU instance stays empty, and is no MIG device.
        """
        pair = self.product.by_name(name)
        if pair is None:
            offered = ", ".join(self.product.profile_names)
            raise Refusal(
                Code.INVALID_ARGUMENT, f"{self.product.cli_name} has no profile {name!r}; it has {offered}"
            )
        profile, ci_profile = pair
        gi = self.create_gi(profile.gi_profile_id, start)
        if compute:
            self.create_ci(gi.id, ci_profile.id)
        return gi

    def create_gi(self, gi_profile_id: int, start: int | None = None, size: int | None = None) -> GiRecord:
        """A new, empty GPU instance. `size` only where the caller named one: it must be the profile's."""
        self._require_mig()
        profile = self.product.by_id(gi_profile_id)
        if profile is None:
            raise Refusal(
                Code.INVALID_ARGUMENT, f"{self.product.cli_name} has no profile with id {gi_profile_id}"
            )
        if start is not None and (
            start not in profile.placements or size not in {None, profile.placement_size}
        ):
            allowed = ", ".join(placement.slots(s, profile.placement_size) for s in profile.placements)
            asked = placement.slots(start, size or profile.placement_size)
            raise Refusal(
                Code.INVALID_ARGUMENT, f"{profile.name} cannot lie at {asked}; its placements are {allowed}"
            )
        if not placement.allowance(self.product, profile, self.held):
            raise Refusal(
                Code.INSUFFICIENT_RESOURCES,
                f"GPU {self.index} holds all the {profile.name} it can: count or media engines are used up",
            )
        chosen = placement.choose_start(self.product, profile, self.held) if start is None else start
        if chosen is None or chosen not in placement.free_starts(profile, self.held):
            where = "anywhere" if start is None else f"at {placement.slots(start, profile.placement_size)}"
            raise Refusal(
                Code.INSUFFICIENT_RESOURCES, f"GPU {self.index} has no room for {profile.name} {where}"
            )
        swapped = self.node.switches.gi_ids == "swapped"
        gi = GiRecord(
            id=placement.gi_id(self.product, chosen, profile.placement_size, swapped=swapped),
            profile=profile.gi_profile_id,
            start=chosen,
            serial=self.node.next_serial(),
            node_made=self.node.switches.capability_nodes == "prompt",
        )
        self.instances.append(gi)
        self.node.post(self, EventType.MIG_CONFIG_CHANGE)
        return gi

    def create_ci(
        self, gi_id: int, ci_profile_id: int, start: int | None = None, size: int | None = None
    ) -> CiRecord:
        """A new compute instance, and with it a MIG device."""
        self._require_mig()
        gi = self.gi(gi_id)
        profile = self.profile(gi)
        ci_profile = next((p for p in profile.ci_profiles if p.id == ci_profile_id), None)
        if ci_profile is None:
            raise Refusal(
                Code.NOT_SUPPORTED, f"{profile.name} has no compute profile with id {ci_profile_id}"
            )
        if start is not None and (
            start not in placement.ci_placements(profile, ci_profile) or size not in {None, ci_profile.slices}
        ):
            asked = placement.slots(start, size or ci_profile.slices)
            raise Refusal(Code.INVALID_ARGUMENT, f"{profile.ci_name(ci_profile)} cannot lie at {asked}")
        taken = [(ci.start, ci.size) for ci in gi.compute]
        chosen = placement.choose_ci_start(profile, ci_profile, taken) if start is None else start
        if chosen is None or chosen not in placement.ci_free_starts(profile, ci_profile, taken):
            raise Refusal(
                Code.INSUFFICIENT_RESOURCES,
                f"GPU instance {gi.id} of GPU {self.index} has no room for {profile.ci_name(ci_profile)}",
            )
        serial = self.node.next_serial()
        ci_id = min(set(range(len(gi.compute) + 1)) - {ci.id for ci in gi.compute})
        ci = CiRecord(
            id=ci_id,
            profile=ci_profile.id,
            start=chosen,
            size=ci_profile.slices,
            uuid=self._mig_uuid(gi.id, ci_id, chosen, serial),
            serial=serial,
            node_made=self.node.switches.capability_nodes == "prompt",
        )
        gi.compute.append(ci)
        self.node.post(self, EventType.MIG_CONFIG_CHANGE)
        return ci

    def destroy_gi(self, gi_id: int) -> None:
        self._require_mig()
        gi = self.gi(gi_id)
        if gi.compute:
            ids = ", ".join(str(ci.id) for ci in gi.compute)
            raise Refusal(
                Code.IN_USE, f"GPU instance {gi_id} of GPU {self.index} still has compute instance {ids}"
            )
        if gi.leaked:
            raise Refusal(Code.IN_USE, f"GPU instance {gi_id} of GPU {self.index} is held by a leaked handle")
        self.instances.remove(gi)
        self.node.post(self, EventType.MIG_CONFIG_CHANGE)

    def destroy_ci(self, gi_id: int, ci_id: int) -> None:
        self._require_mig()
        ci = self.ci(gi_id, ci_id)
        if ci.processes or ci.leaked:
            who = ", ".join(f"{p.name} ({p.pid})" for p in ci.processes) or "a leaked handle"
            raise Refusal(
                Code.IN_USE, f"compute instance {gi_id}/{ci_id} of GPU {self.index} is held by {who}"
            )
        self.gi(gi_id).compute.remove(ci)
        self.node.post(self, EventType.MIG_CONFIG_CHANGE)

    def destroy(self, gi_id: int) -> None:
        """Destroy a GPU instance with its compute instances, or refuse and leave all of them."""
        for ci in self.gi(gi_id).compute:
            if ci.processes or ci.leaked:
                self.destroy_ci(gi_id, ci.id)
        for ci in tuple(self.gi(gi_id).compute):
            self.destroy_ci(gi_id, ci.id)
        self.destroy_gi(gi_id)

    def set_mig_mode(self, *, on: bool) -> Code:
        """Ask for a mode. The answer is the activation status: only SUCCESS means that it is active.

        Turning MIG off with instances present is a GPU in use, as nvidia-smi words it; no source says
        what the call itself answers.
        """
        self.record.mig_pending = on
        if on == self.record.mig_current:
            return Code.SUCCESS
        status = _ACTIVATION[self.node.switches.mig_activation]
        if status is Code.SUCCESS and (self.instances or any(self.processes)):
            status = Code.IN_USE
        if status is Code.SUCCESS:
            self.record.mig_current = on
        return status

    def reset(self) -> None:
        """A GPU reset: instances are gone, the pending mode is active. Refused while something runs on it."""
        running = [process for process, _, _ in self.processes]
        if running:
            raise Refusal(Code.IN_USE, f"GPU {self.index} is in use by process {running[0].pid}")
        self.record.mig_current = self.record.mig_pending
        self.record.lost = False
        self.forget_errors()
        self.instances.clear()

    def forget_errors(self) -> None:
        self.record.uncorrected = 0
        self.record.fields |= dict.fromkeys(RESET_CLEARS & self.record.fields.keys(), 0)

    def xid(self, xid: int, gi: int = WHOLE, ci: int = WHOLE) -> None:
        self.node.post(self, EventType.XID, xid, gi, ci)

    def ecc(self, count: int, gi: int = WHOLE, ci: int = WHOLE) -> None:
        """The driver counts that many uncorrected memory errors of the GPU, or of a compute instance."""
        if gi == WHOLE:
            self.record.uncorrected = count
        else:
            self.ci(gi, ci).uncorrected = count
        self.node.post(self, EventType.DOUBLE_BIT_ECC, 0, gi, ci)

    def _require_mig(self) -> None:
        if not self.record.mig_current:
            raise Refusal(Code.NOT_SUPPORTED, f"MIG is off on GPU {self.index}")

    def _mig_uuid(self, gi: int, ci: int, ci_start: int, serial: int) -> str:
        switches = self.node.switches
        if switches.uuid_format == "legacy":
            return f"MIG-{self.uuid}/{gi}/{ci}"
        # As in NVIDIA's gpu_uuid.c: the GPU, the GI's id and its first engine, and not the profile.
        unique = "" if switches.uuid_reuse else f"/{serial}"
        return f"MIG-{uuid.uuid5(_NAMESPACE, f'{self.uuid}/SMC/{gi}/{ci_start}{unique}')}"


def new_node(spec: str, seed: str, gpus: list[tuple[profiles.Product, bool]], switches: Switches) -> Node:
    """A node with these products, in order, each with MIG on or off and nothing on it."""
    records = []
    for index, (product, mig) in enumerate(gpus):
        identity = uuid.uuid5(_NAMESPACE, f"{seed}/{index}/{product.cli_name}")
        serial = str(1_320_000_000_000 + identity.int % 9_999_999_999)
        records.append(GpuRecord(product.cli_name, f"GPU-{identity}", serial, mig, mig))
    return Node(NodeRecord(FORMAT, spec, seed, records, switches))
