"""Unpaired rows: pairs taken apart with their labels interleaved, and the mismatched completions of KTO's KL term."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from ..formats import CONVERSATIONS, NESTED, TOOLS
from ..messages.wording import AS_WRITTEN, RenderingSwitches
from ..segments import behind_prompt, branches_of
from .columns import list_lengths
from .tokenization import row_tokenization_kwargs, tokenize_numbered_row, tokenize_pair_apart


_MESSAGE_COLUMNS = {"prompt", "chosen", "rejected", "chat_template_kwargs", *CONVERSATIONS, *TOOLS, *NESTED}


# What a completion takes with it to another prompt
_ROTATED = ("completion_ids", "action_mask", "branches", "completion_images", "completion_image_tokens")


def unpair_interleaved(
    dataset: Dataset | IterableDataset, desc: str | None = None, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Turns preference rows into twice as many unpaired rows whose labels alternate.

    `trl.unpair_preference_dataset` writes all winners of a block before its losers, so that a trainer which reads rows
    in order sees batches of one label. Here labels alternate, and the loser that follows a winner belongs to another
    prompt: KTO scores each prompt with its neighbour's completion, which must not be an answer to the same prompt.
    """
    map_kwargs: dict[str, Any] = {"num_proc": num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}
    columns = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(_unpair_batch, batched=True, remove_columns=columns, **map_kwargs)


def tokenize_interleaved(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    all_tokens: bool = False,
    rendering: RenderingSwitches = AS_WRITTEN,
    desc: str | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenizes preference rows of messages into twice as many unpaired token rows, in the order of
    [`unpair_interleaved`]. Tokens are taken apart, not messages, whose forms may differ from row to row."""
    map_kwargs: dict[str, Any] = {"num_proc": num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}
    options = all_tokens, rendering
    fn_kwargs = row_tokenization_kwargs(dataset, processing_class, tokenize_pair_apart, *options)
    columns = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(
        _tokenize_batch, batched=True, with_indices=True, fn_kwargs=fn_kwargs, remove_columns=columns, **map_kwargs
    )


def _tokenize_batch(batch: dict[str, list[Any]], indices: list[int], **kwargs: Any) -> dict[str, list[Any]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    pairs = [tokenize_numbered_row(row, index, **kwargs) for row, index in zip(rows, indices, strict=True)]
    kept = {key: values for key, values in batch.items() if key not in _MESSAGE_COLUMNS}
    taken_apart = _unpair_batch(kept | {side: [pair[side] for pair in pairs] for side in ("chosen", "rejected")})
    sides = taken_apart.pop("completion")
    return taken_apart | {name: [side[name] for side in sides] for name in sides[0]}


def _unpair_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    size = len(batch["chosen"])
    # Two rows further on: then neither neighbour of a row shares its prompt
    order = [(i, True) if side == 0 else ((i + 2) % size, False) for i in range(size) for side in range(2)]
    output = {key: [values[i] for i, _ in order] for key, values in batch.items() if key not in ("chosen", "rejected")}
    output["completion"] = [batch["chosen" if label else "rejected"][i] for i, label in order]
    output["label"] = [label for _, label in order]
    return output


def add_mismatched_completions(dataset: Dataset | IterableDataset, batch_size: int) -> Dataset | IterableDataset:
    """Gives each row the completion of the row before it in its batch: `KL_completion_ids` with its `KL_action_mask`.

    Within each batch the completions are rotated by one, ids and mask together, so that the mismatched completions of
    a batch are the very completions of that batch (KTO, section 4.1). A last batch of one row takes the completion of
    the row before it; a streamed dataset, which cannot look back, pairs such a row with itself. Completions of several
    segments are put behind the other prompt with all of them (`KL_branches`; see [`behind_prompt`]).
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(_rotate, batched=True, batch_size=batch_size)
    branching = "branches" in dataset.column_names
    count = len(dataset)
    order = []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        order += [start + size - 1, *range(start, start + size - 1)] if size > 1 else [max(start - 1, 0)]
    columns = [name for name in _ROTATED if name in dataset.column_names]
    dataset = dataset.remove_columns([name for name in map(_kl_name, columns) if name in dataset.column_names])
    rotated = dataset.select_columns(columns).select(order)
    renamed = rotated.rename_columns({name: _kl_name(name) for name in columns})
    if branching:
        lengths = list_lengths(dataset, "prompt_ids").tolist()
        fn_kwargs = {"own": [lengths[i] for i in order], "other": lengths}
        renamed = renamed.map(_move_branches, with_indices=True, fn_kwargs=fn_kwargs)
    return concatenate_datasets([dataset, renamed], axis=1)


def _rotate(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    names = [name for name in _ROTATED if name in batch]
    rotated = {_kl_name(name): [batch[name][-1], *batch[name][:-1]] for name in names}
    if "branches" in batch:
        other = list(map(len, batch["prompt_ids"]))
        own = [other[-1], *other[:-1]]
        rows = zip(rotated["KL_branches"], own, other, strict=True)
        rotated["KL_branches"] = [behind_prompt(branches_of(branches), *lengths) for branches, *lengths in rows]
    return rotated


def _move_branches(row: dict[str, Any], index: int, own: list[int], other: list[int]) -> dict[str, Any]:
    return {"KL_branches": behind_prompt(branches_of(row["KL_branches"]), own[index], other[index])}


def _kl_name(column: str) -> str:
    return f"KL_{column}"
