"""Rows of trajectories with rewards: what cannot be aligned with the model's predictions is refused."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

from trl_multiturn.data.value_rows import finish_rows


def test_a_row_without_a_prompt_is_refused_by_its_number():
    row = {"prompt_ids": [5], "completion_ids": [6, 7], "action_mask": [1, 1], "reward": 1.0}
    rows = Dataset.from_list([row, row | {"prompt_ids": []}])
    with pytest.raises(ValueError, match="Row 1: `prompt_ids` is empty.*at least one token"):
        finish_rows(rows, None, max_length=None)


TOKENS = {"prompt_ids": [5], "completion_ids": [6, 7, 8], "action_mask": [1, 0, 1]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"reward": "good"}, "Row 0: the reward is 'good', but an outcome is one number"),
        ({"reward": [1.0]}, r"Row 0: the reward is \[1.0\]"),
        ({"label": -1}, "Row 0: the label is -1, .*a number as `reward`"),
        ({"label": "yes"}, "Row 0: the label is 'yes'"),
        ({"reward": 1.0, "action_mask": None}, "Row 0: `action_mask` has no value"),
        ({"reward": 1.0, "behavior_logps": [-1.0, 0.0, math.nan]}, "Row 0: `behavior_logps` holds nan at position 2"),
        (
            {"reward": 1.0, "behavior_logps": [-math.inf, 0.0, -1.0]},
            "Row 0: `behavior_logps` holds -inf at position 0",
        ),
        ({"reward": 1.0, "behavior_logps": [0.9, 0.0, 0.2]}, "Row 0: `behavior_logps` holds 0.9 .*never positive"),
        ({"reward": 1.0, "ref_logps": [None, 0.0, -1.0]}, "Row 0: `ref_logps` holds None at position 0"),
        ({"reward": 1.0, "process_rewards": [0.0, 0.0, math.inf]}, "Row 0: `process_rewards` holds inf at position 2"),
        ({"reward": 1.0, "turn_rewards": [0.5, math.nan]}, "Row 0: `turn_rewards` holds nan at position 1"),
    ],
)
def test_what_is_no_number_is_refused_by_its_row(columns, message):
    rows = Dataset.from_list([TOKENS | columns])
    with pytest.raises(ValueError, match=message):
        finish_rows(rows, None, max_length=None)


def test_what_the_policy_did_not_sample_may_hold_anything():
    junk = {"behavior_logps": [-1.0, math.nan, -2.0], "ref_logps": [-1.0, 7.0, 0.0]}
    rows, _ = finish_rows(Dataset.from_list([TOKENS | {"reward": 1.0} | junk]), None, max_length=None)
    assert rows["token_rewards"][:] == [[0.0, 0.0, 1.0]]
