"""Which of the policy's turns train."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from trl_multiturn.data.truncation import PREFERENCE_SIDES, UNPAIRED_SIDES, fit_rows
from trl_multiturn.data.turns import choose_tokens, columns_of_turns, turn_spans
from trl_multiturn.data.value_rows import finish_rows


MASK = [1, 1, 0, 1, 0, 1]  # three turns


def chosen(mask=MASK, **keys):
    columns = {name: keys.pop(name) for name in ("turn_weights", "turn_calls") if name in keys}
    return choose_tokens(columns, "completion_ids", mask, **keys)


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1], [1, 1, 0, 1, 0], [1], [0, 0], []])
def test_only_the_last_turn(mask):
    last = turn_spans(mask)[-1:]
    assert chosen(mask, train_on_turns="last") == [int(any(a <= i < b for a, b in last)) for i in range(len(mask))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, MASK),
        ({"turn_weights": [1, 1, 1]}, MASK),
        ({"turn_weights": [0, 1, 1.0]}, [0, 0, 0, 1, 0, 1]),
        ({"turn_calls": [1, 1, 0]}, MASK),
        ({"turn_calls": [1, 1, 0], "train_on_turns": "answer"}, [0, 0, 0, 0, 0, 1]),
        ({"turn_calls": [0, 1, 0], "turn_weights": [0, 1, 1], "train_on_turns": "answer"}, [0, 0, 0, 0, 0, 1]),
        ({"turn_weights": [1, 1, 0], "train_on_turns": "last"}, [0] * 6),
        ({"mask_observations": False}, [1] * 6),
        ({"mask_observations": False, "turn_weights": [1, 0, 1]}, [1, 1, 1, 0, 1, 1]),
        ({"mask_observations": False, "train_on_turns": "last"}, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_weights_calls_and_the_trainers_choice(settings, expected):
    assert chosen(**settings) == expected


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"turn_weights": [1, 0]}, "`turn_weights` has 2 entries, but the mask shows 3 turns"),
        ({"turn_weights": [1, 1, 0.5]}, "`turn_weights` holds 0.5, but a turn is trained .1. or not .0."),
        ({"train_on_turns": "answer"}, "nothing says which do: there is no `turn_calls`"),
        ({"train_on_turns": "answer", "turn_calls": [1]}, "`turn_calls` has 1 entries"),
    ],
)
def test_what_does_not_fit_is_told(settings, error):
    with pytest.raises(ValueError, match=error):
        chosen(**settings)


def test_names_of_the_columns():
    names = [columns_of_turns(ids) for ids, _ in (*UNPAIRED_SIDES, *PREFERENCE_SIDES)]
    assert names == [
        ("turn_weights", "turn_calls"),
        ("chosen_turn_weights", "chosen_turn_calls"),
        ("rejected_turn_weights", "rejected_turn_calls"),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_token_rows_say_which_turns_train(streamed):
    row = {
        "prompt_ids": [1],
        "chosen_ids": list(range(6)),
        "chosen_action_mask": MASK,
        "chosen_turn_weights": [0, 1, 1],
        "rejected_ids": [7],
        "rejected_action_mask": [1],
        "rejected_turn_weights": None,
    }
    rows = IterableDataset.from_generator(lambda: iter([row])) if streamed else Dataset.from_list([row])
    fitted, _ = fit_rows(rows, PREFERENCE_SIDES, max_length=None)
    first = next(iter(fitted))
    assert first["chosen_action_mask"] == [0, 0, 0, 1, 0, 1] and first["rejected_action_mask"] == [1]
    assert not any("turn" in name for name in first)


def test_what_an_untrained_turn_earned_is_paid_at_the_action_before_it():
    row = {"prompt_ids": [1], "completion_ids": list(range(6)), "action_mask": MASK, "reward": 10.0}
    process = [100.0, 0.0, float("nan"), 0.0, 0.0, 200.0]
    row |= {"turn_rewards": [1.0, 2.0, 3.0], "process_rewards": process}

    def paid(weights, **settings):
        rows, _ = finish_rows(Dataset.from_list([row | {"turn_weights": weights}]), None, max_length=None, **settings)
        return rows[0]["token_rewards"], rows[0]["action_mask"]

    assert paid([1, 1, 1]) == ([100.0, 1.0, 0.0, 2.0, 0.0, 213.0], MASK)
    assert paid([1, 0, 0]) == ([100.0, 216.0, 0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0, 0, 0])
    assert paid([0, 1, 1]) == ([0.0, 0.0, 0.0, 2.0, 0.0, 213.0], [0, 0, 0, 1, 0, 1])
    assert paid([1, 1, 1], train_on_turns="last") == ([0.0] * 5 + [213.0], [0] * 5 + [1])


def test_a_row_whose_turns_do_not_fit_is_named():
    row = {"prompt_ids": [1], "completion_ids": [2], "action_mask": [1], "turn_weights": [1, 1], "reward": 1.0}
    with pytest.raises(ValueError, match="Row 0: `turn_weights` has 2 entries"):
        fit_rows(Dataset.from_list([row]), UNPAIRED_SIDES, max_length=None)
    with pytest.raises(ValueError, match="Row 0: `turn_weights` has 2 entries"):
        finish_rows(Dataset.from_list([row]), None, max_length=None)
