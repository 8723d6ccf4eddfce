"""Judged trajectories as a value model's rows, and which prompts are held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ...data.row_checks import find_format, first_row
from ...data.tokenization import FIRST_SEGMENT, row_tokenization_kwargs, tokenize_numbered_row, tokenize_unpaired_row
from ...data.truncation import UNPAIRED_SIDES
from ...data.unpaired import tokenize_interleaved
from ...data.value_rows import finish_rows
from ...formats import columns_read
from ...messages.images import images_in
from ...messages.wording import RenderingSwitches
from ...trajectory import Trajectory, Verdict


_FORMATS = [("prompt", "completion", "reward"), ("prompt", "completion", "label"), ("chosen", "rejected")]


def trajectory_rows(trajectories: Sequence[Trajectory], binary_outcomes: bool) -> Dataset:
    """
    Token rows of judged trajectories; those without a verdict, or without a sampled token, are left out.

    Args:
        trajectories (`Sequence[Trajectory]`): judged.
        binary_outcomes (`bool`): whether the outcome is the verdict, 1 or 0, or else the reward.

    Raises:
        `ValueError`: if none is left.
    """
    rows = []
    for trajectory in trajectories:
        if trajectory.verdict is Verdict.UNDECIDED or not any(trajectory.action_mask):
            continue
        if images_in([*trajectory.prompt, *trajectory.completion]):
            raise ValueError(
                "A trajectory shows images, which a value model that is trained alone is not given. Leave such "
                "trajectories out; `OREOTrainer` and `DQOTrainer` read them."
            )
        correct = trajectory.verdict is Verdict.CORRECT
        outcome = float(correct) if binary_outcomes or trajectory.reward is None else trajectory.reward
        rows.append(
            {
                "prompt_ids": trajectory.prompt_ids,
                "completion_ids": trajectory.completion_ids,
                "action_mask": trajectory.action_mask,
                "branches": FIRST_SEGMENT + trajectory.branches,
                "reward": outcome,
                "label": correct,
            }
        )
    if not rows:
        raise ValueError(
            f"None of {len(trajectories)} trajectories has a verdict, so there is no outcome to learn. Roll out with "
            "`reward_funcs`."
        )
    return Dataset.from_list(rows)


def prepared_rows(rows: Dataset | Sequence[Trajectory], tokenizer: Any, args: Any, name: str) -> Dataset:
    """
    The rows that [`DataCollatorForTrajectories`] reads.

    Args:
        rows (`Dataset` or `Sequence[Trajectory]`): judged trajectories, or rows as [`OREOTrainer`] takes them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): for rows of messages.
        args ([`ValueModelConfig`]): limits and objective.
        name (`str`): `"train"` or `"eval"`, for errors.
    """
    binary = args.value_objective == "classification"
    if not isinstance(rows, Dataset):
        rows = trajectory_rows(rows, binary)
    rows = _token_rows(rows, tokenizer, args, name)
    rows, _ = finish_rows(
        rows,
        tokenizer,
        max_length=args.max_length,
        train_on_turns=args.train_on_turns,
        binary_outcomes=binary,
        num_proc=args.dataset_num_proc,
        desc=f"Reading outcomes of {name} dataset",
    )
    return rows


def _token_rows(rows: Dataset, tokenizer: Any, args: Any, name: str) -> Dataset:
    first = first_row(rows, name)
    row_format = find_format(first, _FORMATS, UNPAIRED_SIDES, name)
    if row_format == "tokens":
        return rows
    if row_format == "text":
        raise ValueError(
            f"The {name} dataset holds plain text, whose turns cannot be told apart. Pass trajectories, rows of "
            "messages, or token rows."
        )
    if tokenizer is None:
        raise ValueError("Rows of messages need a tokenizer. Pass `processing_class=`, or token rows.")
    map_kwargs: dict[str, Any] = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
    options = False, RenderingSwitches.of(args)
    if columns_read(first) >= {"chosen", "rejected"}:
        tokens = tokenize_interleaved(rows, tokenizer, *options, **map_kwargs)
        assert isinstance(tokens, Dataset)
        return tokens
    fn_kwargs = row_tokenization_kwargs(rows, tokenizer, tokenize_unpaired_row, *options)
    return rows.map(tokenize_numbered_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)


def hold_out_prompts(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """
    Rows to train on and rows of other prompts to evaluate on (`None` where the share comes to no prompt).

    Args:
        rows (`Dataset`): token rows.
        share (`float`): of the prompts; at least one is trained on.
        seed (`int`): of the draw.
    """
    prompts = [tuple(ids) for ids in rows["prompt_ids"]]
    distinct = sorted(set(prompts))
    count = min(round(share * len(distinct)), len(distinct) - 1)
    held_out = set(random.Random(seed).sample(distinct, count))
    if not held_out:
        return rows, None
    sides: dict[bool, list[int]] = {False: [], True: []}
    for index, prompt in enumerate(prompts):
        sides[prompt in held_out].append(index)
    return rows.select(sides[False]), rows.select(sides[True])
