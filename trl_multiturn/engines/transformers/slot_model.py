"""A policy over the shared cache: one forward pass, over rows that decode or over prompts that are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...precision import matmul_uses_tf32
from .compatibility import attention_windows, refuse_different_logits, refuse_uncertain_window
from .kv_cache import SlotCache, round_up
from .packed_prompts import PackedAttention, Piece, attending
from .slot_attention import uses_slot_attention
from .step_runs import COLUMN_MULTIPLE, in_runs, runs_of
from .step_weights import StepWeights


# Matrix kernels treat fewer rows than this differently (GEMV, short tails): below it, the last bits of a row's result
# would depend on how many rows share the batch. Attention treats every row alone, so it leaves the padding out.
ROW_MULTIPLE = 16


class SlotModel:
    """
    A policy and the [`SlotCache`] that its passes read and fill.

    Args:
        model (`torch.nn.Module`):
            What is called: the policy, or PEFT's shell around it. It gets `input_ids`, `position_ids`,
            `past_key_values` and a 4-D `attention_mask` (or a dict of them by layer type).
        policy ([`~transformers.PreTrainedModel`]):
            The decoder inside.
        max_rows (`int`):
            Most rows of the cache.
        step_weights_bytes (`int`):
            Most bytes of copies of weights for decoding steps; see [`StepWeights`].
    """

    def __init__(self, model: nn.Module, policy: PreTrainedModel, max_rows: int, step_weights_bytes: int) -> None:
        self.model, self.policy = model, policy
        self._max_rows = max(max_rows, ROW_MULTIPLE)
        self.step_weights = StepWeights(model, step_weights_bytes, self._max_rows)
        self._windows, self._uncertain_window = attention_windows(policy)
        self._layer_types = getattr(policy.config.get_text_config(decoder=True), "layer_types", None)
        # Without it, all logits of a prompt are computed and thrown away.
        keeps_logits = "logits_to_keep" in inspect.signature(type(policy).forward).parameters
        self._options = {"use_cache": True} | ({"logits_to_keep": 1} if keeps_logits else {})
        # Hooks of Accelerate move weights after a layer's pass, which may end early
        self._may_pack = not any(hasattr(module, "_hf_hook") for module in model.modules())
        self._proven = False
        self.drop_buffers()

    @property
    def device(self) -> torch.device:
        return cast(nn.Embedding, self.policy.get_input_embeddings()).weight.device

    @property
    def packs(self) -> bool:
        """Whether prompts are read one behind the other, without padding: on a CPU, where it costs nothing to call
        attention once a row, and where attention can be told."""
        return self._may_pack and self.device.type == "cpu" and uses_slot_attention(self.policy)

    def drop_buffers(self) -> None:
        """Frees the shared cache. Only while no row is live."""
        self.cache = SlotCache(len(self._windows), self._max_rows)

    def prove(self) -> None:
        """Compares decoding with the model's plain forward pass, the first time.

        Raises:
            ValueError: if the model cannot be sampled from a shared cache.
        """
        if self._proven:
            return
        precise = _computes_in_float32(self.model, self.policy)
        if self.packs:
            try:
                refuse_different_logits(self, precise)
            except ValueError:
                self._may_pack = False
        if not self.packs:
            refuse_different_logits(self, precise)
        self._proven = True

    def refuse_uncertain(self, length: int) -> None:
        """Raises `ValueError` where it is not known what the model's layers see of `length` tokens."""
        if self._uncertain_window is not None:
            refuse_uncertain_window(self.policy, self._uncertain_window, length)

    def decode_known(self, token_ids: Tensor, count: int) -> Tensor:
        """Logits `(count, V)` after the last `count` of `token_ids`, `(1, T)`, each read by a step of its own. Only
        while no row is live."""
        read, length = token_ids.shape[1] - count, token_ids.shape[1]
        self.cache.reserve(ROW_MULTIPLE, length)
        if self.packs:  # beside another row, and the second half behind the first
            ids, half = token_ids[0, :read].tolist(), read // 2
            self.read_packed([Piece(1, 0, ids[3:half]), Piece(0, 0, ids[:half])])
            self.read_packed([Piece(1, half - 3, ids[3:]), Piece(0, half, ids[half:])])
        else:
            columns = torch.arange(read, device=self.device).unsqueeze(0)
            self.run(0, token_ids[:, :read], columns, columns, read)
        logits = []
        for column in range(read, length):
            step_ids, positions = torch.zeros(2, ROW_MULTIPLE, 1, dtype=torch.long, device=self.device)
            step_ids[0], positions[0] = token_ids[0, column], column
            # Two rows: keys of one alone would fit any number of queries.
            logits.append(self.run(0, step_ids, positions, positions, column + 1, live=2)[0, 0])
        return torch.stack(logits)

    def step(self, token_ids: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits `(L, V)` after one more token of each of the first rows.

        Args:
            token_ids, positions (`torch.Tensor` of shape `(N, 1)`):
                Of the L rows, and of padding behind them.
            lengths (sequence of `int`):
                Of the L rows, the new token included.
        """
        runs = runs_of(lengths) if self.device.type == "cpu" and uses_slot_attention(self.policy) else None
        with in_runs(runs):
            logits = self.run(0, token_ids, positions, positions, max(lengths), live=len(lengths))
        return logits[: len(lengths), 0]

    def run(
        self, first: int, token_ids: Tensor, positions: Tensor, columns: Tensor, length: int, live: int | None = None
    ) -> Tensor:
        """Runs rows from `first` on; tensors are `(N, Q)`, `length` is one more than the largest of `columns`. In a
        decoding step the rows behind the first `live` are padding, whose results mean nothing; without `live` all are
        rows of prompts. Returns the logits of the last token of each row, `(N, 1, V)`."""
        call = self.model if live is None else self.step_weights.call
        if live is None or not uses_slot_attention(self.policy):
            live = len(token_ids)
        # The buffer's length is a multiple of this one too.
        visible = round_up(length, COLUMN_MULTIPLE)
        self.cache.focus(first, live, columns, visible)
        return self._forward(call, token_ids, positions, self._masks(columns, visible))[:, -1:]

    def read_packed(self, pieces: Sequence[Piece]) -> None:
        """Fills rows of the cache with what is left to read of their prompts, one behind the other in one row."""
        token_ids = [token for piece in pieces for token in piece.token_ids]
        rows = [piece.row for piece in pieces for _ in piece.token_ids]
        columns = [column for piece in pieces for column in range(piece.start, piece.end)]
        padding = [0] * (ROW_MULTIPLE - len(token_ids))
        self.cache.reserve(max(rows) + 1, max(columns) + 1)
        self.cache.focus_on_tokens(torch.tensor(rows), torch.tensor(columns))
        # What attends to what is not in the mask, which only has the shape of one.
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(
            1, 1, len(token_ids + padding), self.cache.window.length
        )
        with attending(PackedAttention(pieces, self._windows)):
            ids, positions = torch.tensor([token_ids + padding]), torch.tensor([columns + padding])
            self._forward(self.model, ids, positions, self._by_layer_type(dict.fromkeys(self._windows, seen)))

    def _forward(
        self, call: Callable[..., Any], token_ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor]
    ) -> Tensor:
        return call(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            **self._options,
        ).logits

    def _masks(self, columns: Tensor, visible: int) -> Tensor | dict[str, Tensor]:
        """`(N, 1, Q, K)` masks: a token sees the columns up to its own, within its layer's window."""
        keys = torch.arange(visible, device=columns.device)
        queries = columns[:, None, :, None]
        causal = keys <= queries
        return self._by_layer_type(
            {
                window: self._in_model_format(causal if window is None else causal & (keys > queries - window))
                for window in set(self._windows)
            }
        )

    def _by_layer_type(self, by_window: dict[int | None, Tensor]) -> Tensor | dict[str, Tensor]:
        if len(by_window) == 1:
            return next(iter(by_window.values()))
        layers = zip(self._layer_types or (), self._windows, strict=True)
        return {kind: by_window[window] for kind, window in layers}

    def _in_model_format(self, allowed: Tensor) -> Tensor:
        if self.policy.config._attn_implementation != "eager":
            return allowed
        dtype = self.policy.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def _computes_in_float32(model: nn.Module, policy: PreTrainedModel) -> bool:
    mixed = any(hasattr(module, "_original_forward") for module in (model, policy))  # Accelerate's mixed precision
    coarse = mixed or getattr(policy, "is_quantized", False) or matmul_uses_tf32()
    return policy.dtype == torch.float32 and not coarse
