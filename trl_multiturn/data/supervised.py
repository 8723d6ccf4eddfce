"""Rows for TRL's `SFTTrainer` in which only the policy's own tokens are labels."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .tokenization import tokenize_trajectory


IGNORED = -100


def supervised_rows(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Turns trajectories into rows with `input_ids` and `labels`, which `SFTTrainer` takes as they are.

    TRL's `assistant_only_loss` does this for chat templates that carry `{% generation %}` markers; here any template
    does whose turns can be told apart, and the newline that templates print after a turn is not trained.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows with `messages`, with `prompt` and `completion`, or token rows with `prompt_ids`, `completion_ids` and
            `action_mask`; optionally `tools` and `chat_template_kwargs`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        num_proc (`int`, *optional*):
            Processes for a map-style dataset.

    Returns:
        The dataset with `input_ids` and `labels` (-100 outside the policy's tokens) alone.

    Raises:
        `ValueError`: if a row holds no assistant turn, or the chat template does not show what the policy sampled.
    """
    kwargs: dict[str, Any] = {"remove_columns": dataset.column_names}
    if isinstance(dataset, Dataset):
        kwargs |= {"num_proc": num_proc, "desc": "Labelling the policy's tokens"}
    return dataset.map(supervised_row, with_indices=True, fn_kwargs={"processing_class": processing_class}, **kwargs)


def supervised_row(
    row: dict[str, Any], index: int, processing_class: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, list[int]]:
    """One row of [`supervised_rows`]."""
    if "completion_ids" not in row:
        prompt, completion = _split(row, index)
        kwargs = row.get("chat_template_kwargs") or {}
        try:
            row = tokenize_trajectory(processing_class, prompt, completion, row.get("tools"), **kwargs)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
    prompt_ids, completion_ids = row["prompt_ids"], row["completion_ids"]
    labels = [token if bit else IGNORED for token, bit in zip(completion_ids, row["action_mask"], strict=True)]
    return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORED] * len(prompt_ids) + labels}


def _split(row: dict[str, Any], index: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if "messages" not in row:
        return row["prompt"], row["completion"]
    messages = row["messages"]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise ValueError(f"Row {index}: no message is an assistant's, so there is nothing to imitate. Drop the row.")
    return messages[:first], messages[first:]
