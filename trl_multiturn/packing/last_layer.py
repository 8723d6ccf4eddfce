"""
The last layer's feed-forward block, only on the states that are read.

After the last attention no token looks at another one: what the last feed-forward block adds to a token reaches the LM
head or nothing. So it need not run on tokens that predict nothing scored, more than half of a trajectory with tool
results. On the others it adds nothing here, and nobody reads them; scores and gradients are the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


# The argument of a decoder that names the states to be read, and for whose hooks: `(LastFeedForward, indices)`. It
# reaches the layers as attention arguments do
READ = "packed_states_read"


class LastFeedForward:
    """
    Hooks on a decoder's last layer that let its feed-forward block see the states named by [`READ`] only.

    They act on calls that carry [`READ`] with these hooks' name on it (an earlier trainer's may still sit on the same
    layer, on the other side of PEFT's shell), also where gradient checkpointing computes the layer again: the
    attention before the block gets the layer's arguments both times. A decoder whose last layer is not `self_attn` and
    a plain `mlp` of linear maps (a mixture of experts counts its tokens) is left alone.

    Args:
        decoder (`nn.Module`): with `layers`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._states: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._handles: list[RemovableHandle] = []
        last = _last_blocks(decoder)
        if last is None:
            return
        attention, feed_forward = last
        self._handles = [
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            feed_forward.register_forward_pre_hook(self._select),
            feed_forward.register_forward_hook(self._place, always_call=True),
        ]

    @property
    def acts(self) -> bool:
        """Whether the decoder has such a block."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        reader, states = kwargs.get(READ, (None, None))
        self._states = states if reader is self else None

    def _select(self, module: nn.Module, args: tuple) -> tuple | None:
        if self._states is None:
            return None
        self._shape = args[0].shape
        return args[0].index_select(1, self._states), *args[1:]

    def _place(self, module: nn.Module, args: tuple, output: Tensor | None) -> Tensor | None:
        states, self._states = self._states, None
        if states is None or output is None:
            return None
        return output.new_zeros(self._shape).index_copy(1, states, output)


def _last_blocks(decoder: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    attention, feed_forward = (getattr(layers[-1], name, None) for name in ("self_attn", "mlp"))
    if attention is None or feed_forward is None:
        return None
    linear = [module for module in feed_forward.modules() if isinstance(module, nn.Linear)]
    known = {id(parameter) for module in linear for parameter in module.parameters(recurse=False)}
    if any(id(parameter) not in known for parameter in feed_forward.parameters()):
        return None
    return attention, feed_forward
