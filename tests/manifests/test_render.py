"""The shipped manifests as they render: golden files, valid in each Kubernetes, alike by chart and kustomize.

`GOLDEN=write pytest tests/manifests` writes the golden files anew; then look at them.
"""

import os

import pytest
import yaml

from migplugin import __version__
from tests.manifests.render import (
    CHART,
    GOLDEN,
    KUBERNETES,
    NAMESPACE,
    OVERLAYS,
    ROOT,
    Document,
    RenderFailed,
    agent,
    containers,
    documents,
    env,
    helm,
    invalid,
    kustomize,
    needs_tools,
    only,
    run,
    with_components,
    without_order,
)

pytestmark = needs_tools

# What makes of the chart what an overlay makes of the base.
VALUES: dict[str, Document] = {
    "": {},
    "privileged": {"privileged": True},
    "gpu-operator": {"gpuOperator": {"enabled": True}},
    "gpu-operator-privileged": {"gpuOperator": {"enabled": True}, "privileged": True},
    "openshift": {"openshift": {"enabled": True}},
    "openshift-gpu-operator": {"openshift": {"enabled": True}, "gpuOperator": {"enabled": True}},
    "simulated": {"simulated": {"enabled": True}},
}


def golden(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} is not what is rendered; GOLDEN=write, and look at it"


@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_kustomize_renders_as_in_the_golden_file(overlay: str) -> None:
    golden(overlay or "base", kustomize(overlay))


def test_the_chart_renders_as_in_the_golden_file() -> None:
    golden("chart", helm())


@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_chart_and_kustomize_render_the_same(overlay: str) -> None:
    namespace = NAMESPACE.get(overlay, "migplugin")
    ours = {
        d["kind"]: d for d in documents(kustomize(overlay)) if d["kind"] not in {"Namespace", "Deployment"}
    }
    theirs = {d["kind"]: d for d in documents(helm(values=VALUES[overlay], namespace=namespace))}
    for each in (*ours.values(), *theirs.values()):
        each["metadata"].pop("labels")  # who manages it
    assert without_order(theirs) == without_order(ours)


def test_with_cdi_they_are_the_same_too() -> None:
    ours, theirs = with_components("cdi", "image"), helm(values={"deviceListStrategy": "cdi-cri"})
    assert without_order(only(theirs)["spec"]) == without_order(only(ours)["spec"])


def test_every_version_of_kubernetes_takes_what_kustomize_renders() -> None:
    everything = [d for overlay in ("", *OVERLAYS) for d in documents(kustomize(overlay))]
    assert invalid(everything, KUBERNETES) == []


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_chart_renders_for_each_version_and_that_version_takes_it(version: str) -> None:
    assert invalid(documents(helm(version=f"{version}.0")), [version]) == []


def test_every_version_takes_what_the_chart_renders_with_other_values() -> None:
    everything = [d for values in VALUES.values() for d in documents(helm(values=values))]
    assert invalid(everything, KUBERNETES) == []


def test_the_check_would_see_a_word_that_kubernetes_does_not_know() -> None:
    wrong = only(kustomize())
    wrong["spec"]["template"]["spec"]["priorityClass"] = "high"
    (said,) = invalid([wrong], ["1.36"])
    assert "priorityClass" in said


def test_an_older_kubernetes_is_refused() -> None:
    with pytest.raises(RenderFailed, match=r"kubeVersion: >=1\.28"):
        helm(version="1.27.3")


def test_helm_lint_has_nothing_to_say() -> None:
    said = run("helm", "lint", "--strict", "--namespace", "migplugin", CHART)
    assert "1 chart(s) linted, 0 chart(s) failed" in said


def test_rendering_twice_gives_the_same() -> None:
    assert helm() == helm()
    assert kustomize("simulated") == kustomize("simulated")


@pytest.mark.parametrize("overlay", ["", *OVERLAYS])
def test_one_image_of_this_version_is_everywhere(overlay: str) -> None:
    workloads = [d for d in documents(kustomize(overlay)) if d["kind"] in {"DaemonSet", "Deployment"}]
    images = {container["image"] for workload in workloads for container in containers(workload)}
    (image,) = images
    name, _, tag = image.partition(":")
    assert name == "migplugin"
    assert tag == __version__
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == tag


def test_another_image_is_named_in_one_place() -> None:
    image = {"images": [{"name": "migplugin", "newName": "registry.example/mig", "newTag": "2"}]}
    ours = only(with_components("gpu-operator", "image", **image))
    theirs = only(
        helm(
            values={
                "gpuOperator": {"enabled": True},
                "image": {"repository": "registry.example/mig", "tag": "2"},
            }
        )
    )
    for document in (ours, theirs):
        assert {c["image"] for c in containers(document)} == {"registry.example/mig:2"}


def test_the_kubelets_root_is_one_value() -> None:
    path = "/var/lib/k0s/kubelet"
    theirs = only(helm(values={"kubeletRoot": path}))
    base = (ROOT / "manifests/base/kustomization.yaml").read_text()
    assert base.count("/var/lib/kubelet") == 1
    for document in (theirs, only(kustomize())):
        text = yaml.safe_dump(document["spec"]["template"]["spec"]["volumes"])
        root = path if document is theirs else "/var/lib/kubelet"
        assert text.count(f"path: {root}/") == 2
    mounts = {mount["mountPath"] for mount in agent(theirs)["volumeMounts"]}
    assert "/var/lib/kubelet/device-plugins" in mounts, "inside it is always the same"


def test_components_are_combined_as_one_likes() -> None:
    document = only(with_components("openshift", "cdi", "privileged", "gpu-operator", "image"))
    spec = document["spec"]["template"]["spec"]
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    assert paths["driver-root"] == "/run/nvidia/driver"
    assert {"cdi", "dev", "validations"} <= paths.keys()
    assert agent(document)["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "readOnlyRootFilesystem": True,
        "privileged": True,
    }
    assert env(agent(document))["DEVICE_LIST_STRATEGY"] == "cdi-cri"
    assert invalid([document], KUBERNETES) == []


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if "gpu-operator" in overlay])
def test_the_operators_driver_root_is_mounted_where_it_is_told(overlay: str) -> None:
    document = only(kustomize(overlay))
    (root,) = [v for v in document["spec"]["template"]["spec"]["volumes"] if v["name"] == "driver-root"]
    assert root["hostPath"]["path"] == env(agent(document))["NVIDIA_DRIVER_ROOT"] == "/run/nvidia/driver"


def test_the_dockerfile_has_nothing_against_it() -> None:
    assert run("hadolint", "Dockerfile") == ""
