"""
Values by classification: the chance of a good outcome at every action token (VGS, https://huggingface.co/papers/2505.17373;
Q♯, https://huggingface.co/papers/2502.20548), and the soft value that follows from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ._masking import check_shapes, row_mean, select


def outcome_classification_loss(logits: Tensor, rewards: Tensor, action_mask: Tensor) -> Tensor:
    r"""
    Mean over a trajectory's states, then mean over trajectories; trains `logits`.

    $$L_p = -\frac{1}{N} \sum_t R \log p(s_t) + (1 - R) \log(1 - p(s_t)), \qquad p = \sigma(\text{logit})$$

    On trajectories that a policy sampled, $p(s_t)$ is that policy's chance of the reward 1 from state $s_t$ on,
    whatever the tools' answers are. A row without an action contributes 0 and still counts in the mean over the batch.

    Args:
        logits (`Tensor`): `(B, T)`, of the state in which the action of column `t` is chosen.
        rewards (`Tensor`): `(B,)`, outcome of each trajectory, in [0, 1].
        action_mask (`Tensor`): `(B, T)`, 1 on action columns; the other entries of `logits` may hold anything.

    Returns:
        Scalar, in nats.

    Raises:
        `ValueError`: if shapes differ.
    """
    check_shapes(action_mask, logits=logits, rewards_per_row=rewards)
    mask = action_mask.bool()
    logits = select(logits, mask)
    targets = rewards.to(logits.dtype).unsqueeze(1).expand_as(logits)
    return row_mean(binary_cross_entropy_with_logits(logits, targets, reduction="none"), mask).mean()


def soft_value(logits: Tensor, beta: float) -> Tensor:
    r"""
    The KL-regularized optimal value of states whose outcome under the reference is known, for rewards of 1 and 0:

    $$V(s) = \beta \log \mathbb{E}_{\pi_{ref}} e^{R / \beta} = \beta \log(1 - p + p\,e^{1/\beta})$$

    That is the value to which OREO and DQO regress (Q♯, eq. 5). It is exact where the tools' answers are certain;
    elsewhere it counts their luck as the policy's choice, and is too high.

    Args:
        logits (`Tensor`): of any shape; log-odds of the reward 1 under the reference.
        beta (`float`): reward per nat. Towards 0 the value of every state from which a good outcome is possible is 1,
            towards infinity it is `p`.

    Returns:
        `Tensor` of the shape of `logits`, float32 or wider, between 0 and 1. No intermediate result overflows.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return beta * torch.logaddexp(logsigmoid(-logits), logsigmoid(logits) + 1 / beta)
