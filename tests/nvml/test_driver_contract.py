"""What any driver must do for us: the simulated one always, a real one with `-m gpu`.

The real one is found as `migplugin serve` finds it: below MIGPLUGIN_TEST_DRIVER_ROOT, or by its soname.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migplugin.core.inventory import Gpu, Inventory
from migplugin.core.profile import parse
from migplugin.nvml.driver import Driver
from tests.nvml.machine import edge, machine

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
NODE = "1xa100-40gb=3g.20gb:2g.10gb:1g.5gb*2,1xh100-80gb=1c.3g.40gb*3:1g.10gb,1xa30=,1xa100-80gb"


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    if request.param == "simulated":
        with machine(NODE) as place:
            watched = edge(place)
            yield watched.driver
            await watched.driver.close()
        return
    real = Driver(
        library=None,
        search=Path(os.environ.get("MIGPLUGIN_TEST_DRIVER_ROOT", "/driver-root")),
        proc_root=Path("/proc"),
        sysfs_root=Path("/sys"),
        dev_root=Path("/"),
        deadline=60.0,
        on_geometry=lambda: None,
        on_fault=lambda: None,
        on_news=lambda: None,
    )
    yield real
    await real.close()


@pytest.fixture
async def seen(driver: Driver) -> Inventory:
    return await driver.look()


def test_every_gpu_answers(seen: Inventory) -> None:
    assert seen.gpus
    assert not seen.broken
    assert [gpu.index for gpu in seen.gpus] == list(range(len(seen.gpus)))


def test_the_driver_says_its_version(seen: Inventory) -> None:
    assert re.fullmatch(r"\d+(\.\d+)+", seen.driver_version)


def test_uuids_have_their_forms_and_are_unique(seen: Inventory) -> None:
    gpus = [gpu.uuid for gpu in seen.gpus]
    assert all(re.fullmatch(f"GPU-{_UUID}", uuid) for uuid in gpus)
    devices = [device.uuid for _, device in seen.devices()]
    assert all(re.fullmatch(rf"MIG-(?:{_UUID}|GPU-{_UUID}/\d+/\d+)", uuid) for uuid in devices)
    assert len({*gpus, *devices}) == len(gpus) + len(devices)


def test_every_gpu_has_its_place_and_name(seen: Inventory) -> None:
    for gpu in seen.gpus:
        assert re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", gpu.pci_address)
        assert gpu.product
        assert gpu.numa_node is None or gpu.numa_node >= 0
    assert len({gpu.minor for gpu in seen.gpus}) == len(seen.gpus)
    assert len({gpu.pci_address for gpu in seen.gpus}) == len(seen.gpus)


def test_only_gpus_in_mig_mode_have_mig_devices(seen: Inventory) -> None:
    assert all(gpu.mig_enabled for gpu, _ in seen.devices())
    assert all(gpu.mig_enabled for gpu in seen.gpus if gpu.instances)


def test_every_mig_device_has_a_profile_that_its_gpu_offers(seen: Inventory) -> None:
    for gpu, device in seen.devices():
        parts = parse(device.profile)
        assert parts is not None
        offered = {profile.name for profile in gpu.profiles}
        assert device.profile in offered or device.profile.partition("c.")[2] in offered


def test_every_mig_device_lies_where_its_gpu_instance_does(seen: Inventory) -> None:
    for gpu, device in seen.devices():
        if device.placement is None:
            assert seen.unreadable
            continue
        instance = next(instance for instance in gpu.instances if instance.gi == device.gi)
        assert instance.placement == device.placement
        profile = next(profile for profile in gpu.profiles if profile.name == instance.profile)
        assert device.placement in profile.placements
        assert device.placement.start + device.placement.size <= gpu.memory_slices


def test_gpu_instances_do_not_overlap(seen: Inventory) -> None:
    for gpu in seen.gpus:
        taken = [slot for instance in gpu.instances for slot in _slots(gpu, instance.gi)]
        assert len(taken) == len(set(taken))


def test_every_mig_device_has_its_own_capability_nodes(seen: Inventory) -> None:
    found = list(seen.devices())
    assert all(device.gi_minor is not None and device.ci_minor is not None for _, device in found)
    assert len({device.ci_minor for _, device in found}) == len(found)
    assert len({(gpu.uuid, device.gi) for gpu, device in found}) == len({d.gi_minor for _, d in found})


def test_every_mig_device_tells_its_size(seen: Inventory) -> None:
    for gpu, device in seen.devices():
        assert device.memory_mib is not None
        assert device.multiprocessors is not None
        assert 0 < device.memory_mib <= (gpu.memory_mib or device.memory_mib)
        assert device.multiprocessors > 0


def test_the_control_nodes_that_exist_are_told(seen: Inventory) -> None:
    assert "/dev/nvidiactl" in seen.control_nodes
    assert len(set(seen.control_nodes)) == len(seen.control_nodes)


async def test_two_looks_are_equal_when_nothing_changes(driver: Driver) -> None:
    first = await driver.look()
    assert await driver.look() == first
    assert await driver.look(suspect=True) == first


async def test_there_are_no_faults_when_nothing_happens(driver: Driver) -> None:
    await driver.look()
    assert driver.faults() == ()


async def test_looks_asked_for_at_once_are_answered_one_after_the_other(driver: Driver) -> None:
    first, *others = await asyncio.gather(*(driver.look() for _ in range(4)))
    assert all(other == first for other in others)


async def test_closing_takes_no_more_than_a_second(driver: Driver) -> None:
    await driver.look()
    began = time.monotonic()
    await driver.close()
    assert time.monotonic() - began < 1.2


def _slots(gpu: Gpu, gi: int) -> range:
    placement = next(instance.placement for instance in gpu.instances if instance.gi == gi)
    return range(0) if placement is None else range(placement.start, placement.start + placement.size)
