from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, strategies as st

from trl_multiturn.data.truncation import (
    PREFERENCE_SIDES,
    UNPAIRED_SIDES,
    completion_cut,
    fit_rows,
)


def unpaired(masks, prompt=2, **columns):
    rows = {
        "prompt_ids": [list(range(prompt))] * len(masks),
        "completion_ids": [list(range(100, 100 + len(mask))) for mask in masks],
        "action_mask": masks,
    }
    return Dataset.from_dict({**rows, **columns})


@pytest.mark.parametrize(
    ("mask", "room", "kept"),
    [
        ([1, 1, 0, 0, 1, 1], 6, 6),  # fits
        ([1, 1, 0, 0, 1, 1], 5, 2),  # the second turn does not
        ([1, 1, 0, 1, 0, 1], 5, 4),  # two of three do; context after the second is of no use
        ([1, 1, 1, 1], 2, 2),  # not even the first: cut inside it
        ([0, 0, 1, 1], 1, 1),
        ([1, 0, 1], 0, 0),
        ([1, 0, 1], -3, 0),  # the prompt alone is too long
    ],
)
def test_completion_cut(mask, room, kept):
    assert completion_cut(mask, room) == kept


@given(mask=st.lists(st.integers(0, 1), max_size=20), room=st.integers(-2, 25))
def test_completion_cut_never_exceeds_the_room_nor_splits_a_turn_needlessly(mask, room):
    kept = completion_cut(mask, room)
    assert 0 <= kept <= max(room, 0) or kept == len(mask) <= room
    if kept < len(mask) and kept and mask[kept - 1] and mask[kept]:  # inside a turn
        assert not any(mask[end - 1] and not mask[end] for end in range(1, kept + 1))


def test_rows_are_cut_dropped_and_counted():
    dataset = unpaired([[1, 1], [1, 1, 0, 1, 1], [1] * 5, [0, 0, 0, 0, 1]])
    rows, statistics = fit_rows(dataset, UNPAIRED_SIDES, max_length=6)
    assert rows["action_mask"][:] == [[1, 1], [1, 1], [1] * 4]
    assert rows["completion_ids"][:] == [[100, 101], [100, 101], [100, 101, 102, 103]]
    assert rows.column_names == dataset.column_names
    assert statistics == {
        "data/rows": 3,
        "data/rows_dropped": 1,
        "data/rows_dropped_untrained": 1,
        "data/rows_dropped_identical": 0,
        "data/rows_cut_at_turn": 1,
        "data/rows_cut_inside_turn": 1,
        "data/length_p95": 7.0,
    }


def test_sides_that_are_or_become_identical_are_dropped():
    rows = {
        "prompt_ids": [[1], [1], [1]],
        "chosen_ids": [[5, 6, 7], [5, 6], [5, 9]],
        "chosen_action_mask": [[1, 1, 1], [1, 1], [1, 1]],
        "rejected_ids": [[5, 6, 8], [5, 6], [5, 6]],
        "rejected_action_mask": [[1, 1, 1], [1, 1], [1, 1]],
    }
    kept, statistics = fit_rows(Dataset.from_dict(rows), PREFERENCE_SIDES, max_length=3)
    assert kept["chosen_ids"][:] == [[5, 9]] and statistics["data/rows_dropped_identical"] == 2


def test_keep_end_checks_the_window_that_the_collator_will_keep():
    dataset = unpaired([[1, 0, 0, 0], [0, 0, 1, 1]])
    rows, statistics = fit_rows(dataset, UNPAIRED_SIDES, max_length=3, truncation_mode="keep_end")
    assert rows["action_mask"][:] == [[0, 0, 1, 1]] and statistics["data/rows_dropped_untrained"] == 1


def test_mask_choices_come_before_the_cut():
    dataset = unpaired([[1, 1, 0, 1, 1]])
    last, _ = fit_rows(dataset, UNPAIRED_SIDES, max_length=None, train_on_turns="last")
    assert last["action_mask"][:] == [[0, 0, 0, 1, 1]]
    everything, _ = fit_rows(dataset, UNPAIRED_SIDES, max_length=6, mask_observations=False)
    assert everything["action_mask"][:] == [[1, 1, 1, 1]]  # no turn ends are known
    with pytest.raises(ValueError, match="No row is left"):  # the last turn does not fit
        fit_rows(dataset, UNPAIRED_SIDES, max_length=5, train_on_turns="last")


def test_aligned_columns_are_cut_with_the_completion():
    dataset = unpaired([[1, 1, 0, 1, 1]], behavior_logps=[[-1.0, -2.0, 0.0, -3.0, -4.0]])
    rows, _ = fit_rows(dataset, UNPAIRED_SIDES, max_length=6, aligned_columns=("behavior_logps",))
    assert rows["behavior_logps"][:] == [[-1.0, -2.0]]


def test_streamed_rows_are_fitted_without_counts():
    rows = list(unpaired([[1, 1], [0, 0]]))
    dataset, statistics = fit_rows(IterableDataset.from_generator(lambda: iter(rows)), UNPAIRED_SIDES, max_length=10)
    assert [row["action_mask"] for row in dataset] == [[1, 1]] and statistics == {}
    assert set(next(iter(dataset))) == {"prompt_ids", "completion_ids", "action_mask"}


def test_a_sequence_that_begins_with_its_only_action_trains_nothing():
    dataset = unpaired([[1], [1, 1]], prompt=0)
    rows, statistics = fit_rows(dataset, UNPAIRED_SIDES, max_length=None)
    assert rows["action_mask"][:] == [[1, 1]] and statistics["data/rows_dropped_untrained"] == 1
