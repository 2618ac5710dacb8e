"""What the pod may do, and what it asks for: the fewest rights that work."""

from pathlib import Path

import pytest

from migplugin.settings import TABLE, resolve
from tests.manifests.render import (
    GOLDEN,
    OVERLAYS,
    Document,
    agent,
    containers,
    documents,
    env,
    only,
)

ALL = ["base", *OVERLAYS]
NOT_SETTINGS = {"MIGPLUGIN_SIM_STATE"}


def rendered(name: str) -> Document:
    """The DaemonSet of the golden file, which test_render.py compares with what is rendered."""
    return only((GOLDEN / f"{name}.yaml").read_text())


def pod(name: str) -> Document:
    spec = rendered(name)["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def test_the_agent_has_one_capability_and_no_way_to_more() -> None:
    assert agent(rendered("base"))["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@pytest.mark.parametrize("name", ALL)
def test_no_pod_has_a_token_a_namespace_of_the_host_or_a_writable_root(name: str) -> None:
    spec = pod(name)
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
    for container in containers(rendered(name)):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("name", [name for name in ALL if "privileged" not in name])
def test_nothing_is_privileged_that_does_not_say_so(name: str) -> None:
    for container in containers(rendered(name)):
        context = container["securityContext"]
        assert "privileged" not in context
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("name", ALL)
def test_only_what_must_be_written_is_mounted_writable(name: str) -> None:
    writable = {
        mount["mountPath"]
        for container in containers(rendered(name))
        for mount in container["volumeMounts"]
        if not mount.get("readOnly")
    }
    more: set[str] = {"simulated": {"/var/lib/migplugin/simulated"}}.get(name, set())
    more |= {"/dev"} if "privileged" in name else set()
    assert writable == {"/var/lib/kubelet/device-plugins", "/run/migplugin"} | more


@pytest.mark.parametrize("name", ALL)
def test_two_agents_never_share_a_node(name: str) -> None:
    assert rendered(name)["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }


@pytest.mark.parametrize("name", ALL)
def test_every_variable_and_flag_is_one_that_the_agent_takes(name: str) -> None:
    container = agent(rendered(name))
    known = {variable for setting in TABLE for variable in setting.env} | NOT_SETTINGS
    variables = env(container)
    assert {each for each in variables if not each.startswith("NVIDIA_") or each in known} <= known
    runtime = {each: variables[each] for each in variables if each not in known}
    assert runtime == {
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        "NVIDIA_MIG_MONITOR_DEVICES": "all",
    }
    assert (container["command"], container["args"][0]) == (["migplugin"], "serve")
    flags = {setting.flag: setting.name for setting in TABLE if setting.has_flag}
    given = dict(word.split("=", 1) for word in container["args"][1:])
    settings = resolve({flags[flag]: text for flag, text in given.items()}, variables | {"CONFIG_FILE": ""})
    assert settings.http_listen is not None
    assert settings.http_listen.port == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("name", ALL)
def test_probes_ask_for_pages_that_there_are(name: str) -> None:
    from migplugin.telemetry.probes import Probes  # noqa: PLC0415

    container = agent(rendered(name))
    probes = {
        kind: container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {probe["path"] for probe in probes.values()} == Probes().pages.keys()
    assert probes["readinessProbe"]["path"] == "/readyz"
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["name"]}


@pytest.mark.parametrize("name", ALL)
def test_every_default_path_that_matters_is_mounted(name: str) -> None:
    container = agent(rendered(name))
    mounts = {Path(mount["mountPath"]): mount.get("readOnly", False) for mount in container["volumeMounts"]}
    settings = resolve({}, env(container) | {"CONFIG_FILE": ""})
    assert mounts[settings.kubelet_socket.parent] is False
    assert mounts[settings.pod_resources_socket.parent] is True
    assert mounts[Path(env(container)["CONFIG_FILE"]).parent] is True
    assert settings.control_socket is not None
    assert mounts[settings.control_socket.parent] is False
    (run,) = [volume for volume in pod(name)["volumes"] if volume["name"] == "run"]
    assert run["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Mi"}, "no socket outlives its pod"


@pytest.mark.parametrize("name", ALL)
def test_critical_pods_have_a_quota_that_allows_them(name: str) -> None:
    quota = only((GOLDEN / f"{name}.yaml").read_text(), "ResourceQuota")
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    assert scope["values"] == [pod(name)["priorityClassName"]] == ["system-node-critical"]
    (namespace,) = {
        d["metadata"]["namespace"]
        for d in documents((GOLDEN / f"{name}.yaml").read_text())
        if d["kind"] != "Namespace"
    }
    assert (
        only((GOLDEN / f"{name}.yaml").read_text(), "Namespace")["metadata"]["labels"][
            "pod-security.kubernetes.io/enforce"
        ]
        == "privileged"
    )
    assert namespace == only((GOLDEN / f"{name}.yaml").read_text(), "Namespace")["metadata"]["name"]


def test_simulated_gpus_come_only_where_somebody_asked_for_them() -> None:
    spec = pod("simulated")
    assert spec["nodeSelector"] == {"migplugin/simulated": "true"}
    assert "affinity" not in spec
    assert {"key": "migplugin/simulated", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    example = only((GOLDEN / "simulated.yaml").read_text(), "Deployment")["spec"]["template"]["spec"]
    assert example["tolerations"] == [
        {"key": "migplugin/simulated", "operator": "Exists", "effect": "NoSchedule"}
    ]
    for name in ALL:
        assert any("--simulate" in word for word in agent(rendered(name))["args"]) is (name == "simulated")


@pytest.mark.parametrize("name", [name for name in ALL if "gpu-operator" in name])
def test_the_operator_can_pause_us_as_it_pauses_its_own_plugin(name: str) -> None:
    assert pod(name)["nodeSelector"] == {"nvidia.com/gpu.deploy.device-plugin": "true"}
