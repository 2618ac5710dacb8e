"""NVIDIA's configuration file: what it sets, what is said of what it does not, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migplugin import configfile
from migplugin.errors import InputError
from migplugin.settings import Settings, describe, resolve

# The shape of the file that NVIDIA's documentation shows, with every section.
WHOLE = """
version: v1
flags:
  migStrategy: single
  failOnInitError: true
  nvidiaDriverRoot: /run/nvidia/driver
  gdsEnabled: true
  useNodeFeatureAPI: true
  plugin:
    passDeviceSpecs: true
    deviceListStrategy: [envvar, cdi-cri]
    deviceIDStrategy: index
    containerDriverRoot: /driver
  gfd: {oneshot: false, sleepInterval: 60s}
resources:
  mig: [{pattern: 1g.5gb, name: mig-small}]
sharing:
  timeSlicing:
    resources: [{name: nvidia.com/gpu, replicas: 4}]
migplugin: {removalDelay: 5, pollInterval: 2s}
"""


def settings(tmp_path: Path, text: str, env: dict[str, str] | None = None, **flags: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return resolve({"config_file": str(path), **flags}, env or {})


def test_the_file_sets_what_nvidia_s_sets_and_our_own_keys(tmp_path: Path) -> None:
    found = settings(tmp_path, WHOLE)
    assert found.mig_strategy == "single"
    assert found.fail_on_init_error is True
    assert found.driver_root == found.host_dev_root == "/run/nvidia/driver"
    assert found.gds_enabled
    assert not found.mofed_enabled
    assert found.pass_device_specs
    assert found.device_list_strategy == ("envvar", "cdi-cri")
    assert found.device_id_strategy == "index"
    assert found.driver_root_ctr_path == Path("/driver")
    assert found.removal_delay == 5.0
    assert found.poll_interval == 2.0
    assert found.document.findings == ()
    assert found.document.resources == {"mig": [{"pattern": "1g.5gb", "name": "mig-small"}]}
    assert found.document.sharing["timeSlicing"]["resources"][0]["replicas"] == 4


def test_json_is_yaml(tmp_path: Path) -> None:
    assert settings(tmp_path, '{"flags": {"migStrategy": "none"}}').mig_strategy == "none"


def test_the_order_is_flag_environment_file_default(tmp_path: Path) -> None:
    text = "flags: {migStrategy: single}"
    assert settings(tmp_path, text, {"MIG_STRATEGY": "none"}).mig_strategy == "none"
    assert settings(tmp_path, text, {"MIG_STRATEGY": "none"}, mig_strategy="mixed").mig_strategy == "mixed"
    sources = {name: source for name, _, source in describe(settings(tmp_path, text))}
    assert sources["mig_strategy"].endswith("config.yaml: flags.migStrategy")
    assert sources["gds_enabled"] == "default"


@pytest.mark.parametrize(
    "text", ["", "---\n", "{}", "version: v1", "flags:\n", "flags: {plugin: }", "version: ''"]
)
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    found = settings(tmp_path, text)
    assert found.mig_strategy == "mixed"
    assert found.document.findings == ()


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "flags: {migStrateg: single}",
            "flags.migStrateg: 'single': unknown key, ignored; did you mean migStrategy?",
        ),
        ("flags: {plugin: {x: 1}}", "flags.plugin.x: 1: unknown key, ignored; known here: passDeviceSpecs,"),
        ("flagz: {}", "flagz: {}: unknown key, ignored; did you mean flags?"),
        (
            "flags:\n  migStrategy: none\n  migStrategy: single",
            ":3: flags.migStrategy: given twice, the last one",
        ),
        ("resources: {mig: [{patern: a, name: b}]}", "resources.mig[0].patern: 'a': unknown key"),
        (
            "migplugin: {removalDelai: 3s}",
            "migplugin.removalDelai: '3s': unknown key, ignored; did you mean remov",
        ),
    ],
)
def test_what_is_not_known_is_named_and_the_rest_served(tmp_path: Path, text: str, finding: str) -> None:
    found = settings(tmp_path, text)
    assert len(found.document.findings) == 1
    assert finding in found.document.findings[0]
    with pytest.raises(InputError, match=r"ignored|given twice"):
        settings(tmp_path, text, strict_config="true")


def test_the_last_of_two_values_counts(tmp_path: Path) -> None:
    assert settings(tmp_path, "flags:\n  migStrategy: none\n  migStrategy: single").mig_strategy == "single"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("flags: {migStrategy: mixd}", "flags.migStrategy=mixd: expected none, single or mixed"),
        ("flags: {failOnInitError: 'yes'}", "flags.failOnInitError: 'yes': expected true or false"),
        ("flags: {migStrategy: 3}", "flags.migStrategy: 3: expected text"),
        ("flags: {plugin: {deviceListStrategy: {a: 1}}}", "deviceListStrategy"),
        ("flags: []", "flags: expected a mapping, not a list"),
        ("resources: {mig: 1g.5gb}", "resources.mig: expected a list, not text"),
        ("version: v2", "version: 'v2': expected v1"),
        ("- a", "expected a mapping at the top"),
        ("a: [", "not YAML or JSON"),
        ("? [a, b]\n: c", "a key must be plain text"),
        (
            "sharing: {mps: {resources: [{name: nvidia.com/gpu, replicas: 2}]}}",
            "sharing.mps: MPS is not possible",
        ),
        ("imex: {channelIDs: [0]}", "imex.channelIDs=0: IMEX channels are not served here"),
        ("flags: {deviceDiscoveryStrategy: tegra}", "Tegra is not supported"),
        ("migplugin: {resourceDomain: node.kubernetes.io}", "refuses resources below kubernetes.io"),
        ("[" * 200, "not YAML or JSON"),
    ],
)
def test_what_is_wrong_is_an_error_that_names_file_key_and_value(
    tmp_path: Path, text: str, error: str
) -> None:
    with pytest.raises(InputError) as caught:
        settings(tmp_path, text)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        resolve({"config_file": str(tmp_path / "nowhere")}, {})
    with pytest.raises(InputError, match="larger than"):
        settings(tmp_path, "#" * (configfile.MAX_BYTES + 1))


LAUGHS = ["a: &a0 [x,x,x,x,x,x,x,x,x]"]
LAUGHS += [f"b{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(LAUGHS),
        "sharing:\n" + "- a\n" * 200_000,
        "a: &a [*a]",
        "[" * 500_000,
        "a: '" + "x" * 500_000,
    ],
    ids=["aliases of aliases", "a long list", "an alias of itself", "deep", "never closed"],
)
def test_a_file_that_would_take_minutes_is_refused_at_once(text: str) -> None:
    with pytest.raises(InputError) as refused:
        configfile.parse(text.encode(), "a.yaml")
    assert str(refused.value).startswith("a.yaml: ")
    assert len(str(refused.value)) < 300


def test_aliases_of_a_person_are_taken() -> None:
    text = "flags: {plugin: &p {deviceIDStrategy: uuid}}\nsharing: {timeSlicing: {resources: []}}\nx: *p"
    assert configfile.parse(text.encode(), "a.yaml").values == {"flags.plugin.deviceIDStrategy": "uuid"}


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_KEYS = st.sampled_from(["version", "flags", "resources", "sharing", "imex", "migplugin", "plugin", "x"])


@given(st.dictionaries(_KEYS, _VALUES, max_size=4) | st.text(max_size=60))
def test_any_file_is_a_document_or_one_clear_line(content: object) -> None:
    import yaml  # noqa: PLC0415

    text = content if isinstance(content, str) else yaml.safe_dump(content)
    try:
        configfile.parse(text.encode(), "config.yaml")
    except InputError as exc:
        assert str(exc)  # noqa: PT017
        assert "\n" not in str(exc)  # noqa: PT017


def test_a_mig_index_is_not_read_as_a_number_to_base_sixty() -> None:
    text = b"sharing: {timeSlicing: {resources: [{devices: [1:0, 0:1, 12:30:45, 2]}]}}"
    (resource,) = configfile.parse(text, "file").sharing["timeSlicing"]["resources"]
    assert resource["devices"] == ["1:0", "0:1", "12:30:45", 2]
