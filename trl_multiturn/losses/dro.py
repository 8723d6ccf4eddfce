"""DRO: direct reward optimization (https://huggingface.co/papers/2405.19107); the whole response is one action.

Right for observations that are certain given the actions. Otherwise the residual holds the luck of all of them, and
the policy that it converges to is not the optimum (`tests/test_tabular_optimum.py`): take tokens or turns as actions.
"""

from __future__ import annotations

from torch import Tensor

from ._masking import check_shapes, row_sum


def dro_policy_loss(values: Tensor, log_ratios: Tensor, rewards: Tensor, action_mask: Tensor, beta: float) -> Tensor:
    r"""
    Mean over trajectories; trains `log_ratios` only.

    $$L_\pi = \Big(\beta \sum_t \ell_t - (R - V(x))\Big)^2$$

    There is no ½ and no division by β: this is DQO's policy loss with one action per trajectory (DQO, sec. 3.1).

    Args:
        values (`Tensor`): `(B,)`, value of each prompt; detached.
        log_ratios (`Tensor`): `(B, T)`, $\log\pi - \log\pi_{ref}$ in nats.
        rewards (`Tensor`): `(B,)`, terminal reward of each trajectory.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; entries of `log_ratios` elsewhere may hold anything. A
            row without an action contributes 0.
        beta (`float`): reward per nat.

    Raises:
        `ValueError`: if shapes differ.
    """
    return _squared_residuals(values.detach(), log_ratios, rewards, action_mask, beta)


def dro_value_loss(values: Tensor, log_ratios: Tensor, rewards: Tensor, action_mask: Tensor, beta: float) -> Tensor:
    """Mean over trajectories of the residual of [`dro_policy_loss`], the same number; trains `values` only."""
    return _squared_residuals(values, log_ratios.detach(), rewards, action_mask, beta)


def _squared_residuals(
    values: Tensor, log_ratios: Tensor, rewards: Tensor, action_mask: Tensor, beta: float
) -> Tensor:
    check_shapes(action_mask, values_per_row=values, log_ratios=log_ratios, rewards_per_row=rewards)
    mask = action_mask.bool()
    residuals = beta * row_sum(log_ratios, mask) - (rewards - values)
    # Before the square, whose gradient at a row without an action would be NaN where its value or reward is
    return residuals.where(mask.any(dim=1), 0.0).square().mean()
