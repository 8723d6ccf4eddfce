from __future__ import annotations

import pytest

from trl_multiturn import _upstream
from trl_multiturn.data.collators import (
    DataCollatorForMultiTurnPreference,
    DataCollatorForMultiTurnUnpairedPreference,
)


PAIR = {
    "prompt_ids": [1, 2],
    "chosen_ids": [3, 4, 5],
    "chosen_action_mask": [1, 0, 1],
    "rejected_ids": [6],
    "rejected_action_mask": [1],
}


def as_lists(batch):
    return {key: value.tolist() for key, value in batch.items()}


def test_preference_batch_as_in_the_docstring():
    assert as_lists(DataCollatorForMultiTurnPreference(pad_token_id=0)([PAIR])) == {
        "input_ids": [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "completion_mask": [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]],
    }


@pytest.mark.parametrize(
    ("mode", "masks"), [("keep_start", [[0, 0, 1, 0], [0, 0, 1, 0]]), ("keep_end", [[0, 1, 0, 1], [0, 0, 1, 0]])]
)
def test_masks_are_cut_and_padded_with_the_ids(mode, masks):
    collator = DataCollatorForMultiTurnPreference(
        pad_token_id=0, max_length=4, truncation_mode=mode, pad_to_multiple_of=4
    )
    batch = collator([PAIR])
    assert batch["completion_mask"].tolist() == masks
    assert batch["completion_mask"].shape == batch["input_ids"].shape == (2, 4)


def test_padding_is_not_inferred_from_ids():
    """The pad token may be a trained token too: pad == eos is common."""
    row = {**PAIR, "chosen_ids": [3, 0], "chosen_action_mask": [1, 1], "rejected_ids": [0, 6, 0],
           "rejected_action_mask": [1, 0, 1]}  # fmt: skip
    batch = DataCollatorForMultiTurnPreference(pad_token_id=0)([row])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_margins_and_reference_columns():
    rows = [{**PAIR, "margin": value, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for value in (0.5, None)]
    batch = DataCollatorForMultiTurnPreference(pad_token_id=0)(rows)
    assert batch["margin"].tolist() == [0.5, 0.0]
    assert batch["ref_chosen_logps"].tolist() == [-1.0, -1.0]


def test_rows_without_masks_are_collated_as_trl_does():
    row = {key: value for key, value in PAIR.items() if not key.endswith("mask")}
    ours = DataCollatorForMultiTurnPreference(pad_token_id=0)([row])
    assert as_lists(ours) == as_lists(_upstream.DataCollatorForPreference(pad_token_id=0)([row]))
    row = {"prompt_ids": [1], "completion_ids": [2, 3], "KL_completion_ids": [4], "label": False}
    ours = DataCollatorForMultiTurnUnpairedPreference(pad_token_id=0)([row])
    assert as_lists(ours) == as_lists(_upstream.DataCollatorForUnpairedPreference(pad_token_id=0)([row]))


def test_unpaired_batch_with_kl_rows():
    rows = [
        {"prompt_ids": [1], "completion_ids": [2, 3, 4], "action_mask": [1, 0, 1], "KL_completion_ids": [7],
         "KL_action_mask": [1], "label": True},
        {"prompt_ids": [5, 6], "completion_ids": [7], "action_mask": [1], "KL_completion_ids": [2, 3, 4],
         "KL_action_mask": [1, 0, 1], "label": False},
    ]  # fmt: skip
    batch = as_lists(DataCollatorForMultiTurnUnpairedPreference(pad_token_id=0, max_length=4)(rows))
    assert batch["completion_mask"] == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert batch["KL_input_ids"] == [[1, 7, 0, 0], [5, 6, 2, 3]]
    assert batch["KL_completion_mask"] == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert batch["label"] == [True, False]
