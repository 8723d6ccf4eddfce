from __future__ import annotations

import pytest

from tests.support import byte_tokenizer
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify.process_rewards import (
    Segment,
    hard_reward,
    longest_good_prefix,
    min_utility,
    prefix_rewards,
    segments,
    soft_reward,
    turn_totals,
)


TOKENIZER = byte_tokenizer()
RIGHT, WRONG, UNKNOWN = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def spoken(*parts):
    """A trajectory of turns (text) and observations (text in a tuple), a token per character."""
    ids, mask = [], []
    for part in parts:
        new = TOKENIZER.encode(part[0] if isinstance(part, tuple) else part)
        ids += new
        mask += [int(not isinstance(part, tuple))] * len(new)
    return Trajectory([], [], [1], ids, mask, StopReason.ANSWERED)


def texts(trajectory, delimiter):
    found = segments(trajectory, delimiter, TOKENIZER)
    return [(TOKENIZER.decode(trajectory.completion_ids[s.start : s.stop]), s.turn) for s in found]


@pytest.mark.parametrize(
    ("delimiter", "expected"),
    [
        ("turn", [("One. Two\nthree", 0), ("Four.\n\nFive", 1)]),
        ("line", [("One. Two\n", 0), ("three", 0), ("Four.\n\n", 1), ("Five", 1)]),
        ("sentence", [("One. ", 0), ("Two\n", 0), ("three", 0), ("Four.\n\n", 1), ("Five", 1)]),
    ],
)
def test_steps_are_turns_lines_or_sentences_of_the_policy_alone(delimiter, expected):
    assert texts(spoken("One. Two\nthree", ("out\nput. ",), "Four.\n\nFive"), delimiter) == expected


def test_positions_are_those_of_the_completion():
    assert segments(spoken("ab", ("xyz",), "c", ("w",))) == [Segment(0, 2, 0), Segment(5, 6, 1)]
    assert segments(spoken(("only read",))) == []
    with pytest.raises(ValueError, match="needs a `tokenizer`"):
        segments(spoken("a"), "line")


@pytest.mark.parametrize(
    ("verdicts", "soft", "hard"),
    [
        ([RIGHT, WRONG, WRONG, WRONG], 0.25, 1.0),
        ([WRONG, WRONG], 0.0, 0.0),
        ([RIGHT, WRONG, UNKNOWN, UNKNOWN], 0.5, 1.0),  # what nobody decided is no failure
        ([UNKNOWN], None, None),
        ([], None, None),
    ],
)
def test_soft_and_hard_rewards_by_hand(verdicts, soft, hard):
    assert (soft_reward(verdicts), hard_reward(verdicts)) == (soft, hard)


def test_the_longest_good_prefix_need_not_be_good_throughout():
    assert longest_good_prefix([1.0, 0.0, 1.0, 0.0]) == 3
    assert longest_good_prefix([0.0, None]) == 0
    assert longest_good_prefix([]) == 0
    assert prefix_rewards(4, 3) == [0.25, 0.25, 0.25, 0.0]
    assert sum(prefix_rewards(3, 3)) == pytest.approx(1.0)
    assert prefix_rewards(0, 0) == []
    with pytest.raises(ValueError, match="3 of 2 steps"):
        prefix_rewards(2, 3)


def test_a_turn_gets_what_its_steps_get():
    steps = segments(spoken("a\nb", ("o",), "c"), "line", TOKENIZER)
    assert turn_totals(steps, [0.5, 0.25, 1.0]) == [0.75, 1.0]
    assert turn_totals([], []) == []


def test_a_trajectory_is_as_good_as_its_worst_step():
    assert min_utility([0.9, 0.2, 0.5]) == 0.2
    with pytest.raises(ValueError, match="no step"):
        min_utility([])
