"""What goes wrong around the agent, and how little of it reaches the kubelet."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migplugin.sim.kubelet import Container, Pod
from tests.app.conftest import Start

MIG = "nvidia.com/mig-1g.5gb"


async def test_a_lost_gpu_takes_its_own_devices_and_gives_them_back(machine: Start) -> None:
    node = await machine("2xa100-40gb=1g.5gb*2")
    agent = await node.serve("--poll-interval=200ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 4)
    node.change(lambda made: setattr(made.gpus[0].record, "lost", True))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    assert node.kubelet.capacity(MIG) == 4
    await agent.until_said("attention")
    node.change(lambda made: setattr(made.gpus[0].record, "lost", False))
    await node.until(lambda _: node.allocatable("1g.5gb") == 4)


async def test_a_hung_driver_changes_nothing_and_allocate_answers_throughout(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--poll-interval=200ms", "--nvml-timeout=500ms", "--driver-grace=3s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "hang", ["nvmlSystemGetDriverVersion"]))
    await agent.until_said("the driver does not answer, will try again")
    assert node.allocatable("1g.5gb") == 3
    status = await asyncio.wait_for(node.kubelet.admit(Pod("p", (Container("c", {MIG: 1}),))), 1.0)
    assert status.phase == "Running", status
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    assert node.kubelet.capacity(MIG) == 3, "losing sight of the driver shortens no list"
    node.change(lambda made: setattr(made.switches, "hang", []))
    await node.until(lambda _: node.allocatable("1g.5gb") == 3, timeout=3.0)


async def test_a_wait_for_events_that_hangs_is_noticed_and_so_is_its_end(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--nvml-timeout=1s", "--driver-grace=2s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "hang", ["nvmlEventSetWait_v2"]))
    await agent.until_said("the driver does not answer, will try again")
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    node.change(lambda made: setattr(made.switches, "hang", []))
    await node.until(lambda _: node.allocatable("1g.5gb") == 3, timeout=3.0)


async def test_a_hung_driver_holds_back_neither_the_end_nor_its_time(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--poll-interval=200ms", "--nvml-timeout=500ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "hang", ["nvmlSystemGetDriverVersion"]))
    await agent.until_said("the driver does not answer, will try again")
    assert await asyncio.wait_for(agent.end(), 2.0) == 0


async def test_a_slow_driver_slows_no_allocation(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    await node.serve("--poll-interval=100ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "cost", {"*": 0.2}))
    for number in range(3):
        status = await asyncio.wait_for(
            node.kubelet.admit(Pod(f"p{number}", (Container("c", {MIG: 1}),))), 1.0
        )
        assert status.phase == "Running", status


async def test_a_driver_that_is_not_loaded_yet_is_waited_for(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: setattr(made.switches, "driver_loaded", False))
    agent = await node.serve()
    line = await agent.until_said("the driver does not answer, will try again")
    assert "not loaded" in line["reason"]
    node.change(lambda made: setattr(made.switches, "driver_loaded", True))
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


async def test_fail_on_init_error_ends_with_code_3_and_one_line(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: setattr(made.switches, "driver_loaded", False))
    agent = await node.serve("--fail-on-init-error")
    assert await asyncio.wait_for(agent.process.wait(), 10) == 3
    assert await agent.end() == 3
    assert [line["level"] for line in agent.lines].count("error") == 1


async def test_a_stale_session_is_noticed_and_opened_anew(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: setattr(made.switches, "stale_sessions", True))
    await node.serve("--removal-delay=1s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    gi = node.store.read().gpus[0].mig_devices()[0][0].id
    node.change(lambda made: made.gpus[0].destroy(gi))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    await node.until(lambda _: node.allocatable("2g.10gb") == 1)


async def test_without_events_changes_are_found_by_polling(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: setattr(made.switches, "events", "none"))
    await node.serve("--poll-interval=200ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: made.gpus[0].create("2g.10gb"))
    await node.until(lambda _: node.allocatable("2g.10gb") == 1)


async def test_without_privilege_every_device_is_served_and_one_line_says_what_is_missing(
    machine: Start,
) -> None:
    node = await machine()
    node.change(lambda made: setattr(made.switches, "privilege", "none"))
    agent = await node.serve()
    await node.until(lambda _: (node.allocatable("1g.5gb"), node.allocatable("3g.20gb")) == (9, 1))
    said = [line for line in agent.said("attention") if "CAP_SYS_ADMIN" in line["reason"]]
    assert len(said) == 1
    assert "NVIDIA_MIG_MONITOR_DEVICES=all" in said[0]["reason"]


async def test_a_fault_takes_exactly_the_devices_it_concerns_within_a_second(machine: Start) -> None:
    node = await machine("1xa100-40gb=3g.20gb:1g.5gb*3,1xa100-40gb=1g.5gb*2")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 5)
    gpu = node.store.read().gpus[0]
    (big,) = (gi for gi in gpu.instances if gpu.profile(gi).name == "3g.20gb")
    ones = [(gi.id, ci.id) for gi, ci in gpu.mig_devices() if gi is not big]
    node.change(lambda made: made.gpus[0].xid(94, *ones[0]))
    await node.until(lambda _: node.allocatable("1g.5gb") == 4, timeout=1.0)
    node.change(lambda made: made.gpus[0].xid(48, ones[1][0]))
    await node.until(lambda _: node.allocatable("1g.5gb") == 3, timeout=1.0)
    assert node.allocatable("3g.20gb") == 1
    node.change(lambda made: made.gpus[0].xid(79, *ones[0]))
    await node.until(
        lambda _: (node.allocatable("1g.5gb"), node.allocatable("3g.20gb")) == (2, 0), timeout=1.0
    )
    assert node.kubelet.capacity(MIG) == 5
    line = await agent.until_said("xid", xid=79)
    assert (line["gi"], line["action"]) == (ones[0][0], "RESTART_BM")
    assert [line["reason"].split()[1] for line in agent.said("fell sick")] == ["94", "48", "79"]


async def test_in_a_flood_of_xids_a_pod_is_admitted_and_the_right_device_is_marked(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*7")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 7)
    devices = node.store.read().gpus[0].mig_devices()
    with node.store.change() as made:
        for n in range(10_000):
            gi, ci = devices[n % 7]
            made.gpus[0].xid(94 if n == 5_000 else 31, gi.id, ci.id)
    status = await asyncio.wait_for(node.kubelet.admit(Pod("p", (Container("c", {MIG: 1}),))), 1.0)
    assert status.phase == "Running", status
    (sick,) = (ci.uuid for n, (_, ci) in enumerate(devices) if n == 5_000 % 7)
    await node.until(
        lambda k: {id_ for id_, health in k.devices(MIG).items() if health == "Unhealthy"} == {sick}
    )
    await agent.until_said("fell sick", device=sick)


async def test_what_applications_do_wrong_makes_nobody_sick(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve(DP_DISABLE_HEALTHCHECKS="48")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    gi, ci = node.store.read().gpus[0].mig_devices()[0]
    for code in (13, 31, 43, 45, 63, 48):
        with node.store.change() as made:
            made.gpus[0].xid(code, gi.id, ci.id)
        await agent.until_said("xid", xid=code)
    node.change(lambda made: made.gpus[0].xid(94, gi.id, ci.id))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    await agent.until_said("fell sick")  # a line comes after the list: the log has a thread of its own
    assert len(agent.said("fell sick")) == 1


async def test_an_instance_that_is_made_anew_is_healthy_and_a_device_beside_it_stays_sick(
    machine: Start,
) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    node.change(lambda made: setattr(made.switches, "uuid_reuse", True))
    agent = await node.serve("--removal-delay=1s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    (gi, ci), (other, other_ci), _ = node.store.read().gpus[0].mig_devices()
    node.change(lambda made: made.gpus[0].xid(94, gi.id, ci.id))
    node.change(lambda made: made.gpus[0].xid(94, other.id, other_ci.id))
    await node.until(lambda _: node.allocatable("1g.5gb") == 1)
    node.change(lambda made: made.gpus[0].destroy(gi.id))
    await agent.until_said("mig device gone")
    node.change(lambda made: made.gpus[0].create("1g.5gb"))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    assert len(agent.said("no longer sick")) == 1


async def test_a_contained_error_is_over_when_its_pod_is_and_then_some_time(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--health-recovery-after=500ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    pod = Pod("p", (Container("c", {MIG: 1}),))
    status = await node.kubelet.admit(pod)
    (held,) = status.containers["c"].device_ids[MIG]
    gpu = node.store.read().gpus[0]
    (ids,) = [(gi.id, ci.id) for gi, ci in gpu.mig_devices() if ci.uuid == held]
    node.change(lambda made: made.gpus[0].xid(94, *ids))
    await agent.until_said("fell sick", device=held)
    assert not agent.said("no longer sick")
    await node.kubelet.finish(pod)
    line = await agent.until_said("no longer sick", device=held)
    assert "nobody has held it for 0.5 s" in line["reason"]
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


async def test_restarts_of_agent_and_kubelet_make_nobody_well_and_one_of_the_machine_does(
    machine: Start,
) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    gi, ci = node.store.read().gpus[0].mig_devices()[0]
    node.change(lambda made: made.gpus[0].xid(94, gi.id, ci.id))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2)
    await agent.kill()
    await node.kubelet.restart()
    agent = await node.serve()
    await agent.until_said("registered")
    await node.until(lambda k: k.devices(MIG).get(ci.uuid) == "Unhealthy")
    assert node.allocatable("1g.5gb") == 2
    assert await agent.end() == 0
    (record,) = node.kubelet.socket.parent.glob("migplugin/health.json")
    document = json.loads(record.read_text())
    document["boot"] = "the boot before"
    record.write_text(json.dumps(document))
    agent = await node.serve()
    await agent.until_said("was sick before the machine was started anew", device=ci.uuid)
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    await agent.until_said("control socket")
    _, out, _ = await node.command("health")
    assert f"{ci.uuid} was sick until the machine was started anew: XID 94" in " ".join(out.split())


@pytest.mark.parametrize("pause", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05])
async def test_what_a_killed_agent_has_shown_as_sick_is_sick_under_the_next(
    machine: Start, pause: float
) -> None:
    """Wherever it was killed: the record is written before anybody is told."""
    node = await machine("1xa100-40gb=1g.5gb*7")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 7)
    for gi, ci in node.store.read().gpus[0].mig_devices():
        node.change(lambda made, gi=gi, ci=ci: made.gpus[0].xid(94, gi.id, ci.id))  # type: ignore[misc]
        await asyncio.sleep(pause)  # when it dies is the point
    shown = {id_ for id_, health in node.kubelet.devices(MIG).items() if health == "Unhealthy"}
    await agent.kill()  # from here on the kubelet takes all for Unhealthy, until the next list
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    agent = await node.serve()
    await node.until(lambda k: set(k.devices(MIG).values()) != {"Unhealthy"} or len(shown) == 7)
    now = {id_ for id_, health in node.kubelet.devices(MIG).items() if health == "Unhealthy"}
    assert shown <= now


async def test_a_gpu_is_sick_for_as_long_as_the_driver_wants_it_reset(machine: Start) -> None:
    node = await machine("2xa100-40gb=1g.5gb*2")
    node.change(lambda made: made.gpus[0].record.fields.update({230: 0}))
    agent = await node.serve("--removal-delay=1s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 4)
    node.change(lambda made: made.gpus[0].record.fields.update({230: 1}))
    node.change(lambda made: made.gpus[0].xid(154))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2, timeout=1.0)
    line = await agent.until_said("fell sick")
    assert "GPU reset" in line["reason"]
    node.change(lambda made: made.gpus[0].reset())
    for _ in range(2):
        node.change(lambda made: made.gpus[0].create("1g.5gb"))
    await node.until(lambda _: node.allocatable("1g.5gb") == 4)
    await agent.until_said("no longer sick", gpu=line["gpu"])


async def test_a_driver_that_is_loaded_anew_has_cured_everybody(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: made.gpus[0].xid(79))
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    node.change(lambda made: setattr(made.switches, "driver_loaded", False))
    await agent.until_said("the driver does not answer, will try again")
    await agent.kill()
    node.change(lambda made: setattr(made.switches, "driver_loaded", True))
    node.change(lambda made: setattr(made.switches, "driver_version", "595.10"))
    agent = await node.serve()
    line = await agent.until_said("no longer sick")
    assert "loaded anew" in line["reason"]
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


async def test_a_driver_that_is_updated_under_the_agent_is_noticed_and_served(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: made.gpus[0].xid(79))
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)
    node.change(lambda made: setattr(made.switches, "driver_version", "595.10"))
    await agent.until_said("no longer sick")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: made.gpus[0].xid(79))
    await node.until(lambda _: node.allocatable("1g.5gb") == 0)


async def test_double_bit_errors_make_sick_whom_the_driver_counts_them_against(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3,1xa100-40gb")
    await node.serve()
    await node.until(lambda k: (node.allocatable("1g.5gb"), k.allocatable("nvidia.com/gpu")) == (3, 1))
    gi, ci = node.store.read().gpus[0].mig_devices()[1]
    node.change(lambda made: made.gpus[0].ecc(1, gi.id, ci.id))
    await node.until(lambda k: k.devices(MIG).get(ci.uuid) == "Unhealthy", timeout=1.0)
    assert node.allocatable("1g.5gb") == 2
    node.change(lambda made: made.gpus[1].ecc(2))
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 0, timeout=1.0)


async def test_a_gpu_that_was_reset_has_no_double_bit_errors_any_more(machine: Start) -> None:
    node = await machine("1xa100-40gb")
    await node.serve("--poll-interval=100ms")
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 1)
    node.change(lambda made: made.gpus[0].ecc(2))
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 0)
    node.change(lambda made: made.gpus[0].reset())
    await node.until(lambda k: k.allocatable("nvidia.com/gpu") == 1)


async def test_a_device_whose_capability_files_vanish_is_not_handed_out(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--poll-interval=100ms")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    gi, ci = node.store.read().gpus[0].mig_devices()[0]
    files = node.state / f"host/proc/driver/nvidia/capabilities/gpu0/mig/gi{gi.id}/ci{ci.id}"
    (files / "access").rename(files / "elsewhere")
    await node.until(lambda k: k.devices(MIG).get(ci.uuid) == "Unhealthy")
    line = await agent.until_said("fell sick", device=ci.uuid)
    assert "capability files" in line["reason"]
    (files / "elsewhere").rename(files / "access")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


async def test_a_driver_that_hangs_holds_back_no_fault(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    agent = await node.serve("--poll-interval=200ms", "--nvml-timeout=5s")
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    node.change(lambda made: setattr(made.switches, "hang", ["nvmlSystemGetDriverVersion"]))
    gi, ci = node.store.read().gpus[0].mig_devices()[0]
    node.change(lambda made: made.gpus[0].xid(94, gi.id, ci.id))
    await node.until(lambda _: node.allocatable("1g.5gb") == 2, timeout=2.0)
    assert not agent.said("the driver does not answer, will try again")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a directory that forbids")
async def test_a_directory_that_goes_away_and_comes_back_is_served_again(machine: Start) -> None:
    node = await machine("1xa100-40gb=1g.5gb*3")
    await node.serve()
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)
    await node.kubelet.kill()
    directory = node.kubelet.socket.parent
    moved = Path(f"{directory}-moved")
    directory.rename(moved)
    await asyncio.sleep(0)
    await node.kubelet.start()
    await node.until(lambda _: node.allocatable("1g.5gb") == 3)


FORBIDDEN = """
import asyncio, dataclasses, os, sys
from pathlib import Path
from migplugin import app, settings
from migplugin.nvml.driverfiles import DriverFiles
from migplugin.nvml.nodes import CapabilityNodes
from tests.core.examples import SEVENTHS
from migplugin.core.inventory import Inventory
root = Path(sys.argv[1])
given = settings.resolve({"dev_root": f"{root}/dev", "driver_root_ctr_path": f"{root}/drv"}, {})
node = Inventory("1", (SEVENTHS,))
nodes = CapabilityNodes(dev_root=root, is_host=False, proc_root=root, driver_root=root)
os.setuid(65534)
app._refuse_painted_gpus(settings.resolve({"simulate": "1xa30", "proc_root": str(root)}, {}))
with app.roots(given) as roots:
    print(roots.dev)
print(len(DriverFiles(root, root, root).facts(node).sockets), DriverFiles(root, root, root).has("/usr/bin/x"))
print(len(asyncio.run(nodes.ensure(node))))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_directories_that_may_not_be_entered_are_as_if_they_were_not_there(root: Path) -> None:
    root.chmod(0o700)
    command = [sys.executable, "-c", FORBIDDEN, str(root)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout.split("\n") == ["/", "0 False", "7", ""], said.stderr
