"""Regression on step pairs (REFUEL, https://huggingface.co/papers/2410.04612), with soft returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ._masking import check_shapes, row_sum
from .segments import turn_ids


def first_turn_log_ratios(logps: Tensor, ref_logps: Tensor, action_mask: Tensor) -> Tensor:
    r"""
    Summed log-ratio of each row in nats, `(B,)`, with gradient through its first turn only.

    Args:
        logps (`Tensor`): `(B, T)`, log-probabilities under the policy.
        ref_logps (`Tensor`): `(B,)`, summed log-probabilities under the reference.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; entries elsewhere may hold anything.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, logps=logps, ref_logps_per_row=ref_logps)
    mask = action_mask.bool()
    learned = mask & (turn_ids(mask) == 0)
    return row_sum(torch.where(learned, logps, logps.detach()), mask) - ref_logps


def step_regression_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, reward_gaps: Tensor, beta: float
) -> Tensor:
    r"""
    Mean over pairs of two trajectories that part at a turn `h`.

    $$L = \Big(\beta\,(\ell_h - \ell'_h) - \big[(R - \beta \sum_{i>h} \mathrm{sg}[\ell_i]) -
    (R' - \beta \sum_{i>h} \mathrm{sg}[\ell'_i])\big]\Big)^2$$

    Only turn `h` learns; what came after it is evidence of what the turn is worth, whoever was lucky. The paper's
    returns are $R$ alone; less the later log-ratios they are those of the KL-regularized reward, whose optimum is
    reached exactly (`docs/objectives.md`), and the same where the reference has sampled the rows and training begins.

    Args:
        chosen_log_ratios, rejected_log_ratios (`Tensor`): `(B,)`, [`first_turn_log_ratios`] of the sides from turn
            `h` on.
        reward_gaps (`Tensor`): `(B,)`, $R - R'$.
        beta (`float`): reward per nat.
    """
    return (beta * (chosen_log_ratios - rejected_log_ratios) - reward_gaps).square().mean()
