"""What the policy reads of a cell's output."""

import pytest

from trl_multiturn.sandbox.observation import clean, error_message, last_paragraph, truncate


@pytest.mark.parametrize(
    ("text", "limit", "dropped", "expected"),
    [
        ("abc", 3, 0, "abc"),
        ("abcdefgh", 4, 0, "ab\n[... 4 characters cut ...]\ngh"),
        ("abcdefg", 5, 0, "abc\n[... 2 characters cut ...]\nfg"),
        ("abcdefgh", 4, 10, "ab\n[... 14 characters cut ...]\ngh"),
        ("ab", 1, 0, "a\n[... 1 characters cut ...]\n"),
    ],
)
def test_truncation_keeps_both_ends_and_counts_the_rest(text, limit, dropped, expected):
    assert truncate(text, limit, dropped) == expected


def test_cleaning_leaves_what_a_tokenizer_can_represent():
    assert clean("\x1b[1;31mred\x1b[0m\x1b]0;title\x07 a\x00b \ud800 é") == "red ab ? é"
    assert clean("plain\ttext\n") == "plain\ttext\n"


def test_an_error_is_its_last_paragraph():
    assert error_message("ValueError", "") == "ValueError"
    assert error_message("KeyError", "'x'") == "KeyError: 'x'"
    assert last_paragraph("UFuncTypeError: one\ntwo\n\n \nthree\nfour\n") == "three\nfour"


@pytest.mark.parametrize("name", ["3284123.py", "<ipython-input-3-abc>"])
def test_the_same_mistake_reads_the_same_in_every_session(name):
    assert error_message("SyntaxError", f"invalid syntax ({name}, line 2)") == (
        "SyntaxError: invalid syntax (<cell>, line 2)"
    )
