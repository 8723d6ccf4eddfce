"""DQO: direct Q-function optimization (https://huggingface.co/papers/2410.09302), eqs. 3.10–3.14."""

from __future__ import annotations

import torch
from torch import Tensor

from ._masking import check_shapes, row_sum, select
from .returns import lambda_returns, next_returns


def importance_weights(logps: Tensor, behavior_logps: Tensor, action_mask: Tensor, log_cap: float = 1.0) -> Tensor:
    r"""
    Trajectory weights $w = \exp(\min(c, \sum_t \log\pi - \log\mu))$, `(B,)`, without gradient (eq. 3.14).

    Args:
        logps (`Tensor`): `(B, T)`, log-probabilities under the policy that is trained, in nats.
        behavior_logps (`Tensor`): `(B, T)`, log-probabilities under the policy that sampled the rows.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries may hold anything.
        log_cap (`float`, *optional*, defaults to `1.0`): $c$ in nats; the paper caps the weight at $e$. There is no
            lower bound. A row without an action weighs 1.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, logps=logps, behavior_logps=behavior_logps)
    mask = action_mask.bool()
    # The difference per token, not of the sums: sums of hundreds of nats lose the digits that matter in float32
    differences = select(logps.detach(), mask) - select(behavior_logps.detach(), mask)
    return differences.sum(dim=1).clamp(max=log_cap).exp()


def dqo_value_loss(
    values: Tensor,
    log_ratios: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    beta: float,
    lam: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    r"""
    Sum over a trajectory's actions, then mean over trajectories (eq. 3.12); trains `values` only.

    $$L_V = w \sum_t \big(\mathrm{sg}[G_t] - V(s_t)\big)^2$$

    with $G_t$ of [`lambda_returns`].

    Args:
        values (`Tensor`): `(B, T)`, `V(s_t)` of the state in which the action of column `t` is chosen.
        log_ratios (`Tensor`): `(B, T)`, $\log\pi - \log\pi_{ref}$ in nats; detached.
        rewards (`Tensor`): `(B, T)`, reward of each action; [`terminal_rewards`] makes them from one outcome per row.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries of all tensors may hold anything.
        beta (`float`): reward per nat.
        lam (`float`, *optional*, defaults to `1.0`): λ of the returns.
        weights (`Tensor`, *optional*): `(B,)`, [`importance_weights`]; 1 where absent. Detached.

    Returns:
        Scalar, in squared units of reward. It grows with the number of actions; OREO's losses are means.

    Raises:
        `ValueError`: if shapes differ or `lam` lies outside [0, 1].
    """
    check_shapes(action_mask, weights_per_row=weights)
    mask = action_mask.bool()
    returns = lambda_returns(values, log_ratios, rewards, mask, beta, lam)
    residuals = returns - select(values, mask)
    return _weighted_mean(row_sum(residuals.square(), mask), weights)


def dqo_policy_loss(
    values: Tensor,
    log_ratios: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    beta: float,
    lam: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    r"""
    Sum over a trajectory's actions, then mean over trajectories (eq. 3.13); trains `log_ratios` only.

    $$L_\pi = w \sum_t \big(\beta\,\ell_t - (r_t + \mathrm{sg}[G_{t+1}] - V(s_t))\big)^2$$

    With λ = 1, no weights and a terminal reward the gradient is that of OREO's eq. 9 times the number of actions. At
    λ = 0 the target looks two steps ahead, as printed: $G_{t+1} = r_{t+1} - \beta\,\ell_{t+1} + V(s_{t+2})$.

    Arguments, units and errors are those of [`dqo_value_loss`]; here `values` and the returns are detached.
    """
    check_shapes(action_mask, weights_per_row=weights)
    mask = action_mask.bool()
    returns = lambda_returns(values, log_ratios, rewards, mask, beta, lam)
    targets = select(rewards.detach(), mask) + next_returns(returns, mask) - select(values.detach(), mask)
    residuals = beta * select(log_ratios, mask) - targets
    return _weighted_mean(row_sum(residuals.square(), mask), weights)


def _weighted_mean(row_losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        # A row of weight 0 whose loss overflowed must not turn the batch into NaN
        weights = weights.detach()
        row_losses = torch.where(weights == 0, torch.zeros_like(row_losses), weights * row_losses)
    return row_losses.mean()
