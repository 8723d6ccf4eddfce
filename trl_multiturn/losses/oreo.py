"""OREO: offline reasoning optimization (https://huggingface.co/papers/2412.16145), eqs. 8–10."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._masking import check_shapes, row_mean, select, sum_after, sum_from, terminal_rewards
from .segments import merge_segments


def oreo_value_loss(values: Tensor, log_ratios: Tensor, rewards: Tensor, action_mask: Tensor, beta: float) -> Tensor:
    r"""
    Mean over a trajectory's states, then mean over trajectories (eq. 8); trains `values` only.

    $$L_V = \frac{1}{N} \sum_t \Big(V(s_t) - R + \beta \sum_{i \ge t} \ell_i\Big)^2$$

    There is no ½. A row without an action contributes 0 and still counts in the mean over the batch.

    Args:
        values (`Tensor`): `(B, T)`, `V(s_t)` of the state in which the action of column `t` is chosen.
        log_ratios (`Tensor`): `(B, T)`, $\ell_t = \log\pi - \log\pi_{ref}$ in nats; detached.
        rewards (`Tensor`): `(B,)`, terminal reward of each trajectory.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries of all tensors may hold anything.
        beta (`float`): reward per nat.

    Returns:
        Scalar, in squared units of reward.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, values=values, log_ratios=log_ratios, rewards_per_row=rewards)
    mask = action_mask.bool()
    values, log_ratios = select(values, mask), select(log_ratios.detach(), mask)
    residuals = values - rewards.unsqueeze(1) + beta * sum_from(log_ratios)
    return row_mean(residuals.square(), mask).mean()


def oreo_policy_loss(
    values: Tensor,
    log_ratios: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    beta: float,
    level: Literal["token", "step", "response"] = "token",
    step_ids: Tensor | None = None,
) -> Tensor:
    r"""
    Mean over a trajectory's actions, then mean over trajectories (eqs. 9 and 10); trains `log_ratios` only.

    $$L_\pi = \frac{1}{N} \sum_k \Big(V(s_k) - R + \beta\ell_k + \mathrm{sg}\big[\beta\sum_{i > k}\ell_i\big]\Big)^2$$

    where action $k$ is a token, a step (its log-ratio is the sum over its tokens, all with gradient, its state the one
    before its first token), or the whole response (eq. 10). At the token level this is the same number as
    [`oreo_value_loss`]; only the gradients differ.

    With observations that are not certain the token and step levels are still right on average; the response level is
    biased, since its one residual holds $\sum_h V(s_{h+1}) - \mathbb{E}_o V(s_{h+1})$, the luck of all observations.

    Args:
        values (`Tensor`): `(B, T)`, detached.
        log_ratios (`Tensor`): `(B, T)`, $\log\pi - \log\pi_{ref}$ in nats.
        rewards (`Tensor`): `(B,)`, terminal reward of each trajectory.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries of all tensors may hold anything.
        beta (`float`): reward per nat.
        level (`str`, *optional*, defaults to `"token"`): what one action is.
        step_ids (`Tensor`, *optional*): `(B, T)` integers, non-decreasing along each row's actions; read at
            `level="step"` only.

    Returns:
        Scalar, in squared units of reward.

    Raises:
        `ValueError`: if shapes differ, `level` is unknown, or `step_ids` is missing, no integer tensor or decreasing.
    """
    check_shapes(action_mask, values=values, log_ratios=log_ratios, rewards_per_row=rewards)
    if level not in ("token", "step", "response"):
        raise ValueError(f"`level={level!r}` is unknown. Choose 'token', 'step' or 'response'.")
    if level == "step" and step_ids is None:
        raise ValueError(
            "`level='step'` was given no `step_ids`, so there is no telling where a step ends. Pass `step_ids`, for "
            "example `turn_ids(action_mask)`, or another level."
        )
    mask, values = action_mask.bool(), values.detach()
    if level != "token":
        ids = step_ids if level == "step" else torch.zeros_like(mask, dtype=torch.long)
        values, log_ratios, _, mask = merge_segments(values, log_ratios, terminal_rewards(rewards, mask), mask, ids)
    values, log_ratios = select(values, mask), select(log_ratios, mask)
    residuals = values - rewards.unsqueeze(1) + beta * (log_ratios + sum_after(log_ratios.detach()))
    return row_mean(residuals.square(), mask).mean()
