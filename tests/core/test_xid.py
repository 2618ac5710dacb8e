"""NVIDIA's catalogue, as it is asked."""

import pytest

from migplugin.core.xid import IGNORED_BY_NVIDIA, TABLE, Checks, parse_checks, xid


def test_the_table_has_every_code_once_and_says_of_each_whom_it_concerns() -> None:
    assert len(TABLE) == 177
    assert {x.scope for x in TABLE.values()} == {"process", "instance", "gpu", "link"}
    assert all(x.mnemonic for x in TABLE.values() if x.code != 999)
    assert all(x.kind for x in TABLE.values())


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 68, 121, 137])
def test_what_an_application_did_or_nobody_need_mend_leaves_healthy(code: int) -> None:
    assert not xid(code).makes_sick


@pytest.mark.parametrize("code", [48, 64, 74, 79, 94, 95, 109, 119, 154, 162, 174, 999, 5000])
def test_every_other_action_and_none_makes_sick(code: int) -> None:
    assert xid(code).makes_sick


def test_only_94_is_contained() -> None:
    assert [x.code for x in TABLE.values() if x.is_contained] == [94]


@pytest.mark.parametrize("code", [74, 79, 95, 109, 119, 154, 999])
def test_a_fault_of_the_gpu_or_of_a_link_concerns_the_whole_gpu(code: int) -> None:
    assert xid(code).concerns_gpu


@pytest.mark.parametrize("code", [48, 94, 1, 5000])
def test_other_faults_and_unknown_ones_concern_whom_the_event_names(code: int) -> None:
    assert not xid(code).concerns_gpu


def test_where_nvidias_plugin_disagrees() -> None:
    differing = [x for x in TABLE.values() if x.differs_from_nvidia]
    assert [x.code for x in differing if x.makes_sick] == [109]
    assert sum(not x.makes_sick for x in differing) == 64


def test_a_code_tells_itself() -> None:
    assert str(xid(79)) == "XID 79 ROBUST_CHANNEL_GPU_HAS_FALLEN_OFF_THE_BUS (RESTART_BM)"
    assert str(xid(5000)) == "XID 5000 (not in the table)"


def sick(disable: str, enable: str) -> frozenset[int]:
    checks, unknown = parse_checks(disable, enable)
    assert not unknown
    return frozenset(code for code in (0, 13, 48, 79, 109, 5000) if checks.make_sick(xid(code)))


def test_checks_are_disabled_and_enabled_as_nvidia_documents() -> None:
    assert sick("", "") == {0, 48, 79, 109, 5000}
    assert sick("48, 79", "") == {0, 109, 5000}
    assert sick("all", "") == sick("xids", "") == sick(" ALL ,13", "") == set()
    assert sick("", "13") == {0, 13, 48, 79, 109, 5000}
    assert sick("", "all") == sick("79", "xids") == {0, 13, 48, 79, 109, 5000}
    assert sick("79", "79") == {0, 48, 79, 109, 5000}


def test_nvidias_two_defects_are_not_copied() -> None:
    assert sick("all", "48") == {48}
    assert sick("0", "") == {48, 79, 109, 5000}
    assert sick("all", "0") == {0}


def test_only_all_puts_off_the_signs_that_are_no_xids() -> None:
    assert not parse_checks("all", "")[0].signs
    assert not parse_checks("all", "48")[0].signs
    assert parse_checks("all", "all")[0].signs
    assert parse_checks("xids", "")[0].signs


def test_words_that_mean_nothing_are_said_and_skipped() -> None:
    checks, unknown = parse_checks("48,zehn,-1", "²")
    assert unknown == ("zehn", "-1", "²")
    assert checks == Checks(disabled=frozenset({48}))


def test_nvidias_list_is_as_they_wrote_it() -> None:
    assert frozenset({13, 31, 43, 45, 68, 109}) == IGNORED_BY_NVIDIA
