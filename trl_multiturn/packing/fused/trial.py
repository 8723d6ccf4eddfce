"""Whether a fused layer computes what its class does, tried on the model and the device at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..attention import packed_arguments
from ..row import pack_rows
from .layer import FusedLayer


def reason_against_fusing(decoder: nn.Module, fused: list[FusedLayer], input_ids: Tensor) -> str | None:
    """
    The first layer of a decoder, forward and backward, fused and as it came; why the results differ, or `None`.

    Weights are only read, no gradient is kept, and PyTorch's random state is not touched.

    Args:
        decoder (`nn.Module`): that is fused.
        fused (`list[FusedLayer]`): its layers.
        input_ids (`Tensor`): `(B, L)`, sequences that fork.
    """
    layer, row = fused[0].layer, pack_rows(input_ids)
    try:
        embedding = cast(nn.Module, decoder.get_input_embeddings())  # type: ignore[operator]
        states = embedding(row.input_ids).detach()
        arguments = packed_arguments(row, {}, states.dtype)
        del arguments["input_ids"]
        arguments["position_embeddings"] = decoder.rotary_emb(states, row.position_ids)  # type: ignore[operator]
        ours, theirs = (
            _results(forward, layer, states, arguments)
            for forward in (fused[0].forward, lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs))
        )
    except Exception as error:  # of whatever kind: the layers can do without
        return f"the trial raised {type(error).__name__}: {error}"
    eps = max(torch.finfo(x.dtype).eps for x in theirs)
    if torch.is_autocast_enabled(states.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(states.device.type)).eps)
    largest = max(_difference(ours[0], theirs[0]), _difference(_flat(ours[1:]), _flat(theirs[1:])))
    return None if largest <= max(1e-3, 16 * eps) else f"states or gradients differ by {largest:.2g}"


def _results(
    forward: Callable[..., Tensor], layer: nn.Module, states: Tensor, arguments: dict[str, Any]
) -> list[Tensor]:
    """States after a layer, and gradients of some function of them: of the states before, and of the parameters."""
    with torch.enable_grad():
        states = states.clone().requires_grad_()
        after = forward(states, **arguments)
        after = after if isinstance(after, Tensor) else after[0]
        weights = torch.linspace(-1, 1, after.numel(), device=after.device).view_as(after)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        with torch.autocast(states.device.type, enabled=False):
            gradients = torch.autograd.grad((after * weights.to(after.dtype)).sum(), [states, *parameters])
    return [after.detach(), *gradients]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def _difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to the second."""
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()
