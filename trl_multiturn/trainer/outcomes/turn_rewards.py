"""Rewards of turns that a policy trained on preferences implies (iStar, https://huggingface.co/papers/2509.19199)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn

from ...losses import merge_segments, turn_ids


def implicit_turn_rewards(
    rows: Dataset,
    policy: nn.Module,
    reference: nn.Module | None = None,
    *,
    beta: float,
    weight: float = 1.0,
    batch_size: int = 8,
) -> Dataset:
    r"""
    Adds `turn_rewards`, which [`DQOTrainer`] and [`GroupRegressionTrainer`] read: $\beta \log \pi / \pi_{ref}$ of each
    turn under a policy that M-DPO trained.

    With tools whose answers are certain that is the advantage $Q - V$ of the turn: preferences between whole
    trajectories become a reward for each of their turns. Over a trajectory it sums to its reward less the value of its
    prompt, so that rows which also keep their outcome pay for it twice: set a `weight`, or their `reward` to 0.

    Args:
        rows ([`~datasets.Dataset`]): unpaired token rows with `prompt_ids`, `completion_ids`, `action_mask`.
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): what M-DPO trained.
        reference ([`~transformers.PreTrainedModel`], *optional*): what it was trained against. Not needed for an
            adapter, whose base it is.
        beta (`float`): that of the training.
        weight (`float`, *optional*, defaults to `1.0`): factor on all rewards.
        batch_size (`int`, *optional*, defaults to `8`): rows of a forward pass.

    Returns:
        [`~datasets.Dataset`]: the rows with `turn_rewards`, one number per turn of the policy.

    Raises:
        `ValueError`: if columns or the reference are missing, or rows are of several segments.
    """
    missing = [name for name in ("prompt_ids", "completion_ids", "action_mask") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"The rows lack {missing}, so it is unknown what the policy sampled. Pass token rows, as "
            "`build_unpaired_dataset` writes them."
        )
    if reference is None and not is_peft_model(policy):
        raise ValueError(
            "There is no `reference`, and the policy is no adapter whose base could be it. Pass the model that M-DPO "
            "started from."
        )
    if "branches" in rows.column_names and any(rows["branches"]):
        raise ValueError(
            "Some rows hold several segments (`branches`), whose tokens were not read in one sequence. Leave these "
            "rows out."
        )
    rewards: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, mask = _padded(batch, next(policy.parameters()).device)
        ratios = token_logps(policy, ids, mask)
        with policy.disable_adapter() if reference is None else nullcontext():  # type: ignore[operator]
            ratios = ratios - token_logps(policy if reference is None else reference, ids, mask)
        rewards += turn_sums(weight * beta * ratios, mask[:, 1:])
    if "turn_rewards" in rows.column_names:
        rows = rows.remove_columns("turn_rewards")
    return rows.add_column("turn_rewards", rewards)  # type: ignore[call-arg]


def turn_sums(numbers: Tensor, action_mask: Tensor) -> list[list[float]]:
    """Each row's sums over its turns: `(B, T)` numbers, of which those outside the mask may be anything."""
    zeros = torch.zeros_like(numbers)
    turns = merge_segments(zeros, numbers, zeros, action_mask, turn_ids(action_mask))
    return [row[kept].tolist() for row, kept in zip(turns.log_ratios, turns.action_mask, strict=True)]


@torch.no_grad()
def token_logps(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities in nats of right-padded rows `(B, L)`, `(B, L−1)`: 0 where `mask` `(B, L)` is, in evaluation
    mode."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        logits = model(input_ids=ids.to(device)).logits[:, :-1].float()  # causal: padding at the end is never read
    finally:
        model.train(training)
    logps = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None].to(device)).squeeze(-1).to(ids.device)
    return logps.masked_fill(mask[:, 1:] == 0, 0.0)


def _padded(batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    columns = list(zip(batch["prompt_ids"], batch["completion_ids"], batch["action_mask"], strict=True))
    width = max(len(prompt) + len(completion) for prompt, completion, _ in columns)
    ids, mask = (torch.zeros(len(columns), width, dtype=torch.long, device=device) for _ in range(2))
    for i, (prompt, completion, actions) in enumerate(columns):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        mask[i, len(prompt) : end] = torch.tensor(list(map(int, actions)))
    return ids, mask
