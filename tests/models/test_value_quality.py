"""AUC within a prompt and calibration, by hand."""

from __future__ import annotations

import pytest
import torch

from trl_multiturn.models.value_quality import auc_within, calibration_error, calibration_sums


def test_pairs_of_one_prompt_are_compared_and_ties_count_half():
    groups = ["a", "a", "a", "b", "b", "c"]
    values = [0.9, 0.2, 0.9, 0.1, 0.3, 0.0]
    labels = [True, False, False, True, False, True]
    # a: one win, one tie; b: one loss; c: nothing to compare
    assert auc_within(groups, values, labels) == pytest.approx(1.5 / 3)


def test_there_is_no_auc_where_no_prompt_has_both_kinds():
    assert auc_within(["a", "b"], [0.1, 0.2], [True, False]) is None


def test_the_calibration_error_compares_means_by_bin():
    predictions, outcomes = torch.tensor([0.72, 0.78, 0.1, 1.3]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    # bin of 0.7: mean 0.75 against 1/2; bin of 0.1: 0.1 against 0; 1.3 is read as 1
    expected = (2 * 0.25 + 0.1 + 0.0) / 4
    assert calibration_error(calibration_sums(predictions, outcomes)) == pytest.approx(expected)


def test_sums_of_batches_add_up_to_those_of_the_whole():
    predictions, outcomes = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.0, 1.0, 1.0])
    parts = calibration_sums(predictions[:1], outcomes[:1]) + calibration_sums(predictions[1:], outcomes[1:])
    torch.testing.assert_close(parts, calibration_sums(predictions, outcomes))
