"""Rows of trajectories with rewards: what cannot be aligned with the model's predictions is refused."""

from __future__ import annotations

import pytest
from datasets import Dataset

from trl_multiturn.data.trajectories import finish_rows


def test_a_row_without_a_prompt_is_refused_by_its_number():
    row = {"prompt_ids": [5], "completion_ids": [6, 7], "action_mask": [1, 1], "reward": 1.0}
    rows = Dataset.from_list([row, row | {"prompt_ids": []}])
    with pytest.raises(ValueError, match="Row 1: `prompt_ids` is empty.*at least one token"):
        finish_rows(rows, None, max_length=None)
