"""The offline examples: what they measure, and one run of each as a user would start it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from tests import launch


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from embedded import offline_values  # noqa: E402


def test_a_problem_is_held_out_with_all_its_rows():
    rows = Dataset.from_dict({"question_id": [i // 3 for i in range(30)], "row": list(range(30))})
    train, test = offline_values.hold_out(rows, 0.2, seed=1)
    assert len(test) == 6 and len(train) == 24
    assert not set(train["question_id"]) & set(test["question_id"])


def test_each_problem_is_held_out_once():
    rows = Dataset.from_dict({"question_id": [i // 3 for i in range(33)]})
    splits = offline_values.folds(rows, 3)
    for train, test in splits:
        assert len(train) + len(test) == 33
        assert not set(train["question_id"]) & set(test["question_id"])
    assert sorted(question for _, test in splits for question in set(test["question_id"])) == list(range(11))


def test_finished_folds_are_pooled(tmp_path):
    groups = [[(0.5, True), (0.25, False)], [(1.0, False)]]
    offline_values.save_groups(groups[:1], tmp_path / "fold_0" / "values.jsonl")
    offline_values.save_groups(groups[1:], tmp_path / "fold_3" / "values.jsonl")
    assert offline_values.load_groups(tmp_path) == groups


def test_balanced_rows_say_nothing_about_a_problem():
    labels = {0: "++--", 1: "+++-", 2: "++++", 3: "----", 4: "-+"}
    rows = [
        {"question_id": q, "label": sign == "+", "row": f"{q}{i}"} for q in labels for i, sign in enumerate(labels[q])
    ]
    kept = offline_values.balance(Dataset.from_list(rows))
    counts = {(q, side): 0 for q in labels for side in (True, False)}
    for row in kept:
        counts[row["question_id"], row["label"]] += 1
    assert [counts[q, True] for q in labels] == [counts[q, False] for q in labels] == [2, 1, 0, 0, 1]
    assert len(set(kept["row"])) == len(kept)
    assert len(set(offline_values.balance(Dataset.from_list(rows), 2)["question_id"])) == 2


def test_auc_by_hand():
    # correct: 3, 1; incorrect: 2, 1.  3 beats both, 1 ties with 1 and loses to 2: 2.5 of 4
    group = [(3.0, True), (1.0, True), (2.0, False), (1.0, False)]
    assert offline_values._wins(group) == (2.5, 4)
    assert offline_values._pooled_auc([group]) == 0.625
    # one problem is easy and one hard, within each the values are upside down
    groups = [[(9.0, True), (9.5, False)], [(1.0, True), (1.5, False)]]
    assert offline_values._pooled_auc(groups) == 0.25
    assert offline_values._auc_within(groups) == 0.0
    assert offline_values._auc_within([[(1.0, True)], [(0.0, False)]]) == 0.5  # nothing to compare


class Values:
    """Stands where a trainer stands; the value of a sequence is its last token."""

    kind = "full"
    model = None
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    seen: list = []

    @property
    def value_model(self):
        return self

    def standing_on(self, policy):
        return self

    def score(self, sequences):
        self.seen.extend(sequences)
        return [float(ids[-1]) for ids in sequences]


def test_the_last_state_is_the_one_before_the_final_end_of_turn():
    rows = Dataset.from_list(
        [
            {
                "prompt_ids": [1],
                "completion_ids": [7 + i, 2, 3],
                "action_mask": [1, 1, 0],
                "label": i > 4,
                "question_id": i,
            }
            for i in range(10)
        ]
    )
    groups = offline_values.last_values(Values(), rows)
    assert Values.seen[0] == [1, 7]
    assert offline_values.outcome_auc(groups, resamples=50)["auc"] == (1.0, 1.0, 1.0)


def test_numbers_and_what_wraps_a_call_are_tokens():
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "16-3"}}}
    turns = [
        {"role": "assistant", "content": "She has 16 - 3 =", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "13"},
    ]
    conversation = [{"role": "user", "content": "She has 16 eggs."}, *turns]
    tokenizer = offline_values._learn_tokenizer([conversation] * 20)
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    pieces = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert pieces.count("16") == 3 and '\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "' in pieces


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of right and wrong answers to eight problems."""
    rows = []
    for i in range(16):
        right = i % 2 == 0
        turns = [
            {"role": "assistant", "content": f"I add {i} and {i}."},
            {"role": "user", "content": str(2 * i)},
            {"role": "assistant", "content": f"It is {2 * i if right else 3 * i}."},
        ]
        question = {"role": "user", "content": f"What is {i // 2} plus {i}?"}
        row = {"prompt": [question], "completion": turns, "label": right, "question_id": i // 2, "tools": []}
        rows.append(json.dumps(row))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def run(script, *arguments, command=False):
    """By the command of a user, or forked, which spares the imports."""
    script = f"examples/{script}.py"
    if command:
        done = launch.run([sys.executable, script, *map(str, arguments)])
    else:
        done = launch.run_forked(script, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--bf16", "False"]
SMALL += ["--gradient_checkpointing", "False", "--report_to", "none", "--save_strategy", "no"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oreo", "oreo --compare_on", "dqo"])
def test_the_script_runs_on_rows_from_a_file(tmp_path, rows, name):
    name, *compare = name.split()
    arguments = ["--dataset_name", rows, *SMALL, "--value_model", "head", "--held_out", "0.5"]
    text = run(name, *arguments, *compare, *([rows] if compare else []),
               "--output_dir", tmp_path / "out", command=not compare)  # fmt: skip
    assert f"auc_within_problem on {8 if compare else 4} held-out problems" in text
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "value_model" / "value_head.safetensors").exists()
    assert "hsl(" in (tmp_path / "out" / "values.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_folds_go_on_from_a_pretrained_policy_and_a_value_model(tmp_path, rows):
    """The commands of `oreo.py`'s docstring, in small."""
    policy, first, out = tmp_path / "policy", tmp_path / "first", tmp_path / "out"
    size = ["--hidden_size", "16", "--num_layers", "1", "--vocabulary", "300"]
    text = ["--only_correct", "--whole_text", "--without_tools", "--held_out", "0.25", "--eval_strategy", "steps"]
    run("sft", "--dataset_name", rows, *size, *text, *SMALL, "--eval_steps", "2", "--output_dir", policy)
    offline = ["--dataset_name", rows, *SMALL, "--without_tools", "--value_model", "full"]
    run("oreo", "--model_name_or_path", policy, *offline, "--value_learning_rate", "0.1", "--output_dir", first)
    folds = ["--model_name_or_path", first, *offline, "--folds", "2", "--initial_value_model", first / "value_model"]
    none = ["--value_learning_rate", "0", "--output_dir", out]
    assert "auc_within_problem on 4 held-out problems" in run("oreo", *folds, *none, "--fold", "1")
    assert "auc_within_problem on 8 held-out problems" in run("oreo", *folds, *none, "--fold", "0")
    assert len(offline_values.load_groups(out)) == 8
    start, end = (
        load_file(folder / "value_model" / "value_head.safetensors")["weight"] for folder in (first, out / "fold_0")
    )
    assert start.abs().max() > 0 and torch.equal(start, end)
