"""Attention over the live rows of a decoding step: the rows that only fill up the batch attend to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packed_prompts import packed_attention
from .step_runs import Run, step_runs


SLOT_ATTENTION = "slot_sdpa"


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of the first rows; the rest is padding.

    Matrix kernels want a batch of a certain size, attention does not: it treats every row alone, and at a context of
    a thousand tokens it is most of a step.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(N, H, Q, D)`):
            Queries of all rows.
        key, value (`torch.Tensor` of shape `(L, H', K, D)`):
            What [`SlotLayer`] returned: keys and values of the first L ≤ N rows.
        attention_mask (`torch.Tensor` of shape `(N, 1, Q, K)`):
            Mask of all rows.

    Returns:
        `(N, Q, H, D)`, zeros in the rows from L on, and `None`. In a pass over pieces of prompts
        [`PackedAttention`] decides what attends to what.
    """
    if (packed := packed_attention()) is not None:
        return packed(cast(int, module.layer_idx), query, key, value, **kwargs), None
    count, live = query.shape[0], key.shape[0]
    runs = step_runs()
    if runs is None or kwargs.get("position_bias") is not None:
        runs = [Run(0, live, key.shape[2])]
    parts = []
    per_row = {name: each for name, each in kwargs.items() if isinstance(each, Tensor) and each.shape[:1] == (count,)}
    for first, last, columns in runs:
        rows = slice(first, last)
        own = kwargs | {name: each[rows] for name, each in per_row.items()}  # e.g. a bias per row
        mask = None if attention_mask is None else attention_mask[rows, ..., :columns]
        parts.append(_attention(module, query[rows], key[rows, :, :columns], value[rows, :, :columns], mask, **own))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (output if live == count else F.pad(output, (0, 0) * 3 + (0, count - live))), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' attention; on a CPU the heads of a group share their keys and values as they are.

    transformers copies them for each head where there is a mask: for three heads to a group and a context of a few
    hundred tokens that takes ten times as long as attention itself.
    """
    grouped = query.device.type == "cpu" and query.shape[1] != key.shape[1]
    if grouped and attention_mask is not None and position_bias is None and not dropout:
        return _grouped_attention(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous()
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]


def _grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """`(L, H, Q, D)`, of H heads over H' of keys and values. Single queries of a group stand as several of one head,
    so that its keys and values are read once: reading them is what a step's attention takes."""
    rows, heads, queries, width = query.shape
    if queries > 1 or mask.shape[1] > 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    attended = F.scaled_dot_product_attention(groups, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(rows, heads, queries, value.shape[3])


def uses_slot_attention(policy: PreTrainedModel) -> bool:
    """Whether keys and values of the live rows are enough for the model, as it is set now."""
    return policy.config.get_text_config(decoder=True)._attn_implementation == SLOT_ATTENTION


@contextmanager
def attention_for_sampling(policy: PreTrainedModel) -> Iterator[None]:
    """An attention implementation that takes a mask and, where the model lets itself be told, reads live rows only;
    undone on exit. A model on eager attention stays there."""
    before = policy.config._attn_implementation
    wanted = _implementation(policy, before)
    if wanted == before:
        yield
        return
    policy.set_attn_implementation(wanted)
    try:
        yield
    finally:
        policy.set_attn_implementation(before)


def _implementation(policy: PreTrainedModel, before: str) -> str:
    if before == "eager" or not policy._supports_sdpa:
        return "eager"
    # A layer that went on with another implementation would get fewer keys than queries.
    models = [module for module in policy.modules() if isinstance(module, PreTrainedModel)]
    if not all(model._supports_sdpa and model._can_set_attn_implementation() for model in models):
        return "sdpa"
    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
    return SLOT_ATTENTION
