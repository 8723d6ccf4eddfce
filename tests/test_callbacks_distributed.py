"""The online loop on two processes: the work is shared, rows and policy are the same, and neither waits in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import run_module_forked


pytestmark = pytest.mark.slow


def run_twice(module, tmp_path):
    """What each of two processes of `module` wrote."""
    run_module_forked(module, tmp_path)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    return run_twice("tests.online_worker", tmp_path_factory.mktemp("online"))


def test_two_processes_share_the_rollouts_and_agree(online):
    first, second = online
    for key in ("revision", "rows", "trajectories", "steps", "pass@1", "loaded"):
        assert first[key] == second[key]
    assert len(set(first["loaded"])) == 3 and first["loaded"][-1] == first["revision"]
    assert first["rows"] == [5, 5] and first["trajectories"] == [20, 20]
    assert first["steps"] == 6  # five pairs, one per process and step: three steps an iteration
    for share in ("rolled_out", "evaluated"):
        assert first[share] and second[share] and not set(first[share]) & set(second[share])
    assert len(first["rolled_out"]) + len(second["rolled_out"]) == 40


def test_two_processes_roll_out_beside_the_training_with_the_policy_that_they_name(online):
    """The worker itself asserts that both went on at once, and what an engine over a copy has sampled."""
    first, second = (each["ahead"] for each in online)
    for key in ("revision", "started", "lags", "said"):
        assert first[key] == second[key]
    started = first["started"]
    assert len({*started, first["revision"]}) == 4 and first["lags"] == [0, 1, 1]
    policies = zip(("0/current", "1/current", "2/current", "2/previous"), (0, 0, 1, 0), strict=True)
    expected = [[place, started[policy]] for place, policy in policies]
    assert first["said"] == first["sampled"] == second["sampled"] == expected
    assert not set(first["rolled_out"]) & set(second["rolled_out"])
    assert len(first["rolled_out"]) + len(second["rolled_out"]) == 60
    assert first["checkpoints"] == 1  # what engines had to load earlier is gone


def test_two_processes_resume_from_one_step_and_fail_together(tmp_path):
    present = ["same/checkpoint-2", "same/checkpoint-4", "machine0/one/checkpoint-4"]
    present += ["machine0/disjoint/checkpoint-4", "machine1/disjoint/checkpoint-2"]
    present += ["machine0/ahead/checkpoint-2", "machine0/ahead/checkpoint-4", "machine1/ahead/checkpoint-2"]
    for path in present:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "trainer_state.json").write_text("{}")
    main, other = run_twice("tests.resume_worker", tmp_path)

    assert main["same"] == other["same"] == str(tmp_path / "same" / "checkpoint-4")
    assert main["empty"] is other["empty"] is None
    for name, here, there in (("only on one", "checkpoint-4", "none"), ("disjoint", "checkpoint-4", "checkpoint-2")):
        kind, message = main[name]
        assert kind == "ValueError" and other[name] == main[name]
        folder = {"only on one": "one"}.get(name, name)
        assert f"process 0 finds {here} in {tmp_path / 'machine0' / folder}" in message
        assert f"process 1 finds {there} in {tmp_path / 'machine1' / folder}" in message
        assert "same `output_dir`" in message
    assert [Path(found["one ahead"]).parts[-3:] for found in (main, other)] == [
        ("machine0", "ahead", "checkpoint-2"), ("machine1", "ahead", "checkpoint-2")
    ]  # fmt: skip
    for found in (main, other):
        assert found["named"][0] == "ValueError" and "as process 1 sees it" in found["named"][1]

    assert main["result"] == other["result"] == {"rank": 0}
    assert main["disk full"] == ["OSError", "[Errno 28] No space left on device: 'report.json'"]
    assert main["mistake"] == other["mistake"] == ["ValueError", "other settings"]
    for name, message in (("disk full", "No space left"), ("journal", "a shard is damaged"), ("unpicklable", "held")):
        assert other[name][0] == "RuntimeError" and message in other[name][1] and "main process" in other[name][1]
    assert main["after"] == other["after"] == "still in step"
