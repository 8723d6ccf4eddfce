"""Rows that fit `max_length` and still train something: cut where a turn ends, dropped where nothing is left.

A row cut by a collator can lose its last turns, every trained token, or the difference between its two sides, and
nobody is told. Here it is cut before training, at the end of a turn where one fits, and every row that would carry no
gradient is dropped and counted. A row of several segments loses whole segments from its front instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..errors import NoRowsLeftError as NoRowsLeftError
from ..formats import images_of
from .segments import TokenRow, drop_empty_branches, fit_segments
from .turns import TrainOnTurns, branches_column, choose_tokens, columns_of_turns


PREFERENCE_SIDES = (("chosen_ids", "chosen_action_mask"), ("rejected_ids", "rejected_action_mask"))
UNPAIRED_SIDES = (("completion_ids", "action_mask"),)

_STATUS, _LENGTH = "_fit_status", "_fit_length"
_SEVERITY = ["whole", "cut_at_segment", "cut_at_turn", "cut_inside_turn", "untrained"]


def fit_rows(
    dataset: Dataset | IterableDataset,
    sides: tuple[tuple[str, str], ...],
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    mask_observations: bool = True,
    train_on_turns: TrainOnTurns = "all",
    aligned_columns: tuple[str, ...] = (),
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """Chooses the trained tokens of token rows, cuts the rows to `max_length` and drops those that train nothing.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt_ids` and the columns of `sides`.
        sides (`tuple[tuple[str, str], ...]`):
            `(ids, mask)` column names: `PREFERENCE_SIDES` or `UNPAIRED_SIDES`.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion together. With `truncation_mode="keep_start"` a longer completion
            is cut after its last turn that fits, or inside its first turn where none does. With `"keep_end"` the
            collator cuts, and rows are only checked here. A row of several segments, whose tokens count once however
            many segments read them, loses its first segments, and is cut only where the last one alone is too long.
        mask_observations (`bool`, *optional*, defaults to `True`):
            Whether only the policy's tokens train. Otherwise every completion token does, and no turn ends are known.
        train_on_turns (`"all"`, `"last"` or `"answer"`, *optional*, defaults to `"all"`):
            Whether all turns of the policy train, only its last, or only those that call no tool; of these, those to
            which the rows give the weight 1 (`turn_weights`). The choice comes before the cut.
        aligned_columns (`tuple[str, ...]`, *optional*):
            Further per-token columns of the completion, cut with it (e.g. `behavior_logps`).

    Returns:
        The rows, and for a [`~datasets.Dataset`] its counts under `data/…` (empty for a streamed one).

    Raises:
        `ValueError`: if a mask is not aligned with its ids, or no row is left.
    """
    kwargs = dict(
        sides=sides,
        max_length=max_length,
        keep_start=truncation_mode == "keep_start",
        mask_observations=mask_observations,
        train_on_turns=train_on_turns,
        aligned_columns=aligned_columns,
    )
    streamed = isinstance(dataset, IterableDataset)
    map_kwargs: dict[str, Any] = {} if streamed else {"num_proc": num_proc, "desc": desc}
    # What they say is in the masks from here on
    present = dataset.column_names or list(next(iter(dataset), {}))
    turns = [name for ids, _ in sides for name in columns_of_turns(ids) if name in present]
    dataset = dataset.map(_fit_row, with_indices=True, fn_kwargs=kwargs, remove_columns=turns, **map_kwargs)
    stats: dict[str, float] = {}
    if not streamed:
        stats = _statistics(dataset, max_length)
        map_kwargs["desc"] = None
        if stats["data/rows_dropped"] == len(dataset):
            raise NoRowsLeftError(_nothing_left(stats, max_length))
    if streamed or stats["data/rows_dropped"]:
        dataset = dataset.filter(_is_kept, input_columns=[_STATUS], **map_kwargs)
    return drop_empty_branches(dataset.remove_columns([_STATUS, _LENGTH]), [ids for ids, _ in sides]), stats


def completion_cut(mask: list[int], room: int) -> int:
    """Tokens of a completion to keep in `room`: up to the last end of a turn that fits, else `room`.

    Example:

    ```python
    >>> completion_cut([1, 1, 0, 0, 1, 1], room=5)  # the second turn does not fit
    2
    >>> completion_cut([1, 1, 1], room=2)  # not even the first turn does
    2
    ```
    """
    if len(mask) <= room:
        return len(mask)
    room = max(room, 0)
    for end in range(room, 0, -1):
        if mask[end - 1] and not mask[end]:
            return end
    return room


def _is_kept(status: str) -> bool:
    return status not in ("untrained", "identical")


def _fit_row(
    example: dict[str, Any],
    index: int,
    sides: tuple[tuple[str, str], ...],
    max_length: int | None,
    keep_start: bool,
    mask_observations: bool,
    train_on_turns: TrainOnTurns,
    aligned_columns: tuple[str, ...],
) -> dict[str, Any]:
    rows, dropped = [], 0
    try:
        for ids_column, mask_column in sides:
            row = _read_side(example, ids_column, mask_column, train_on_turns, mask_observations, aligned_columns)
            rows.append(row)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    output: dict[str, Any] = {_LENGTH: max(map(len, rows))}
    for side, row in enumerate(rows):
        if row.branches and max_length is not None:
            rows[side], count = fit_segments(row, max_length)
            dropped += count
    if dropped:
        output["prompt_ids"] = TokenRow.share_prompt(rows)
    statuses, sequences = [], []
    for row, (ids_column, mask_column) in zip(rows, sides, strict=True):
        prompt, ids, mask = row.prompt_ids, row.completion_ids, row.aligned.pop(mask_column)
        turns = row.action_mask if mask_observations else mask
        kept, status = _fit_side(len(prompt), turns, max_length, keep_start)
        window = slice(None) if keep_start or max_length is None else slice(-max_length, None)
        # The first token of a sequence is predicted from nothing, so it never enters a loss
        trains = any(([0] * len(prompt) + mask[:kept])[window][1:])
        statuses.append(status if trains else "untrained")
        shown = images_of(example, ids_column.removesuffix("_ids"))
        sequences.append(((prompt + ids[:kept])[window], mask[:kept], row.branches, shown))
        output[ids_column], output[mask_column] = ids[:kept], mask[:kept]
        output |= {name: values[:kept] for name, values in row.aligned.items()}
        if branches_column(ids_column) in example:
            output[branches_column(ids_column)] = row.branches
    if dropped and "whole" in statuses:
        statuses[statuses.index("whole")] = "cut_at_segment"
    output[_STATUS] = max(statuses, key=_SEVERITY.index)
    if output[_STATUS] != "untrained" and len(sides) == 2 and sequences[0] == sequences[1]:
        output[_STATUS] = "identical"
    return output


def _read_side(
    example: dict[str, Any],
    ids_column: str,
    mask_column: str,
    train_on_turns: TrainOnTurns,
    mask_observations: bool,
    aligned_columns: tuple[str, ...],
) -> TokenRow:
    """One side of a row, whose `aligned` has the mask of what trains under the name of its mask column."""
    ids, actions = example[ids_column] or [], list(example[mask_column] or [])
    if len(ids) != len(actions):
        raise ValueError(
            f"`{mask_column}` has {len(actions)} entries but `{ids_column}` has {len(ids)}, so it is unknown which "
            "tokens are trained. Write one mask entry per token."
        )
    mask = choose_tokens(
        example, ids_column, actions, train_on_turns=train_on_turns, mask_observations=mask_observations
    )
    row = TokenRow.read(example, ids_column, actions, {mask_column: mask}, aligned_columns)
    if row.branches and not mask_observations:
        raise ValueError(
            "the trajectory is more than one token sequence, and `mask_observations=False` would train what later "
            "sequences read again. Train with `mask_observations=True`."
        )
    return row


def _fit_side(prompt_length: int, actions: list[int], max_length: int | None, keep_start: bool) -> tuple[int, str]:
    """Completion tokens to keep, and what that did to the side. Turns end where `actions` has a 1 before a 0."""
    if max_length is None or prompt_length + len(actions) <= max_length:
        return len(actions), "whole"
    if not keep_start:
        return len(actions), "cut_inside_turn"
    kept = completion_cut(actions, max_length - prompt_length)
    return kept, "cut_at_turn" if kept and actions[kept - 1] and not actions[kept] else "cut_inside_turn"


def _statistics(dataset: Dataset, max_length: int | None) -> dict[str, float]:
    statuses = dataset.with_format(None)[_STATUS][:]
    lengths = dataset.with_format(None)[_LENGTH][:]
    counts = {status: statuses.count(status) for status in set(statuses)}
    dropped = counts.get("untrained", 0) + counts.get("identical", 0)
    cut_segments = {"data/rows_cut_at_segment": counts["cut_at_segment"]} if "cut_at_segment" in counts else {}
    return {
        "data/rows": len(statuses) - dropped,
        "data/rows_dropped": dropped,
        "data/rows_dropped_untrained": counts.get("untrained", 0),
        "data/rows_dropped_identical": counts.get("identical", 0),
        "data/rows_cut_at_turn": counts.get("cut_at_turn", 0),
        "data/rows_cut_inside_turn": counts.get("cut_inside_turn", 0),
        "data/length_p95": float(np.percentile(lengths, 95)) if lengths else 0.0,
        **cut_segments,
    }


def _nothing_left(stats: dict[str, float], max_length: int | None) -> str:
    untrained, identical = stats["data/rows_dropped_untrained"], stats["data/rows_dropped_identical"]
    return (
        f"No row is left to train on: of {untrained + identical} rows, {untrained} have no token sampled by the "
        f"policy within `max_length={max_length}` on one side, and the two sides of {identical} are identical "
        f"there (95th percentile of lengths: {stats['data/length_p95']:.0f} tokens). Raise `max_length` or shorten "
        "the prompts; where that is not it, see that completions hold turns with the role `assistant`."
    )
