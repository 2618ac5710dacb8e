"""What must be there before devices are offered: the CDI document, and their nodes on the host.

What fails takes away only what cannot be handed out without it. A document that cannot be written costs
the devices that it would have added, and these only where CDI alone tells containers theirs.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from migplugin.aio import OwnerThread
from migplugin.control.ports import Readiness
from migplugin.core import cdi
from migplugin.core.allocation import EditOptions
from migplugin.core.inventory import DeviceId, Inventory
from migplugin.errors import CdiError

log = logging.getLogger(__name__)

WITHIN = 10.0


class FactsSource(Protocol):
    def facts(self, inventory: Inventory) -> cdi.Facts:
        """What the driver's files say. Raises nothing."""


class DocumentFile(Protocol):
    def read(self) -> Mapping[str, Any] | None:
        """The document that is there, if any. Raises nothing."""

    def put(self, document: Mapping[str, Any] | None) -> None:
        """The document that is to be there, None for no file. Raises CdiError."""


class NodeMaker(Protocol):
    async def ensure(self, inventory: Inventory) -> Mapping[DeviceId, str]:
        """Why a device lacks a node on the host, for each that does after this. Raises nothing."""


class Nodes:
    """Has missing nodes made where the kubelet is told of nodes: it must find them on the host."""

    def __init__(self, maker: NodeMaker) -> None:
        self._maker = maker

    async def prepare(self, inventory: Inventory, edits: EditOptions) -> Readiness:
        if not edits.pass_device_specs or cdi.is_alone(edits.device_list_strategies):
            return Readiness()
        unready = await self._maker.ensure(inventory)
        return Readiness(unready, complete=not unready)


class Publication:
    """Writes the document in a thread of its own: a slow disk must not keep Allocate waiting."""

    def __init__(self, facts: FactsSource, file: DocumentFile, options: cdi.Options) -> None:
        self._facts = facts
        self._file = file
        self._options = options
        self._thread: OwnerThread | None = None
        self._last: Inventory | None = None
        self._told = ""
        self._lacking: tuple[str, ...] = ()

    async def prepare(self, inventory: Inventory, edits: EditOptions) -> Readiness:
        """Which devices a runtime would not find in the document now, and why."""
        if not cdi.is_used(edits.device_list_strategies):
            return Readiness()
        if self._thread is None:
            self._thread = OwnerThread("cdi")
        inventory = self._last = cdi.standing(self._last, inventory)
        unready = dict(cdi.unresolvable(inventory, self._options))
        try:
            failed, missing = await self._thread.call(lambda: self._publish(inventory), WITHIN)
        except TimeoutError:
            failed = f"writing it takes longer than {WITHIN:g} s"
            missing = frozenset(cdi.names(inventory, self._options))
        if failed and failed != self._told:
            log.warning(
                "the cdi document is not written, will try again; "
                "containers that are told their devices by CDI alone will not start",
                extra={"reason": failed},
            )
        self._told = failed
        if failed and cdi.is_alone(edits.device_list_strategies):
            unready |= dict.fromkeys(missing - unready.keys(), f"the CDI document does not have it: {failed}")
        return Readiness(unready, complete=not failed)

    def _publish(self, inventory: Inventory) -> tuple[str, frozenset[DeviceId]]:
        """Why the document could not be written, and which devices are then not in the one that is there."""
        facts = self._facts.facts(inventory)
        self._tell_lacking(facts, inventory)
        document = cdi.document(inventory, facts, self._options)
        if document is None and inventory.broken:
            # What does not answer is not gone, and a pod that holds it may restart its container.
            return "", frozenset()
        try:
            self._file.put(document)
        except CdiError as exc:
            return str(exc), cdi.missing(inventory, self._options, wanted=document, there=self._file.read())
        return "", frozenset()

    def _tell_lacking(self, facts: cdi.Facts, inventory: Inventory) -> None:
        lacking = cdi.lacking(facts, inventory)
        for reason in lacking:
            if reason not in self._lacking:
                log.warning("the cdi document lacks something", extra={"reason": reason})
        self._lacking = lacking
