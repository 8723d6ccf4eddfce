"""Prompts of several rows in one: read without padding, each attending to its own row of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import CacheFilledError


@dataclass(frozen=True)
class Piece:
    """What is left to read of a row's prompt.

    Attributes:
        row (`int`): the row of the cache.
        start (`int`): tokens before it, which the row holds already.
        token_ids (`list[int]`): the tokens to read.
    """

    row: int
    start: int
    token_ids: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def split(self, size: int) -> list[Piece]:
        """In parts of at most `size` tokens, from the first on: where they end depends on nothing else."""
        offsets = range(0, len(self.token_ids), size)
        return [Piece(self.row, self.start + at, self.token_ids[at : at + size]) for at in offsets]


class PackedAttention:
    """Attention of pieces that stand one behind the other.

    Args:
        pieces (sequence of [`Piece`]):
            As they stand in the pass; tokens behind them are padding.
        windows (sequence of `int`, *optional* entries):
            Window of each layer's attention.
    """

    def __init__(self, pieces: Sequence[Piece], windows: Sequence[int | None]) -> None:
        self._pieces, self._windows = pieces, windows
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            layer (`int`):
                Index of the layer.
            query (`torch.Tensor` of shape `(1, H, T, D)`):
                Queries of all pieces.
            key, value (`torch.Tensor` of shape `(R, H', K, D)`):
                The rows of the cache.
            scaling (`float`, *optional*):
                Of the scores.
            position_bias (`torch.Tensor`, *optional*):
                Refused.

        Returns:
            `(1, T, H, D)`, zeros for padding.

        Raises:
            ValueError: if scores get a bias, which nobody could cut into pieces.
        """
        if position_bias is not None:
            raise ValueError("A bias of the scores cannot be cut into pieces.")
        output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        first = 0
        for index, piece in enumerate(self._pieces):
            last, rows = first + len(piece.token_ids), slice(piece.row, piece.row + 1)
            mask = self._mask(index, self._windows[layer], query)
            attended = F.scaled_dot_product_attention(
                query[:, :, first:last],
                key[rows, :, : piece.end],
                value[rows, :, : piece.end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            output[:, first:last] = attended.transpose(1, 2)
            first = last
        return output

    def _mask(self, index: int, window: int | None, query: Tensor) -> Tensor | None:
        """`(q, k)`, added to the scores; `None` where a piece sees its own tokens up to each, and no others."""
        piece = self._pieces[index]
        if window is not None and window >= piece.end:
            window = None
        if piece.start == 0 and window is None:
            return None
        if (index, window) not in self._masks:
            keys = torch.arange(piece.end, device=query.device)
            queries = keys[piece.start :, None]
            seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
            self._masks[index, window] = query.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return self._masks[index, window]


_PACKED: ContextVar[PackedAttention | None] = ContextVar("packed_attention", default=None)


def packed_attention() -> PackedAttention | None:
    """That of the pass that runs now, if it reads pieces."""
    return _PACKED.get()


@contextmanager
def attending(attention: PackedAttention) -> Iterator[None]:
    """Runs a pass over pieces, which may end early."""
    token = _PACKED.set(attention)
    try:
        yield
    except CacheFilledError:
        pass
    finally:
        _PACKED.reset(token)
