"""Rows of whole trajectories with rewards, for trainers that hold a value model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..formats import find_reward
from ..steps import StepDelimiter, step_ids
from .collators import DataCollatorForMultiTurnUnpairedPreference
from .segments import TokenRow, drop_empty_branches, fit_segments
from .truncation import NoRowsLeftError
from .turns import TURN_COLUMNS, TrainOnTurns, choose_tokens


# Per-token columns of a completion that the collator lays out beside `input_ids`
ALIGNED_COLUMNS = {
    "token_rewards": torch.float32,
    "behavior_logps": torch.float32,
    "ref_logps": torch.float32,
    "step_ids": torch.int64,
}


_SHORTENED = "_dropped_segments"
_LARGEST_LOGP = 1e-2  # a little above 0: half-precision engines round


@dataclass
class DataCollatorForTrajectories(DataCollatorForMultiTurnUnpairedPreference):
    """
    Data collator for trajectories with rewards.

    As [`DataCollatorForMultiTurnUnpairedPreference`], and `reward` becomes a tensor `(B,)`. The columns
    `token_rewards`, `behavior_logps`, `ref_logps` and `step_ids` (lists aligned with `completion_ids`) become tensors
    `(B, L)` beside `input_ids`, 0 on the prompt and on padding. Rows must fit `max_length`: a trajectory that is cut
    has no outcome.

    Example:

    ```python
    >>> collator = DataCollatorForTrajectories(pad_token_id=0)
    >>> row = {"prompt_ids": [1], "completion_ids": [2, 3, 4], "action_mask": [1, 0, 1], "label": True, "reward": 1.0}
    >>> collator([row | {"token_rewards": [0.5, 0.0, 1.0]}])
    {'input_ids': tensor([[1, 2, 3, 4]]),
     'attention_mask': tensor([[1, 1, 1, 1]]),
     'completion_mask': tensor([[0, 1, 0, 1]]),
     'label': tensor([True]),
     'reward': tensor([1.]),
     'token_rewards': tensor([[0.0000, 0.5000, 0.0000, 1.0000]])}
    ```
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # The parent reads `ref_logps` as one number per row
        output = super().torch_call([{k: v for k, v in row.items() if k not in ALIGNED_COLUMNS} for row in examples])
        output["reward"] = torch.tensor([float(row["reward"]) for row in examples])
        for name, dtype in ALIGNED_COLUMNS.items():
            if name not in examples[0]:
                continue
            output[name] = torch.zeros(output["input_ids"].shape, dtype=dtype)
            for index, row in enumerate(examples):
                start = len(row["prompt_ids"])
                output[name][index, start : start + len(row[name])] = torch.tensor(row[name], dtype=dtype)
        return output


def finish_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    step_delimiter: StepDelimiter | None = None,
    train_on_turns: TrainOnTurns = "all",
    binary_outcomes: bool = False,
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """
    Give token rows the reward columns that [`DataCollatorForTrajectories`] reads, and drop what cannot train.

    A row's outcome is `reward`, or 1 and 0 for its `label`; it is paid at the last action, on top of `turn_rewards`
    (one per assistant turn, paid at the turn's last action) and of `process_rewards` (one per token). Rows longer than
    `max_length` are dropped, never cut: the loss of every state sums up to the end of the trajectory. Rows of several
    segments lose as many of the first ones as do not fit, which leaves the later states as they are.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt_ids`, `completion_ids`, `action_mask`, and `reward` or `label`; optionally
            `turn_rewards`, `process_rewards`, `behavior_logps`, `ref_logps`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): reads step delimiters.
        max_length (`int`, *optional*): most tokens of prompt and completion together.
        step_delimiter (`str`, *optional*): adds `step_ids`; absent where nothing reads them.
        train_on_turns (`"all"`, `"last"` or `"answer"`, *optional*, defaults to `"all"`): which of the policy's turns
            are actions, of those to which the rows give the weight 1 (`turn_weights`). The others are context, and
            what they earned is paid at the last action before them.
        binary_outcomes (`bool`, *optional*, defaults to `False`): whether rewards must be 1 or 0, for values learned
            by classification.

    Returns:
        The rows, and for a [`~datasets.Dataset`] its counts under `data/…` (empty for a streamed one).

    Raises:
        `ValueError`: if a row has no prompt or no outcome, a column is not aligned with its tokens or holds what is no
            number at an action, or no row is left.
    """
    streamed = isinstance(dataset, IterableDataset)
    map_kwargs = {} if streamed else {"num_proc": num_proc, "desc": desc}
    fn_kwargs = {
        "tokenizer": tokenizer,
        "step_delimiter": step_delimiter,
        "train_on_turns": train_on_turns,
        "binary_outcomes": binary_outcomes,
        "max_length": max_length,
    }
    # What they say is in the masks from here on
    present = dataset.column_names or list(next(iter(dataset), {}))
    turns = [name for name in TURN_COLUMNS if name in present]
    dataset = dataset.map(_finish_row, with_indices=True, fn_kwargs=fn_kwargs, remove_columns=turns, **map_kwargs)
    stats: dict[str, float] = {}
    if not streamed:
        dataset, shortened = _count_shortened(drop_empty_branches(dataset, ["completion_ids"]))
        lengths = [len(p) + len(c) for p, c in zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)]
        too_long = [max_length is not None and length > max_length for length in lengths]
        untrained = [not any(mask) and not long for mask, long in zip(dataset["action_mask"], too_long, strict=True)]
        dropped = sum(too_long) + sum(untrained)
        stats = {
            "data/rows": len(dataset) - dropped,
            "data/rows_dropped_too_long": sum(too_long),
            "data/rows_dropped_untrained": sum(untrained),
            **({"data/rows_cut_at_segment": shortened} if shortened else {}),
        }
        if len(dataset) and dropped == len(dataset):
            raise NoRowsLeftError(
                f"No row is left to train on: of {dropped} rows, {sum(too_long)} are longer than "
                f"`max_length={max_length}` (the longest: {max(lengths)} tokens) and {sum(untrained)} no token "
                "sampled by the policy. Raise `max_length`, or check the masks."
            )
        if not dropped:
            return dataset, stats
    keep_kwargs = {} if streamed else {"num_proc": num_proc}
    return dataset.filter(_can_train, fn_kwargs={"max_length": max_length}, **keep_kwargs), stats


def outcome(example: dict[str, Any], index: int) -> float:
    """The row's terminal reward: `reward`, or its `label` as 1 or 0."""
    reward, label = find_reward(example), example.get("label")
    if reward is None and label is None:
        raise ValueError(
            f"Row {index}: neither `reward` nor `label` is set, so the trajectory has no outcome to learn from. Give "
            "it one, or drop it: an undecided trajectory is not a failed one."
        )
    if reward is None and not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(
            f"Row {index}: the label is {label!r}, but it says whether the trajectory is good (True or 1) or not "
            "(False or 0). Pass one of these, or a number as `reward`."
        )
    try:
        reward = float(label if reward is None else reward)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Row {index}: the reward is {reward!r}, but an outcome is one number.") from error
    if not math.isfinite(reward):
        raise ValueError(f"Row {index}: the reward is {reward}, which no value can regress to. Drop or mend the row.")
    return reward


def _finish_row(
    example: dict[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    step_delimiter: StepDelimiter | None,
    train_on_turns: TrainOnTurns,
    binary_outcomes: bool,
    max_length: int | None,
) -> dict[str, Any]:
    if not example["prompt_ids"]:
        raise ValueError(
            f"Row {index}: `prompt_ids` is empty, so the completion's first token is predicted from nothing: it has "
            "no log-probability and its state no value. Begin the prompt with at least one token (e.g. the "
            "tokenizer's `bos_token_id`), or drop the row."
        )
    count = len(example["completion_ids"])
    for name in ("action_mask", "behavior_logps", "ref_logps", "process_rewards"):
        if name in example and (example[name] is None or len(example[name]) != count):
            entries = "no value" if example[name] is None else f"{len(example[name])} entries"
            raise ValueError(
                f"Row {index}: `{name}` has {entries} but `completion_ids` has {count}, so it is unknown which token "
                f"each belongs to. Write one entry per token, or remove the column `{name}` from all rows."
            )
    sampled = [int(bool(x)) for x in example["action_mask"]]
    try:
        mask = choose_tokens(example, "completion_ids", sampled, train_on_turns=train_on_turns)
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    _refuse_numbers(example, mask, sampled, index)
    reward = outcome(example, index)
    if binary_outcomes and reward not in (0.0, 1.0):
        raise ValueError(
            f"Row {index}: the reward is {reward}, but `value_objective='classification'` learns the chance of the "
            "reward 1 against 0. Give the rows rewards of 1 and 0, or use `value_objective='regression'`."
        )
    label = example.get("label")
    output: dict[str, Any] = {"reward": reward, "label": reward > 0 if label is None else bool(label)}
    token_rewards = _token_rewards(sampled, reward, example.get("turn_rewards"), index)
    process_rewards = example.get("process_rewards") or [0.0] * count
    paid = [
        earned + (process if action else 0.0)
        for earned, process, action in zip(token_rewards, process_rewards, sampled, strict=True)
    ]
    output["action_mask"] = mask
    output["token_rewards"] = paid if mask == sampled else _paid_at_actions(paid, mask)
    if step_delimiter is not None:
        output["step_ids"] = step_ids(tokenizer, example["completion_ids"], mask, step_delimiter)
    if example.get("branches"):
        output |= _fit_branching(example, sampled, output, max_length, index)
    # For `train_sampling_strategy="group_by_length"`
    output["length"] = len(output.get("prompt_ids", example["prompt_ids"])) + len(output["action_mask"])
    return output


def _fit_branching(
    example: dict[str, Any], sampled: list[int], made: dict[str, Any], max_length: int | None, index: int
) -> dict[str, Any]:
    """The token columns of a row of several segments, without as many of the first ones as do not fit."""
    names = [name for name in ("action_mask", "token_rewards", "step_ids") if name in made]
    try:
        row = TokenRow.read(
            example, "completion_ids", sampled, {name: made[name] for name in names}, ("behavior_logps", "ref_logps")
        )
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    row, dropped = (row, 0) if max_length is None else fit_segments(row, max_length)
    tokens = {"prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids, "branches": row.branches}
    return {**tokens, **row.aligned, _SHORTENED: dropped}


def _count_shortened(dataset: Dataset) -> tuple[Dataset, int]:
    """Rows without the column that counts the segments which they lost, and how many of them lost some."""
    if _SHORTENED not in dataset.column_names:
        return dataset, 0
    return dataset.remove_columns(_SHORTENED), sum(bool(count) for count in dataset[_SHORTENED])


def _refuse_numbers(example: dict[str, Any], mask: list[int], sampled: list[int], index: int) -> None:
    """Raises where a number that a loss reads is none. Outside the mask the per-token columns may hold anything."""
    for name in ("behavior_logps", "ref_logps", "process_rewards", "turn_rewards"):
        numbers = example.get(name) or []
        for position, number in enumerate(numbers):
            read = {"turn_rewards": None, "process_rewards": sampled}.get(name, mask)
            if read is not None and not read[position]:
                continue
            if number is None or not math.isfinite(number):
                raise ValueError(
                    f"Row {index}: `{name}` holds {number} at position {position}, and one such number makes the loss "
                    "of its whole batch NaN. Mend or drop the row."
                )
            if name.endswith("logps") and number > _LARGEST_LOGP:
                raise ValueError(
                    f"Row {index}: `{name}` holds {number} at position {position}, but the logarithm of a probability "
                    "is never positive. Pass logarithms, not probabilities or negated ones."
                )


def _token_rewards(mask: list[int], reward: float, turn_rewards: list[float] | None, index: int) -> list[float]:
    turn_ends = [i for i, action in enumerate(mask) if action and not (mask[i + 1 : i + 2] or [0])[0]]
    if turn_rewards is not None and len(turn_rewards) != len(turn_ends):
        raise ValueError(
            f"Row {index}: `turn_rewards` has {len(turn_rewards)} entries, but the mask shows {len(turn_ends)} turns "
            "of the policy. Give one reward per assistant turn, or `None` for a row without process rewards."
        )
    rewards = [0.0] * len(mask)
    for position, turn_reward in zip(turn_ends, turn_rewards or [0.0] * len(turn_ends), strict=True):
        rewards[position] += turn_reward
    if turn_ends:
        rewards[turn_ends[-1]] += reward
    return rewards


def _paid_at_actions(rewards: list[float], mask: list[int]) -> list[float]:
    """Rewards of turns that are no actions, moved to the last action before them; before the first, they are gone."""
    paid, last = [0.0] * len(mask), None
    for position, (reward, action) in enumerate(zip(rewards, mask, strict=True)):
        last = position if action else last
        if last is not None:
            paid[last] += reward
    return paid


def _can_train(example: dict[str, Any], max_length: int | None) -> bool:
    length = len(example["prompt_ids"]) + len(example["completion_ids"])
    return any(example["action_mask"]) and (max_length is None or length <= max_length)
