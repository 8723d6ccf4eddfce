"""What one call of the model will compute: a packed row or the padded batch, and which of its tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .row import MIN_SHARED_TOKENS, PackedRow, pack_rows


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
    """

    row: PackedRow | None
    sources: Tensor
    targets: Tensor
    mask: Tensor
    places: Tensor

    def scatter(self, scores: Tensor) -> Tensor:
        """`(N,)` scores as a padded `(B, L - 1)` field, 0 outside the mask; sequences that share a token share it."""
        field = scores.new_zeros(self.mask.shape)
        return field.masked_scatter(self.mask, scores.index_select(0, self.places))


def chunk_overhead(hidden_size: int, device: torch.device) -> int:
    """What a chunk costs beyond its tokens, in tokens: little next to a wide layer, and nothing in a varlen kernel."""
    return 0 if device.type == "cuda" else 1 + _CHUNK_WORK // hidden_size**2


def plan_call(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, pack: bool | str = "auto", overhead: int = 0
) -> Plan | None:
    """
    Decide from the shapes alone how to compute the scores of a right-padded batch.

    With `pack="auto"` the packed row runs where its unique tokens and the overhead of its chunks come to less than the
    padded batch; where nothing is padded, shared or long, the padded batch is as good and stays.

    Args:
        input_ids (`Tensor`): `(B, L)`.
        attention_mask (`Tensor`, *optional*): `(B, L)`.
        labels (`Tensor`): `(B, L)`, the token itself where it is scored and -100 elsewhere.
        pack (`bool` or `"auto"`, *optional*, defaults to `"auto"`): always, never, or where it pays.
        overhead (`int`, *optional*, defaults to `0`): tokens that a chunk costs beyond its own.

    Returns:
        `Plan` or `None` where the batch is not a right-padded batch of token sequences scored on their own tokens.
    """
    mask = labels[:, 1:] != -100
    if not bool((labels[:, 1:][mask] == input_ids[:, 1:][mask]).all()):
        return None
    batch, width = input_ids.shape
    if pack:
        try:
            worth = MIN_SHARED_TOKENS if pack is True else max(MIN_SHARED_TOKENS, overhead)
            row = pack_rows(input_ids, attention_mask, min_shared=worth)
        except ValueError:
            return None
        if pack is True or len(row) + overhead * len(row.chunks) < batch * width + overhead:
            return _packed_plan(row, mask)
    cells = torch.arange(batch * width, device=input_ids.device).view(batch, width)
    sources = cells[:, :-1][mask]
    return Plan(None, sources, input_ids[:, 1:][mask], mask, torch.arange(len(sources), device=input_ids.device))


def _packed_plan(row: PackedRow, mask: Tensor) -> Plan:
    scored, places = row.cells[:, 1:][mask].unique(return_inverse=True)
    return Plan(row, row.parents[scored], row.input_ids[0, scored], mask, places)


class PlanCache:
    """The last batch's plan: the policy, then the reference, are called with the very same tensors."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._batch: tuple[Tensor | None, ...] = ()
        self._pack: bool | str | None = None
        self._plan: Plan | None = None

    def plan(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, pack: bool | str, overhead: int
    ) -> Plan | None:
        """As [`plan_call`]."""
        batch = (input_ids, attention_mask, labels)
        same = len(self._batch) == 3 and all(a is b for a, b in zip(batch, self._batch, strict=True))
        if not same or pack is not self._pack:
            self._plan = plan_call(*batch, pack=pack, overhead=overhead)
            self._batch, self._pack = batch, pack
        return self._plan
