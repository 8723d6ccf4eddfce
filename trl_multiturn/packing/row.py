"""
The packed row: a batch of token sequences as one row in which every shared prefix stands once.

Sequences in lexicographic order are a depth-first walk of their trie: the longest prefix that a sequence shares with
any earlier one, it shares with its predecessor. So each sequence refers to its predecessor's tokens for the common
prefix and appends only the tokens after it:

    [a b c d], [a b x], [y z]   ->   row        a b c d x y z
                                     depth      0 1 2 3 2 0 1     (the `position_ids`)
                                     parent     - 0 1 2 1 - 5     (index of the token before, on the token's own path)

A token of a trie has one parent, so whoever predicts it reads the hidden state at `parents`, also where several
sequences branch off. Without anything to share the same row is plain padding-free packing.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


# A prefix shorter than this costs more to look up in every layer than its few tokens cost to compute again
MIN_SHARED_TOKENS = 8


class Chunk(NamedTuple):
    """The tokens that one sequence adds to the row, and the segments of the row that precede them on its path."""

    start: int
    end: int
    prefix_segments: tuple[int, ...]
    prefix_length: int


class PackedRow:
    """
    A batch as one row of unique tokens; built by [`pack_rows`].

    Attributes:
        input_ids (`Tensor`): `(1, T)`, the row's tokens.
        position_ids (`Tensor`): `(1, T)`, depth of each token in the trie, its position in every sequence it is in.
        parents (`Tensor`): `(T,)`, index in the row of the token before; -1 for the first token of a sequence.
        cells (`Tensor`): `(B, L)`, index in the row of each token of each sequence; -1 where the batch is padded.
        chunks (`list[Chunk]`): the tokens each sequence adds, in row order; they tile the row.
        segment_lengths (`list[int]`): the row cut wherever a path enters or leaves it, so that every prefix is a list
            of whole segments.
        raw_tokens (`int`): tokens of the batch without padding, shared ones counted once per sequence.
    """

    def __init__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        parents: Tensor,
        cells: Tensor,
        chunks: list[Chunk],
        segment_lengths: list[int],
        raw_tokens: int,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.parents = parents
        self.cells = cells
        self.chunks = chunks
        self.segment_lengths = segment_lengths
        self.raw_tokens = raw_tokens
        self._varlen_index: Any = None  # of `varlen`, which computes it once
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        # What attention layers asked for and computed in, since the row was made; for the self-test
        self.windows_seen: list[int | None] = []
        self.dtypes_seen: set[torch.dtype] = set()

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    @cached_property
    def chunk_lengths(self) -> list[int]:
        return [chunk.end - chunk.start for chunk in self.chunks]

    @cached_property
    def shares(self) -> bool:
        """Whether any token of the row stands for more than one sequence's."""
        return any(chunk.prefix_length for chunk in self.chunks)

    @cached_property
    def paths(self) -> Tensor:
        """`(raw_tokens,)`, the row's indices of all sequences' tokens, one sequence after the other."""
        return self.cells[self.cells >= 0]

    def path_before(self, chunk: Chunk) -> list[tuple[int, int]]:
        """The row's stretches `[start, end)` that precede a chunk on its path."""
        return [(self._segment_starts[s], self._segment_starts[s + 1]) for s in chunk.prefix_segments]

    @cached_property
    def _segment_starts(self) -> list[int]:
        return [0, *np.cumsum(self.segment_lengths).tolist()]

    def unpack(self, states: Tensor) -> Tensor:
        """`(1, T, H)` states of the row as the padded batch's `(B, L, H)`; padded positions hold some token's."""
        return states[0].index_select(0, self.cells.clamp(min=0).flatten()).view(*self.cells.shape, -1)

    def in_columns(self, cells: Tensor) -> PackedRow:
        """
        The same row for a batch whose tokens stand elsewhere.

        Args:
            cells (`Tensor`): `(B', L')`, where each of its tokens stands in the flattened batch of before; -1 on
                padding.
        """
        row = copy.copy(self)
        row.cells = self.cells.flatten()[cells.clamp(min=0)].masked_fill(cells < 0, -1)
        return row

    def causal_mask(self, new: int, prefix: int, window: int | None) -> Tensor:
        """`(1, 1, new, prefix + new)`, true where a chunk's token may attend: its path, within `window` tokens."""
        key = (new, prefix, window)
        if key not in self._masks:
            device = self.input_ids.device
            distance = torch.arange(prefix, prefix + new, device=device)[:, None] - torch.arange(
                prefix + new, device=device
            )
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[key] = mask[None, None]
        return self._masks[key]


def pack_rows(
    input_ids: Tensor, attention_mask: Tensor | None = None, share: bool = True, min_shared: int = MIN_SHARED_TOKENS
) -> PackedRow:
    """
    Pack a right-padded batch.

    Args:
        input_ids (`Tensor`): `(B, L)`.
        attention_mask (`Tensor`, *optional*): `(B, L)`, 1 on tokens and 0 on the padding to their right; all 1 if
            `None`. Padding is read from here alone, never from token ids.
        share (`bool`, *optional*, defaults to `True`): whether common prefixes stand in the row once.
        min_shared (`int`, *optional*): shorter common prefixes are repeated.

    Raises:
        `ValueError`: if a row is empty or padded anywhere but on the right.
    """
    ids = input_ids.cpu().numpy()
    batch, width = ids.shape
    lengths = _lengths(attention_mask, batch, width)
    order, shared = _walk(ids, lengths, share, min_shared)

    new = lengths[order] - shared
    starts = np.concatenate([[0], np.cumsum(new)])
    columns = np.arange(width)
    cells = np.full((batch, width), -1, dtype=np.int64)
    for place, b in enumerate(order):
        if shared[place]:
            cells[b, : shared[place]] = cells[order[place - 1], : shared[place]]
        cells[b, shared[place] : lengths[b]] = np.arange(starts[place], starts[place + 1])

    total = int(starts[-1])
    row_ids, depth, parents = (np.empty(total, dtype=np.int64) for _ in range(3))
    real = columns < lengths[:, None]
    row_ids[cells[real]] = ids[real]
    depth[cells[real]] = np.broadcast_to(columns, real.shape)[real]
    previous = np.concatenate([np.full((batch, 1), -1), cells[:, :-1]], axis=1)
    parents[cells[real]] = previous[real]

    segment_lengths, segment_of = _segments(cells, order, shared, starts)
    chunks = []
    for place, b in enumerate(order):
        if new[place]:
            prefix = segment_of[cells[b, : shared[place]]]
            prefix = prefix[np.flatnonzero(np.diff(prefix, prepend=-1))]
            chunks.append(
                Chunk(int(starts[place]), int(starts[place + 1]), tuple(prefix.tolist()), int(shared[place]))
            )
    device = input_ids.device
    return PackedRow(
        input_ids=torch.from_numpy(row_ids)[None].to(device),
        position_ids=torch.from_numpy(depth)[None].to(device),
        parents=torch.from_numpy(parents).to(device),
        cells=torch.from_numpy(cells).to(device),
        chunks=chunks,
        segment_lengths=segment_lengths,
        raw_tokens=int(lengths.sum()),
    )


def _lengths(attention_mask: Tensor | None, batch: int, width: int) -> np.ndarray:
    if attention_mask is None:
        return np.full(batch, width)
    mask = attention_mask.cpu().numpy().astype(bool)
    lengths = mask.sum(axis=1)
    if not lengths.all() or not (mask == (np.arange(width) < lengths[:, None])).all():
        raise ValueError(
            "`attention_mask` has an empty row or padding that is not on the right, so positions cannot be told from "
            "columns. Pad on the right, with at least one token per row."
        )
    return lengths


def _walk(ids: np.ndarray, lengths: np.ndarray, share: bool, min_shared: int) -> tuple[list[int], np.ndarray]:
    """Order of the sequences in the row, and for each place the tokens shared with the place before."""
    if not share or len(ids) == 1:
        return list(range(len(ids))), np.zeros(len(ids), dtype=np.int64)
    # Big-endian words compare as bytes in the order of the ids, and a prefix comes before what extends it
    words = ids.astype(">u4")
    order = sorted(range(len(ids)), key=lambda b: words[b, : lengths[b]].tobytes())
    ordered, limits = ids[order], np.minimum(lengths[order][1:], lengths[order][:-1])
    differs = ordered[1:] != ordered[:-1]
    differs |= np.arange(ids.shape[1]) >= limits[:, None]
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), limits)
    common[common < min_shared] = 0
    return order, np.concatenate([[0], common])


def _segments(
    cells: np.ndarray, order: list[int], shared: np.ndarray, starts: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Lengths of the row's segments, and the segment of each token."""
    branches = [cells[b, m - 1] + 1 for b, m in zip(order, shared, strict=True) if m]
    cuts = np.unique(np.concatenate([starts, np.array(branches, dtype=np.int64)]))
    lengths = np.diff(cuts)
    return lengths.tolist(), np.repeat(np.arange(len(lengths)), lengths)
