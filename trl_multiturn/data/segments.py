"""Token rows of several segments: cut to a length, and told from plain ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from ..segments import Branches, branches_of, check_branches, common_prefix, drop_segments
from .turns import branches_column


@dataclass(frozen=True)
class TokenRow:
    """One side of a row: tokens, which of them the policy sampled, and columns that are aligned with them.

    Attributes:
        prompt_ids, completion_ids, action_mask (`list[int]`): as in [`Trajectory`].
        branches (`list[list[int]]`): in columns of both; empty for a plain row.
        aligned (`dict[str, list]`): further columns, aligned with `completion_ids`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    action_mask: list[int]
    branches: list[list[int]]
    aligned: dict[str, list[Any]]

    @classmethod
    def read(
        cls,
        example: Mapping[str, Any],
        ids_column: str,
        actions: Sequence[int],
        made: Mapping[str, list[Any]],
        aligned_columns: Sequence[str] = (),
    ) -> TokenRow:
        """One side of an example.

        Args:
            example (`Mapping[str, Any]`): a token row.
            ids_column (`str`): of the side.
            actions (`list[int]`): which of its tokens the policy sampled.
            made (`Mapping[str, list]`): aligned columns that the example does not have.
            aligned_columns (`Sequence[str]`): aligned columns that it may have.

        Raises:
            `ValueError`: if its branches do not describe its tokens.
        """
        prompt_ids, ids = list(example["prompt_ids"]), list(example[ids_column] or [])
        branches = branches_of(example.get(branches_column(ids_column)))
        check_branches(branches, len(prompt_ids), len(prompt_ids) + len(ids))
        found = {name: list(example[name]) for name in aligned_columns if example.get(name) is not None}
        return cls(prompt_ids, ids, list(actions), branches, {**found, **made})

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def without_first(self, count: int) -> TokenRow:
        """The row without its first segments; what later ones read of them is context."""
        before, offset = self.prompt_ids + self.completion_ids, len(self.prompt_ids)
        row = drop_segments(self.branches, self.action_mask, len(self), count)
        start = row.prompt_length
        pairs = list(zip(row.ids, row.action_mask, strict=True))[start:]
        aligned = {
            # 0 on what has become context, and on what was the prompt
            name: [values[column - offset] if own else type(values[0])() for column, own in pairs]
            for name, values in self.aligned.items()
        }
        ids = [before[column] for column in row.ids]
        return TokenRow(ids[:start], ids[start:], row.action_mask[start:], row.branches, aligned)

    def with_prompt(self, length: int) -> TokenRow:
        """The row with only the first tokens of its prompt as prompt; the others begin its completion."""
        rest = self.prompt_ids[length:]
        aligned = {name: [type(v[0])() for _ in rest] + v if v else v for name, v in self.aligned.items()}
        mask = [0] * len(rest) + self.action_mask
        return TokenRow(self.prompt_ids[:length], rest + self.completion_ids, mask, self.branches, aligned)

    @staticmethod
    def share_prompt(rows: list[TokenRow]) -> list[int]:
        """Gives the sides of a row, in place, one prompt: what theirs have in common; returns it."""
        shared = min(common_prefix(rows[0].prompt_ids, row.prompt_ids) for row in rows)
        rows[:] = [row.with_prompt(shared) for row in rows]
        return rows[0].prompt_ids


def fit_segments(row: TokenRow, max_length: int) -> tuple[TokenRow, int]:
    """A row without as many of its first segments as do not fit `max_length`, and how many these are.

    The last segment stays, whatever its length.
    """
    fitted, count = row, 0
    while len(fitted) > max_length and count < len(row.branches):
        count += 1
        fitted = row.without_first(count)
    return fitted, count


def drop_empty_branches(dataset: Dataset | IterableDataset, ids_columns: Sequence[str]) -> Dataset | IterableDataset:
    """Rows without the columns of branches, where no row has any."""
    if isinstance(dataset, IterableDataset):
        return dataset
    columns = [name for name in map(branches_column, ids_columns) if name in dataset.column_names]
    if not columns or any(branches_of(value) for name in columns for value in _values(dataset, name)):
        return dataset
    return dataset.remove_columns(columns)


def _values(dataset: Dataset, name: str) -> Sequence[Branches | None]:
    return dataset.with_format(None)[name][:]
