"""
Exact attention over a packed row, through transformers' public extension points and without a `T x T` mask.

A call that carries `packed_row` attends along the row's paths; every other call (generation, a padded batch) runs what
the model ran before, or `sdpa` where that was a flash-attention package, whose masks are of another kind. A packed
call needs no mask, and it must not be given a usable one: a layer that is not on this implementation would attend
across trajectories without a sign of it. So the mask it gets is NaN, and such a layer returns NaN.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from .path_attention import path_attention, splits
from .row import Chunk, PackedRow
from .slices import RowSlice
from .varlen import varlen_attention, varlen_index, varlen_kernel


SDPA, EAGER = "packed_sdpa", "packed_eager"

# What an attention variant passes when it computes more than softmax(QK) V under a causal mask
_UNSUPPORTED = ("s_aux", "position_bias", "alibi", "head_mask", "cache")


def register() -> None:
    """Make [`SDPA`] and [`EAGER`] known to transformers; harmless to repeat."""
    AttentionInterface.register(SDPA, _sdpa)
    AttentionMaskInterface.register(SDPA, sdpa_mask)
    AttentionInterface.register(EAGER, _eager)
    AttentionMaskInterface.register(EAGER, eager_mask)


def implementation_for(current: str, softcap: bool) -> str:
    """The implementation that treats ordinary batches as `current` does and packed ones along their paths."""
    return EAGER if current == "eager" or softcap else SDPA


def switch_attention(model: PreTrainedModel) -> str:
    """Put the packed attention on a model; the name of what it had before, for `set_attn_implementation`."""
    register()
    config = model.config.get_text_config()
    before = config._attn_implementation
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation(implementation_for(before, softcap))
    return before


def poison_mask(row: PackedRow, dtype: torch.dtype) -> Tensor:
    """`(1, 1, 1, 1)` of NaN: 4-D, so that transformers builds no mask from it, and never to be read."""
    return torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=row.input_ids.device)


def packed_arguments(row: PackedRow, kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A decoder's arguments with the batch replaced by the row."""
    return kwargs | {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "attention_mask": poison_mask(row, dtype),
        "packed_row": row,
    }


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    row = kwargs.pop("packed_row", None)
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_own_mask(attention_mask)
    return packed_attention(module, query, key, value, row, **kwargs), None


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    row = kwargs.pop("packed_row", None)
    if row is not None:
        _refuse_own_mask(attention_mask)
        return packed_attention(module, query, key, value, row, **kwargs), None
    _refuse_unsupported(kwargs)
    scaling: float = kwargs.get("scaling") or cast(int, module.head_dim) ** -0.5
    output, weights = _softmax_attention(
        query, key, value, attention_mask, scaling, kwargs.get("softcap"), kwargs.get("dropout", 0.0)
    )
    return output.transpose(1, 2).contiguous(), weights


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow | RowSlice,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> Tensor:
    """
    Attention in which each token sees its own path: `(1, T, heads, head_dim)`.

    Args:
        query (`Tensor`): `(1, heads, T, head_dim)`, rotated by depth (`row.position_ids`).
        key, value (`Tensor`): `(1, key_value_heads, T, head_dim)`.
        row ([`PackedRow`] or [`RowSlice`]): where the paths run.
        sliding_window (`int`, *optional*): a token sees the last `sliding_window` tokens of its path, itself included.
        softcap (`float`, *optional*): `c` of `c * tanh(scores / c)`.

    Raises:
        `NotImplementedError`: with attention dropout (a shared token would drop for all its sequences at once) or a
            variant that is not softmax attention under a causal mask.
    """
    _refuse_unsupported(kwargs)
    if dropout:
        raise NotImplementedError("attention dropout")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("bidirectional attention")
    if isinstance(row, RowSlice):
        return _slice_attention(module, query, key, value, row, scaling, sliding_window, softcap)
    row.windows_seen.append(sliding_window)
    query, key, value = _as_autocast(query, key, value)
    row.dtypes_seen.add(query.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = varlen_kernel(query, softcap)
    if kernel is not None:
        return varlen_attention(kernel, query, key, value, varlen_index(row), scaling, sliding_window, softcap)

    # Splits, not slices: the backward of a slice fills a tensor of the whole row with zeros, once per slice
    own = [tensor.split(row.chunk_lengths, dim=2) for tensor in (query, key, value)]
    if row.shares:
        segments = [tensor.split(row.segment_lengths, dim=2) for tensor in (query, key, value)]
    outputs = []
    for i, chunk in enumerate(row.chunks):
        q, k, v = (tensor[i] for tensor in own)
        prefix = [[tensor[s] for s in chunk.prefix_segments] for tensor in segments] if chunk.prefix_length else None
        outputs.append(_chunk_attention(row, chunk, prefix, q, k, v, scaling, sliding_window, softcap))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does inside SDPA, but before keys are gathered, and for kernels that autocast does not know."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _slice_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowSlice,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one slice to its path, whose keys and values are given; its own are left in `row`."""
    layer = cast(int, module.layer_idx)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _as_autocast(query, key, value)
    row.own[layer] = key, value
    path = row.prefix.get(layer)
    new, total = query.shape[2], key.shape[2] + (path[0].shape[2] if path else 0)
    window = None if window is not None and total <= window else window
    if path and window is None and softcap is None and splits(query, value):
        return path_attention(query, key, value, *path, scaling).transpose(1, 2)
    if path:
        key, value = (torch.cat(pair, dim=2) for pair in zip(path, (key, value), strict=True))
    kernel = varlen_kernel(query, softcap)
    if kernel is not None:
        index = row.varlen_index(new, query.device)
        return varlen_attention(kernel, query, key, value, index, scaling, window, softcap)
    grouped = query.shape[1] != key.shape[1]
    if window is None and softcap is None and new == total:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return output.transpose(1, 2)
    mask = row.causal_mask(new, window, query.device)
    if softcap is None:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    else:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        bias = bias.masked_fill(~mask, torch.finfo(query.dtype).min)
        output = _softmax_attention(query, key, value, bias, scaling, softcap, 0.0)[0]
    return output.transpose(1, 2)


def _chunk_attention(
    row: PackedRow,
    chunk: Chunk,
    path: list[list[Tensor]] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    new, prefix = q.shape[2], chunk.prefix_length
    if window is not None and prefix + new <= window:
        window = None
    plain = window is None and softcap is None
    if path and plain and 3 * prefix >= new and splits(q, v):
        return path_attention(q, k, v, torch.cat(path[1], dim=2), torch.cat(path[2], dim=2), scaling)
    if path:
        k, v = torch.cat([*path[1], k], dim=2), torch.cat([*path[2], v], dim=2)
    if softcap is not None:
        mask = row.causal_mask(new, prefix, window)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        return _softmax_attention(q, k, v, bias, scaling, softcap, 0.0)[0]
    grouped = q.shape[1] != k.shape[1]
    if plain and prefix <= new:
        # `is_causal` skips the masked half, which buys more than the prefix's own queries cost to run again
        q = torch.cat([*path[0], q], dim=2) if path else q
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        return output[:, :, prefix:] if prefix else output
    mask = row.causal_mask(new, prefix, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for scores that are soft-capped or wanted: output and weights."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, value), weights


def _refuse_unsupported(kwargs: dict) -> None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with `{name}`")


def _refuse_own_mask(mask: Tensor | None) -> None:
    """A layer that adds something to its mask (a learned bias, a choice of tokens) no longer has the one of NaN."""
    if mask is not None and mask.numel() > 1:
        raise NotImplementedError("attention with a mask that the layer makes itself")
