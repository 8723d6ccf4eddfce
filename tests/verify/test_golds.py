import logging
import math

import pytest

from trl_multiturn.verify import MathVerifier, gold_answer, look_at_golds


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        (18, "18"),
        (0.5, "0.5"),
        ("She makes 9*2 = <<9*2=18>>18.\n#### 1,800", "1,800"),
        (r"Therefore there are $\boxed{\frac{3}{4}}$ of them.", r"\frac{3}{4}"),
        (r"First \boxed{1}, at last \boxed{2}.", "2"),
        ("She sells 16 - 3 = 13.\nThat is $26 every day.\nA: 26", "26"),
        ("16 - 3 = 13\nThe answer is 13.", "13."),
        ("**Answer:** 13", "13"),
        ("Final answer: **13**", "13"),
        ("<think>16 - 3</think><answer> 13 </answer>", "13"),
        (["18"], "18"),
        (" x + 1 ", "x + 1"),
        ("New York", "New York"),
        ("B", "B"),
        ("(1, 2)", "(1, 2)"),
        ("\\begin{matrix} 1 \n 2 \\end{matrix}", "\\begin{matrix} 1 \n 2 \\end{matrix}"),
        ("None", "None"),  # a word, as in a multiple choice
    ],
)
def test_golds_are_read_as_datasets_write_them(gold, expected):
    assert gold_answer(gold) == expected


@pytest.mark.parametrize(
    "gold",
    [
        None,
        math.nan,
        "nan",
        "",
        "  ",
        "N/A",
        "#### nan",
        ["18", "eighteen"],
        {"value": 18},
        "She has 3 + 4 = 7 apples.\nShe gives 2 away and keeps 5.",
        "He buys some at the market, and she brings all of them home on foot.",
    ],
)
def test_what_no_reader_is_sure_of_is_no_gold_answer(gold):
    assert gold_answer(gold) is None


def test_a_sentence_with_one_number_is_compared_by_it():
    verifier = MathVerifier(num_workers=1)
    golds = ["The answer is 18.", "She has 18 apples left.", "**18**", r"\[18\]", "A: 18", math.nan]
    right = [[{"role": "assistant", "content": r"\boxed{18}"}]] * 6
    wrong = [[{"role": "assistant", "content": r"\boxed{17}"}]] * 6
    assert verifier.reward([None] * 6, right, answer=golds) == [1.0] * 5 + [None]
    assert verifier.reward([None] * 6, wrong, answer=golds) == [0.0] * 5 + [None]


def test_a_look_at_the_golds_warns_once_where_many_cannot_be_read(caplog):
    verifier = MathVerifier(num_workers=1)
    columns = {"answer": ["18", None, "one line\nand another", "19"]}
    verifier.check_columns(columns)
    verifier.check_columns(columns)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "2 of the first 4 values of the column `answer`" in record.message
    assert "row 1: None" in record.message and "`#### 18`" in record.message


def test_few_unreadable_golds_are_no_matter_for_a_warning(caplog):
    look_at_golds(["18"] * 99 + [None])
    assert not caplog.records
    look_at_golds(["18"] * 9 + [None])
    assert "row 9: None" in caplog.text
    look_at_golds([])
