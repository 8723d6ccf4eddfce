"""A few completions per iteration: which ones, in the terminal, and in the real trackers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import assistant, call, needs, result, user
from tests.viewer.runs import HOSTILE
from trl_multiturn import StopReason, Trajectory, Verdict
from trl_multiturn.completions import CompletionPicker, completions_table, log_completions
from trl_multiturn.completions.trackers import _block, _messages


def trajectory(name, reward, verdict=None, said="It is 3."):
    verdict = verdict or (Verdict.CORRECT if reward > 0.5 else Verdict.INCORRECT)
    return Trajectory([user("What is 1+2?")], [assistant(said)], [1], [2], [1], StopReason.ANSWERED,
                      reward=reward, verdict=verdict, info={"trajectory_id": name})  # fmt: skip


def picked(count, *seen):
    picker = CompletionPicker(count)
    for each in seen:
        picker.see(*each)
    return [(pick.reason, pick.trajectory.info["trajectory_id"]) for pick in picker.picks()]


SEEN = [
    (trajectory("good", 0.8), None),
    (trajectory("best", 1.0), None),
    (trajectory("bad", 0.2), None),
    (trajectory("worst", -1.0), None),
    (trajectory("copy", 1.0), "duplicate"),
    (trajectory("copy2", 1.0), "duplicate"),
    (trajectory("long", 0.0), "over_length"),
    (trajectory("open", None, Verdict.UNDECIDED), "undecided"),
]


def test_the_best_the_worst_each_reason_and_then_more():
    found = picked(7, *SEEN)
    assert found[:2] == [("best", "best"), ("worst", "worst")]
    assert found[2][0] == "dropped: duplicate" and found[3:5] == [
        ("dropped: over_length", "long"),
        ("undecided", "open"),
    ]
    assert found[5:] == [("best", "good"), ("worst", "bad")]
    assert picked(2, *SEEN) == found[:2]


def test_picks_do_not_depend_on_the_order_of_arrival_but_for_ties_between_reasons():
    equal = [(trajectory(str(i), 1.0), None) for i in range(50)] + [
        (trajectory(str(-i), 1.0), "duplicate") for i in range(50)
    ]
    assert picked(6, *equal) == picked(6, *reversed(equal))
    assert picked(1, *equal) != [("best", "0")]  # a lot, not the first


def test_an_evaluation_has_nothing_dropped():
    picker = CompletionPicker(5).see_all([trajectory("open", None, Verdict.UNDECIDED), trajectory("best", 1.0)])
    assert [pick.reason for pick in picker.picks()] == ["best", "undecided"]
    with pytest.raises(ValueError, match="`num_completions_to_print` must be at least 1"):
        CompletionPicker(0)


def rendered(*trajectories):
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(completions_table(CompletionPicker(5).see_all(trajectories).picks(), "Iteration 1"))
    return capture.get()


def test_the_table_shows_prompt_completion_and_verdict():
    worked = Trajectory([user("What is 1+2?")], [call(1, 2), result("3"), assistant("It is 3.")], [1], [2], [1],
                        StopReason.ANSWERED, reward=1.0, verdict=Verdict.CORRECT)  # fmt: skip
    text = rendered(worked)
    for part in (
        "Iteration 1",
        "best",
        "What is 1+2?",
        'add({"a": 1, "b": 2})',
        "tool: 3",
        "assistant: It is 3.",
        "reward 1",
    ):
        assert part in text


def test_nothing_that_a_model_writes_reaches_the_terminal_as_a_command():
    text = rendered(trajectory("x", 1.0, said=f"{HOSTILE} [bold red]no mark-up[/] \x07\x9b2J"))
    assert not set("\x1b\x07\x9b\u202e\u200b") & set(text)
    flat = "".join(line.split("│")[3].strip() for line in text.splitlines() if line.count("│") == 5)
    assert "[bold red]no mark-up[/]" in flat and "\\x1b[31mred" in flat and "\\u202edesrever" in flat


def test_a_block_of_markdown_is_fenced_longer_than_what_it_holds():
    assert _block("```python\n1\n```") == "````text\n```python\n1\n```\n````"


def test_results_carry_the_ids_of_their_calls():
    two = call(1, 2)
    two["tool_calls"] = two["tool_calls"] * 2
    messages = _messages(Trajectory([user("?")], [two, result("3"), result("4")], [1], [2], [1], StopReason.ENDED))
    ids = [each["id"] for each in messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in messages[2:]] == ids and len(set(ids)) == 2
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}


def test_a_tracker_that_fails_stops_nothing(caplog):
    class Broken:
        class tb_writer:
            @staticmethod
            def add_text(*args):
                raise OSError("disk full")

    picks = CompletionPicker(1).see_all([trajectory("best", 1.0)]).picks()
    log_completions(picks, "Iteration 1", callbacks=[Broken()])
    assert "Completions were not logged to tensorboard: OSError: disk full" in caplog.text


RUN = """
import json, sys
from pathlib import Path
import trackio, wandb
from tests.test_callbacks import make_run, problems, TOKENIZER
from trl_multiturn import MultiTurnDPOConfig, PythonTool
from trackio.sqlite_storage import SQLiteStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

def config(**settings):
    return MultiTurnDPOConfig(**{**settings, "report_to": ["trackio", "tensorboard", "wandb"], "project": "loop"})

folder = Path(sys.argv[1])
with PythonTool() as tool:
    shown = {"log_completions": True, "num_completions_to_print": 3}
    trainer, generator, _ = make_run(folder, tool, config=config, eval_prompts=problems(2, 50), **shown)
    trainer.train()
wandb.finish()
traces = [trace for run in SQLiteStorage.get_runs("loop") for trace in SQLiteStorage.get_traces("loop", run)]
events = EventAccumulator(str(next(folder.rglob("events.out.tfevents*"))), size_guidance={"tensors": 0}).Reload()
texts = {tag: [t.tensor_proto.string_val[0].decode() for t in events.Tensors(f"{tag}/text_summary")]
         for tag in ("completions", "eval_completions")}
tables = [json.loads(path.read_text()) for path in sorted(folder.parent.rglob("*.table.json"))]
print("RESULT " + json.dumps({"traces": traces, "texts": texts, "tables": tables}))
"""


@pytest.mark.slow
@pytest.mark.trackers
def test_the_loop_logs_to_the_real_trackers_offline(tmp_path):
    """Two iterations and three evaluations, in trackio, TensorBoard and W&B, with no network."""
    for module in ("trackio", "tensorboard", "wandb"):
        needs(module)
    environment = {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run")], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[1], env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("Rollouts of iteration") == 2 and done.stdout.count("Held-out prompts") == 3
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])

    rollouts = [trace for trace in found["traces"] if trace["key"] == "completions"]
    assert len(rollouts) == 2 * 3 and len(found["traces"]) == 2 * 3 + 3 * 2
    reasons = {trace["metadata"]["reason"] for trace in rollouts}
    assert {"best", "worst"} <= reasons
    best = next(trace for trace in rollouts if trace["metadata"]["reason"] == "best")
    assert best["metadata"]["verdict"] == "correct" and best["metadata"]["reward"] == 1.0
    assert "print(" in json.dumps(best["messages"]) and "\\\\boxed" in json.dumps(best["messages"])

    assert len(found["texts"]["completions"]) == 2 and len(found["texts"]["eval_completions"]) == 3
    assert all("#### best: correct, reward 1" in text for text in found["texts"]["completions"])
    tables = [table for table in found["tables"] if "reason" in table["columns"]]
    assert len(tables) == 5 and all(row[1] in {*reasons, "best", "worst"} for table in tables for row in table["data"])
