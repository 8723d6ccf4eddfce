"""Groups: the trajectories of one prompt, what each earned, and what the group earned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...data.row_checks import check_column, check_margin
from ...data.value_rows import DataCollatorForTrajectories


# Columns of whole rows that the collator lays out as tensors `(B,)`
ROW_COLUMNS = {
    "returns": torch.float32,
    "baseline": torch.float32,
    "reward_std": torch.float32,
    "group": torch.int64,
}


@dataclass
class DataCollatorForGroups(DataCollatorForTrajectories):
    """
    Data collator for trajectories that are compared with those of the same prompt.

    As [`DataCollatorForTrajectories`], and the columns `returns`, `baseline`, `reward_std` and `group` become tensors
    `(B,)`.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call([{k: v for k, v in row.items() if k not in ROW_COLUMNS} for row in examples])
        for name, dtype in ROW_COLUMNS.items():
            if name in examples[0]:
                output[name] = torch.tensor([row[name] for row in examples], dtype=dtype)
        return output


def with_groups(rows: Dataset) -> tuple[Dataset, dict[str, float]]:
    """
    The rows with `group`, `returns` and `reward_std`, and the counts of groups.

    Rows of a group have the same `prompt_id` (or the `prompt_index` that rollouts write) and the same prompt; without
    either column, the same prompt. `returns` are the sum of a row's rewards less its `margin`: how much luckier its
    observations were than expected. `reward_std` is the standard deviation of the returns in the group.

    Args:
        rows ([`~datasets.Dataset`]): as [`finish_rows`] leaves them.

    Raises:
        `ValueError`: if a margin is no finite number.
    """
    margins = _margins(rows)
    returns = np.array([sum(paid) for paid in rows["token_rewards"]], np.float64) - margins
    groups = group_numbers(rows)
    counts = np.bincount(groups)
    means = np.bincount(groups, weights=returns) / counts
    variances = np.bincount(groups, weights=(returns - means[groups]) ** 2) / counts
    for name, column in (
        ("group", groups),
        ("returns", returns),
        ("reward_std", np.sqrt(variances)[groups]),
    ):
        rows = rows.add_column(name, column)  # type: ignore[call-arg, arg-type]  # takes arrays, too
    statistics: dict[str, float] = {
        "data/groups": len(counts),
        "data/largest_group": int(counts.max()),
        "data/rows_alone_in_group": int((counts == 1).sum()),
    }
    return rows, statistics


def group_numbers(rows: Dataset) -> np.ndarray:
    """The number of each row's group, `(N,)` int64, in the order in which groups appear."""
    identity = next((name for name in ("prompt_id", "prompt_index") if name in rows.column_names), None)
    identities = rows[identity] if identity else [None] * len(rows)
    numbers: dict[Any, int] = {}
    keys = ((given, tuple(prompt)) for given, prompt in zip(identities, rows["prompt_ids"], strict=True))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _margins(rows: Dataset) -> np.ndarray:
    if "margin" not in rows.column_names:
        return np.zeros(len(rows))
    check_column(rows["margin"], check_margin)
    return np.array([margin or 0.0 for margin in rows["margin"]], np.float64)
