"""The asyncio helpers: what follows, what coalesces, what hangs and what watches."""

import asyncio
import threading
from pathlib import Path

import pytest

from migplugin.aio import Cell, DirectoryWatch, Mailbox, OwnerThread, first_of, keep_running


async def test_what_is_amended_wakes_nobody_and_is_there_for_who_looks() -> None:
    cell = Cell(1)
    reader = asyncio.ensure_future(cell.after(cell.version))
    await asyncio.sleep(0)
    cell.amend(2)
    await asyncio.sleep(0)
    assert (reader.done(), cell.value) == (False, 2)
    cell.set(3)
    assert await reader == (cell.version, 3)


async def test_a_cell_wakes_its_readers_once_for_each_difference() -> None:
    cell = Cell(1)
    waiting = asyncio.ensure_future(cell.after(cell.version))
    await asyncio.sleep(0)
    assert not cell.set(1)
    assert not waiting.done()
    assert cell.set(2)
    assert await waiting == (1, 2)
    assert await cell.after(0) == (1, 2)


async def test_a_slow_reader_of_a_cell_sees_the_latest_value_only() -> None:
    cell = Cell("a")
    for value in "bcd":
        cell.set(value)
    assert await cell.after(0) == (3, "d")


def test_a_mailbox_merges_by_key_and_is_bounded_by_its_limit() -> None:
    box: Mailbox[str, int] = Mailbox(lambda old, new: old + new, limit=2)
    for key, value in (("a", 1), ("b", 1), ("a", 1), ("c", 1)):
        box.put(key, value)
    assert box.take() == (2, 1)
    assert box.dropped == 1
    assert box.take() == ()


async def test_an_owner_thread_answers_and_raises_like_the_function() -> None:
    owner = OwnerThread("test")
    assert await owner.call(lambda: threading.current_thread().name, 5.0) == "test"
    with pytest.raises(ZeroDivisionError):
        await owner.call(lambda: 1 // 0, 5.0)
    owner.close()


async def test_a_call_that_hangs_is_given_up_and_the_next_waits_for_it_within_its_own_deadline() -> None:
    owner, release = OwnerThread("test"), threading.Event()

    def is_stuck() -> bool:
        return owner.stuck

    with pytest.raises(TimeoutError):
        await owner.call(lambda: release.wait(10), 0.05)
    assert is_stuck()
    with pytest.raises(TimeoutError):
        await owner.call(lambda: True, 0.05)
    release.set()
    assert await owner.call(lambda: "again", 5.0) == "again"
    assert not is_stuck()
    owner.close()


async def test_calls_of_several_callers_take_turns() -> None:
    owner, running, most = OwnerThread("test"), [0], [0]

    def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        running[0] -= 1

    await asyncio.gather(*(owner.call(work, 5.0) for _ in range(50)))
    assert most == [1]
    owner.close()


async def test_first_of_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    await first_of(asyncio.Event().wait(), asyncio.sleep(0), timeout=5.0)
    await first_of(asyncio.Event().wait(), timeout=0.01)
    assert asyncio.all_tasks() == before


async def test_a_loop_that_fails_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    runs = []

    async def run() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("a bug")

    await asyncio.wait_for(keep_running("test", run), 5.0)
    assert len(runs) == 2
    assert "unexpected failure" in caplog.text


async def test_a_directory_watch_wakes_for_a_new_name_and_for_a_new_directory(tmp_path: Path) -> None:
    woken = asyncio.Event()
    directory = tmp_path / "not-there-yet"
    watch = asyncio.ensure_future(DirectoryWatch(directory, woken.set).run())
    await asyncio.wait_for(woken.wait(), 5.0)
    for name in ("one", "two"):
        directory.mkdir(exist_ok=True)
        woken.clear()
        (directory / name).touch()
        await asyncio.wait_for(woken.wait(), 5.0)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


async def test_without_an_inotify_instance_the_directory_is_looked_at_once_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_instance_left(*_: object) -> None:
        raise OSError(24, "inotify instance limit reached")

    from watchdog.observers.inotify_c import InotifyFD  # noqa: PLC0415

    monkeypatch.setattr(InotifyFD, "_instance", None)
    monkeypatch.setattr(InotifyFD, "_create_inotify_fd", no_instance_left)
    woken = asyncio.Event()
    watch = asyncio.ensure_future(DirectoryWatch(tmp_path, woken.set).run())
    for _ in range(3):
        await asyncio.wait_for(woken.wait(), 5.0)
        woken.clear()
    assert caplog.text.count("no inotify watch, looking once a second instead") == 1
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
