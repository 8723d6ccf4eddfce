"""
The packed path of a decoder without an LM head: value models, and hidden states for whoever reads them.

The decoder is called with a padded batch and returns padded hidden states; in between runs the packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import packed_arguments, switch_attention
from .plan import PlanCache, chunk_overhead
from .row import PackedRow
from .sequences import Sequences


# The row, or the segments, that a decoder is running on, while it does
ROWS_IN_FLIGHT: WeakKeyDictionary[nn.Module, PackedRow | Sequences] = WeakKeyDictionary()

# Decoders whose every state somebody reads
CAPTURED: WeakSet[nn.Module] = WeakSet()


class PackedDecoder:
    """
    Runs a decoder's training calls (`use_cache=False`, padded on the right) on packed rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a decoder, of an architecture that passed the self-test.
        pack (`bool` or `"auto"`): as in [`PackedForward`].
        plans ([`PlanCache`]): the policy's, so that a batch is packed once for both.
    """

    def __init__(self, model: nn.Module, pack: bool | str, plans: PlanCache) -> None:
        self.decoder = without_adapters(model)
        self.calls = {"packed": 0, "padded": 0}
        self._pack, self._plans = pack, plans
        self._before = switch_attention(self.decoder)
        self._handles = [
            # First, as `expanded` takes the branching batches that are left
            self.decoder.register_forward_pre_hook(self._pack_call, with_kwargs=True, prepend=True),
            self.decoder.register_forward_hook(self._unpack_states, always_call=True),
        ]

    @property
    def packs(self) -> bool:
        """Whether batches may be packed."""
        return bool(self._pack)

    def remove(self) -> None:
        """Take everything back; the model is as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.decoder.set_attn_implementation(self._before)

    def _pack_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        others = {name for name, value in kwargs.items() if value is not None}
        if args or ids is None or kwargs.get("use_cache") is not False:
            return None
        if others - {"input_ids", "attention_mask", "use_cache", "return_dict"}:
            return None
        overhead = chunk_overhead(self.decoder.config.get_text_config().hidden_size, ids.device, self.decoder.dtype)
        row = self._plans.row(ids, mask, self._pack, overhead)
        self.calls["padded" if row is None else "packed"] += 1
        if row is None:
            return None
        ROWS_IN_FLIGHT[module] = row
        return args, packed_arguments(row, kwargs, self.decoder.dtype)

    def _unpack_states(self, module: nn.Module, args: tuple, output: Any) -> Any:
        row = ROWS_IN_FLIGHT.pop(module, None)
        if row is not None and output is not None:
            output.last_hidden_state = row.unpack(output.last_hidden_state)
        return output


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The model that adapters are put on, with those it carries inside its layers; the model itself without PEFT."""
    return cast(PreTrainedModel, cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model)


@contextmanager
def capture_hidden_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """
    Collects the decoder's last hidden states `(B, L, H)` of each forward pass made inside, packed or not.

    Padded positions hold anything.
    """
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        row = ROWS_IN_FLIGHT.get(module)
        states = output.last_hidden_state
        captured.append(states if row is None else row.unpack(states))

    # Before the packed path's own hook, which keeps only what is scored
    handle = decoder.register_forward_hook(hook, prepend=True)
    CAPTURED.add(decoder)
    try:
        yield captured
    finally:
        CAPTURED.discard(decoder)
        handle.remove()
