"""How well values know outcomes: whether they tell right from wrong within a prompt, and whether they are chances."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor


NUM_BINS = 10


def auc_within(groups: Iterable[Hashable], values: Sequence[float], labels: Sequence[bool]) -> float | None:
    """
    The chance that of a good and a bad trajectory of one prompt the good one has the higher value; ties count half.

    All such pairs of all prompts weigh alike. Which prompts are hard does not enter, as it would in an AUC over all
    trajectories: a search chooses among trajectories of one prompt.

    Args:
        groups (`Iterable[Hashable]`): the prompt of each trajectory.
        values (`Sequence[float]`), labels (`Sequence[bool]`): of each trajectory.

    Returns:
        `float`, or `None` where no prompt has both kinds.
    """
    by_group: dict[Hashable, tuple[list[float], list[float]]] = {}
    for group, value, label in zip(groups, values, labels, strict=True):
        by_group.setdefault(group, ([], []))[bool(label)].append(value)
    wins, pairs = 0.0, 0
    for bad, good in by_group.values():
        if bad and good:
            difference = torch.tensor(good).unsqueeze(1) - torch.tensor(bad)
            wins += ((difference > 0).double() + 0.5 * (difference == 0).double()).sum().item()
            pairs += difference.numel()
    return wins / pairs if pairs else None


def calibration_sums(predictions: Tensor, outcomes: Tensor) -> Tensor:
    """
    What [`calibration_error`] needs of some predictions; the sums of several batches are added.

    Args:
        predictions (`Tensor`): `(N,)`, read as chances (clamped to [0, 1]).
        outcomes (`Tensor`): `(N,)`, of 1 and 0.

    Returns:
        `Tensor`: `(3, NUM_BINS)`: count, sum of predictions and sum of outcomes, by equal bins of the prediction.
    """
    chances = predictions.detach().float().clamp(0, 1)
    bins = (chances * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    sums = torch.zeros(3, NUM_BINS, device=chances.device)
    for row, values in zip(sums, (torch.ones_like(chances), chances, outcomes.float()), strict=True):
        row.index_add_(0, bins, values)
    return sums


def calibration_error(sums: Tensor) -> float:
    """The expected calibration error: how far the mean prediction of a bin is from its share of good outcomes, on
    average over predictions."""
    counts, predicted, good = sums
    return ((predicted - good).abs().sum() / counts.sum().clamp(min=1)).item()
