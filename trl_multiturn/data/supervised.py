"""Rows for TRL's `SFTTrainer` in which only the policy's own tokens are labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..formats import Shapes, column_shapes
from ..messages.wording import AS_WRITTEN, RenderingSwitches
from ..segments import branches_of, split_segments
from .tokenization import read_messages, tokenize_trajectory
from .turns import choose_tokens


IGNORED = -100


def supervised_rows(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    num_proc: int | None = None,
    tool_dialect: str | None = None,
    write_reasoning: bool = False,
) -> Dataset | IterableDataset:
    """Turns trajectories into rows with `input_ids` and `labels`, which `SFTTrainer` takes as they are.

    TRL's `assistant_only_loss` does this for chat templates that carry `{% generation %}` markers; here any template
    does whose turns can be told apart, and the newline that templates print after a turn is not trained.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows with `messages` (or `conversations`), with `prompt` and `completion`, or token rows with `prompt_ids`,
            `completion_ids` and `action_mask`; optionally `tools` and `chat_template_kwargs`. Turns that a row flags
            (`"train": False` on a message, `turn_weights` 0) are no labels.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        num_proc (`int`, *optional*):
            Processes for a map-style dataset.
        tool_dialect (`str`, *optional*), write_reasoning (`bool`, *optional*, defaults to `False`):
            As in [`tokenize_trajectory`].

    Returns:
        The dataset with `input_ids` and `labels` (-100 outside the policy's tokens) alone. A trajectory that is more
        than one token sequence becomes a row for each.

    Raises:
        `ValueError`: if a row holds no assistant turn, or the chat template does not show what the policy sampled.
    """
    kwargs: dict[str, Any] = {"remove_columns": dataset.column_names}
    if isinstance(dataset, Dataset):
        kwargs |= {"num_proc": num_proc, "desc": "Labelling the policy's tokens"}
    fn_kwargs = {
        "processing_class": processing_class,
        "shapes": column_shapes(dataset),
        "rendering": RenderingSwitches(tool_dialect=tool_dialect, write_reasoning=write_reasoning),
    }
    return dataset.map(_label_batch, batched=True, with_indices=True, fn_kwargs=fn_kwargs, **kwargs)


def _label_batch(batch: Mapping[str, list[Any]], indices: list[int], **kwargs: Any) -> dict[str, list[list[int]]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    labeled = [each for row, index in zip(rows, indices, strict=True) for each in _label(row, index, **kwargs)]
    return {name: [each[name] for each in labeled] for name in ("input_ids", "labels")}


def _label(
    row: Mapping[str, Any],
    index: int,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None = None,
    rendering: RenderingSwitches = AS_WRITTEN,
) -> list[dict[str, list[int]]]:
    """The rows of [`supervised_rows`] that one row becomes: one for each of its sequences."""
    try:
        tokens = row if "completion_ids" in row else _tokenize(row, processing_class, shapes, rendering)
        mask = choose_tokens(tokens, "completion_ids", tokens["action_mask"])
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    if any(tokens.get(name) for name in ("images", "completion_images")):
        raise ValueError(
            f"Row {index}: it shows images, which rows of `input_ids` and `labels` cannot hold. Train with "
            "`SFTTrainer` on the messages themselves, or drop the row."
        )
    branches = branches_of(tokens.get("branches"))
    labeled = []
    for segment in split_segments(tokens["prompt_ids"], tokens["completion_ids"], mask, branches):
        pairs = zip(segment.completion_ids, segment.action_mask, strict=True)
        labels = [token if bit else IGNORED for token, bit in pairs]
        ids = segment.context_ids + segment.completion_ids
        labeled.append({"input_ids": ids, "labels": [IGNORED] * len(segment.context_ids) + labels})
    return labeled


def _tokenize(
    row: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    shapes: Shapes | None,
    rendering: RenderingSwitches,
) -> dict[str, list[Any]]:
    read = read_messages(row, processing_class, shapes)
    if "completion" not in read:
        raise ValueError(
            "the row is a pair, of which nobody says what is to be imitated. Pass one completion per row."
        )
    kwargs = {**rendering.arguments(), **read["chat_template_kwargs"]}
    return tokenize_trajectory(processing_class, read["prompt"], read["completion"], read["tools"], **kwargs)
