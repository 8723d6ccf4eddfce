"""The journal: what finished is never lost, never repeated, and comes out as the same bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

import trl_multiturn.journal.index as index_module
import trl_multiturn.journal.sync as sync_module
from tests.support import assistant, byte_tokenizer, user
from trl_multiturn import StopReason, Trajectory, Verdict
from trl_multiturn.rollout import (
    Journal,
    JournalError,
    RolloutConfig,
    ScriptedEngine,
    generate_trajectories,
    read_dataset,
)
from trl_multiturn.tools import ToolFailure, current_rollout


SCOPE = "0/current"


def trajectory(prompt=0, sample=0, text="x", **changes):
    values = dict(
        prompt=[user("q")],
        completion=[assistant(text)],
        prompt_ids=[1, 2],
        completion_ids=[3, 4, 5],
        action_mask=[1, 1, 0],
        logps=[-0.1, -1e-17, 0.0],
        stop_reason=StopReason.ANSWERED,
        info={"prompt_index": prompt, "sample_index": sample, "timing": {"seconds": random.random()}},
    )
    return Trajectory(**{**values, **changes})


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_what_was_written_is_read_by_place(tmp_path):
    written = [trajectory(1, 1), trajectory(0, 1), trajectory(1, 0), trajectory(0, 0, "\ud800 \N{SNOWMAN}\n")]
    with Journal(tmp_path / "new") as journal:
        for each in written:
            journal.append(SCOPE, each)
    assert list(Journal(tmp_path / "new").read()) == [written[i] for i in (3, 1, 2, 0)]


def test_scopes_are_kept_apart_and_in_numerical_order(tmp_path):
    with Journal(tmp_path) as journal:
        for scope in ("10/current", "2/previous", "2/current"):
            journal.append(scope, trajectory(text=scope))
    texts = [each.completion[0]["content"] for each in Journal(tmp_path).read()]
    assert texts == ["2/current", "2/previous", "10/current"]
    assert [each.completion[0]["content"] for each in Journal(tmp_path).read("2/previous")] == ["2/previous"]


def test_prompt_by_prompt_all_scopes_come_together(tmp_path):
    """Whatever the order in which they finished, and over several shards."""
    places = [
        (scope, prompt, sample) for scope in ("0/current", "0/previous") for prompt in (0, 2, 10) for sample in (0, 1)
    ]
    shuffled = random.Random(0).sample(places, len(places))
    for part in (shuffled[:5], shuffled[5:]):
        with Journal(tmp_path) as journal:
            for scope, prompt, sample in part:
                journal.append(scope, trajectory(prompt, sample, scope))
    groups = list(Journal(tmp_path).read_by_prompt())
    found = [[(t.completion[0]["content"], t.info["prompt_index"], t.info["sample_index"]) for t in g] for g in groups]
    assert found == [[place for place in places if place[1] == prompt] for prompt in (0, 2, 10)]
    assert list(Journal(tmp_path / "none").read_by_prompt()) == list(Journal(tmp_path / "none").read()) == []


def test_the_last_trajectory_and_the_last_verdict_after_it_count(tmp_path):
    first, second = trajectory(0, text="machine failed"), trajectory(0, text="tried again")
    with Journal(tmp_path) as journal:
        journal.judge(SCOPE, trajectory(1).judged(Verdict.CORRECT, 1.0))  # its trajectory was torn
        journal.append(SCOPE, first)
        journal.judge(SCOPE, first.judged(Verdict.INCORRECT, 0.0))
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, second)
    (kept,) = Journal(tmp_path).read()
    assert kept == second and kept.verdict is Verdict.UNDECIDED
    with Journal(tmp_path) as journal:
        journal.judge(SCOPE, second.judged(Verdict.INCORRECT, 0.0))
        journal.judge(SCOPE, second.judged(Verdict.CORRECT, 1.0))
    ((kept,),) = Journal(tmp_path).read_by_prompt()
    assert (kept.completion, kept.verdict, kept.reward) == (second.completion, Verdict.CORRECT, 1.0)


def test_shards_are_many_and_open_files_few(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_MOST_OPEN_SHARDS", 2)
    for i in range(5):
        with Journal(tmp_path) as journal:
            for prompt in range(3):
                journal.append(SCOPE, trajectory(prompt, i, f"{prompt} {i}"))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    texts = []
    for group in Journal(tmp_path).read_by_prompt():
        texts.append([each.completion[0]["content"] for each in group])
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert texts == [[f"{prompt} {i}" for i in range(5)] for prompt in range(3)]


def test_the_order_of_a_hundred_thousand_places_takes_24_bytes_each():
    index, generator = index_module.LineIndex(), random.Random(0)
    places = [(prompt, sample) for prompt in range(10_000) for sample in range(10)]
    generator.shuffle(places)
    for position, (prompt, sample) in enumerate(places):
        index.add(SCOPE, prompt, sample, 2 * position, is_verdict=False)
        index.add(SCOPE, prompt, sample, 2 * position + 1, is_verdict=True)
    found = index.latest()
    assert found.nbytes == 24 * len(places)
    assert [places[position // 2] for position in found[:, 1].tolist()] == sorted(places)
    assert (found[:, 2] == found[:, 1] + 1).all()
    assert found[:, 0].tolist() == [prompt for prompt in range(10_000) for _ in range(10)]


def test_verdicts_are_lines_of_their_own(tmp_path):
    first, second = trajectory(0), trajectory(1)
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, first)
        journal.append(SCOPE, second)
        judged = Trajectory.from_dict({**first.to_dict(), "info": {**first.info, "rewards": {"math": 1.0}}})
        journal.judge(SCOPE, judged.judged(Verdict.CORRECT, 1.0))
    judged, unjudged = Journal(tmp_path).read()
    assert (judged.verdict, judged.reward, judged.info["rewards"]) == (Verdict.CORRECT, 1.0, {"math": 1.0})
    assert unjudged == second


def test_a_line_survives_the_moment_it_is_written(tmp_path):
    journal = Journal(tmp_path)
    journal.append(SCOPE, trajectory())
    assert len(list(Journal(tmp_path).read())) == 1  # another reader, while the first still has the shard open


def test_a_torn_last_line_is_forgotten_and_the_next_run_goes_on(tmp_path, caplog):
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, trajectory(0))
        journal.append(SCOPE, trajectory(1))
    (shard,) = tmp_path.glob("shard-*")
    whole = shard.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole)):
        shard.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING):
            assert [each.info["prompt_index"] for each in Journal(tmp_path).read()] == [0]
    assert "torn line" in caplog.text
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, trajectory(1))
    assert [each.info["prompt_index"] for each in Journal(tmp_path).read()] == [0, 1]


@pytest.mark.parametrize("damage", [lambda b: bytes([b ^ 1]), lambda b: b"", lambda b: b"\n"])
def test_damage_in_the_middle_is_refused(tmp_path, damage):
    with Journal(tmp_path) as journal:
        for i in range(3):
            journal.append(SCOPE, trajectory(i))
    (shard,) = tmp_path.glob("shard-*")
    content = shard.read_bytes()
    at = content.index(b"\n") + 200
    shard.write_bytes(content[:at] + damage(content[at]) + content[at + 1 :])
    before = shard.read_bytes()
    with pytest.raises(JournalError, match=r"Line 2 of .*shard-000000.jsonl is damaged.*move it away"):
        list(Journal(tmp_path).read())
    assert shard.read_bytes() == before


def test_a_shard_that_somebody_copied_is_read_and_not_written_to(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, trajectory(0))
    for name in ("shard-000004 (copy).jsonl", "shard-old.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / "shard-000000.jsonl").read_bytes())
    with Journal(tmp_path) as journal:
        journal.append(SCOPE, trajectory(1))
    assert (tmp_path / "shard-000005.jsonl").exists()
    assert [each.info["prompt_index"] for each in Journal(tmp_path).read()] == [0, 1]


def test_lines_written_after_shards_were_moved_away_come_last(tmp_path):
    for i in range(5):
        with Journal(tmp_path) as journal:
            journal.append(SCOPE, trajectory(i))
    for number in (1, 2, 3):
        (tmp_path / f"shard-{number:06d}.jsonl").unlink()
    with Journal(tmp_path) as journal:
        journal.judge(SCOPE, trajectory(4).judged(Verdict.CORRECT, 1.0))
    assert [each.verdict for each in Journal(tmp_path).read()] == [Verdict.UNDECIDED, Verdict.CORRECT]


def test_other_settings_are_refused_and_named(tmp_path):
    Journal(tmp_path).claim(SCOPE, {"temperature": 1.0, "tools": {"python": "1"}})
    Journal(tmp_path).claim(SCOPE, {"tools": {"python": "1"}, "temperature": 1.0})
    Journal(tmp_path).claim("1/current", {"temperature": 0.7})
    with pytest.raises(JournalError, match="`temperature`: 1.0 before, 0.7 now. Use the earlier settings"):
        Journal(tmp_path).claim(SCOPE, {"temperature": 0.7, "tools": {"python": "1"}})


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for write in (lambda j: j.append(SCOPE, trajectory()), lambda j: j.claim(SCOPE, {}), lambda j: j.write_dataset()):
        with pytest.raises(JournalError, match="cannot be used.*start again"):
            write(Journal(tmp_path / "file" / "journal"))
    assert (tmp_path / "file").read_text() == "not a folder"


def fill_the_disk(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    journal, written = Journal(folder), 0
    try:
        while True:
            journal.append(SCOPE, trajectory(written, text="y" * 700))
            written += 1
    except JournalError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(SCOPE, trajectory(written))  # space was made: the same process may go on
    Path(folder, "report.json").write_text(json.dumps([message, written]))


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    finish(fill_the_disk, tmp_path)
    message, written = json.loads((tmp_path / "report.json").read_text())
    assert "File too large" in message and "Free space" in message
    kept = [each.info["prompt_index"] for each in Journal(tmp_path).read()]
    assert kept == list(range(written + 1)) and written > 2


def test_two_processes_write_to_shards_of_their_own(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    for i in range(3):
        first.append(SCOPE, trajectory(i, 0))
        second.append(SCOPE, trajectory(i, 1))
    assert len(list(tmp_path.glob("shard-*"))) == 2
    assert len(list(Journal(tmp_path).read())) == 6


def test_the_dataset_holds_the_trajectories_but_not_the_clock(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None, "b": [1, {"c": "d"}]}}}
    each = trajectory(logps=None, completion=[{"role": "assistant", "content": "", "tool_calls": [call]}])
    for folder in ("a", "b"):
        journal = Journal(tmp_path / folder)
        for item in [each, trajectory(1)] if folder == "a" else [trajectory(1), each]:
            journal.append(SCOPE, item)
        journal.write_dataset()
    assert digest(tmp_path / "a/trajectories.parquet") == digest(tmp_path / "b/trajectories.parquet")
    first, second = read_dataset(tmp_path / "a/trajectories.parquet")
    assert first.completion == each.completion and first.logps is None
    assert second.logps == [-0.1, -1e-17, 0.0] and second.info == {"prompt_index": 1, "sample_index": 0}


# With the loop

TOKENIZER = byte_tokenizer("qwen2_5")
ROWS = [{"prompt": [user(f"{i}?")], "answer": str(i)} for i in range(4)]


def lookup(key: str) -> str:
    """
    Looks up.

    Args:
        key: Key.
    """
    if lookup.broken:
        raise ToolFailure("no network")
    return key


lookup.broken = False


def roll(folder, engine=None, rows=ROWS, **kwargs):
    settings = {"num_generations": 2, "dialect": "fenced", "tool_retries": 0, **kwargs.pop("settings", {})}
    engine = engine or ScriptedEngine(["```lookup\na\n```", "\\boxed{1}"], TOKENIZER)
    config = RolloutConfig(**settings)
    return engine, generate_trajectories(
        rows, engine, [lookup], config, journal=folder, progress=False, **{"reward_funcs": reward, **kwargs}
    )


def reward(completions, answer, **columns):
    return [float(a == "1") for a in answer]


def test_a_second_run_samples_nothing_again(tmp_path):
    engine, first = roll(tmp_path)
    assert len(engine.calls) == 16
    engine, second = roll(tmp_path)
    assert engine.calls == [] and second == first
    engine, more = roll(tmp_path, settings={"num_generations": 3})
    assert len(engine.calls) == 8 and len(more) == 12 and [t for t in more if t.info["sample_index"] < 2] == first


def test_without_collecting_the_journal_has_it_all(tmp_path):
    _, collected = roll(tmp_path / "a")
    _, nothing = roll(tmp_path / "b", collect=False)
    assert nothing == []
    assert [t.completion_ids for t in Journal(tmp_path / "b").read()] == [t.completion_ids for t in collected]
    assert [t.verdict for t in Journal(tmp_path / "b").read()] == [t.verdict for t in collected]
    with pytest.raises(ValueError, match="needs a `journal`"):
        generate_trajectories(ROWS, ScriptedEngine([], TOKENIZER), collect=False)


def test_what_finished_before_a_crash_is_kept_and_judged_later(tmp_path):
    class Crash(Exception):
        pass

    def script(prompt_text, sampling, session):
        if session == "0/current/2/0":
            raise Crash
        return "\\boxed{1}"

    with pytest.raises(Crash):
        roll(
            tmp_path,
            ScriptedEngine(script, TOKENIZER),
            settings={"max_concurrent_trajectories": 1},
            reward_funcs=reward,
        )
    kept = list(Journal(tmp_path).read())
    assert [(t.info["prompt_index"], t.info["sample_index"]) for t in kept] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    engine, trajectories = roll(tmp_path, ScriptedEngine(["\\boxed{1}"], TOKENIZER))
    assert {call.session for call in engine.calls} == {f"0/current/{i}/{j}" for i in (2, 3) for j in (0, 1)}
    assert [t.verdict is Verdict.CORRECT for t in trajectories] == [False] * 2 + [True] * 2 + [False] * 4
    assert [t.verdict for t in Journal(tmp_path).read()] == [t.verdict for t in trajectories]


def test_the_machines_failures_are_tried_again(tmp_path):
    lookup.broken = True
    try:
        _, trajectories = roll(tmp_path)
    finally:
        lookup.broken = False
    assert {t.stop_reason for t in trajectories} == {StopReason.TOOL_FAILED}
    _, trajectories = roll(tmp_path)
    assert {t.stop_reason for t in trajectories} == {StopReason.ANSWERED}
    assert [t.stop_reason for t in Journal(tmp_path).read()] == [StopReason.ANSWERED] * 8


def test_other_settings_or_prompts_are_refused(tmp_path):
    roll(tmp_path)
    with pytest.raises(JournalError, match="`sampler`.*another folder"):
        roll(tmp_path, settings={"temperature": 0.5})
    with pytest.raises(JournalError, match="Prompt 0 is not the one"):
        roll(tmp_path, rows=ROWS[::-1])


# Killed at any moment


def roll_dice(sides: int) -> str:
    """
    Rolls dice.

    Args:
        sides: Sides.
    """
    return " ".join(str(random.Random(current_rollout().seed).randrange(sides)) for _ in range(300))


def play(prompt_text, sampling, session):
    turns = 1 + int(session.split("/")[2]) % 3
    if prompt_text.count("<tool_response>") == turns:
        return f"It is {sampling.seed % 7}."
    call = {"name": "roll_dice", "arguments": {"sides": sampling.seed % 100 + 1}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def in_text(completions, answer, **columns):
    return [float(a in completion[-1]["content"]) for completion, a in zip(completions, answer, strict=True)]


def whole_run(folder):
    """12 prompts, 4 trajectories each, one to three calls; then the dataset, and the number of sampled turns."""
    rows = [{"prompt": [user(f"Question {i}?")], "answer": str(i)} for i in range(12)]
    settings = dict(num_generations=4, dialect="native", max_concurrent_trajectories=5, max_trajectory_tokens=8192)
    engine = ScriptedEngine(play, TOKENIZER, latency_seconds=0.002)
    journal = Journal(folder)
    config = RolloutConfig(**settings)
    generate_trajectories(rows, engine, [roll_dice], config, reward_funcs=in_text, journal=journal, progress=False)
    journal.write_dataset()
    Path(folder, "sampled_turns").write_text(str(len(engine.calls)))


def start(target, folder):
    process = multiprocessing.get_context("fork").Process(target=target, args=(str(folder),))
    process.start()
    return process


def finish(target, folder):
    process = start(target, folder)
    process.join()
    assert process.exitcode == 0


def start_and_kill(folder, after_lines):
    """Starts the run and kills it with SIGKILL once the journal holds about `after_lines` more lines."""
    before = count_lines(folder)
    process = start(whole_run, folder)
    while process.is_alive() and count_lines(folder) < before + after_lines:
        time.sleep(0.0005)  # the run needs the core, too
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def count_lines(folder):
    return sum(shard.read_bytes().count(b"\n") for shard in Path(folder).glob("shard-*"))


def check_kills(tmp_path, kills):
    finish(whole_run, tmp_path / "undisturbed")
    expected = digest(tmp_path / "undisturbed/trajectories.parquet")
    assert len(read_dataset(tmp_path / "undisturbed/trajectories.parquet")) == 48
    for attempt in range(20):
        folder = tmp_path / f"killed_{attempt}"
        killed = [start_and_kill(folder, after) for after in kills]
        if any(killed):
            break  # or else the run was over each time before this process looked: begin again
    else:
        pytest.fail("the runs were over before they were killed")
    kept = len(list(Journal(folder).read()))
    finish(whole_run, folder)
    assert kept > 0
    sampled = [int((run / "sampled_turns").read_text()) for run in (tmp_path / "undisturbed", folder)]
    assert sampled[1] < sampled[0], "the resumed run repeated what had finished"
    assert digest(folder / "trajectories.parquet") == expected
    lines = [json.loads(line) for shard in folder.glob("shard-*") for line in shard.read_bytes().split(b"\n")[:-1]]
    places = [(line["prompt"], line["sample"]) for line in lines if line["kind"] == "trajectory"]
    assert len(places) == len(set(places)) == 48, "a trajectory that had finished was rolled out twice"


def test_a_run_killed_and_started_again_writes_the_same_bytes(tmp_path):
    check_kills(tmp_path, kills=[7])


@pytest.mark.slow
def test_a_run_killed_at_20_random_points_writes_the_same_bytes(tmp_path):
    generator = random.Random(0)
    for number in range(5):
        check_kills(tmp_path / str(number), kills=[generator.randrange(1, 30) for _ in range(4)])


def test_a_slow_disk_holds_up_no_rollout_and_its_error_is_told(tmp_path, monkeypatch):
    begun, released, synced = threading.Event(), threading.Event(), []

    def slow(descriptor):
        begun.set()
        assert released.wait(20)
        synced.append(descriptor)
        raise OSError(5, "Input/output error")

    journal = Journal(tmp_path, sync_seconds=1e-9)
    journal.append(SCOPE, trajectory(0))
    journal.sync()
    with monkeypatch.context() as patch:
        patch.setattr(sync_module.os, "fsync", slow)
        journal.append(SCOPE, trajectory(1))
        assert begun.wait(20)
        journal.append(SCOPE, trajectory(2))  # while the disk is busy with the line before
        assert not synced
        released.set()
        with pytest.raises(JournalError, match="Input/output error"):
            journal.sync()
    assert len(synced) >= 2  # what was written meanwhile was synced as well
    journal.close()
    assert [each.info["prompt_index"] for each in Journal(tmp_path).read()] == [0, 1, 2]


def test_the_last_line_of_a_burst_is_synced_though_none_follows(tmp_path, monkeypatch):
    sizes, synced = [], threading.Condition()
    fsync = os.fsync

    def watched(descriptor):
        size = os.fstat(descriptor).st_size
        fsync(descriptor)
        with synced:
            sizes.append(size)
            synced.notify()

    def is_durable():
        """Whether all that was written is on the disk before long, though nothing is asked of the journal."""
        with synced:
            return synced.wait_for(lambda: sizes and sizes[-1] == journal._size, 20)

    monkeypatch.setattr(sync_module.os, "fsync", watched)
    journal = Journal(tmp_path, sync_seconds=0.2)
    for i in range(5):
        journal.append(SCOPE, trajectory(i))
    assert is_durable()
    count = len(sizes)
    journal.append(SCOPE, trajectory(5))  # the next burst, when the thread of the first has ended or not
    assert is_durable() and len(sizes) > count
    journal.close()


def test_every_line_can_be_synced_before_its_trajectory_counts(tmp_path, monkeypatch):
    synced = []
    with Journal(tmp_path, sync_seconds=0) as journal:
        journal.append(SCOPE, trajectory(0))
        monkeypatch.setattr(sync_module.os, "fsync", synced.append)
        for i in range(1, 4):
            journal.append(SCOPE, trajectory(i))
            assert len(synced) == i


def test_all_is_on_the_disk_when_the_rollouts_return(tmp_path, monkeypatch):
    """However long the journal may wait with a sync."""
    journal = Journal(tmp_path, sync_seconds=3600)
    sizes = []
    monkeypatch.setattr(sync_module.os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    roll(journal)
    assert sizes[-1] == sum(shard.stat().st_size for shard in tmp_path.glob("shard-*")) > 0
    journal.close()


def test_closing_on_a_broken_disk_leaves_nothing_open(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    journal = Journal(tmp_path)
    journal.append(SCOPE, trajectory(0))
    opened = journal._descriptor
    with monkeypatch.context() as patch:
        patch.setattr(sync_module.os, "fsync", broken)
        with pytest.raises(JournalError, match="Input/output error"):
            journal.close()
    with pytest.raises(OSError):
        os.fstat(opened)
    journal.append(SCOPE, trajectory(1))  # in another shard
    journal.close()
    assert [each.info["prompt_index"] for each in Journal(tmp_path).read()] == [0, 1]
