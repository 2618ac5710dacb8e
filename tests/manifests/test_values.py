"""The chart's values: NVIDIA's names do what they do there, and what cannot be is refused in words."""

import json
from typing import Any

import pytest
import yaml

from migplugin.settings import resolve
from tests.manifests.render import (
    CHART,
    KUBERNETES,
    Document,
    RenderFailed,
    agent,
    documents,
    env,
    helm,
    invalid,
    needs_tools,
    only,
    plain,
)

pytestmark = needs_tools

# As a person who comes from NVIDIA's chart may have them in a file.
NVIDIAS: Document = {
    "config": {
        "name": "",
        "map": {"a": "version: v1\n"},
        "default": "",
        "fallbackStrategies": ["named", "single"],
    },
    "compatWithCPUManager": None,
    "migStrategy": "mixed",
    "failOnInitError": False,
    "deviceListStrategy": ["envvar", "cdi-annotations"],
    "deviceIDStrategy": "uuid",
    "nvidiaDriverRoot": "/opt/nvidia",
    "gdrcopyEnabled": True,
    "gdsEnabled": True,
    "mofedEnabled": False,
    "deviceDiscoveryStrategy": "nvml",
    "nameOverride": "",
    "fullnameOverride": "",
    "namespaceOverride": "",
    "selectorLabelsOverride": {},
    "allowDefaultNamespace": False,
    "imagePullSecrets": [{"name": "pull"}],
    "image": {"repository": "migplugin", "pullPolicy": "Always", "tag": ""},
    "updateStrategy": {"type": "RollingUpdate"},
    "podAnnotations": {"a": "b"},
    "podSecurityContext": {},
    "securityContext": {},
    "resources": {},
    "nodeSelector": {"pool": "gpus"},
    "runtimeClassName": "nvidia",
    "priorityClassName": "system-node-critical",
    "devicePlugin": {"enabled": True, "enableHostNetwork": False},
    "gfd": {"enabled": False, "securityContext": {"privileged": True}},
    "nfd": {"enabled": False},
    "mps": {"root": "/run/nvidia/mps", "enableHostPID": True},
    "cdi": {"nvidiaHookPath": "/usr/bin/nvidia-cdi-hook", "featureFlags": "disable-nvsandboxutils"},
    "nvidiaDevRoot": "/",
}


def test_a_values_file_of_nvidias_chart_is_understood() -> None:
    document = only(helm(values=NVIDIAS))
    container = agent(document)
    spec = document["spec"]["template"]["spec"]
    settings = resolve({}, env(container) | {"CONFIG_FILE": ""})
    assert settings.mig_strategy == "mixed"
    assert settings.fail_on_init_error is False
    assert settings.device_list_strategy == ("envvar", "cdi-annotations")
    assert settings.driver_root == "/opt/nvidia"
    assert settings.gdrcopy_enabled
    assert not settings.mofed_enabled
    assert settings.nvidia_cdi_hook_path == "/usr/bin/nvidia-cdi-hook"
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["nodeSelector"] == {"pool": "gpus"}
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    assert paths["cdi"] == "/var/run/cdi"
    assert paths["driver-root"] == "/opt/nvidia"
    assert env(container)["CONFIG_FILE"] == "/etc/migplugin/a"
    assert invalid(documents(helm(values=NVIDIAS)), KUBERNETES) == []


@pytest.mark.parametrize(
    ("value", "variable", "text"),
    [
        ({"migStrategy": "none"}, "MIG_STRATEGY", "none"),
        ({"failOnInitError": True}, "FAIL_ON_INIT_ERROR", "true"),
        ({"failOnInitError": False}, "FAIL_ON_INIT_ERROR", "false"),
        ({"deviceListStrategy": "envvar,cdi-cri"}, "DEVICE_LIST_STRATEGY", "envvar,cdi-cri"),
        ({"deviceIDStrategy": "index"}, "DEVICE_ID_STRATEGY", "index"),
        ({"deviceDiscoveryStrategy": "auto"}, "DEVICE_DISCOVERY_STRATEGY", "auto"),
        ({"sharedDevicesAllocationPolicy": "packed"}, "SHARED_DEVICES_ALLOCATION_POLICY", "packed"),
        ({"nvidiaDriverRoot": "/d"}, "NVIDIA_DRIVER_ROOT", "/d"),
        ({"nvidiaDevRoot": "/d"}, "NVIDIA_DEV_ROOT", "/d"),
        ({"gdsEnabled": True}, "GDS_ENABLED", "true"),
        ({"passDeviceSpecs": True}, "PASS_DEVICE_SPECS", "true"),
        ({"compatWithCPUManager": True}, "PASS_DEVICE_SPECS", "true"),
        ({"privileged": True, "passDeviceSpecs": False}, "PASS_DEVICE_SPECS", "false"),
        ({"resourceDomain": "example.com"}, "MIGPLUGIN_RESOURCE_DOMAIN", "example.com"),
        ({"pollInterval": "10s"}, "MIGPLUGIN_POLL_INTERVAL", "10s"),
        ({"removalDelay": "2m"}, "MIGPLUGIN_REMOVAL_DELAY", "2m"),
        ({"logFormat": "json"}, "MIGPLUGIN_LOG_FORMAT", "json"),
        ({"logLevel": "debug"}, "MIGPLUGIN_LOG_LEVEL", "debug"),
        ({"probes": {"port": 9500}}, "MIGPLUGIN_HTTP_LISTEN", ":9500"),
        (
            {"extraEnv": [{"name": "DP_DISABLE_HEALTHCHECKS", "value": "xids"}]},
            "DP_DISABLE_HEALTHCHECKS",
            "xids",
        ),
    ],
)
def test_a_value_becomes_a_variable_that_the_agent_takes(value: Document, variable: str, text: str) -> None:
    variables = env(agent(only(helm(values=value))))
    assert variables[variable] == text
    resolve({}, variables | {"CONFIG_FILE": ""})


def test_what_is_not_set_is_left_to_the_configuration_file() -> None:
    assert set(env(agent(only(helm())))) == {
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_MIG_MONITOR_DEVICES",
        "CONFIG_FILE",
        "MIGPLUGIN_HTTP_LISTEN",
    }


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({}, "config.yaml"),
        ({"map": {"one": {"version": "v1"}}}, "one"),
        ({"map": {"one": "version: v1", "default": "version: v1"}}, "default"),
        ({"map": {"one": "version: v1", "two": "version: v1"}, "default": "two"}, "two"),
        ({"name": "mine", "default": "theirs"}, "theirs"),
        ({"name": "mine", "fallbackStrategies": ["empty"]}, None),
    ],
)
def test_one_configuration_file_is_chosen(config: Document, file: str | None) -> None:
    text = helm(values={"config": config})
    assert env(agent(only(text))).get("CONFIG_FILE") == (file and f"/etc/migplugin/{file}")
    maps = [d for d in documents(text) if d["kind"] == "ConfigMap"]
    assert bool(maps) is ("name" not in config)
    for made in maps:
        assert all(yaml.safe_load(each) == {"version": "v1"} for each in made["data"].values())


@pytest.mark.parametrize(
    ("values", "mounted"),
    [
        ({}, False),
        ({"deviceListStrategy": "envvar"}, False),
        ({"deviceListStrategy": "cdi-cri"}, True),
        ({"config": {"map": {"a": "version: v1\nflags: {plugin: {deviceListStrategy: cdi-cri}}"}}}, True),
        ({"cdi": {"mount": True}}, True),
        ({"deviceListStrategy": "cdi-cri", "cdi": {"mount": False}}, False),
    ],
)
def test_the_directory_for_cdi_is_mounted_where_it_is_needed(values: Document, mounted: bool) -> None:
    mounts = {mount["mountPath"] for mount in agent(only(helm(values=values)))["volumeMounts"]}
    assert ("/var/run/cdi" in mounts) is mounted


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"migStrategy": "mix"}, "'/migStrategy': value must be one of 'none', 'single', 'mixed'"),
        ({"migstrategy": "mixed"}, "additional properties 'migstrategy' not allowed"),
        ({"deviceListStrategy": "cdi"}, "'/deviceListStrategy'"),
        ({"kubeletRoot": "/var/lib/kubelet/"}, "'/kubeletRoot'"),
        ({"image": {"digest": "0.1.0"}}, "does not match pattern"),
        ({"image": {"tag": 1}}, "'/image/tag': got number, want string"),
        (
            {"config": {"name": "a", "map": {"b": "c"}}},
            "config.name and config.map are both set; name an existing ConfigMap, or write the files into",
        ),
        ({"config": {"name": "a"}}, "config.default must say which configuration file is used"),
        ({"config": {"map": {"b": "", "a": ""}}}, "is used; config.map has: a, b"),
        (
            {"config": {"map": {"a": ""}, "default": "b"}},
            "config.default is b, which config.map does not have; it has: a",
        ),
        ({"gfd": {"enabled": True}}, "gpu-feature-discovery is not part of this chart"),
        ({"devicePlugin": {"enabled": False}}, "leaves nothing to install"),
        ({"updateStrategy": {"rollingUpdate": {"maxSurge": 1}}}, "maxSurge must be 0"),
        ({"simulated": {"enabled": True}, "gpuOperator": {"enabled": True}}, "a simulated node has no GPU"),
        ({"simulated": {"enabled": True}, "privileged": True}, "the simulation needs no privilege"),
        (
            {"privileged": True, "securityContext": {"runAsUser": 0}},
            "securityContext replaces what privileged and compatWithCPUManager would set",
        ),
        (
            {"seLinuxOptions": {"type": "a"}, "podSecurityContext": {"seLinuxOptions": {"type": "b"}}},
            "seLinuxOptions and podSecurityContext.seLinuxOptions are the same thing",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(values: Document, said: str) -> None:
    with pytest.raises(RenderFailed) as refused:
        helm(values=values)
    assert said in plain(refused.value)


def test_the_default_namespace_is_refused_unless_one_insists() -> None:
    with pytest.raises(RenderFailed, match="choose one with --namespace migplugin"):
        helm(namespace="default")
    assert only(helm(namespace="default", values={"allowDefaultNamespace": True}))


@pytest.mark.parametrize(
    ("context", "asks"),
    [
        ({"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, True),
        ({"privileged": True}, True),
        ({"capabilities": {"drop": ["ALL"]}}, False),
        ({"runAsUser": 0}, False),
    ],
)
def test_mig_is_monitored_only_with_the_privilege_without_which_the_runtime_starts_nothing(
    context: Document, *, asks: bool
) -> None:
    container = agent(only(helm(values={"securityContext": context})))
    assert ("NVIDIA_MIG_MONITOR_DEVICES" in {entry["name"] for entry in container["env"]}) == asks


def test_an_image_can_be_pinned_by_its_digest() -> None:
    digest = f"sha256:{'0a' * 32}"
    container = agent(only(helm(values={"image": {"repository": "r/migplugin", "digest": digest}})))
    assert container["image"] == f"r/migplugin@{digest}"


def test_what_the_pod_is_given_can_be_changed() -> None:
    values: Document = {
        "seLinuxOptions": {"type": "container_device_plugin_t"},
        "resources": {"limits": {"memory": "1Gi"}},
        "tolerations": [],
        "affinity": {},
        "priorityClassName": None,
        "serviceAccount": {"name": "mine"},
        "podLabels": {"team": "gpu"},
        "extraVolumes": [{"name": "x", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "x", "mountPath": "/x"}],
        "extraArgs": ["--strict-config"],
        "probes": {"enabled": False},
    }
    text = helm(values=values)
    document = only(text)
    spec, container = document["spec"]["template"]["spec"], agent(document)
    assert spec["securityContext"] == {"seLinuxOptions": {"type": "container_device_plugin_t"}}
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert not {"tolerations", "affinity", "priorityClassName"} & spec.keys()
    assert spec["serviceAccountName"] == "mine"
    assert document["spec"]["template"]["metadata"]["labels"]["team"] == "gpu"
    assert container["args"] == ["serve", "--strict-config"]
    assert not {"livenessProbe", "ports"} & container.keys()
    assert not {d["kind"] for d in documents(text)} & {"ServiceAccount", "ResourceQuota"}
    assert invalid(documents(text), KUBERNETES) == []


def test_the_schema_knows_every_value_that_there_is() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def unknown(part: Any, known: Any, path: str = "") -> list[str]:
        if not isinstance(part, dict) or known.get("additionalProperties") is not False:
            return []
        properties = known["properties"]
        return [f"{path}/{key}" for key in part.keys() - properties.keys()] + [
            found
            for key in part.keys() & properties.keys()
            for found in unknown(part[key], properties[key], f"{path}/{key}")
        ]

    assert unknown(values, schema) == []
    missing = schema["properties"].keys() - values.keys() - {"global"}
    assert missing == set()
