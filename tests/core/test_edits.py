"""What a container gets, strategy by strategy, as NVIDIA's plugin answers (nvidia-device-plugin.md 4.1)."""

from dataclasses import replace
from itertools import combinations

import pytest

from migplugin.core.allocation import EditOptions, Edits, Offer, OfferedDevice, Offers, edits
from migplugin.core.inventory import DeviceId, GpuUuid
from migplugin.core.resource import Device, ResourceName

MIG = ResourceName("nvidia.com/mig-1g.5gb")
A = Device(
    DeviceId("MIG-a"),
    GpuUuid("GPU-0"),
    0,
    "1g.5gb",
    None,
    ("/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap30"),
    "0:1",
)
B = Device(DeviceId("MIG-b"), GpuUuid("GPU-1"), 1, "1g.5gb", None, ("/dev/nvidia1",), "1:0")
OFFERS = Offers({MIG: Offer({d.id: OfferedDevice(d) for d in (A, B)})}, ("/dev/nvidiactl",))
STRATEGIES = ("envvar", "volume-mounts", "cdi-annotations", "cdi-cri")
NAMES = ("k8s.device-plugin.nvidia.com/gpu=MIG-b", "k8s.device-plugin.nvidia.com/gpu=MIG-a")


def answer(*strategies: str, **options: object) -> Edits:
    chosen = EditOptions(frozenset(strategies), **options)  # type: ignore[arg-type]
    return edits(MIG, ("MIG-b", "MIG-a"), replace(OFFERS, edits=chosen), "token")


ALL = [c for n in range(1, 5) for c in combinations(STRATEGIES, n)]


@pytest.mark.parametrize("strategies", ALL, ids="+".join)
def test_each_strategy_adds_its_own_and_cdi_alone_adds_nothing_else(strategies: tuple[str, ...]) -> None:
    given = answer(*strategies, pass_device_specs=True)
    plain = {"envvar", "volume-mounts"} & set(strategies)
    assert given.cdi_devices == (NAMES if "cdi-cri" in strategies else ())
    annotations = (
        {"cdi.k8s.io/nvidia-device-plugin_token": ",".join(NAMES)} if "cdi-annotations" in strategies else {}
    )
    assert given.annotations == annotations
    if not plain:
        assert given.envs == {}
        assert given.nodes == ()
        assert given.mounts == ()
        return
    visible = "/var/run/nvidia-container-devices" if "volume-mounts" in plain else "MIG-b,MIG-a"
    assert given.envs == {"NVIDIA_VISIBLE_DEVICES": visible}
    assert [m.container_path for m in given.mounts] == (
        [f"/var/run/nvidia-container-devices/{id_}" for id_ in ("MIG-b", "MIG-a")]
        if "volume-mounts" in plain
        else []
    )
    assert [n.container_path for n in given.nodes] == [
        "/dev/nvidiactl",
        "/dev/nvidia1",
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap30",
    ]


def test_by_index_every_name_is_an_index() -> None:
    given = answer("envvar", "cdi-cri", device_id_strategy="index")
    assert given.envs == {"NVIDIA_VISIBLE_DEVICES": "1:0,0:1"}
    assert given.cdi_devices == (
        "k8s.device-plugin.nvidia.com/gpu=1:0",
        "k8s.device-plugin.nvidia.com/gpu=0:1",
    )


def test_the_prefix_of_the_annotation_is_a_setting() -> None:
    given = answer("cdi-annotations", cdi_annotation_prefix="cdi.nvidia.com/")
    assert list(given.annotations) == ["cdi.nvidia.com/nvidia-device-plugin_token"]


@pytest.mark.parametrize("strategy", ["envvar", "cdi-cri"])
def test_the_runtime_is_asked_for_features_also_where_cdi_is_alone(strategy: str) -> None:
    given = answer(strategy, features=("GDRCOPY", "GDS", "MOFED"))
    assert {k: v for k, v in given.envs.items() if k != "NVIDIA_VISIBLE_DEVICES"} == {
        "NVIDIA_GDRCOPY": "enabled",
        "NVIDIA_GDS": "enabled",
        "NVIDIA_MOFED": "enabled",
    }


@pytest.mark.parametrize("strategies", ALL, ids="+".join)
def test_replicas_of_one_device_are_that_device(strategies: tuple[str, ...]) -> None:
    shown = {DeviceId(f"{d.id}::{n}"): OfferedDevice(d) for d in (A, B) for n in range(3)}
    offers = replace(OFFERS, resources={MIG: Offer(shown)}, edits=EditOptions(frozenset(strategies)))
    given = edits(MIG, ("MIG-b::2", "MIG-a::0", "MIG-b::0", "MIG-a::1"), offers, "token")
    assert given == answer(*strategies)
