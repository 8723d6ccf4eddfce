"""Reads prompts into the rows of the shared cache, in passes of a bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from .kv_cache import round_up
from .packed_prompts import Piece
from .slot_model import ROW_MULTIPLE, SlotModel


# Tokens of one pass over prompts, and how many bytes of states a CPU's caches hold
MAX_PREFILL_TOKENS = 16384
CACHED_BYTES = 6 * 2**20


def read_prompts(slots: SlotModel, pieces: Sequence[Piece], max_tokens: int) -> int:
    """Reads what is left of prompts; returns the number of tokens.

    Args:
        slots ([`SlotModel`]):
            The policy and its cache.
        pieces (sequence of [`Piece`]):
            Of rows that follow each other; sorted by their lengths where they are not packed.
        max_tokens (`int`):
            Most tokens, padding included, of one pass.
    """
    if slots.packs:
        for together in _packed(pieces, max_tokens):
            slots.read_packed(together)
    else:
        for rectangle in _rectangles(pieces, max_tokens):
            _read_rectangle(slots, rectangle, max_tokens)
    return sum(len(piece.token_ids) for piece in pieces)


def _packed(pieces: Iterable[Piece], max_tokens: int) -> Iterator[list[Piece]]:
    """As many as fit. One that does not fit into any pass is cut at places of its own, so that what is computed for it
    does not depend on what it shares passes with."""
    together: list[Piece] = []
    taken = 0
    for part in (part for piece in pieces for part in piece.split(max_tokens)):
        if taken + len(part.token_ids) > max_tokens:
            yield together
            together, taken = [], 0
        together.append(part)
        taken += len(part.token_ids)
    if together:
        yield together


def _rectangles(pieces: Sequence[Piece], max_tokens: int) -> Iterator[Sequence[Piece]]:
    """Rows are taken while their padded rectangle, as wide as the last (longest) of them, stays in the budget."""
    done = 0
    while done < len(pieces):
        take = 1
        while done + take < len(pieces) and _width(pieces[done + take]) * (take + 1) <= max_tokens:
            take += 1
        yield pieces[done : done + take]
        done += take


def _width(piece: Piece) -> int:
    return round_up(len(piece.token_ids), ROW_MULTIPLE)


def _read_rectangle(slots: SlotModel, pieces: Sequence[Piece], max_tokens: int) -> None:
    width, first = _width(pieces[-1]), pieces[0].row
    chunk = max(ROW_MULTIPLE, max_tokens // len(pieces) // ROW_MULTIPLE * ROW_MULTIPLE)
    furthest = max(piece.start for piece in pieces)
    slots.cache.reserve(first + len(pieces), furthest + width)
    device = slots.device
    start_column = torch.tensor([piece.start for piece in pieces], device=device).unsqueeze(1)
    last_column = torch.tensor([piece.end for piece in pieces], device=device).unsqueeze(1)
    for offset in range(0, width, chunk):
        size = min(chunk, width - offset)
        parts = [piece.token_ids[offset : offset + size] for piece in pieces]
        token_ids = torch.tensor([part + [0] * (size - len(part)) for part in parts], device=device)
        columns = start_column + torch.arange(offset, offset + size, device=device)
        # Padding is written behind the row's tokens, where it is masked and later overwritten; its position only has
        # to be one that the model knows.
        slots.run(first, token_ids, torch.minimum(columns, last_column), columns, furthest + offset + size)


def prefill_tokens(policy: PreTrainedModel) -> int:
    """Tokens of a pass: on a CPU larger states leave its caches, and take fresh memory at every operator."""
    if policy.device.type != "cpu":
        return MAX_PREFILL_TOKENS
    config = policy.config.get_text_config(decoder=True)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return min(max(512, CACHED_BYTES // (width * policy.dtype.itemsize)), MAX_PREFILL_TOKENS)
