"""Files that outlive a power failure: what a name stands for is on the disk before the name is."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat

import pytest
import torch
from datasets import Dataset

from tests.rows.test_pairing import fresh
from trl_multiturn import UnpairedConfig
from trl_multiturn.distributed import durable
from trl_multiturn.distributed.durable import put_in_place, write_whole
from trl_multiturn.online.report import IterationReport
from trl_multiturn.rows.row_files import save_rows, write_rows
from trl_multiturn.rows.selection import select_by_prompt
from trl_multiturn.trainer.loop.policy_weights import save_policy_weights


@pytest.fixture
def disk(monkeypatch):
    """What happens to the disk, in order: `("sync", path)` and `("rename", path)`."""
    happened = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        happened.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", synced)
    monkeypatch.setattr(durable.os, "replace", renamed)
    return happened


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc")


@needs_proc
def test_a_file_is_synced_then_named_then_its_name_is_synced(tmp_path, disk):
    write_whole(tmp_path / "new" / "a.json", b"1")
    (_, partial), *rest = disk
    assert partial.startswith(str(tmp_path / "new" / "a.json.")) and disk[0][0] == "sync"
    assert rest == [("rename", str(tmp_path / "new" / "a.json")), ("sync", str(tmp_path / "new"))]
    write_whole(tmp_path / "new" / "a.json", b"22")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_bytes() == b"22"
    assert stat.S_IMODE((tmp_path / "new" / "a.json").stat().st_mode) & 0o200  # an ordinary file's rights


@needs_proc
def test_a_folder_is_synced_with_all_that_it_holds(tmp_path, disk):
    (tmp_path / "partial" / "deep").mkdir(parents=True)
    (tmp_path / "partial" / "one").write_text("1")
    (tmp_path / "partial" / "deep" / "two").write_text("2")
    (tmp_path / "partial" / "latest").symlink_to(tmp_path / "nowhere")
    put_in_place(tmp_path / "partial", tmp_path / "whole")
    renamed = disk.index(("rename", str(tmp_path / "whole")))
    partial = str(tmp_path / "partial")
    expected = [partial, f"{partial}/deep", f"{partial}/deep/two", f"{partial}/one"]
    assert sorted(path for _, path in disk[:renamed]) == expected
    assert disk[renamed + 1 :] == [("sync", str(tmp_path))]


@needs_proc
def test_rows_and_reports_go_this_way(tmp_path, disk):
    """A report that says `ready` is written after the rows; a power failure must not leave it alone."""
    save_rows(Dataset.from_dict({"a": [1]}), tmp_path / "rows")
    IterationReport(0).save(tmp_path)
    renames = [path for what, path in disk if what == "rename"]
    assert renames == [str(tmp_path / "rows"), str(tmp_path / "report.json")]
    before = {path for _, path in disk[: disk.index(("rename", renames[0]))]}
    assert {os.path.basename(path) for path in before} >= {"data-00000-of-00001.arrow", "state.json", "rows.partial"}


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", refuse_folders)
    write_whole(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match=r"/a cannot be written: No space left on device.*same command") as caught:
        write_whole(tmp_path / "a", b"2")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == b"1"  # what was there stays
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def write_rows_of(folder):
    save_rows(Dataset.from_dict({"a": list(range(5000))}), folder / "rows")


def write_found_rows(folder):
    trajectories = [fresh(0, float(sample % 2)) for sample in range(400)]
    selections = (part for _, part in select_by_prompt([trajectories], UnpairedConfig("all", deduplicate=False)))
    write_rows(selections, folder / "rows", "unpaired")


def write_snapshot(folder):
    save_policy_weights(torch.nn.Linear(100, 100), folder / "policy.safetensors")


def write_report(folder):
    IterationReport(0, settings={"many": "x" * 9000}).save(folder)


@pytest.fixture
def small_disk():
    """Files end at 4 KiB, as on a disk that is full by then."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [write_rows_of, write_found_rows, write_snapshot, write_report])
def test_a_full_disk_is_named_with_what_could_not_be_written(tmp_path, small_disk, write):
    (tmp_path / "before").write_text("is there")
    with pytest.raises(
        OSError, match=r"(rows|rows.found|policy.safetensors|report.json) cannot be written: .*File too"
    ):
        write(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"before"} in ({"rows"}, {"policy.safetensors"}, {"report.json"})


def test_an_error_of_a_network_is_told_as_it_is(tmp_path):
    def judged():
        yield from ()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "judge.example refused")

    with pytest.raises(ConnectionRefusedError, match="^.Errno 111. judge.example refused$"):
        write_rows(judged(), tmp_path / "rows", "preference")


def test_an_error_of_a_file_is_told_once(tmp_path):
    with pytest.raises(OSError, match="b cannot be written: No space") as caught, durable.writing(tmp_path / "a"):
        with durable.writing(tmp_path / "b"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value).count("cannot be written") == 1
