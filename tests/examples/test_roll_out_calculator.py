"""Rolling out with a calculator: what it says, which answer counts, and the rows of a policy that knows a problem."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import launch


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import roll_out_calculator  # noqa: E402
from prepare_real_data import calculator_turns  # noqa: E402


@pytest.mark.parametrize(
    ("expression", "value"), [("16-3", "13"), ("48/2", "24.0"), ("1/4", "0.25"), (".5*3", "1.5"), ("2 eggs", "error")]
)
def test_the_calculator_answers_as_in_the_recorded_rows(expression, value):
    assert roll_out_calculator.calculator(expression) == value


@pytest.mark.parametrize(
    ("text", "answer"), [("so 7.\nA: 7", 7.0), ("A: 1\nA: $1,250.50", 1250.5), ("A: -3", -3.0), ("So it is 7", None)]
)
def test_the_answer_is_the_number_after_the_last_mark(text, answer):
    assert roll_out_calculator.answer_of(text) == answer


def test_an_answer_is_right_as_a_number():
    completions = [[{"content": text}] for text in ("A: 7.0", "A: 8", "none", None)]
    assert roll_out_calculator.same_answer(completions, [7.0] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.slow
def test_a_policy_that_knows_a_problem_answers_it(tmp_path):
    prompt = [{"role": "user", "content": "Ann has 3 bags of 4 pears and eats 5. How many are left?"}]
    turns = calculator_turns("She has 3*4 = <<3*4=12>>12 pears.\nThen 12-5 = <<12-5=7>>7 are left.\nA: 7")
    row = {"prompt": prompt, "completion": turns, "label": True, "question_id": 5}
    (tmp_path / "gold.jsonl").write_text(json.dumps(row), encoding="utf-8")
    policy, own = tmp_path / "policy", tmp_path / "own" / "rows.jsonl"
    size = ["--hidden_size", "32", "--num_layers", "1", "--vocabulary", "300", "--max_steps", "60"]
    cpu = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--save_strategy", "no"]
    gold = ["--dataset_name", tmp_path / "gold.jsonl"]
    done = launch.run_forked("examples/sft.py", *gold, *size, *cpu, "--learning_rate", 0.02, "--output_dir", policy)
    assert done.returncode == 0, done.stderr[-4000:]
    arguments = ["--policy", policy, *gold, "--output", own, "--num_generations", "3", "--temperature", "0.1"]
    done = launch.run([sys.executable, "examples/roll_out_calculator.py", *map(str, arguments)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "3 answers to 1 problems, 3 of them correct." in done.stdout
    rows = [json.loads(line) for line in own.read_text(encoding="utf-8").splitlines()]
    assert [(row["label"], row["reward"], row["question_id"]) for row in rows] == [(True, 1.0, 5)] * 3
    mask = rows[0]["action_mask"]
    assert sum(before < after for before, after in zip([0, *mask], mask, strict=False)) == 3  # turns
