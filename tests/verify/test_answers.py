from fractions import Fraction

import pytest

from trl_multiturn.verify import canonical_answer, exact_number, final_answer, last_boxed, message_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So \boxed{18}.", "18"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} and \boxed{2", "1"),  # cut off inside the last box
        (r"\boxed{}", None),
        (r"\boxed{18}, as I put it in \boxed{\ldots}", "18"),
        ("no box", None),
        (r"\boxed 5", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_only_the_last_assistant_turn_answers():
    observation = {"role": "user", "content": r"```output\n\boxed{3}\n```"}
    early = {"role": "assistant", "content": r"Guess \boxed{1}"}
    assert final_answer([early, observation, {"role": "assistant", "content": r"\boxed{2}"}]) == "2"
    assert final_answer([early, observation, {"role": "assistant", "content": "No idea."}]) is None
    assert final_answer([early, observation]) == "1"  # stopped at a limit, after the observation
    assert final_answer([]) is None
    assert final_answer(r"plain text \boxed{4}") == "4"


def test_message_text_reads_blocks_and_absent_content():
    assert message_text({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}) == "a"
    assert message_text({"role": "assistant", "content": None, "tool_calls": []}) == ""
    assert message_text({"role": "assistant", "tool_calls": []}) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", Fraction(18)),
        ("-3.50", Fraction(-7, 2)),
        ("+.5", Fraction(1, 2)),
        ("1,234,567", Fraction(1234567)),
        ("1{,}234", Fraction(1234)),
        (r"\$18", Fraction(18)),
        ("$18$", Fraction(18)),
        ("18.", Fraction(18)),
        ("3/4", Fraction(3, 4)),
        (r"-\dfrac{6}{8}", Fraction(-3, 4)),
        (r"\frac{-6}{8}", Fraction(-3, 4)),
        ("1,2", None),  # a pair, not a number
        ("12,34", None),
        ("50%", None),
        (r"50\%", None),
        ("1/0", None),
        ("1 234", Fraction(1234)),
        (r"7\,000\,000", Fraction(7_000_000)),
        ("1 23", None),
        (r"1\,00", None),
        ("1,00,000", Fraction(100_000)),
        ("1.234,56", Fraction(123_456, 100)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("1½", Fraction(3, 2)),
        (r"2\frac{3}{2}", None),  # a product
        ("1e3", Fraction(1000)),
        (r"1.5 \times 10^{-4}", Fraction(15, 100_000)),
        ("10^{500}", None),
        ("7 million", Fraction(7_000_000)),
        ("half", Fraction(1, 2)),
        ("two hundred and five", Fraction(205)),
        ("three quarters", Fraction(3, 4)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.272727...", Fraction(3, 11)),
        ("3.14159...", None),
        ("**18**", Fraction(18)),
        (r"\[18\]", Fraction(18)),
        ("5th", Fraction(5)),
        ("101_2", None),
        ("18 eggs", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_exact_number(text, value):
    assert exact_number(text) == value


def test_canonical_answers_meet_where_they_are_plainly_equal():
    assert len({canonical_answer(text) for text in ("0.5", "1/2", r"$\dfrac{1}{2}$", ".50")}) == 1
    assert canonical_answer(r"\left( 1,\, 2 \right)") == canonical_answer("(1,2)")
    assert canonical_answer(r"\dfrac{\pi}{2}") == canonical_answer(r"\frac{\pi}{2}")
    assert canonical_answer("x+1") != canonical_answer("1+x")
    assert len({canonical_answer(text) for text in ("18", "$18", "18 eggs", "**18**", r"18\text{ cm}")}) == 1
    assert canonical_answer(r"25\%") != canonical_answer("25")
    assert canonical_answer("The red one.") == canonical_answer("red one")
    assert canonical_answer("101_2") == canonical_answer("5")
