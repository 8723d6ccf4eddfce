r"""
Attention of new tokens to their path and to each other in two kernel calls without a mask, for CPUs.

A mask costs a CPU more than to be read: where it allows nothing, scores are computed all the same. The path before new
tokens is open to all of them, and among themselves they are causal, which the kernel knows how to halve. The outputs
$o_i$ and log-sum-exps $l_i$ of two disjoint sets of keys give those of their union exactly:

$$l = \log(e^{l_1} + e^{l_2}), \qquad o = e^{l_1 - l} o_1 + e^{l_2 - l} o_2$$

The kernel's backward pass computes probabilities as $e^{s - l}$ and needs of the output only $\mathrm{d}o \cdot o$, so
that, given $o$ and $l$ of the union, it returns the gradients of either part (FlashAttention, arXiv:2205.14135,
algorithm 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


# Of fewer new tokens the masked half is too small to pay for a second call
LEAST_NEW_TOKENS = 256


def splits(query: Tensor, value: Tensor) -> bool:
    """Whether two calls are possible, and faster than one with a mask."""
    if _FORWARD is None or _BACKWARD is None or query.device.type != "cpu":
        return False
    return query.shape[2] >= LEAST_NEW_TOKENS and query.shape[-1] == value.shape[-1]


def path_attention(
    query: Tensor, key: Tensor, value: Tensor, path_key: Tensor, path_value: Tensor, scaling: float
) -> Tensor:
    """
    Attention of `T` new tokens to the `P` before them and, causally, to each other: `(1, heads, T, head_dim)`.

    Args:
        query (`Tensor`): `(1, heads, T, head_dim)`.
        key, value (`Tensor`): `(1, key_value_heads, T, head_dim)`.
        path_key, path_value (`Tensor`): `(1, key_value_heads, P, head_dim)`, `P > 0`.
        scaling (`float`): factor on the scores.
    """
    return _PathAttention.apply(query, key, value, path_key, path_value, scaling)


class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *path_and_scaling: Any) -> Tensor:
        *path, scaling = path_and_scaling
        query, key, value, *path = (_by_rows(tensor) for tensor in (query, key, value, *path))
        groups = query.shape[1] // key.shape[1]
        output, logsumexp = _FORWARD(query, *_repeat((key, value), groups), 0.0, True, scale=scaling)
        folded, path_logsumexp = _FORWARD(_fold(query, groups), *path, 0.0, False, scale=scaling)
        path_output, path_logsumexp = folded.reshape(output.shape), path_logsumexp.reshape(logsumexp.shape)
        share = torch.sigmoid(path_logsumexp - logsumexp)[..., None]
        output = torch.lerp(output, path_output, share.to(output.dtype))
        logsumexp = torch.logaddexp(logsumexp, path_logsumexp)
        ctx.save_for_backward(query, key, value, *path, output, logsumexp)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, path_key, path_value, output, logsumexp = ctx.saved_tensors
        groups, grad = query.shape[1] // key.shape[1], _by_rows(grad)
        own = _repeat((key, value), groups)
        grads = _BACKWARD(grad, query, *own, output, logsumexp, 0.0, True, scale=ctx.scaling)
        of_path = _BACKWARD(
            _fold(grad, groups), _fold(query, groups), path_key, path_value, _fold(output, groups),
            _fold(logsumexp[..., None], groups)[..., 0], 0.0, False, scale=ctx.scaling,
        )  # fmt: skip
        of_own = (x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2) for x in grads[1:])
        return grads[0] + of_path[0].reshape(query.shape), *of_own, *of_path[1:], None


def _by_rows(tensor: Tensor) -> Tensor:
    """With a head's numbers side by side, as the kernel reads them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _repeat(tensors: tuple[Tensor, Tensor], groups: int) -> tuple[Tensor, ...]:
    return tensors if groups == 1 else tuple(tensor.repeat_interleave(groups, dim=1) for tensor in tensors)


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """The heads of a group as more queries of one: `(1, heads / groups, groups * T, ...)`."""
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).flatten(2, 3)
