"""What the stand-in kubelet makes of a plugin's lists, and of their end (kubelet.md 1.3)."""

import grpc

from migplugin.sim.kubelet import Listed
from tests.fakes.plugin import Plugin, device
from tests.sim.kubelet_fixtures import R, listed, pod, running


async def test_capacity_counts_all_and_allocatable_the_healthy() -> None:
    devices = [device("a"), device("b", "Unhealthy"), device("c")]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices):
        await listed(kubelet, 2)
        assert kubelet.node() == {"capacity": {R: 3}, "allocatable": {R: 2}}
        assert kubelet.devices(R) == {"a": "Healthy", "b": "Unhealthy", "c": "Healthy"}


async def test_a_resource_that_was_never_listed_is_absent() -> None:
    async with running() as kubelet:
        assert kubelet.capacity(R) is None
        assert kubelet.allocatable(R) is None
        assert kubelet.devices(R) == {}
        assert kubelet.messages(R) == []


async def test_every_message_replaces_the_whole_list() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]) as plugin:
        await listed(kubelet, 2)
        plugin.list(device("c"))
        await listed(kubelet, 1)
        assert kubelet.devices(R) == {"c": "Healthy"}
        assert kubelet.messages(R) == [
            (Listed("a", "Healthy"), Listed("b", "Healthy")),
            (Listed("c", "Healthy"),),
        ]


async def test_health_goes_and_comes_back() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        for health, count in (("Unhealthy", 0), ("Healthy", 1)):
            plugin.list(device("a", health))
            await listed(kubelet, count)
            assert kubelet.capacity(R) == 1


async def test_only_the_literal_healthy_is_healthy() -> None:
    words = ["healthy", "HEALTHY", "weird", "", "Healthy "]
    devices = [device(f"d{number}", word) for number, word in enumerate(words)]
    async with running() as kubelet, Plugin(kubelet.socket, R, [*devices, device("good")]):
        await listed(kubelet, 1)
        assert kubelet.capacity(R) == 6
        assert kubelet.devices(R)["d2"] == "weird"


async def test_an_empty_list_takes_capacity_to_zero_at_once() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        plugin.list()
        await kubelet.until(lambda k: k.capacity(R) == 0)
        assert kubelet.allocatable(R) == 0


async def test_duplicates_collapse_and_the_last_one_wins() -> None:
    devices = [device("a", nodes=[0]), device("a", nodes=[1]), device("b")]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices):
        await listed(kubelet, 2)
        assert kubelet.capacity(R) == 2
        await kubelet.admit(pod(count=2))
        assert '"1":["a"]' in kubelet.checkpoint_path.read_text()


async def test_an_id_of_a_hundred_characters_is_taken() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("x" * 100)]):
        await listed(kubelet, 1)


async def test_71000_devices_fit_into_a_message() -> None:
    devices = [device(f"MIG-{number:036}") for number in range(71_000)]
    async with running() as kubelet, Plugin(kubelet.socket, R, devices):
        await listed(kubelet, 71_000, within=30.0)


async def test_a_message_beyond_4_mib_ends_the_stream_and_the_resource_is_unhealthy() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        plugin.list(*(device(f"MIG-{number:036}") for number in range(90_000)))
        await listed(kubelet, 0)
        assert kubelet.devices(R) == {"a": "Unhealthy"}


async def test_the_end_of_the_stream_makes_all_unhealthy_and_keeps_capacity() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]) as plugin:
        await listed(kubelet, 2)
        await plugin.end_stream()
        await listed(kubelet, 0)
        assert kubelet.capacity(R) == 2
        assert kubelet.devices(R) == {"a": "Unhealthy", "b": "Unhealthy"}


async def test_a_failing_stream_ends_like_any_other_and_is_never_opened_again() -> None:
    async with running(grace=0.05) as kubelet:
        plugin = Plugin(kubelet.socket, R, [device("a")])
        plugin.failures["ListAndWatch"] = grpc.StatusCode.INTERNAL, "not today"
        await plugin.serve()
        await plugin.register()
        await kubelet.until(lambda k: k.capacity(R) is None and plugin.calls["ListAndWatch"])
        # When the grace has passed, a second try would have come.
        async with Plugin(kubelet.socket, "x/other", [device("o")]):
            await listed(kubelet, 1, "x/other")
        await kubelet.until(lambda k: k.capacity("x/other") == 0)
        assert plugin.calls["ListAndWatch"] == 1
        await plugin.stop()


async def test_after_the_grace_capacity_is_zero_and_not_absent() -> None:
    async with running(grace=0.3) as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        await plugin.end_stream()
        await kubelet.until(lambda k: k.allocatable(R) == 0 and k.capacity(R) == 1)
        await kubelet.until(lambda k: k.capacity(R) == 0)
        assert kubelet.node() == {"capacity": {R: 0}, "allocatable": {R: 0}}
        assert kubelet.devices(R) == {}
        assert f'"{R}"' not in kubelet.checkpoint_path.read_text()


async def test_the_grace_is_five_minutes_by_default() -> None:
    async with running() as kubelet:
        assert kubelet._rules.grace == 300.0


async def test_a_plugin_that_is_back_within_the_grace_goes_on_where_it_was() -> None:
    async with running(grace=0.2) as kubelet:
        async with Plugin(kubelet.socket, R, [device("a")]):
            await listed(kubelet, 1)
        async with (
            Plugin(kubelet.socket, R, [device("a")]),
            Plugin(kubelet.socket, "x/other", [device("o")]) as other,
        ):
            await listed(kubelet, 1)
            # The first one's grace would have ended before the other's does.
            await other.stop()
            await kubelet.until(lambda k: k.capacity("x/other") == 0)
            assert kubelet.allocatable(R) == 1


async def test_pod_status_shows_what_was_last_listed_and_a_vanished_device_as_healthy() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a"), device("b")]) as plugin:
        await listed(kubelet, 2)
        held = pod(count=2)
        await kubelet.admit(held)
        plugin.list(device("a", "Unhealthy"), device("b"))
        await listed(kubelet, 1)
        assert kubelet.device_health(held, "main") == {R: {"a": "Unhealthy", "b": "Healthy"}}
        plugin.list(device("b"))
        await kubelet.until(lambda k: k.capacity(R) == 1)
        assert kubelet.device_health(held, "main") == {R: {"a": "Healthy", "b": "Healthy"}}


async def test_an_unhealthy_device_with_a_running_pod_keeps_capacity() -> None:
    async with running() as kubelet, Plugin(kubelet.socket, R, [device("a")]) as plugin:
        await listed(kubelet, 1)
        held = pod()
        await kubelet.admit(held)
        plugin.list(device("a", "Unhealthy"))
        await listed(kubelet, 0)
        assert kubelet.capacity(R) == 1
        assert kubelet.status(held).phase == "Running"
