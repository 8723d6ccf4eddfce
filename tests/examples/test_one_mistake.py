"""Gold solutions with one mistake or other numbers: what is changed, and what follows from it."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from embedded.one_mistake import MARK, NUMBER, calculate, one_mistake, other_numbers  # noqa: E402
from prepare_real_data import read_trajectories  # noqa: E402


QUESTION = "Ann has 3 bags of 4 pears and eats 5 of the pears. She sells the rest for $2 each. How much does she get?"
SOLUTION = (
    "She has 3 x 4 = <<3*4=12>>12 pears.\nSo 12 - 5 = <<12-5=7>>7 pears are left.\nShe gets 7 * $2 = $<<7*2=14>>14."
)


@pytest.fixture(scope="module")
def mistaken():
    made = [one_mistake(QUESTION, SOLUTION, random.Random(seed)) for seed in range(300)]
    return sorted({made_one for made_one in made if made_one is not None})


def test_calculations_are_right_and_the_answer_is_the_last(mistaken):
    assert len(mistaken) > 20
    for text, answer in mistaken:
        marks = MARK.findall(text)
        assert all(calculate(expression) == value for expression, value in marks), text
        assert answer == marks[-1][1]


def test_one_step_goes_wrong_and_later_steps_follow(mistaken):
    texts = [text for text, _ in mistaken]
    assert "She has 3 x 4 = <<3*4=12>>12 pears.\nSo 12 - 5 = <<12-5=7>>7 pears are left." in texts  # stops early
    operator = (
        "She has 3 + 4 = <<3+4=7>>7 pears.\nSo 7 - 5 = <<7-5=2>>2 pears are left.\nShe gets 2 * $2 = $<<2*2=4>>4."
    )
    assert operator in texts
    number = SOLUTION.replace("7 * $2 = $<<7*2=14>>14", "12 * $2 = $<<12*2=24>>24")  # of a step before
    assert number in texts
    for text in texts:
        lines, gold = text.split("\n"), SOLUTION.split("\n")
        first = next(i for i in range(3) if i >= len(lines) or lines[i] != gold[i])
        # the words say what the calculator is asked
        for line in lines[first:]:
            words = re.sub(r"[$ ]", "", line.split("<<")[0]).replace("x", "*")
            assert MARK.search(line)[1] in words, text


def test_solutions_without_room_for_a_mistake_are_left_alone():
    assert all(one_mistake("How many?", "It is 4.", random.Random(seed)) is None for seed in range(20))
    one_step = [one_mistake("1", "So <<2=2>>2.", random.Random(seed)) for seed in range(20)]
    assert {made for made in one_step if made} == {("So <<1=1>>1.", "1")}


def test_a_problem_is_told_with_other_numbers():
    question = "Ann has 30 bags of 4 pears and sells 45 of the pears for $3 each. How many pears are left?"
    solution = "She has 30 x 4 = <<30*4=120>>120 pears.\nSo 120 - 45 = <<120-45=75>>75 pears are left."
    told = {other_numbers(question, solution, random.Random(seed)) for seed in range(60)}
    assert None not in told and len(told) > 20
    for question, text, answer in told:
        bags, each, sold, price = NUMBER.findall(question)
        pears, left = int(bags) * int(each), int(bags) * int(each) - int(sold)
        assert text == (
            f"She has {bags} x {each} = <<{bags}*{each}={pears}>>{pears} pears.\n"
            f"So {pears} - {sold} = <<{pears}-{sold}={left}>>{left} pears are left."
        )
        assert int(answer) == left > 0
        assert price == "3"  # plays no part in the solution, so that nothing would show it was read
        assert int(bags) % 10 == 0 and int(sold) % 5 == 0  # round numbers stay round
    assert len({NUMBER.findall(question)[1] for question, _, _ in told}) > 2


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        ("He runs 5 miles a day.", "In a week 5*8=<<5*8=40>>40 miles."),  # 8 comes from nowhere
        ("He runs 5 miles and 10 miles.", "So 5+5=<<5+5=10>>10 and 10+10=<<10+10=20>>20."),  # which 10?
        ("He runs 5 miles.", "So 5*3=<<5*3=16>>16."),
        ("He runs 5 of 7 miles.", "So 7-5=<<7-5=3>>3."),  # miscalculated
        ("He earns $5,000.", "So 5*2=<<5*2=10>>10."),
        ("He runs 5 miles.", "He runs 5 miles."),
    ],
)
def test_problems_whose_numbers_may_mean_two_things_are_left_alone(question, solution):
    assert all(other_numbers(question, solution, random.Random(seed)) is None for seed in range(30))


def test_variants_stay_with_their_problem(tmp_path):
    gold = [(QUESTION, SOLUTION, "14"), ("It is 4. How much?", "It is 4.", "4")]
    lines = [json.dumps({"question": q, "answer": f"{text}\n#### {answer}"}) for q, text, answer in gold]
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    plain = read_trajectories(tmp_path, "gsm8k_train")
    told = read_trajectories(tmp_path, "gsm8k_train", variants=5)
    questions = [
        {row["prompt"][0]["content"] for row in rows if row["label"] and row["question_id"] == 0}
        for rows in (plain, told)
    ]
    assert questions[0] == {QUESTION} < questions[1] and len(questions[1]) > 2
    assert [row for row in told if row["question_id"] == 1] == [row for row in plain if row["question_id"] == 1]


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2*(3+4)", "14"), ("1/3", "0.3333"), ("-5+2.50", "-2.5"), ("2/0", None), ("9999999*9", None), ("f(1)", None)],
)
def test_calculations(expression, value):
    assert calculate(expression) == value
