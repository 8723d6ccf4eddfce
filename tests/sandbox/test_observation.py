"""What the policy reads of a cell's output."""

import pytest

from trl_multiturn.sandbox.observation import Addresses, clean, error_message, truncate


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


def test_an_error_begins_with_its_name_whatever_its_message_holds():
    assert error_message("ValueError", "") == "ValueError"
    assert error_message("KeyError", "'x'") == "KeyError: 'x'"
    assert error_message("AssertionError", "\nArrays differ\n\nMismatch: 1\n") == (
        "AssertionError: \nArrays differ\n\nMismatch: 1"
    )


def test_addresses_repeat_and_stay_distinct():
    addresses = Addresses()
    first = addresses.repeat("<A object at 0x7f1c2c0a5d90> <B object at 0x55d0c8a3b2c0>")
    assert first == "<A object at 0x7f0000000010> <B object at 0x7f0000000020>"
    assert addresses.repeat("<A object at 0x7f1c2c0a5d90>") == "<A object at 0x7f0000000010>"
    assert addresses.repeat("at 0x7f1c2c0a5d90, at 0xff, jump at 0x7f1c2c0a5d901") == (
        "at 0x7f1c2c0a5d90, at 0xff, jump at 0x7f1c2c0a5d901"
    )


@pytest.mark.parametrize("name", ["3284123.py", "<ipython-input-3-abc>"])
def test_the_same_mistake_reads_the_same_in_every_session(name):
    assert error_message("SyntaxError", f"invalid syntax ({name}, line 2)") == (
        "SyntaxError: invalid syntax (<cell>, line 2)"
    )
