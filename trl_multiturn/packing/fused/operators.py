r"""
Differentiable operators that launch few kernels; each takes and returns one row of tokens.

Autograd would record every product, cast and slice by itself, and undo each by itself. Here the backward passes are
written out. Whatever the dtype of the states, products run in that of the weights they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """Linear maps of the same input as one: `(outputs, inputs)`, in the dtype of products, and perhaps a bias."""

    weight: Tensor
    bias: Tensor | None


def stack_weights(groups: Sequence[Sequence[nn.Linear]], dtype: torch.dtype) -> list[Weights]:
    """Each group's maps stacked and cast, all by one launch; a single map of that dtype is taken as it is."""
    sources: list[Tensor] = []
    targets: list[Tensor] = []

    def stack(parts: list[Tensor]) -> Tensor:
        parts = [part.detach() for part in parts]
        if len(parts) == 1 and parts[0].dtype == dtype:
            return parts[0]
        lengths = [len(part) for part in parts]
        stacked = parts[0].new_empty((sum(lengths), *parts[0].shape[1:]), dtype=dtype)
        sources.extend(parts)
        targets.extend(stacked.split(lengths))
        return stacked

    stacked = [
        Weights(
            stack([linear.weight for linear in group]),
            None if group[0].bias is None else stack([linear.bias for linear in group]),
        )
        for group in groups
    ]
    if sources:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return stacked


def linear(states: Tensor, weights: Weights, group: Sequence[nn.Linear]) -> Tensor:
    """`(T, inputs)` through the stacked maps of a group, whose parameters get the gradients: `(T, outputs)`."""
    biases = [layer.bias for layer in group] if weights.bias is not None else []
    return _Linear.apply(states, weights, len(group), *(layer.weight for layer in group), *biases)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Weights, count: int, *parameters: Tensor) -> Tensor:
        inputs = states.to(weights.weight.dtype)
        # A stack of the parameters' own dtype is made again, so that no second set of weights is kept for the backward
        own = parameters[0].dtype == weights.weight.dtype
        ctx.save_for_backward(inputs, *(parameters[:count] if own else [weights.weight]))
        ctx.count, ctx.dtype, ctx.parameters_dtype = count, states.dtype, parameters[0].dtype
        ctx.lengths, ctx.biases = [len(matrix) for matrix in parameters[:count]], len(parameters) - count
        if weights.bias is None:
            return torch.mm(inputs, weights.weight.t())
        return torch.addmm(weights.bias, inputs, weights.weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *maps = ctx.saved_tensors
        needs_states, needs_matrices, needs_biases = _needs(ctx.needs_input_grad, ctx.count)
        grad_states = None
        if needs_states:
            grad_states = torch.mm(grad, maps[0] if len(maps) == 1 else torch.cat(maps)).to(ctx.dtype)
        matrices: tuple[Tensor | None, ...] = (None,) * ctx.count
        biases: tuple[Tensor | None, ...] = (None,) * ctx.biases
        if needs_matrices:
            matrices = _product(grad.t(), inputs, ctx.parameters_dtype).split(ctx.lengths)
        if needs_biases:
            biases = grad.sum(dim=0, dtype=torch.float32).to(ctx.parameters_dtype).split(ctx.lengths)
        return grad_states, None, None, *matrices, *biases


def _needs(needs: tuple[bool, ...], count: int) -> tuple[bool, bool, bool]:
    """Whether states, matrices and biases need gradients."""
    return needs[0], any(needs[3 : 3 + count]), any(needs[3 + count :])


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in another dtype; on a GPU without rounding to that of the inputs first."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class Rotation(NamedTuple):
    """Rotary position embeddings of a row, `(T, 1, head_dim)` each: a half-rotation is a roll times signed sines."""

    cos: Tensor
    signed: Tensor
    rolled: Tensor  # `signed` as the transposed rotation needs it


def rotation_of(cos: Tensor, sin: Tensor) -> Rotation:
    """
    From transformers' `position_embeddings`, `(1, T, head_dim)` each.

    `rotate_half` is `[-x2, x1]`, and `[x2, x1]` a roll by half the head.
    """
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]
    return Rotation(cos[0, :, None], signed, signed.roll(half, dims=-1))


class RotationCache:
    """The rotation of the row at hand, made once for all layers, which get the very same embeddings."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Rotation] | None = None

    def rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """As [`rotation_of`]."""
        if self._known is None or self._known[0] is not cos:
            self._known = cos, rotation_of(cos, sin)
        return self._known[1]


def split_heads(
    projected: Tensor, queries: int, keys: int, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(T, (queries + 2 keys) * head_dim)` as `(T, heads, head_dim)`: queries, keys (rotated, if wanted), values."""
    return _SplitHeads.apply(projected, queries, keys, rotation)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, queries: int, keys: int, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rotation, ctx.keys = rotation, keys
        heads = projected.view(len(projected), queries + 2 * keys, -1)
        turned = heads[:, :-keys]
        if rotation is not None:
            turned = _rotate(turned, rotation.cos, rotation.signed).to(heads.dtype)
        return turned[:, :queries], turned[:, queries:], heads[:, -keys:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.cat(grads, dim=1)
        if ctx.rotation is not None:
            turned = grad[:, : -ctx.keys]
            turned.copy_(_rotate(turned, ctx.rotation.cos, ctx.rotation.rolled))
        return grad.flatten(1), None, None, None


def rotate(heads: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """Heads `(T, heads, head_dim)` rotated by their positions, in the dtype of products."""
    return _Rotate.apply(heads, rotation, dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
        ctx.rotation, ctx.dtype = rotation, heads.dtype
        return _rotate(heads, rotation.cos, rotation.signed).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rotate(grad, ctx.rotation.cos, ctx.rotation.rolled).to(ctx.dtype), None, None


def _rotate(heads: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    rolled = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.mul(heads, cos).addcmul_(rolled, signed)


def gated(both: Tensor) -> Tensor:
    """`silu(gate) * up` of `(T, 2 I)`, gates before ups: `(T, I)`."""
    return _Gated.apply(both)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        active = nn.functional.silu(gate)
        ctx.save_for_backward(both, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        both, active = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, active, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_both
