"""Where drivers and nodes differ: each switch through the real pynvml."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pynvml
import pytest

from migplugin.errors import InputError
from migplugin.sim import spec
from migplugin.sim.records import Failure, Process, Switches
from migplugin.sim.switches import MEANING, set_switch
from tests.sim.driver_fixtures import A100, create, driver, gpu_instances, placements, refused

INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, UNKNOWN = 2, 3, 4, 6, 999


def test_sparse_indices_have_gaps_and_stay_where_they_are() -> None:
    with driver("1xa100-40gb=3g.20gb:2g.10gb", mig_index="sparse") as d:
        uuids = d.mig_uuids()
        assert len(uuids) == 2
        assert [pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids] == [0, 4]
        assert refused("nvmlDeviceGetMigDeviceHandleByIndex", d.gpu(), 1) == NOT_FOUND
        d.change(lambda node: node.gpus[0].destroy(3))
        assert pynvml.nvmlDeviceGetIndex(d.mig(4)) == 4


def test_compact_indices_move_when_a_neighbour_leaves() -> None:
    with driver("1xa100-40gb=3g.20gb:2g.10gb") as d:
        last = d.mig_uuids()[1]
        d.change(lambda node: node.gpus[0].destroy(2))
        assert d.mig_uuids() == [last]


def test_stale_session_lists_the_dead_and_not_the_new_until_it_is_opened_again() -> None:
    with driver("1xa100-40gb=1g.5gb", stale_sessions=True) as d:
        old = d.mig_uuids()
        d.change(lambda node: node.gpus[0].destroy(13))
        d.change(lambda node: node.gpus[0].create("2g.10gb"))
        assert d.mig_uuids() == old
        handle = d.mig()
        assert pynvml.nvmlDeviceGetName(handle).endswith("1g.5gb")
        assert pynvml.nvmlDeviceGetGpuInstanceId(handle) == 13
        assert pynvml.nvmlDeviceGetMemoryInfo(handle).total == 4864 << 20
        assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []
        assert gpu_instances(d.gpu(), 19) == [], "the kernel's own lists are never stale"
        assert len(gpu_instances(d.gpu(), 14)) == 1
        pynvml.nvmlShutdown()
        pynvml.nvmlInit()
        assert len(d.mig_uuids()) == 1
        assert d.mig_uuids() != old


def test_stale_session_sees_what_it_does_itself() -> None:
    with driver("1xa100-40gb=", stale_sessions=True) as d:
        gi, ci = create(d.gpu(), 19, 0)
        assert len(d.mig_uuids()) == 1
        pynvml.nvmlComputeInstanceDestroy(ci)
        pynvml.nvmlGpuInstanceDestroy(gi)
        assert d.mig_uuids() == []


def test_swapped_gpu_instance_ids_are_not_in_the_order_of_their_places() -> None:
    with driver("1xa100-40gb=1g.5gb*7", gi_ids="swapped") as d:
        places = {}
        for gi in gpu_instances(d.gpu(), 19):
            info = pynvml.nvmlGpuInstanceGetInfo(gi)
            places[info.id] = info.placement.start
        assert places == {7: 4, 8: 5, 9: 6, 11: 0, 12: 1, 13: 2, 14: 3}


PRIVILEGED: list[tuple[str, Callable[[], object]]] = [
    ("placements", lambda: placements(pynvml.nvmlDeviceGetHandleByIndex(0), 19)),
    (
        "capacity",
        lambda: pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(pynvml.nvmlDeviceGetHandleByIndex(0), 19),
    ),
    ("list", lambda: gpu_instances(pynvml.nvmlDeviceGetHandleByIndex(0), 19)),
    ("by id", lambda: pynvml.nvmlDeviceGetGpuInstanceById(pynvml.nvmlDeviceGetHandleByIndex(0), 13)),
    ("create", lambda: create(pynvml.nvmlDeviceGetHandleByIndex(0), 19)),
]


def _code(act: Callable[[], object]) -> int:
    try:
        act()
    except pynvml.NVMLError as exc:
        return int(exc.value)
    return 0


@pytest.mark.parametrize(("name", "act"), PRIVILEGED)
@pytest.mark.parametrize(
    ("privilege", "allowed"), [("admin", True), ("config", True), ("monitor", False), ("none", False)]
)
def test_calls_about_instances_need_the_config_privilege(
    name: str, act: Callable[[], object], privilege: str, allowed: bool
) -> None:
    with driver("1xa100-40gb=1g.5gb", privilege=privilege):
        assert _code(act) == (0 if allowed else NO_PERMISSION), name


@pytest.mark.parametrize(
    ("privilege", "allowed"), [("admin", True), ("config", False), ("monitor", True), ("none", False)]
)
def test_whole_gpu_with_mig_on_needs_the_monitor_privilege(privilege: str, allowed: bool) -> None:
    with driver("1xa100-40gb=1g.5gb", privilege=privilege) as d:
        expected = 0 if allowed else NO_PERMISSION
        assert _code(lambda: pynvml.nvmlDeviceGetMemoryInfo(d.gpu())) == expected
        assert _code(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v3(d.gpu())) == expected


@pytest.mark.parametrize("privilege", ["config", "monitor", "none"])
def test_mode_needs_cap_sys_admin(privilege: str) -> None:
    with driver(A100, privilege=privilege) as d:
        assert refused("nvmlDeviceSetMigMode", d.gpu(), 1) == NO_PERMISSION
        d.set(privilege="admin")
        assert pynvml.nvmlDeviceSetMigMode(d.gpu(), 1) == 0


def test_caller_without_privilege_still_sees_its_mig_devices() -> None:
    with driver("1xa100-40gb=1g.5gb", privilege="none") as d:
        mig = d.mig()
        assert pynvml.nvmlDeviceGetName(mig).endswith("MIG 1g.5gb")
        assert pynvml.nvmlDeviceGetAttributes_v2(mig).multiprocessorCount == 14
        assert (pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)) == (13, 0)
        assert pynvml.nvmlDeviceGetMemoryInfo(mig).total == 4864 << 20
        assert pynvml.nvmlDeviceGetGpuInstanceProfileInfo(d.gpu(), 0).id == 19
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [1, 1]


DROP_AND_ASK = """
import ctypes, os, sys
import pynvml
from migplugin.sim.driver import Simulation
os.setgid(65534); os.setuid(65534)   # leaves no capability
with Simulation.open(sys.argv[1]) as simulation:
    pynvml.nvmlLib = simulation.library
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    def code(call, *rest):
        try: getattr(pynvml, call)(gpu, *rest)
        except pynvml.NVMLError as exc: return exc.value
        return 0
    print(code("nvmlDeviceGetGpuInstanceById", 13), code("nvmlDeviceGetMemoryInfo"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_privilege_is_deduced_from_the_caller_and_delegated_by_chmod() -> None:
    """config is 0400 and monitor 0444, on the host; a container without them has neither."""
    with driver("1xa100-40gb=1g.5gb", privilege="auto") as d:
        state = d.store.state_dir
        state.chmod(0o755)

        def asked() -> list[str]:
            ran = subprocess.run(
                [sys.executable, "-c", DROP_AND_ASK, str(state)], capture_output=True, text=True, check=True
            )
            return ran.stdout.split()

        assert asked() == ["4", "0"]
        config = state / "host/dev/nvidia-caps/nvidia-cap1"
        config.chmod(0o444)
        assert asked() == ["0", "0"]
        d.store.refresh_files()
        assert asked() == ["0", "0"], "deriving the files again must not take back what chmod gave"
        d.set(runtime_view="container")
        assert asked() == ["4", "4"]
        d.set(container_capabilities="monitor")
        assert asked() == ["4", "0"]


def test_process_lists_are_cut_to_a_pid_namespace_with_success() -> None:
    with driver("1xa100-40gb=1g.5gb", process_list="namespace") as d:
        d.change(lambda node: node.gpus[0].ci(13, 0).processes.append(Process(5, "p")))
        assert pynvml.nvmlDeviceGetComputeRunningProcesses(d.mig()) == []
        assert pynvml.nvmlDeviceGetComputeRunningProcesses(d.gpu()) == []
        gi = gpu_instances(d.gpu(), 19)[0]
        ci = pynvml.nvmlGpuInstanceGetComputeInstanceById(gi, 0)
        assert refused("nvmlComputeInstanceDestroy", ci) == 19, "in use all the same"


def test_profiles_can_need_mig_on() -> None:
    with driver("1xa100-40gb,1xa100-40gb=", profile_queries="mig-on") as d:
        assert refused("nvmlDeviceGetGpuInstanceProfileInfo", d.gpu(0), 0) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetGpuInstanceProfileInfo", d.gpu(0), 0, version=1) == NOT_SUPPORTED
        assert _code(lambda: placements(d.gpu(0), 19)) == NOT_SUPPORTED
        assert pynvml.nvmlDeviceGetGpuInstanceProfileInfo(d.gpu(1), 0).id == 19
        assert pynvml.nvmlDeviceGetFieldValues(d.gpu(0), [199])[0].value.uiVal == 0


def test_old_driver_has_no_profile_info_with_names() -> None:
    with driver("1xa100-40gb=1g.5gb", v2_profile_info=False) as d:
        assert refused("nvmlDeviceGetGpuInstanceProfileInfo", d.gpu(), 0) == 13
        assert refused("nvmlDeviceGetGpuInstanceProfileInfoById", d.gpu(), 19) == 13
        assert pynvml.nvmlDeviceGetGpuInstanceProfileInfo(d.gpu(), 0, version=1).memorySizeMB == 4864


def test_missing_symbols_are_function_not_found() -> None:
    with driver(
        A100, missing_symbols=["nvmlEventSetWait_v2", "nvmlDeviceGetComputeRunningProcesses_v3"]
    ) as d:
        assert refused("nvmlEventSetWait_v2", None, 0) == 13
        with pytest.raises(pynvml.NVMLLibraryMismatchError):
            pynvml.nvmlDeviceGetComputeRunningProcesses(d.gpu())


@pytest.mark.parametrize(("switch", "status"), [("in-use", 19), ("reset-required", 16)])
def test_activation_can_stay_pending(switch: str, status: int) -> None:
    with driver(A100, mig_activation=switch) as d:
        assert pynvml.nvmlDeviceSetMigMode(d.gpu(), 1) == status
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [0, 1]
        d.set(mig_activation="now")
        assert pynvml.nvmlDeviceSetMigMode(d.gpu(), 1) == 0
        assert pynvml.nvmlDeviceGetMigMode(d.gpu()) == [1, 1]


def test_calls_can_cost_time() -> None:
    with driver(A100, cost={"nvmlDeviceGetCount_v2": 0.05}) as d:
        begun = time.monotonic()
        d.gpu()
        assert time.monotonic() - begun < 0.05
        pynvml.nvmlDeviceGetCount()
        assert time.monotonic() - begun >= 0.05


def test_a_call_hangs_until_it_is_let_go_and_only_that_call() -> None:
    with driver(A100, hang=["nvmlDeviceGetUUID"]) as d:
        gpu = d.gpu()
        answers: list[str] = []
        stuck = threading.Thread(target=lambda: answers.append(pynvml.nvmlDeviceGetUUID(gpu)))
        stuck.start()
        assert pynvml.nvmlDeviceGetName(gpu)
        stuck.join(0.1)
        assert stuck.is_alive()
        d.change(lambda node: node.gpus[0].xid(79))
        stuck.join(0.05)
        assert stuck.is_alive()
        d.set(hang=[])
        stuck.join(5)
        assert answers


def test_a_call_fails_on_one_gpu_or_on_all() -> None:
    with driver("2xa100-40gb", fail={"nvmlDeviceGetName": Failure(999, gpu=1)}) as d:
        assert pynvml.nvmlDeviceGetName(d.gpu(0))
        assert refused("nvmlDeviceGetName", d.gpu(1)) == UNKNOWN
        d.set(fail={"nvmlDeviceGetName": Failure(16), "nvmlDeviceGetHandleByIndex_v2": Failure(4, gpu=1)})
        assert refused("nvmlDeviceGetName", d.gpu(0)) == 16
        assert refused("nvmlDeviceGetHandleByIndex", 1) == NO_PERMISSION
        assert pynvml.nvmlDeviceGetCount() == 2


def test_a_driver_that_is_not_loaded_refuses_init_until_it_is() -> None:
    with driver() as d:
        pynvml.nvmlShutdown()
        d.set(driver_loaded=False)
        assert refused("nvmlInit") == 9
        d.set(driver_loaded=True)
        pynvml.nvmlInit()


def test_minors_and_bus_addresses_need_not_follow_the_index() -> None:
    with driver("3xa100-40gb", minors=[2, 0, 1], pci_order="descending", numa=[1, -1]) as d:
        assert [pynvml.nvmlDeviceGetMinorNumber(d.gpu(i)) for i in range(3)] == [2, 0, 1]
        buses = [pynvml.nvmlDeviceGetPciInfo_v3(d.gpu(i)).bus for i in range(3)]
        assert buses == sorted(buses, reverse=True)
        assert [list(pynvml.nvmlDeviceGetMemoryAffinity(d.gpu(i), 1, 0)) for i in range(2)] == [[2], [0]]


def test_gpus_of_one_numa_node_meet_there_and_others_nowhere_nearer_than_the_system() -> None:
    with driver("3xa100-40gb", numa=[0, 1, 0]) as d:
        gpus = [d.gpu(i) for i in range(3)]
        levels = [pynvml.nvmlDeviceGetTopologyCommonAncestor(gpus[0], gpu) for gpu in gpus]
        assert levels == [
            pynvml.NVML_TOPOLOGY_INTERNAL,
            pynvml.NVML_TOPOLOGY_SYSTEM,
            pynvml.NVML_TOPOLOGY_NODE,
        ]


def test_nvlinks_end_at_the_gpus_that_the_switch_names() -> None:
    with driver("3xa100-40gb", nvlinks=[(0, 2, 2)]) as d:
        states = [pynvml.nvmlDeviceGetNvLinkState(d.gpu(0), link) for link in range(18)]
        assert states == [1, 1, *[0] * 16]
        for gpu, other in ((0, 2), (2, 0)):
            end = pynvml.nvmlDeviceGetNvLinkRemotePciInfo(d.gpu(gpu), 1)
            assert end.busId == pynvml.nvmlDeviceGetPciInfo(d.gpu(other)).busId
        assert refused("nvmlDeviceGetNvLinkRemotePciInfo", d.gpu(0), 2) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetNvLinkState", d.gpu(0), 18) == INVALID_ARGUMENT
        assert refused("nvmlDeviceGetNvLinkState", d.gpu(1), 0) == NOT_SUPPORTED, "it has no link at all"


def test_a_mig_device_has_neither_a_place_on_the_bus_nor_links() -> None:
    with driver("2xa100-40gb=1g.5gb") as d:
        assert refused("nvmlDeviceGetTopologyCommonAncestor", d.gpu(1), d.mig()) == NOT_SUPPORTED
        assert refused("nvmlDeviceGetNvLinkState", d.mig(), 0) == NOT_SUPPORTED


def test_legacy_uuids_name_gpu_and_instances() -> None:
    with driver("1xa100-40gb=1c.3g.20gb*2", uuid_format="legacy") as d:
        gpu = pynvml.nvmlDeviceGetUUID(d.gpu())
        assert d.mig_uuids() == [f"MIG-{gpu}/2/0", f"MIG-{gpu}/2/1"]
        assert pynvml.nvmlDeviceGetComputeInstanceId(pynvml.nvmlDeviceGetHandleByUUID(d.mig_uuids()[1])) == 1


@pytest.mark.parametrize("reuse", [True, False])
def test_uuid_of_a_device_made_again_is_the_old_one_or_a_new_one(reuse: bool) -> None:
    with driver("1xa100-40gb=1g.5gb", uuid_reuse=reuse) as d:
        before = d.mig_uuids()
        d.make_again(13, "1g.5gb")
        assert (d.mig_uuids() == before) is reuse


def test_every_switch_has_a_meaning_and_every_meaning_a_switch() -> None:
    assert set(MEANING) == set(Switches.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mig-index", "sparse", "sparse"),
        ("stale_sessions", "on", True),
        ("v2_profile_info", "false", False),
        ("minors", "1,0", [1, 0]),
        ("numa", "-1,1", [-1, 1]),
        ("nvlinks", "[[0, 1, 4]]", [(0, 1, 4)]),
        ("nvlinks", "", []),
        (
            "missing_symbols",
            "nvmlDeviceGetName, nvmlDeviceGetUUID",
            ["nvmlDeviceGetName", "nvmlDeviceGetUUID"],
        ),
        ("hang", "*", ["*"]),
        ("cost", '{"*": 0.5}', {"*": 0.5}),
        ("fail", '{"nvmlDeviceGetName": {"gpu": 1, "code": 999}}', {"nvmlDeviceGetName": Failure(999, 1)}),
        ("driver_version", "470.42.01", "470.42.01"),
    ],
)
def test_switch_is_set_from_text(name: str, text: str, value: object) -> None:
    node = spec.build("2xa30")
    set_switch(node, name, text)
    assert getattr(node.switches, name.replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mig_indx", "sparse", "did you mean 'mig_index'?"),
        ("mig_index", "dense", "dense"),
        ("stale_sessions", "maybe", "expected on or off"),
        ("minors", "1,1", "different numbers"),
        ("minors", "0,1,2", "3 numbers for 2 GPUs"),
        ("minors", "1", "would be [1, 1]"),
        ("minors", "a,b", "minors"),
        ("nvlinks", "[[0, 2, 4]]", "[0, 2, 4] is not two of 2 GPUs"),
        ("nvlinks", "[[1, 1, 4]]", "[1, 1, 4] is not two"),
        ("nvlinks", "[[0, 1, 0]]", "a number of links"),
        ("nvlinks", "[[0, 1, 9], [1, 0, 10]]", "at most 18"),
        ("nvlinks", "[[0, 1]]", "nvlinks"),
        ("nvlinks", "0-1", "nvlinks"),
        ("gi_ids", "swapped", "there are GPU instances"),
        ("hang", "nvmlDeviceGetNam", "did you mean 'nvmlDeviceGetName'?"),
        ("fail", '{"nvmlDeviceGetName": 999}', "fail"),
        ("cost", "{", "cost"),
    ],
)
def test_wrong_switch_is_refused_with_what_it_means_and_changes_nothing(
    name: str, text: str, words: str
) -> None:
    node = spec.build("2xa30=1g.6gb")
    with pytest.raises(InputError) as error:
        set_switch(node, name, text)
    assert words in str(error.value)
    assert node.switches == Switches()
