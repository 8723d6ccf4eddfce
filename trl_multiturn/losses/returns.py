"""λ-returns over action tokens; time jumps over everything that the policy did not sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ._masking import check_shapes, select


def lambda_returns(
    values: Tensor,
    log_ratios: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    beta: float,
    lam: float,
    literal: bool = False,
) -> Tensor:
    r"""
    λ-return of every action's state, `(B, T)`, 0 outside the mask, without gradient (DQO, eqs. 3.10–3.11).

    With $\delta_t = r_t - \beta\,\ell_t$ and $V = 0$ after the last action, along each row's actions:

    $$G_t = \delta_t + (1 - \lambda) V(s_{t+1}) + \lambda G_{t+1}$$

    the usual average of n-step returns, whose weights sum to one. The paper's eq. 3.11 leaves out the last weight for
    λ < 1: its weights sum to $1 - \lambda^{N-t}$ and the return vanishes as λ → 1, although the paper's own case
    λ = 1 is the full Monte Carlo return.

    Args:
        values (`Tensor`): `(B, T)`, `V(s_t)` in units of reward.
        log_ratios (`Tensor`): `(B, T)`, $\ell_t = \log\pi - \log\pi_{ref}$ in nats.
        rewards (`Tensor`): `(B, T)`, reward of each action.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries of all tensors may hold anything.
        beta (`float`): reward per nat.
        lam (`float`): λ in [0, 1]. 1 ignores `values`; 0 bootstraps from the next state.
        literal (`bool`, *optional*, defaults to `False`): the sum of eq. 3.11 exactly as printed.

    Raises:
        `ValueError`: if shapes differ or `lam` lies outside [0, 1].
    """
    check_shapes(action_mask, values=values, log_ratios=log_ratios, rewards=rewards)
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"`lam={lam}` cannot weigh n-step returns: λ must lie in [0, 1].")
    mask = action_mask.bool()
    values, log_ratios, rewards = (_compact(x.detach(), mask) for x in (values, log_ratios, rewards))
    deltas = rewards - beta * log_ratios
    returns = _discounted_sum(deltas + (1 - lam) * _shift(values, 1), lam)
    if literal and lam < 1.0:
        actions_left = _discounted_sum(_compact(torch.ones_like(deltas), mask), 1.0)
        returns = returns - lam**actions_left * _discounted_sum(deltas, 1.0)
    return _expand(returns, mask)


def next_returns(returns: Tensor, action_mask: Tensor) -> Tensor:
    """`G_{t+1}` for each action, the return of the next one, `(B, T)`; 0 after the last one and outside the mask."""
    check_shapes(action_mask, returns=returns)
    mask = action_mask.bool()
    return _expand(_shift(_compact(returns, mask), 1), mask)


def _compact(tensor: Tensor, mask: Tensor) -> Tensor:
    """Move each row's k-th action to column k, `(B, T) -> (B, T)`; 0 in the columns left over."""
    tensor = select(tensor, mask)
    number = torch.where(mask, mask.long().cumsum(dim=1), 0)  # actions are numbered from 1, the rest goes to column 0
    return tensor.new_zeros(tensor.size(0), tensor.size(1) + 1).scatter_add(1, number, tensor)[:, 1:]


def _expand(tensor: Tensor, mask: Tensor) -> Tensor:
    """Undo [`_compact`]; 0 outside the mask."""
    return select(tensor.gather(1, (mask.long().cumsum(dim=1) - 1).clamp(min=0)), mask)


def _shift(tensor: Tensor, by: int) -> Tensor:
    """`out[:, t] = tensor[:, t + by]`, 0 past the end."""
    return torch.cat([tensor[:, by:], torch.zeros_like(tensor[:, :by])], dim=1)


def _discounted_sum(tensor: Tensor, lam: float) -> Tensor:
    """`out[:, t] = sum_{i >= t} lam**(i - t) * tensor[:, i]`, by doubling: log2(T) steps, no division by powers."""
    span = 1
    while span < tensor.size(1) and lam**span > 0.0:
        tensor = tensor + lam**span * _shift(tensor, span)
        span *= 2
    return tensor
