"""Coarser actions: a step, a turn or the whole response taken as one action of the decision process."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._masking import check_shapes, select


class Segments(NamedTuple):
    """A batch whose columns are segments instead of tokens; `(B, S)` each, with `S` the largest number of segments."""

    values: Tensor
    log_ratios: Tensor
    rewards: Tensor
    action_mask: Tensor


def turn_ids(action_mask: Tensor) -> Tensor:
    """
    Number the turns of each row, `(B, T) -> (B, T)` int64: every maximal run of action columns is a turn.

    Entries outside the mask hold the number of the turn before them, -1 before the first.

    ```python
    >>> turn_ids(torch.tensor([[0, 1, 1, 0, 1]]))
    tensor([[-1,  0,  0,  0,  1]])
    ```
    """
    check_shapes(action_mask)
    mask = action_mask.bool()
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return (mask & ~before).long().cumsum(dim=1) - 1


def segment_index(step_ids: Tensor, action_mask: Tensor) -> Tensor:
    """
    Dense segment numbers 0, 1, 2, … from arbitrary non-decreasing `step_ids`, `(B, T) -> (B, T)` int64.

    Only action columns are read: a new segment begins where an action's id differs from that of the action before it.
    Entries outside the mask hold the number of the segment before them, -1 before the first.

    Raises:
        `ValueError`: if shapes differ, if `step_ids` is not an integer tensor, or if ids decrease along a row's
            actions.
    """
    check_shapes(action_mask, step_ids=step_ids)
    if step_ids.is_floating_point() or step_ids.is_complex() or step_ids.dtype == torch.bool:
        raise ValueError(
            f"`step_ids` has dtype {step_ids.dtype}, but steps are counted in integers: a rounded id would merge or "
            "split steps. Pass an integer tensor."
        )
    mask = action_mask.bool()
    columns = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    last_action = torch.where(mask, columns, -1).cummax(dim=1).values  # this column's, or the latest before it
    previous = torch.cat([torch.full_like(last_action[:, :1], -1), last_action[:, :-1]], dim=1)
    change = step_ids - step_ids.gather(1, previous.clamp(min=0))
    if bool((mask & (previous >= 0) & (change < 0)).any()):
        raise ValueError(
            "`step_ids` decreases along the actions of a row, so a step would be revisited and its state would be "
            "ambiguous. Number the steps of a trajectory in the order in which they were taken."
        )
    starts = mask & ((previous < 0) | (change != 0))
    return starts.long().cumsum(dim=1) - 1


def merge_segments(
    values: Tensor, log_ratios: Tensor, rewards: Tensor, action_mask: Tensor, step_ids: Tensor
) -> Segments:
    """
    Take each segment of actions as one action.

    A segment's log-ratio and reward are the sums over its actions, its value is `V` at its first state. With
    `step_ids` constant per row the whole response is one action; with [`turn_ids`] a turn is.

    Args:
        values, log_ratios, rewards (`Tensor`): `(B, T)`; entries outside the mask may hold anything.
        action_mask (`Tensor`): `(B, T)`, 1 on action columns.
        step_ids (`Tensor`): `(B, T)` integers, non-decreasing along each row's actions.

    Returns:
        [`Segments`] with columns counted from 0; rows with fewer segments are padded and masked.
    """
    check_shapes(action_mask, values=values, log_ratios=log_ratios, rewards=rewards)
    mask = action_mask.bool()
    index = segment_index(step_ids, mask)
    counts = index.amax(dim=1) + 1  # segments per row; -1 + 1 where the row has no action
    width = max(int(counts.max()), 1)
    target = index.clamp(min=0)
    before = torch.cat([torch.full_like(index[:, :1], -1), index[:, :-1]], dim=1)
    starts = mask & (index != before)

    def collapse(tensor: Tensor, where: Tensor) -> Tensor:
        tensor = select(tensor, where)
        return tensor.new_zeros(tensor.size(0), width).scatter_add(1, target, tensor)

    segment_mask = torch.arange(width, device=mask.device) < counts.unsqueeze(1)
    return Segments(collapse(values, starts), collapse(log_ratios, mask), collapse(rewards, mask), segment_mask)
