"""
What every loss does before its equation: check shapes, and select under the mask instead of multiplying by it.

Multiplying is wrong twice: `0 * inf` is NaN, and so is its gradient. `torch.where` gives a masked entry neither a
value nor a gradient, so masked entries may hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(action_mask: Tensor, **tensors: Tensor | None) -> None:
    """
    Raise `ValueError` unless every tensor has the shape of `action_mask`, `(B, T)`.

    A keyword that ends in `_per_row` names a tensor that must have shape `(B,)` instead. `None` is skipped.
    """
    if action_mask.dim() != 2:
        raise ValueError(
            f"`action_mask` has shape {tuple(action_mask.shape)}, but the loss needs one row per trajectory and one "
            "column per token, `(B, T)`. Add the missing dimension or flatten the extra one."
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        per_row = name.endswith("_per_row")
        expected = action_mask.shape[:1] if per_row else action_mask.shape
        if tensor.shape != expected:
            name = name.removesuffix("_per_row")
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but with an `action_mask` of shape "
                f"{tuple(action_mask.shape)} it must have shape {tuple(expected)}, or broadcasting would silently mix "
                f"trajectories. Pass {'one entry per row' if per_row else 'one entry per column of the mask'}."
            )


def select(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where `mask` is set and 0 elsewhere, in float32 or wider; masked entries get no gradient."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or not tensor.is_floating_point():
        tensor = tensor.float()
    return torch.where(mask, tensor, tensor.new_zeros(()))


def row_sum(tensor: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row's selected entries, `(B, T) -> (B,)`; 0 for a row whose mask is empty."""
    return select(tensor, mask).sum(dim=1)


def row_mean(tensor: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row's selected entries, `(B, T) -> (B,)`; 0 for a row whose mask is empty."""
    return row_sum(tensor, mask) / mask.sum(dim=1).clamp(min=1)


def sum_from(tensor: Tensor) -> Tensor:
    """Reverse cumulative sum along time, `out[:, t] = sum_{i >= t} tensor[:, i]`."""
    return tensor.flip(dims=(1,)).cumsum(dim=1).flip(dims=(1,))


def sum_after(tensor: Tensor) -> Tensor:
    """`out[:, t] = sum_{i > t} tensor[:, i]`, 0 in the last column."""
    return torch.cat([sum_from(tensor)[:, 1:], torch.zeros_like(tensor[:, :1])], dim=1)


def terminal_rewards(rewards: Tensor, action_mask: Tensor) -> Tensor:
    """
    Per-action rewards that pay `rewards[b]` at row `b`'s last action and 0 before it, `(B,) -> (B, T)`.

    A row without an action is paid nothing.
    """
    check_shapes(action_mask, rewards_per_row=rewards)
    mask = action_mask.bool()
    is_last = mask & (mask.long().flip(dims=(1,)).cumsum(dim=1).flip(dims=(1,)) == 1)
    return torch.where(is_last, rewards.unsqueeze(1), rewards.new_zeros(()))
