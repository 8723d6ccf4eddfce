"""Which answers are the same: 1,137 pairs of our own, each told by hand, and properties of the comparison."""

import random
from pathlib import Path

import pytest

from trl_multiturn.verify import MathVerifier, compare_numbers
from trl_multiturn.verify.amounts import Open, compare_loosely
from trl_multiturn.verify.comparison import asks_for_percent, compare
from trl_multiturn.verify.reading.notation import KEYBOARD, LAYOUT, MARKUP, WHOLE, normalize


VERDICTS = {"=": True, "≠": False, "?": None}


def read_pairs():
    """`{kind: [(gold, answer, verdict), …]}` of the data file, in both orders."""
    kinds = {}
    for line in Path(__file__).with_name("answer_pairs.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("# "):
            pairs = kinds.setdefault(line[2:], [])
        else:
            verdict, gold, answer = line.split("\t")
            pairs += [(gold, answer, VERDICTS[verdict]), (answer, gold, VERDICTS[verdict])]
    return kinds


PAIRS = read_pairs()
ALL = [pair for pairs in PAIRS.values() for pair in pairs]


@pytest.mark.parametrize("kind", PAIRS)
def test_what_can_be_read_is_compared_as_a_mathematician_would(kind):
    outcomes = [(gold, answer, compare(gold, answer), expected) for gold, answer, expected in PAIRS[kind]]
    assert [o for o in outcomes if not isinstance(o[2], Open) and o[2] is not o[3]] == []


@pytest.mark.slow
def test_what_is_left_to_math_verify_comes_out_alike():
    left = [pair for pair in ALL if isinstance(compare(*pair[:2]), Open)]
    assert len(left) > 300
    verifier = MathVerifier(timeout_seconds=60.0, num_workers=1)
    verdicts = verifier.verify([gold for gold, _, _ in left], [answer for _, answer, _ in left])
    verifier.close()
    assert [pair for pair, verdict in zip(left, verdicts, strict=True) if verdict is not pair[2]] == []


def test_the_order_of_two_texts_changes_no_verdict():
    for gold, answer, _ in ALL:
        there, back = compare(gold, answer), compare(answer, gold)
        assert isinstance(there, Open) is isinstance(back, Open), (gold, answer)
        assert isinstance(there, Open) or there is back, (gold, answer)


def test_a_text_is_the_same_as_itself_in_any_notation_of_ours():
    for text in {gold.strip(" ,") for gold, _, _ in ALL}:
        assert compare(text, text) is True
        assert normalize(normalize(text)) == normalize(text)
        assert compare(text, f" **{text}** ") is True or "*" in text


@pytest.mark.parametrize("gold", ["", " ", "NaN", "nan"])
def test_nothing_equals_a_gold_answer_that_is_none(gold):
    assert compare(gold, "5") is None
    assert compare(gold, gold) is None


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("66.67", r"\frac{200}{3}", None),  # the gold answer may have been rounded as the question said
        ("66.67", "66.66666666666667", None),
        (r"\frac{200}{3}", "66.67", False),  # this one was not
        (r"\frac{200}{3}", "66.6667", True),  # six digits, as math-verify compares
        ("66.66666666666667", r"\frac{200}{3}", True),  # what Python prints
        ("0.1", "0.10000001", False),
    ],
)
def test_rounded_numbers(gold, answer, verdict):
    assert compare(gold, answer) is verdict


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("What percentage of the students passed?", True),
        ("A coat costs $80. What percent is saved? Round to the nearest integer.", True),
        ("Express the share as a %.", True),
        ("With a discount of 20%, a coat costs $80. What did it cost?", False),
        ("", False),
    ],
)
def test_the_question_tells_whether_a_percent_sign_may_be_left_away(question, asks):
    assert asks_for_percent(question) is asks
    assert compare("25", r"25\%", asks) is (True if asks else None)
    assert compare("25", r"0.25\%", asks) is False


def test_numbers_alone_need_no_process():
    assert compare_numbers("18 eggs", "18") is True
    assert compare_numbers("18", "19") is False
    assert compare_numbers("18", r"18\%") is None  # cannot be known
    assert compare_numbers("x", "18") is None  # math-verify's


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [("18", "18.001", True), ("18", "18.01", False), ("0.5", "50", True), ("50%", "0.5", True), ("A", "a", True)],
)
def test_the_papers_rules_allow_one_part_in_ten_thousand_and_percentages(gold, answer, equal):
    assert compare_loosely(gold, answer) is equal


def test_the_papers_rules_leave_expressions_to_math_verify():
    assert compare_loosely("2x", "x+x") == Open((("2x", "x+x"),))


def test_a_comparison_of_several_parts_holds_where_all_do():
    outcome = compare(r"(\sqrt{2}x, 3, 1+y)", r"(x\sqrt{2}, 3, y+1)")
    assert isinstance(outcome, Open) and len(outcome.pairs) == 2
    assert outcome.decide([True, True]) is True
    assert outcome.decide([True, None]) is None
    assert outcome.decide([None, False]) is False


def test_every_rule_has_its_reason():
    assert all(rule.reason for rule in (*MARKUP, *LAYOUT, *WHOLE, *KEYBOARD))


PIECES = (
    r"\frac { } ( ) [ 1 3.5 , / x cm hours and or = - ^ _ \\ $ % \text{ ** ` : am half twenty 1,000 \boxed{ ' "
    r". \circ √ ½ ² € of is e th ... \overline{ ~ July 0x < & base"
).split() + [" ", "\n", '"', "\u202e"]


def test_no_text_is_too_odd_to_be_read():
    draw = random.Random(0)
    for _ in range(500):
        gold, answer = ("".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(2))
        outcome = compare(gold, answer)
        assert outcome in (True, False, None) or isinstance(outcome, Open)
