"""Flag over environment over default, Go's spellings, and one clear line for what is wrong."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migplugin.errors import InputError
from migplugin.settings import TABLE, markdown_table, parse_bool, parse_duration, resolve


def test_defaults_stand_where_nothing_is_given() -> None:
    settings = resolve({}, {})
    assert settings.mig_strategy == "mixed"
    assert settings.fail_on_init_error is None
    assert settings.device_list_strategy == ("envvar",)
    assert settings.kubelet_socket == Path("/var/lib/kubelet/device-plugins/kubelet.sock")
    assert settings.removal_delay == 60.0
    assert settings.poll_interval is None


def test_a_flag_outranks_the_environment_which_outranks_the_default() -> None:
    env = {"MIG_STRATEGY": "single"}
    assert resolve({}, env).mig_strategy == "single"
    assert resolve({"mig_strategy": "none"}, env).mig_strategy == "none"


def test_a_variable_that_is_set_to_nothing_is_not_set() -> None:
    assert resolve({}, {"MIG_STRATEGY": "", "PASS_DEVICE_SPECS": ""}).mig_strategy == "mixed"


def test_the_first_of_two_variables_wins() -> None:
    env = {"CONTAINER_DRIVER_ROOT": "/b", "DRIVER_ROOT_CTR_PATH": "/a"}
    assert resolve({}, env).driver_root_ctr_path == Path("/a")


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (
            {"mig_strategy": "mixd"},
            {},
            "--mig-strategy=mixd: expected none, single or mixed; did you mean mixed?",
        ),
        ({}, {"MIG_STRATEGY": "all"}, "MIG_STRATEGY=all: expected none, single or mixed"),
        ({"pass_device_specs": "yes"}, {}, "--pass-device-specs=yes: expected true or false"),
        (
            {"removal_delay": "3 s"},
            {},
            '--removal-delay=3 s: expected a duration such as "30s", "500ms" or "1m30s"',
        ),
        ({"poll_interval": "1ms"}, {}, "--poll-interval=1ms: expected at least 100ms"),
        ({"proc_root": "proc"}, {}, "--proc-root=proc: expected an absolute path"),
        (
            {"device_list_strategy": "envvar,volume-mount"},
            {},
            "--device-list-strategy=envvar,volume-mount: 'volume-mount': expected one or more of "
            "envvar, volume-mounts, cdi-annotations or cdi-cri; did you mean volume-mounts?",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_source_and_what_is_allowed(
    flags: dict[str, str], env: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolve(flags, env)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3s", 3.0), ("500ms", 0.5), ("1m30s", 90.0), ("1.5h", 5400.0), ("7", 7.0), ("0", 0.0), (".5s", 0.5)],
)
def test_durations_are_read_as_go_writes_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "3x", "-1s", "1s3", "1e9h", "5 ", "3s5s5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.text(max_size=30))
def test_any_text_is_a_value_or_a_clear_error(text: str) -> None:
    for setting in TABLE:
        with contextlib.suppress(ValueError):
            setting.parse(text)


def test_booleans_have_go_s_spellings() -> None:
    assert [parse_bool(text) for text in ("1", "t", "T", "true", "TRUE", "True")] == [True] * 6
    assert [parse_bool(text) for text in ("0", "f", "F", "false", "FALSE", "False")] == [False] * 6


def test_every_setting_has_a_row_in_the_readme_s_table() -> None:
    table = markdown_table()
    assert all(f"`{setting.flag}`" in table for setting in TABLE if setting.has_flag)
    assert all(f"`{name}`" in table for setting in TABLE for name in setting.env)
