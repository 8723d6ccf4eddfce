r"""
Regression of log-ratios on what a trajectory earned beyond its group, the trajectories of one prompt.

At the optimum $\beta \sum_t \ell_t = R - V(x)$ holds for every trajectory of a prompt. What stands in for the prompt's
value $V(x)$ tells the methods apart: the group's soft mean (A*-PO, https://huggingface.co/papers/2505.20686; OAPL,
2602.19362), its mean (Kimi k1.5, 2501.12599), or whatever makes the residuals of the group equal (AGRO, 2503.19612).

Right for observations that are certain given the actions. Otherwise take the luck of the observations out of the
returns (`trl_multiturn.observation_margins`): `tests/test_tabular_optimum.py` shows what is reached with and without.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._masking import check_shapes, row_sum


def group_means(numbers: Tensor, groups: Tensor) -> Tensor:
    """Each row's mean over its group, `(B,) -> (B,)`; rows with the same integer in `groups` `(B,)` are a group."""
    index, counts = _groups(numbers, groups)
    return (numbers.new_zeros(len(counts)).index_add(0, index, numbers) / counts)[index]


def group_soft_means(numbers: Tensor, groups: Tensor, beta: float) -> Tensor:
    r"""
    Each row's $\beta \log \mathrm{mean} \exp(R / \beta)$ over its group, `(B,) -> (B,)`.

    An estimate of $V(x)$ where the reference sampled the group. Between the mean (β → ∞) and the maximum (β → 0).
    """
    index, counts = _groups(numbers, groups)
    largest = numbers.new_full((len(counts),), -math.inf).scatter_reduce(0, index, numbers, "amax")
    shifted = ((numbers - largest[index]) / beta).exp()
    sums = numbers.new_zeros(len(counts)).index_add(0, index, shifted)
    return (largest + beta * (sums / counts).log())[index]


def group_regression_loss(
    log_ratios: Tensor, returns: Tensor, baselines: Tensor, action_mask: Tensor, beta: float
) -> Tensor:
    r"""
    Mean over trajectories; trains `log_ratios`.

    $$L = \Big(\beta \sum_t \ell_t - (R - b)\Big)^2$$

    Args:
        log_ratios (`Tensor`): `(B, T)`, $\log\pi - \log\pi_{ref}$ in nats.
        returns (`Tensor`): `(B,)`, what each trajectory earned.
        baselines (`Tensor`): `(B,)`, $b$, such as [`group_means`] or [`group_soft_means`] of the returns; detached.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; entries of `log_ratios` elsewhere may hold anything. A
            row without an action contributes 0.
        beta (`float`): reward per nat.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, log_ratios=log_ratios, returns_per_row=returns, baselines_per_row=baselines)
    mask = action_mask.bool()
    residuals = beta * row_sum(log_ratios, mask) - (returns - baselines.detach())
    return residuals.where(mask.any(dim=1), 0.0).square().mean()


def group_variance_loss(
    log_ratios: Tensor,
    returns: Tensor,
    groups: Tensor,
    action_mask: Tensor,
    beta: float,
    all_returns: Tensor | None = None,
    all_groups: Tensor | None = None,
) -> Tensor:
    r"""
    Variance of $R - \beta \sum_t \ell_t$ within each group, mean over trajectories (AGRO); trains `log_ratios`.

    $$L = \frac{n}{n - 1} \Big(x_i - \frac{1}{n} \sum_{j} x_j\Big)^2, \quad x = R - \beta \sum_t \ell_t$$

    with the `n` rows of the group in the batch. With $n - 1$ the expectation is the same however many of a prompt's
    trajectories a batch holds; a row alone in its group contributes 0. Nothing stands in for $V(x)$, and whoever
    sampled the rows, the optimum is the same.

    Args:
        log_ratios, returns, action_mask, beta: as for [`group_regression_loss`].
        groups (`Tensor`): `(B,)` int64, equal for the trajectories of one prompt.
        all_returns, all_groups (`Tensor`, *optional*): `(N,)`, `x` (see [`adjusted_returns`]) and group of these and
            further rows, such as those of other processes, over which the mean is taken.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, log_ratios=log_ratios, returns_per_row=returns, groups_per_row=groups)
    own = adjusted_returns(log_ratios, returns, action_mask, beta)
    if all_returns is None or all_groups is None:
        all_returns, all_groups = own.detach(), groups
    same = groups.unsqueeze(1) == all_groups.unsqueeze(0)
    counts = same.sum(dim=1)
    means = torch.where(same, all_returns.detach().unsqueeze(0), 0.0).sum(dim=1) / counts
    # Through the mean no gradient flows: over a whole group its parts cancel, as the residuals sum to 0
    weights = counts / (counts - 1).clamp(min=1)
    return (weights * (own - means).square()).mean()


def adjusted_returns(log_ratios: Tensor, returns: Tensor, action_mask: Tensor, beta: float) -> Tensor:
    r"""$R - \beta \sum_t \ell_t$ of each row, `(B,)`: equal to $V(x)$ at the optimum. Arguments as for
    [`group_regression_loss`]."""
    return returns - beta * row_sum(log_ratios, action_mask.bool())


def _groups(numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's place among the groups, and the rows of each."""
    if numbers.dim() != 1 or numbers.shape != groups.shape:
        raise ValueError(
            f"`numbers` has shape {tuple(numbers.shape)} and `groups` {tuple(groups.shape)}, but both need one entry "
            "per trajectory, `(B,)`."
        )
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    return index, counts
