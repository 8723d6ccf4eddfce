"""Recorded solutions of real models: conversion, masks on every row, and their programs in our interpreter.

The data are not part of the project. They are looked for at `../shared/data` from the project's root, or where the
environment variable `TRL_MULTITURN_DATA` points.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.support import byte_tokenizer, render_actions
from trl_multiturn.data import tokenize_trajectory
from trl_multiturn.tools import Sandbox, SandboxConfig
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import AUTHORS_FILTERS, apply_filters, math_reward
from trl_multiturn.verify.filters import observation_text, turns


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import prepare_real_data as real  # noqa: E402


DATA = real.default_data_dir()
PAIRS = DATA.parent / "cases" / "answer_pairs.jsonl"
needs_data = pytest.mark.skipif(
    not (DATA / real.GSM8K_FILE).exists(),
    reason=f"no recorded solutions in {DATA}: put them there or set TRL_MULTITURN_DATA",
)


@pytest.fixture(scope="module")
def gsm8k():
    return real.read_trajectories(DATA, "gsm8k")


@pytest.fixture(scope="module")
def tora():
    return real.read_trajectories(DATA, "tora")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer("qwen2_5")


def call(expression):
    return [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}]


def test_a_calculator_mark_becomes_a_call_and_its_answer():
    assert real.calculator_turns("He has 16 - 3 = <<16-3=13>>13 eggs.\nTimes 2 is $<<13*2=26.0=26>>26\nA: 26") == [
        {"role": "assistant", "content": "He has 16 - 3 =", "tool_calls": call("16-3")},
        {"role": "tool", "name": "calculator", "content": "13"},
        {"role": "assistant", "content": "13 eggs.\nTimes 2 is $", "tool_calls": call("13*2=26.0")},
        {"role": "tool", "name": "calculator", "content": "26"},
        {"role": "assistant", "content": "26\nA: 26"},
    ]
    # a sample that was cut off inside a mark: the mark is the model's text
    assert real.calculator_turns("So 3/440 = <<3/440=0.0068") == [
        {"role": "assistant", "content": "So 3/440 = <<3/440=0.0068"}
    ]


def test_quotients_of_gold_solutions_look_like_recorded_ones():
    solution = "So 8/2 = <<8/2=4>>4, 1/8 = <<1/8=0.125>>0.125, <<2*2=4>>4.\nA: 4"
    turns = real._as_recorded(real.calculator_turns(solution))
    assert [turn["content"] for turn in turns if turn["role"] == "tool"] == ["4.0", "0.125", "4"]


def test_a_program_becomes_a_turn_its_output_and_the_answer():
    text = "Let us see.\n```python\nprint(1)\n```\n```output\n1\n```\nIt is $\\boxed{1}$."
    messages = real.program_turns(text)
    assert messages == [
        {"role": "assistant", "content": "Let us see.\n```python\nprint(1)\n```"},
        {"role": "user", "content": "```output\n1\n```"},
        {"role": "assistant", "content": "It is $\\boxed{1}$."},
    ]
    assert real.program_of(messages[0]) == "print(1)"
    unfinished = "```python\nprint(1)\n```"
    assert real.program_turns(unfinished) == [{"role": "assistant", "content": unfinished}]


def test_pairs_share_the_prompt_and_use_no_trajectory_twice():
    def row(question, label, model):
        return {"prompt": [question], "completion": [model], "label": label, "question_id": question, "model": model}

    rows = [row(1, True, "a"), row(1, False, "b"), row(1, True, "c"), row(1, False, "d"), row(1, False, "e")]
    pairs = real.pair([*rows, row(2, True, "a"), row(3, False, "a")])
    assert [(pair["chosen"], pair["rejected"], pair["prompt"]) for pair in pairs] == [
        (["a"], ["b"], [1]),
        (["c"], ["d"], [1]),
    ]


def test_absent_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        real.read_trajectories(tmp_path, "gsm8k")
    with pytest.raises(ValueError, match="gsm8k, tora, gsm8k_train"):
        real.read_trajectories(tmp_path, "math")


@needs_data
def test_every_recorded_solution_becomes_a_row(gsm8k, tora):
    assert (len(gsm8k), sum(row["label"] for row in gsm8k)) == (2640, 1008)
    assert len(tora) == 1320
    assert len(real.pair(gsm8k)) == 466 and len(real.pair(tora)) == 81
    # nothing of the model's words is lost: what was stripped are blanks at the turns' borders, and the marks
    with open(DATA / real.GSM8K_FILE, encoding="utf-8") as file:
        solutions = [json.loads(line)[model]["solution"] for line in file for model in real.GSM8K_MODELS]
    for row, solution in zip(gsm8k, solutions, strict=True):
        rebuilt = ""
        for message in row["completion"]:
            rebuilt += message["content"] if message["role"] == "assistant" else f"={message['content']}>>"
            for tool_call in message.get("tool_calls", ()):
                rebuilt += f"<<{tool_call['function']['arguments']['expression']}"
        assert "".join(rebuilt.split()) == "".join(solution.split())


@needs_data
def test_gold_solutions_get_company_that_is_wrong_in_one_place(gsm8k):
    rows = real.read_trajectories(DATA, "gsm8k_train")
    gold = {row["question_id"]: row for row in rows if row["label"]}
    assert len(gold) == 7473 and len(rows) - len(gold) > 10_000
    questions = {row["prompt"][0]["content"] for row in gsm8k}
    for row in rows:
        right = gold[row["question_id"]]
        assert row["prompt"] == right["prompt"] and row["prompt"][0]["content"] not in questions
        answers = [r["completion"][-1]["content"].rpartition("A: ")[2] for r in (row, right)]
        assert row["label"] == (answers[0] == answers[1])


@needs_data
def test_the_recorded_verdicts_are_ours(tora):
    """`label` comes from the recorded prediction; the reward function reads the trajectory itself."""
    with open(DATA / real.TORA_FILES["tora-70b"], encoding="utf-8") as file:
        golds = {record["idx"]: record["gt"] for record in map(json.loads, file)}
    rewards = math_reward(
        [row["prompt"] for row in tora],
        [row["completion"] for row in tora],
        answer=[golds[row["question_id"]] for row in tora],
    )
    disagree = [(row, reward) for row, reward in zip(tora, rewards, strict=True) if reward != row["reward"]]
    # these end without a box, where ToRA's grader took the last number in the text or in the output
    assert len(disagree) == 6
    assert all(reward == 0.0 and "boxed" not in row["completion"][-1]["content"] for row, reward in disagree)


@needs_data
def test_gold_solutions_in_prose_are_read_and_the_recorded_verdicts_are_ours():
    """`ground_truth` ends in a line `A: 18`; the solutions have verdicts of their own."""
    questions, completions, golds, recorded = [], [], [], []
    with open(DATA / real.GSM8K_FILE, encoding="utf-8") as file:
        for record in map(json.loads, file):
            for told in filter(lambda value: isinstance(value, dict), record.values()):
                text, _, answer = told["solution"].rpartition("A:")
                questions.append(record["question"])
                completions.append(rf"{text}\boxed{{{answer.strip()}}}" if text else told["solution"])
                golds.append(record["ground_truth"])
                recorded.append(float(told["is_correct"]))
    assert Counter(recorded) == {1.0: 1008, 0.0: 1632}
    assert math_reward(questions, completions, answer=golds) == recorded


@pytest.mark.slow
@pytest.mark.skipif(not PAIRS.exists(), reason=f"no pairs in {PAIRS}")
def test_pairs_of_answers_that_others_decided():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    rewards = math_reward(
        [None] * len(pairs),
        [rf"\boxed{{{pair['answer']}}}" for pair in pairs],
        answer=[pair["gold"] for pair in pairs],
    )
    outcomes = Counter((pair["equal"], reward) for pair, reward in zip(pairs, rewards, strict=True))
    assert outcomes[False, 1.0] <= 0.02 * len(pairs)
    assert outcomes[True, 0.0] <= 0.04 * len(pairs)
    assert outcomes[True, None] + outcomes[False, None] <= 0.05 * len(pairs)


def sampled_text(message):
    """What a policy with Qwen2.5's template samples in a turn, written out by hand."""
    text = message["content"]
    for tool_call in message.get("tool_calls", ()):
        function = json.dumps(tool_call["function"], ensure_ascii=False)
        text += "\n" * bool(text) + f"<tool_call>\n{function}\n</tool_call>"
    return text + "<|im_end|>"


def check_masks(rows, tokenizer):
    """The mask covers exactly the model's own words, turn by turn, on every row."""
    for row in rows:
        tokens = tokenize_trajectory(tokenizer, row["prompt"], row["completion"], tools=row.get("tools"))
        own = [sampled_text(message) for message in row["completion"] if message["role"] == "assistant"]
        assert render_actions(tokenizer, tokens) == own, (row["question_id"], row["model"])


@needs_data
def test_masks_on_gsm8k_solutions(gsm8k, tokenizer):
    check_masks(gsm8k[::20], tokenizer)


@needs_data
@pytest.mark.slow
def test_masks_on_every_gsm8k_solution(gsm8k, tokenizer):
    check_masks(gsm8k, tokenizer)


@needs_data
def test_masks_on_every_tora_trajectory(tora, tokenizer):
    check_masks(tora, tokenizer)


def why_different(recorded, result):
    """A word on why two outputs differ."""
    if recorded.split(":")[0] == result.output.split(":")[0] and result.status == "error":
        return "the same error in other words"
    return f"status {result.status}"


@needs_data
@pytest.mark.slow
def test_recorded_programs_in_our_interpreter(tora, capsys):
    """Re-executes every ToRA program. Documented bound: 1,310 of the 1,318 outputs that were recorded agree.

    Measured: 1,317. The remaining one is a SyntaxError, after which our message also names the line.
    """
    executed = [row for row in tora if len(row["completion"]) == 3]
    outcomes, differences = Counter(), []
    with Sandbox(SandboxConfig(isolation="best_effort")) as sandbox:
        for row in executed:
            recorded = observation_text(row["completion"][1]).strip()
            session = sandbox.open()
            try:
                result = session.run(real.program_of(row["completion"][0]))
            finally:
                session.close()
            outcome = "agree" if result.output.strip() == recorded else why_different(recorded, result)
            outcomes[outcome] += 1
            if outcome != "agree":
                differences.append(f"  {row['model']} {row['question_id']}: {recorded!r} against {result.output!r}")
    with capsys.disabled():
        print(f"\n{len(executed)} recorded programs in our interpreter: {dict(outcomes)}", *differences, sep="\n")
    assert outcomes.total() == 1318
    assert outcomes["agree"] >= 1310


@needs_data
def test_turns_are_read_by_the_filters(tora, gsm8k):
    """Both dialects, as real models wrote them, are turns with observations to the filters."""

    def trajectory(row):
        verdict = Verdict.CORRECT if row["label"] else Verdict.INCORRECT
        return Trajectory(row["prompt"], row["completion"], [1], [2], [1], StopReason.ANSWERED, verdict=verdict)

    # of 1,320: two that never ran their program, and one that answered right after a SyntaxError
    assert apply_filters(map(trajectory, tora), AUTHORS_FILTERS).dropped == {
        "no_tool_call": 2,
        "error_before_answer": 1,
    }
    long = max(gsm8k, key=lambda row: len(row["completion"]))
    assert len(turns(trajectory(long))) == (len(long["completion"]) + 1) // 2


@needs_data
def test_the_script_writes_rows_that_load(tmp_path):
    program = [
        sys.executable,
        str(EXAMPLES / "prepare_real_data.py"),
        "--data_dir",
        str(DATA),
        "--output",
        str(tmp_path),
    ]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert "gsm8k_preference.jsonl: 466 rows" in printed and "tora_trajectory.jsonl: 1320 rows" in printed
    for name, rows in (("gsm8k", real.read_preferences(DATA, "gsm8k")), ("tora", real.read_preferences(DATA, "tora"))):
        path = str(tmp_path / f"{name}_preference.jsonl")
        loaded = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == rows == real.to_dataset(rows).to_list()
