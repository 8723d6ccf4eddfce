"""What one call of the model will compute: a packed row or the padded batch, and which of its tokens are scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .row import MIN_SHARED_TOKENS, PackedRow, pack_rows
from .sequences import sequences_of
from .varlen import KERNEL_DTYPES


# Work of one more attention call per layer, in weights touched: what a chunk costs on top of its tokens. Dividing by
# the weights that a token meets in a layer (of the order of `hidden_size ** 2`) gives tokens.
_CHUNK_WORK = 100_000


@dataclass(frozen=True)
class Plan:
    """
    Args:
        row ([`PackedRow`], *optional*): what the network runs on; `None` for the padded batch as it came.
        sources (`Tensor`): `(N,)`, for each scored token the index of the hidden state that predicts it, in the row
            or in the flattened padded batch.
        targets (`Tensor`): `(N,)`, the scored tokens.
        mask (`Tensor`): `(B, L - 1)`, true where the padded fields hold a score.
        places (`Tensor`): `(mask.sum(),)`, which scored token each of those entries holds.
        right_padded (`bool`): whether no token has padding before it, so that causality alone hides the padding.
    """

    row: PackedRow | None
    sources: Tensor
    targets: Tensor
    mask: Tensor
    places: Tensor
    right_padded: bool

    def __str__(self) -> str:
        batch, width = self.mask.shape[0], self.mask.shape[1] + 1
        shape = f"{batch} sequences, {batch * width} tokens padded"
        if self.row is None:
            return f"{shape}: stays padded, the LM head on {len(self.targets)} trained tokens only"
        return f"{shape}, {self.row.raw_tokens} without padding, {len(self.row)} unique: packed"

    @cached_property
    def read(self) -> Tensor:
        """The hidden states that predict a scored token, in order, each once."""
        return self.sources.unique()

    def scatter(self, scores: Tensor) -> Tensor:
        """`(N,)` scores as a padded `(B, L - 1)` field, 0 outside the mask; sequences that share a token share it."""
        field = scores.new_zeros(self.mask.shape)
        return field.masked_scatter(self.mask, scores.index_select(0, self.places))


def chunk_overhead(hidden_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """What a chunk costs beyond its tokens, in tokens: little next to a wide layer, and nothing in a varlen kernel."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cuda" and dtype in KERNEL_DTYPES:
        return 0
    return 1 + _CHUNK_WORK // hidden_size**2


def choose_row(
    input_ids: Tensor, attention_mask: Tensor | None, pack: bool | str = "auto", overhead: int = 0
) -> PackedRow | None:
    """
    The packed row of a right-padded batch, or `None` where the batch stays padded; decided from the shapes alone.

    With `pack="auto"` the row is used where its unique tokens and the overhead of its chunks come to less than the
    padded batch; where nothing is padded, shared or long, the padded batch is as good and stays. Of a batch that
    branches ([`note_branches`]) the segments are packed.

    Args:
        input_ids (`Tensor`): `(B, L)`.
        attention_mask (`Tensor`, *optional*): `(B, L)`. A batch that is not padded on the right stays as it is.
        pack (`bool` or `"auto"`, *optional*, defaults to `"auto"`): always, never, or where it pays.
        overhead (`int`, *optional*, defaults to `0`): tokens that a chunk costs beyond its own.
    """
    if not pack or input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        return None
    worth = MIN_SHARED_TOKENS if pack is True else max(MIN_SHARED_TOKENS, overhead)
    sequences = sequences_of(input_ids)
    ids, mask = (input_ids, attention_mask) if sequences is None else (sequences.input_ids, sequences.attention_mask)
    try:
        row = pack_rows(ids, mask, min_shared=worth)
    except ValueError:
        return None
    if pack is not True and len(row) + overhead * len(row.chunks) >= ids.numel() + overhead:
        return None
    if sequences is not None:
        sequences.are_read = True
        row = row.in_columns(sequences.cells)
    return row


def plan_call(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, row: PackedRow | None) -> Plan | None:
    """
    Which tokens of a batch are scored, and where their scores go.

    Args:
        input_ids (`Tensor`): `(B, L)`.
        attention_mask (`Tensor`, *optional*): `(B, L)`.
        labels (`Tensor`): `(B, L)`, the token itself where it is scored and -100 elsewhere.
        row ([`PackedRow`], *optional*): of the batch; `None` if it stays padded.

    Returns:
        `Plan`, or `None` where labels are other than the batch's own tokens.
    """
    mask = labels[:, 1:] != -100
    if not bool((labels[:, 1:][mask] == input_ids[:, 1:][mask]).all()):
        return None
    if row is not None:
        scored, places = row.cells[:, 1:][mask].unique(return_inverse=True)
        return Plan(row, row.parents[scored], row.input_ids[0, scored], mask, places, True)
    cells = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
    sources = cells[:, :-1][mask]
    places = torch.arange(len(sources), device=input_ids.device)
    return Plan(None, sources, input_ids[:, 1:][mask], mask, places, _is_right_padded(attention_mask))


def _is_right_padded(attention_mask: Tensor | None) -> bool:
    if attention_mask is None:
        return True
    return attention_mask.dim() == 2 and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


class PlanCache:
    """
    Rows and plans of the last two batches.

    Policy, reference and value model are called with the very same tensors; KTO calls each with two batches in turn.
    """

    def __init__(self) -> None:
        self._rows: deque[tuple[tuple[Any, ...], PackedRow | None]] = deque(maxlen=2)
        self._plans: deque[tuple[tuple[Any, ...], Plan | None]] = deque(maxlen=2)

    def clear(self) -> None:
        self._rows.clear()
        self._plans.clear()

    def row(
        self, input_ids: Tensor, attention_mask: Tensor | None, pack: bool | str, overhead: int
    ) -> PackedRow | None:
        """As [`choose_row`]."""
        key = (input_ids, attention_mask, pack)
        return _remembered(self._rows, key, lambda: choose_row(input_ids, attention_mask, pack, overhead))

    def plan(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, pack: bool | str, overhead: int
    ) -> Plan | None:
        """As [`plan_call`], of the batch's row."""
        key = (input_ids, attention_mask, self.row(input_ids, attention_mask, pack, overhead))
        # Labels are made anew for every call, from the same mask: compared by value, which costs less than a plan
        for (*known, known_labels), plan in self._plans:
            if _same(tuple(known), key) and torch.equal(known_labels, labels):
                return plan
        plan = plan_call(input_ids, attention_mask, labels, key[2])
        self._plans.append(((*key, labels), plan))
        return plan


def _remembered(memory: deque, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    for known, value in memory:
        if _same(known, key):
            return value
    value = make()
    memory.append((key, value))
    return value


def _same(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(key) == len(other) and all(a is b for a, b in zip(key, other, strict=True))
