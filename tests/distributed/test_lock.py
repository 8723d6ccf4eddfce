"""One run, one folder: who holds the lock is told, and whoever died holds nothing."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, replace

import pytest

from trl_multiturn.distributed.lock import FolderInUseError, FolderLock, Holder


def leave_behind(path, **changes):
    path.write_text(json.dumps(asdict(replace(Holder.here(), **changes))))


def test_a_folder_in_use_is_refused_with_host_process_and_start(tmp_path):
    first, second = FolderLock(tmp_path / "run" / "lock"), FolderLock(tmp_path / "run" / "lock")
    first.acquire()
    me = Holder.here()
    with pytest.raises(FolderInUseError) as raised:
        second.acquire()
    for part in (str(tmp_path / "run"), f"process {os.getpid()} on {me.host}", "started 2", "another `output_dir`"):
        assert part in str(raised.value)
    first.release()
    second.acquire()
    second.release()
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize(
    "changes",
    [dict(process=2**30, process_start="7"), dict(process_start="7"), dict(machine="gone", host="elsewhere")],
    ids=["dead process", "number used again", "silent machine"],
)
def test_what_a_dead_process_left_is_taken_over(tmp_path, caplog, changes):
    path = tmp_path / "lock"
    leave_behind(path, **changes)
    lock = FolderLock(path, silence_seconds=0.05)
    lock.acquire()
    assert "taken over" in caplog.text
    assert json.loads(path.read_text())["process"] == os.getpid()
    lock.release()


def test_a_lock_that_was_never_written_to_its_end_is_taken_over(tmp_path):
    (tmp_path / "lock").write_text('{"host": "a')
    lock = FolderLock(tmp_path / "lock")
    lock.acquire()
    lock.release()


def test_a_machine_that_shows_life_keeps_the_lock(tmp_path):
    path, over = tmp_path / "lock", threading.Event()
    leave_behind(path, machine="another", host="elsewhere", process=7)

    def show_life():
        beat = 0
        while not over.wait(0.05):
            beat += 1
            partial = tmp_path / "partial"
            leave_behind(partial, machine="another", host="elsewhere", process=7, beat=beat)
            os.replace(partial, path)

    thread = threading.Thread(target=show_life)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="process 7 on elsewhere"):
            FolderLock(path, silence_seconds=20).acquire()
    finally:
        over.set()
        thread.join()


def test_a_lock_that_was_taken_over_is_not_given_back_by_its_former_holder(tmp_path):
    lock = FolderLock(tmp_path / "lock")
    lock.acquire()
    leave_behind(tmp_path / "lock", process=7)
    lock.release()
    assert json.loads((tmp_path / "lock").read_text())["process"] == 7
