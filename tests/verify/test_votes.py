"""Elections among answers, by hand."""

from __future__ import annotations

from trl_multiturn.verify.votes import elect, tally, winning_answers


def test_equal_answers_vote_together_and_negative_weights_count_nothing():
    assert tally(["0.50", "0.5", None, "2"], [1.0, 2.0, 9.0, -1.0]) == {
        tally(["0.5"], [1]).popitem()[0]: 3.0,
        "2": 0.0,
    }


def test_ties_leave_several_winners():
    assert winning_answers(["1", "2", "3"], [1.0, 2.0, 2.0]) == ["2", "3"]
    assert winning_answers([None], [1.0]) == []


def test_of_the_winning_answer_the_highest_score_is_elected_the_earlier_among_equals():
    assert elect(["1", "1", "2"], [1, 1, 1], [0.1, 0.3, 0.9]) == 1
    assert elect(["1", "2"], [1, 1], [0.5, 0.5]) == 0
    assert elect([None, None], [1, 1], [0.1, 0.2]) == 1
