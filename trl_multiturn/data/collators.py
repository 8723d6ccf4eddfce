"""TRL's preference collators, with the mask of the policy's own tokens instead of "everything after the prompt"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import _upstream
from ..formats import sequence_images
from ..images.vision import Vision
from ..segments import branches_of
from .images.fitting import fit_mismatched_images
from .turns import branches_column


@dataclass
class DataCollatorForMultiTurnPreference(_upstream.DataCollatorForPreference):
    """
    Data collator for preference rows whose completions hold several turns.

    As [`~trl.trainer.dpo_trainer.DataCollatorForPreference`], whose arguments it takes, except that `completion_mask`
    is 1 on the tokens of `chosen_action_mask` and `rejected_action_mask` (lists of 0 and 1, aligned with `chosen_ids`
    and `rejected_ids`). Rows without these columns are collated as TRL does. A `margin` column (nats times beta: it is
    added to the argument of the sigmoid) becomes a tensor `(B,)`; a missing margin is 0. Where rows are more than one
    token sequence (`chosen_branches`, `rejected_branches`; see `trl_multiturn.segments`), `token_parents` of the shape
    of `input_ids` is the column that each token continues.

    With `vision` the images of the rows (`images`, `chosen_images`, `rejected_images`), whose tokens the ids hold
    already, become what the processor makes of them (`pixel_values`, …), those of chosen sequences first.

    Example:

    ```python
    >>> collator = DataCollatorForMultiTurnPreference(pad_token_id=0)
    >>> examples = [
    ...     {
    ...         "prompt_ids": [1, 2],
    ...         "chosen_ids": [3, 4, 5],
    ...         "chosen_action_mask": [1, 0, 1],
    ...         "rejected_ids": [6],
    ...         "rejected_action_mask": [1],
    ...     }
    ... ]
    >>> collator(examples)
    {'input_ids': tensor([[1, 2, 3, 4, 5],
                          [1, 2, 6, 0, 0]]),
     'attention_mask': tensor([[1, 1, 1, 1, 1],
                               [1, 1, 1, 0, 0]]),
     'completion_mask': tensor([[0, 0, 1, 0, 1],
                                [0, 0, 1, 0, 0]])}
    ```
    """

    vision: Vision | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        masks = [
            _mask(example, f"{side}_ids", f"{side}_action_mask")
            for side in ("chosen", "rejected")
            for example in examples
        ]
        if self.max_length is not None:
            keep_start = self.truncation_mode == "keep_start"
            masks = [mask[: self.max_length] if keep_start else mask[-self.max_length :] for mask in masks]
        output["completion_mask"] = _fill(output["completion_mask"], masks)
        rows = [(example, f"{side}_ids") for side in ("chosen", "rejected") for example in examples]
        _add_parents(output, "", rows, cuts_start=self.truncation_mode == "keep_end")
        if self.vision is not None:
            images = [sequence_images(row, f"{side}_ids") for side in ("chosen", "rejected") for row in examples]
            output |= self.vision.inputs(output["input_ids"], images)
        if "margin" in examples[0]:
            output["margin"] = torch.tensor([float(example["margin"] or 0.0) for example in examples])
        return output


@dataclass
class DataCollatorForMultiTurnUnpairedPreference(_upstream.DataCollatorForUnpairedPreference):
    """
    Data collator for unpaired rows whose completions hold several turns.

    As [`~trl.trainer.kto_trainer.DataCollatorForUnpairedPreference`], whose arguments it takes, except that
    `completion_mask` is 1 on the tokens of `action_mask` (aligned with `completion_ids`) and `KL_completion_mask` on
    those of `KL_action_mask` (aligned with `KL_completion_ids`, the completion of another row). Rows without these
    columns are collated as TRL does. Where rows are more than one token sequence (`branches`, `KL_branches`),
    `token_parents` and `KL_token_parents` are the column that each token continues.

    With `vision` the images of the rows (`images`, `completion_images`), whose tokens the ids hold already, become
    what the processor makes of them (`pixel_values`, …). Where mismatched completions show images, too
    (`KL_completion_images`), theirs follow under the same names with `KL_` before them.

    Example:

    ```python
    >>> collator = DataCollatorForMultiTurnUnpairedPreference(pad_token_id=0)
    >>> collator([{"prompt_ids": [1], "completion_ids": [2, 3, 4], "action_mask": [1, 0, 1], "label": True}])
    {'input_ids': tensor([[1, 2, 3, 4]]),
     'attention_mask': tensor([[1, 1, 1, 1]]),
     'completion_mask': tensor([[0, 1, 0, 1]]),
     'label': tensor([True])}
    ```
    """

    vision: Vision | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.vision is not None and "KL_completion_ids" in examples[0]:
            examples = [fit_mismatched_images(row, self.max_length, self.vision.token_ids) for row in examples]
        output = super().torch_call(examples)
        for prefix in ("", "KL_"):
            if f"{prefix}completion_mask" not in output:
                continue
            masks = [_mask(example, f"{prefix}completion_ids", f"{prefix}action_mask") for example in examples]
            masks = [mask[: self.max_length] for mask in masks]
            output[f"{prefix}completion_mask"] = _fill(output[f"{prefix}completion_mask"], masks)
            _add_parents(output, prefix, [(example, f"{prefix}completion_ids") for example in examples])
        if self.vision is not None:
            output |= self._images(self.vision, output, examples)
        return output

    @staticmethod
    def _images(vision: Vision, output: dict[str, Any], examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = [sequence_images(row, "completion_ids") for row in examples]
        added = vision.inputs(output["input_ids"], images)
        if "KL_input_ids" not in output:
            return added
        others = [sequence_images(row, "KL_completion_ids") for row in examples]
        if any(row.get("KL_completion_images") or row.get("completion_images") for row in examples):
            mismatched = vision.inputs(output["KL_input_ids"], others)
        else:  # only prompts show images: the same pixels
            mismatched = vision.token_types(output["KL_input_ids"])
        return added | {f"KL_{name}": value for name, value in mismatched.items()}


def _mask(example: dict[str, Any], ids_column: str, mask_column: str) -> list[int]:
    mask = example.get(mask_column)
    return [0] * len(example["prompt_ids"]) + list([1] * len(example[ids_column]) if mask is None else mask)


def _add_parents(
    output: dict[str, Any], prefix: str, rows: list[tuple[dict[str, Any], str]], cuts_start: bool = False
) -> None:
    """Adds `token_parents` to a batch, if one of its rows (an example and the column of its ids) branches."""
    branches = [branches_of(example.get(branches_column(ids))) for example, ids in rows]
    if not any(branches):
        return
    ids = output[f"{prefix}input_ids"]
    if cuts_start and any(len(each["prompt_ids"]) + len(each[column]) > ids.shape[1] for each, column in rows):
        raise ValueError(
            "A row of several segments is longer than `max_length`, and cutting its start would tear them apart. Let "
            "the trainer prepare the rows: it drops whole segments."
        )
    parents = torch.arange(-1, ids.shape[1] - 1).repeat(len(ids), 1)
    for index, row in enumerate(branches):
        for start, parent in row:
            if start < ids.shape[1]:
                parents[index, start] = parent
    output[f"{prefix}token_parents"] = parents


def _fill(like: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Right-padded rows in a tensor of the shape and type of `like`."""
    output = torch.zeros_like(like)
    for index, row in enumerate(rows):
        output[index, : len(row)] = torch.tensor(row, dtype=like.dtype)
    return output
