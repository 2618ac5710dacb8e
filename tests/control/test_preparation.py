"""What must be there before devices are offered, and what it costs where it cannot be."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from migplugin.control.ports import Readiness
from migplugin.control.preparation import Nodes, Publication
from migplugin.core import cdi
from migplugin.core.allocation import EditOptions
from migplugin.core.inventory import BrokenGpu, DeviceId, Inventory
from migplugin.errors import CdiError
from tests.core.examples import ASSORTED, SEVENTHS, gpu, inventory

CDI = EditOptions(frozenset({"cdi-cri"}))
BOTH = EditOptions(frozenset({"cdi-annotations", "envvar"}))
NODE = inventory(SEVENTHS, ASSORTED)
ALL = {device.uuid for _, device in NODE.devices()}


class Files:
    def __init__(self, found: cdi.Facts | None = None) -> None:
        self.found = found or cdi.Facts(234, libraries=("/lib64/libcuda.so.1",))

    def facts(self, inventory: Inventory) -> cdi.Facts:
        return self.found


class Disk:
    """A document file that fails as told."""

    def __init__(self, there: Mapping[str, Any] | None = None) -> None:
        self.there = there
        self.reason = ""

    def read(self) -> Mapping[str, Any] | None:
        return self.there

    def put(self, document: Mapping[str, Any] | None) -> None:
        if self.reason:
            raise CdiError(self.reason)
        self.there = document


class Maker:
    def __init__(self, missing: Mapping[DeviceId, str]) -> None:
        self.missing = missing

    async def ensure(self, inventory: Inventory) -> Mapping[DeviceId, str]:
        return self.missing


def publication(disk: Disk, files: Files | None = None) -> Publication:
    return Publication(files or Files(), disk, cdi.Options())


def listed(disk: Disk) -> set[str]:
    assert disk.there is not None
    return {device["name"] for device in disk.there["devices"]}


async def test_the_document_follows_the_inventory() -> None:
    disk = Disk()
    ours = publication(disk)
    assert await ours.prepare(NODE, CDI) == Readiness()
    assert listed(disk) == ALL
    await ours.prepare(inventory(gpu(0), ASSORTED), CDI)
    assert listed(disk) == {device.uuid for device in ASSORTED.devices}
    await ours.prepare(inventory(gpu(0), gpu(1)), CDI)
    assert disk.there is None


async def test_without_a_cdi_strategy_nothing_is_touched() -> None:
    disk = Disk({"devices": []})
    assert (await publication(disk).prepare(NODE, EditOptions())).complete
    assert disk.there == {"devices": []}


async def test_a_gpu_that_does_not_answer_takes_nothing_from_the_document() -> None:
    disk = Disk()
    ours = publication(disk)
    await ours.prepare(NODE, CDI)
    lost = tuple(BrokenGpu(card.index, card.uuid, "lost") for card in NODE.gpus)
    await ours.prepare(replace(NODE, gpus=(), broken=lost), CDI)
    assert listed(disk) == ALL
    fresh = publication(disk)
    await fresh.prepare(replace(NODE, gpus=(), broken=lost), CDI)
    assert listed(disk) == ALL, "not even after our own restart"


async def test_where_cdi_is_the_only_way_a_device_waits_for_its_document(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = Disk()
    ours = publication(disk)
    await ours.prepare(inventory(SEVENTHS), CDI)
    disk.reason = "read-only file system"
    for _ in range(2):
        readiness = await ours.prepare(NODE, CDI)
    assert not readiness.complete
    assert readiness.unready.keys() == {device.uuid for device in ASSORTED.devices}, "the others are in it"
    assert "read-only file system" in next(iter(readiness.unready.values()))
    assert [r.levelname for r in caplog.records if "not written" in r.getMessage()] == ["WARNING"]
    disk.reason = ""
    assert await ours.prepare(NODE, CDI) == Readiness()


async def test_where_there_is_another_way_devices_are_offered_without_their_document() -> None:
    disk = Disk()
    disk.reason = "read-only file system"
    assert await publication(disk).prepare(NODE, BOTH) == Readiness({}, complete=False)


async def test_a_device_that_cannot_be_in_the_document_is_unready_in_any_combination() -> None:
    first, *others = SEVENTHS.devices
    blind = replace(SEVENTHS, devices=(replace(first, ci_minor=None), *others))
    disk = Disk()
    for edits in (CDI, BOTH):
        readiness = await publication(disk).prepare(inventory(blind), edits)
        assert readiness.complete
        assert list(readiness.unready) == [first.uuid]
    assert listed(disk) == {device.uuid for device in others}


async def test_what_the_document_lacks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ours = publication(Disk(), Files(cdi.Facts()))
    for _ in range(2):
        await ours.prepare(NODE, CDI)
    said = [r.__dict__["reason"] for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 2
    assert "libraries" in said[0]
    assert "nvidia-caps" in said[1]


async def test_nodes_are_made_only_where_the_kubelet_is_told_of_nodes() -> None:
    missing = {SEVENTHS.devices[0].uuid: "no node"}
    nodes = Nodes(Maker(missing))
    assert await nodes.prepare(NODE, EditOptions()) == Readiness()
    specs = EditOptions(pass_device_specs=True)
    assert await nodes.prepare(NODE, specs) == Readiness(missing, complete=False)
    assert await nodes.prepare(NODE, replace(specs, device_list_strategies=CDI.device_list_strategies)) == (
        Readiness()
    ), "with CDI alone no node is named"
