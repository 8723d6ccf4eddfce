"""Gold solutions with one mistake: what is changed, and what follows from it."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
from one_mistake import MARK, calculate, one_mistake  # noqa: E402


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


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2*(3+4)", "14"), ("1/3", "0.3333"), ("-5+2.50", "-2.5"), ("2/0", None), ("9999999*9", None), ("f(1)", None)],
)
def test_calculations(expression, value):
    assert calculate(expression) == value
