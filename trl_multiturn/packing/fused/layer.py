"""
A decoder layer of a packed row, from few operators.

transformers' layer launches about 165 operators forward and backward in bfloat16 autocast: casts of every weight and
of every input of every product, norms and rotary embeddings from elementary parts. At a few thousand tokens a GPU
waits for them to be launched. Here the projections of one input are one product, weights are cast by one launch, norms
are PyTorch's, and the rotation of queries and keys is one.

The layer keeps its modules and parameters. While it is fused, its instance has a `forward` of its own, which answers
calls with a packed row and passes others on.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import packed_attention
from ..last_layer import READ
from ..row import PackedRow
from .operators import RotationCache, gated, linear, rotate, split_heads, stack_weights


_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def fuse_layers(decoder: nn.Module) -> list[FusedLayer]:
    """The fused layers of a decoder, in place; empty where its layers are of another kind."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(_is_known(layer) for layer in layers):
        return []
    rotations = RotationCache()
    return [FusedLayer(layer, rotations, is_last=layer is layers[-1]).install() for layer in layers]


class FusedLayer:
    """
    The forward pass of one decoder layer on a packed row.

    Args:
        layer (`nn.Module`): pre-norm attention and a gated SiLU feed-forward block, as in Llama, Mistral, Qwen2 and
            Qwen3.
        rotations ([`RotationCache`]): of the decoder.
        is_last (`bool`, *optional*, defaults to `False`): whether it is the decoder's last layer, whose feed-forward
            block runs on what is read (see [`LastFeedForward`]).
    """

    def __init__(self, layer: nn.Module, rotations: RotationCache, is_last: bool = False) -> None:
        self.layer, self.rotations, self.is_last = layer, rotations, is_last
        parts = cast(Any, layer)
        self.attention, self.norms = parts.self_attn, (parts.input_layernorm, parts.post_attention_layernorm)
        head_norms = [getattr(self.attention, name, None) for name in _HEAD_NORMS]
        self.head_norms = [norm for norm in head_norms if norm is not None]
        self.groups: tuple[list[nn.Linear], ...] = (
            [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj],
            [self.attention.o_proj],
            [parts.mlp.gate_proj, parts.mlp.up_proj],
            [parts.mlp.down_proj],
        )
        self._hooks = self._count_hooks()

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.groups[1][0].weight.device

    def install(self) -> FusedLayer:
        """Put the forward pass on the layer."""
        self.layer.forward = self.forward  # type: ignore[method-assign]
        return self

    def remove(self) -> None:
        """The layer has its class's `forward` again."""
        if getattr(self.layer.__dict__.get("forward"), "__self__", None) is self:
            del self.layer.forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        row = kwargs.get("packed_row")
        if args or not isinstance(row, PackedRow) or self._count_hooks() != self._hooks:
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        run = partial(self._compute, row=row, kwargs=kwargs)
        layer = cast(Any, self.layer)
        if layer.training and getattr(layer, "gradient_checkpointing", False) and self._checkpoints_in_forward:
            return layer._gradient_checkpointing_func(run, hidden_states)
        return run(hidden_states)

    @property
    def _checkpoints_in_forward(self) -> bool:
        """Whether transformers checkpoints the class's `forward`, as since 5.23; before, it did the layer's call."""
        return type(self.layer).__call__ is nn.Module.__call__

    def _compute(self, hidden_states: Tensor, row: PackedRow, kwargs: dict[str, Any]) -> Tensor:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.groups[1][0].weight.dtype
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return self._run(hidden_states.squeeze(0), row, dtype, kwargs).unsqueeze(0)

    def _run(self, states: Tensor, row: PackedRow, dtype: torch.dtype, kwargs: dict[str, Any]) -> Tensor:
        inputs, out, both, down = stack_weights(self.groups, dtype)
        projected = linear(_norm(self.norms[0], states), inputs, self.groups[0])
        attended = self._attend(projected, row, kwargs)
        states = states + linear(attended, out, self.groups[1])
        read = kwargs.get(READ, (None, None))[1] if self.is_last else None
        seen = states if read is None else states.index_select(0, read)
        added = linear(gated(linear(_norm(self.norms[1], seen), both, self.groups[2])), down, self.groups[3])
        return states + added if read is None else states.index_add(0, read, added.to(states.dtype))

    def _attend(self, projected: Tensor, row: PackedRow, kwargs: dict[str, Any]) -> Tensor:
        attention = self.attention
        head_dim = attention.head_dim
        queries, keys = (layer.out_features // head_dim for layer in self.groups[0][:2])
        rotation = self.rotations.rotation(*kwargs["position_embeddings"])
        q, k, v = split_heads(projected, queries, keys, None if self.head_norms else rotation)
        if self.head_norms:
            q, k = (
                rotate(_norm(norm, x), rotation, projected.dtype)
                for norm, x in zip(self.head_norms, (q, k), strict=True)
            )
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        output = packed_attention(attention, q, k, v, row, scaling=attention.scaling, sliding_window=window)
        return output.squeeze(0).flatten(1)  # not `[0]`, whose backward pass fills a tensor with zeros

    def _count_hooks(self) -> int:
        """Hooks of the parts, which are not called one by one here: where one is put on later, the layer is run."""
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in self.layer.modules())


def _norm(norm: nn.Module, states: Tensor) -> Tensor:
    """A root-mean-square norm as one launch, which wants states and weights of one dtype."""
    weight = cast(Tensor, norm.weight)
    dtype = torch.promote_types(states.dtype, weight.dtype)
    return F.rms_norm(states.to(dtype), weight.shape, weight.to(dtype), cast(float, norm.variance_epsilon))


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer has the parts that are computed here, and no others; what it does with them is tried later."""
    if "forward" in layer.__dict__ or {name for name, _ in layer.named_children()} != _PARTS:
        return False
    attention, block = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    head_norms = [getattr(attention, name, None) for name in _HEAD_NORMS]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in head_norms if norm is not None)]
    return (
        _maps_of(attention) == {*_MAPS}
        and len(norms) in (2, 4)
        and _maps_of(block) == {*_FEED_FORWARD}
        and _activation(block) in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") and len(list(norm.parameters())) == 1 for norm in norms)
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "config"))
        and len({linear.bias is None for linear in (attention.q_proj, attention.k_proj, attention.v_proj)}) == 1
        and (block.gate_proj.bias is None) == (block.up_proj.bias is None)
        and len({parameter.dtype for linear in _linears(layer) for parameter in linear.parameters()}) == 1
    )


def _maps_of(block: nn.Module) -> set[str]:
    """Names of a block's plain linear maps; of everything in it that has parameters, if something else has."""
    parts = {name: part for name, part in block.named_children() if name not in _HEAD_NORMS and _has_parameters(part)}
    return {name if type(part) is nn.Linear else f"another {name}" for name, part in parts.items()}


def _has_parameters(part: nn.Module) -> bool:
    return any(True for _ in part.parameters())


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def _activation(block: nn.Module) -> str:
    return type(getattr(block, "act_fn", None)).__name__
