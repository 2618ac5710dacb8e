"""One state, many processes: nothing is lost, nothing is half, and a dead writer leaves no mess."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from migplugin.errors import SimulatorError
from migplugin.sim import files, spec
from migplugin.sim import store as store_module
from migplugin.sim.model import Node
from migplugin.sim.store import Store
from migplugin.sim.watch import Watch
from tests.sim.driver_fixtures import directory


def _made(state: Path, text: str = "1xa100-40gb=") -> Store:
    store = Store(state)
    store.create(spec.build(text))
    return store


def _python(code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)


def _matches_its_state(store: Store) -> bool:
    wanted = files.plan(store.read())
    return files.present(store.state_dir, wanted) == wanted


CARVE = """
import sys
from migplugin.sim.store import Store
store = Store(sys.argv[1])
for _ in range(25):
    with store.change() as node:
        gi = node.gpus[int(sys.argv[2])].create("1g.5gb")
    with store.change() as node:
        node.gpus[int(sys.argv[2])].destroy(gi.id)
with store.change() as node:
    node.gpus[int(sys.argv[2])].create("1g.5gb")
"""


def test_two_processes_that_write_at_once_lose_no_change_and_no_event() -> None:
    with directory() as state:
        store = _made(state, "2xa100-40gb=")
        writers = [_python(CARVE, str(state), gpu) for gpu in ("0", "1")]
        assert [writer.wait(30) for writer in writers] == [0, 0]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.close()
        node = store.read()
        assert [len(gpu.instances) for gpu in node.gpus] == [1, 1]
        assert [event.seq for event in store.events_after(0)] == list(range(1, 2 * (25 * 4 + 2) + 1))
        assert _matches_its_state(store)


def test_reader_sees_each_change_of_another_process_however_fast_they_follow() -> None:
    """The cache is keyed by inode, time and size, and inode numbers come back at once."""
    with directory() as state:
        reader, writer = _made(state), Store(state)
        for _ in range(300):
            with writer.change() as node:
                serial = node.next_serial()
            assert reader.read().record.last_serial == serial


def test_reading_an_unchanged_state_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with directory() as state:
        store = _made(state)
        first = store.read()
        monkeypatch.setattr(store, "_decode", None)
        assert store.read() is first


def test_a_change_that_raises_is_dropped() -> None:
    with directory() as state:
        store = _made(state)
        with pytest.raises(ZeroDivisionError), store.change() as node:
            node.gpus[len(node.gpus[0].create("1g.5gb").compute) // 0]
        assert not store.read().gpus[0].instances
        assert store.events_after(0) == []


def test_a_change_of_nothing_wakes_nobody() -> None:
    with directory() as state:
        store = _made(state)
        with store.change() as node:
            node.gpus[0].create("1g.5gb")
        before = (state / "state.json").stat()
        with store.change():
            pass
        assert (state / "state.json").stat() == before


DIE = """
import os, signal, sys
from migplugin.sim import files, store
from migplugin.sim.store import Store
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
where = sys.argv[2]
if where == "files": files._make = die
if where == "state": Store._write = die
if where == "journal": Store._append = die
with Store(sys.argv[1]).change() as node:
    node.gpus[0].create("1g.5gb")
"""


@pytest.mark.parametrize(("where", "there"), [("files", 0), ("state", 0), ("journal", 1)])
def test_killed_writer_leaves_the_old_state_or_the_new_one_and_the_next_one_mends(
    where: str, there: int
) -> None:
    with directory() as state:
        store = _made(state)
        killed = _python(DIE, str(state), where)
        assert killed.wait(20) == -signal.SIGKILL
        assert killed.stdout is not None
        killed.stdout.close()
        assert len(store.read().gpus[0].instances) == there
        assert len(store.events_after(0)) == 2 * there
        with store.change() as node:
            node.gpus[0].create("2g.10gb")
        assert [event.seq for event in store.events_after(0)] == list(range(1, 2 * there + 3))
        assert _matches_its_state(store)


def test_opening_derives_the_files_again_after_a_killed_writer() -> None:
    with directory() as state:
        store = _made(state)
        killed = _python(DIE, str(state), "state")
        killed.wait(20)
        assert killed.stdout is not None
        killed.stdout.close()
        assert not _matches_its_state(store)
        store.refresh_files()
        assert _matches_its_state(store)


def test_torn_last_line_of_the_journal_is_cut_and_its_event_is_not_lost() -> None:
    with directory() as state:
        store = _made(state)
        with store.change() as node:
            node.gpus[0].create("1g.5gb")
        journal = state / "events.jsonl"
        os.truncate(journal, journal.stat().st_size - 7)
        assert [event.seq for event in store.events_after(0)] == [1, 2]
        with store.change() as node:
            node.gpus[0].xid(79)
        assert [json.loads(line)["seq"] for line in journal.read_text().splitlines()] == [1, 2, 3]


def test_journal_is_bounded_and_keeps_the_youngest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "JOURNAL_LIMIT", 4096)
    with directory() as state:
        store = _made(state)
        for _ in range(20):
            with store.change() as node:
                for _ in range(10):
                    node.gpus[0].xid(31)
        assert (state / "events.jsonl").stat().st_size <= 4096
        seqs = [event.seq for event in store.events_after(0)]
        assert seqs == list(range(seqs[0], 201))
        assert len(seqs) >= 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("", "is damaged"),
        ('{"version": 99}', "has format 99, this program reads 1"),
        ('{"version": 1, "gpus": 3}', "is damaged"),
    ],
)
def test_damaged_state_gives_one_clear_error_and_can_be_replaced(content: str, words: str) -> None:
    with directory() as state:
        store = _made(state)
        (state / "state.json").write_text(content)
        for act in (store.read, store.refresh_files, lambda: store.change().__enter__()):
            with pytest.raises(SimulatorError, match="init --replace SPEC") as error:
                act()
            assert words in str(error.value)
            assert str(state) in str(error.value)
        store.create(spec.build("1xa30"), replace=True)
        assert store.read().gpus[0].product.cli_name == "a30"


def test_missing_state_says_how_to_make_one() -> None:
    with directory() as state:
        for path in (state, state / "nowhere"):
            store = Store(path)
            for act in (store.read, store.refresh_files, lambda s=store: s.change().__enter__()):
                with pytest.raises(SimulatorError, match="make one with: migplugin sim --state"):
                    act()


def test_a_driver_is_not_replaced_unless_asked_and_its_numbers_go_on() -> None:
    with directory() as state:
        store = _made(state, "1xa100-40gb=1g.5gb")
        with pytest.raises(SimulatorError, match="already holds"):
            store.create(spec.build("1xa30"))
        old = store.read()
        store.create(spec.build("1xa100-40gb=1g.5gb"), replace=True)
        new = store.read()
        assert new.record.last_seq > old.record.last_seq
        assert new.gpus[0].instances[0].serial > old.record.last_serial


def test_watch_wakes_for_a_change_and_not_for_a_look() -> None:
    with directory() as state:
        store = _made(state)
        watch = Watch(state)
        store.read()
        store.refresh_files()
        assert not watch.wait(0)
        with store.change() as node:
            node.gpus[0].xid(79)
        assert watch.wait(5)
        assert not watch.wait(0)
        watch.close()


def test_watch_ends_when_the_directory_goes_away() -> None:
    with directory() as state:
        inner = state / "driver"
        store = _made(inner)
        watch = Watch(inner)
        remover = threading.Thread(target=_remove, args=(store,))
        remover.start()
        assert watch.wait(10)
        remover.join()
        watch.close()


def _remove(store: Store) -> None:
    subprocess.run(["rm", "-r", str(store.state_dir)], check=True)


def test_state_file_is_text_that_a_person_can_read() -> None:
    with directory() as state:
        _made(state, "1xa100-40gb=1g.5gb")
        found = json.loads((state / "state.json").read_text())
        assert found["version"] == 1
        assert found["gpus"][0]["instances"][0]["compute"][0]["uuid"].startswith("MIG-")


def test_node_says_which_gpus_there_are() -> None:
    node: Node = spec.build("2xa30")
    with pytest.raises(SimulatorError, match="no GPU 2; this node has GPUs 0 to 1"):
        node.gpu(2)
