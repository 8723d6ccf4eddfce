"""
The token sequences of a batch whose rows branch (see `trl_multiturn.segments`), and the way back to its columns.

A row holds each token of its trajectory once. `token_parents` `(B, L)` says which column each one continues: the one
before it, but for the first tokens of segments. A model reads every segment as a sequence of its own; what it returns
is put back into the columns of the batch, so that losses see one row per trajectory and never the difference.

Which batches branch is noted for their `input_ids` tensor itself, as TRL's trainers call a model in many places with
that tensor and nothing else of ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Sequences:
    """
    A branching batch as a right-padded batch of its segments.

    Attributes:
        input_ids, attention_mask (`Tensor`): `(S, W)`, one sequence per segment of each row.
        cells (`Tensor`): `(B, L)`, where each token of the batch stands in the flattened `(S, W)`: in the segment that
            added it; -1 on padding.
        are_read (`bool`): whether a model has read them.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, token_parents: Tensor) -> None:
        columns, lengths, cells = _lay_out(token_parents.cpu().numpy(), attention_mask.sum(dim=1).tolist())
        device = input_ids.device
        places = torch.from_numpy(columns).to(device)
        self.cells = torch.from_numpy(cells).to(device)
        width = torch.arange(columns.shape[1], device=device)
        mask = width < torch.from_numpy(lengths).to(device)[:, None]
        self.attention_mask = mask.to(attention_mask.dtype)
        self.input_ids = input_ids.flatten()[places]
        self.are_read = False

    def spread(self, labels: Tensor) -> Tensor:
        """`(B, L)` labels as `(S, W)`, -100 where a token belongs to an earlier segment."""
        known = self.cells >= 0
        spread = torch.full_like(self.input_ids, -100)
        spread.view(-1)[self.cells[known]] = labels[known]
        return spread

    def gather(self, scores: Tensor) -> Tensor:
        """`(S, W - 1)` scores of each sequence's tokens as `(B, L - 1)` of the batch's, 0 on padding.

        Columns that stand before the sequences (of prompt-learning adapters) are left out.
        """
        width = self.input_ids.shape[1]
        first = scores.new_zeros(len(scores), 1)  # of a token that nothing predicts
        scores = torch.cat([first, scores[:, scores.shape[1] - (width - 1) :]], dim=1)
        cells = self.cells[:, 1:]
        return scores.flatten()[cells.clamp(min=0)].masked_fill(cells < 0, 0)

    def unpack(self, states: Tensor) -> Tensor:
        """`(S, W, H)` states as `(B, L, H)`: each token's in the segment that added it; padded positions hold any."""
        states = states[:, states.shape[1] - self.input_ids.shape[1] :]
        return states.flatten(0, 1).index_select(0, self.cells.clamp(min=0).flatten()).view(*self.cells.shape, -1)


def _lay_out(parents: np.ndarray, lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat columns `(S, W)` of the batch that each sequence reads, the sequences' lengths, and the batch's cells."""
    batch, width = parents.shape
    paths: list[np.ndarray] = []
    owners, depths = np.full((batch, width), -1), np.zeros((batch, width), dtype=np.int64)
    for row, length in enumerate(lengths):
        starts = [0, *(np.flatnonzero(parents[row, 1:length] != np.arange(length - 1)) + 1)]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            parent = parents[row, start] if start else -1
            before = paths[owners[row, parent]][: depths[row, parent] + 1] if parent >= 0 else parents[row, :0]
            owners[row, start:stop] = len(paths)
            depths[row, start:stop] = np.arange(len(before), len(before) + stop - start)
            paths.append(np.concatenate([before, row * width + np.arange(start, stop)]))
    sizes = np.array([len(path) for path in paths])
    columns = np.zeros((len(paths), sizes.max()), dtype=np.int64)
    for place, path in enumerate(paths):
        columns[place, : len(path)] = path
    cells = np.where(owners >= 0, owners * columns.shape[1] + depths, -1)
    return columns, sizes, cells


_SEQUENCES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note_branches(input_ids: Tensor, attention_mask: Tensor, token_parents: Tensor) -> Sequences:
    """Note, for as long as `input_ids` lives, that its rows branch."""
    if input_ids not in _SEQUENCES:
        _SEQUENCES[input_ids] = Sequences(input_ids, attention_mask, token_parents)
    return _SEQUENCES[input_ids]


def sequences_of(input_ids: Any) -> Sequences | None:
    """The sequences of a batch whose rows branch; `None` for any other.

    TRL's trainers may call a model with the batch moved to `accelerator.device`. On several processes without a GPU
    that is `cpu:0`, and a move there copies: such a tensor is the last batch of equal tokens.
    """
    if not _SEQUENCES or not isinstance(input_ids, Tensor):
        return None
    found = _SEQUENCES.get(input_ids)
    if found is None and input_ids.device.type == "cpu":
        noted = reversed([each for each in _SEQUENCES.items() if each[0].shape == input_ids.shape])
        found = next((sequences for ids, sequences in noted if torch.equal(ids, input_ids)), None)
    return found


def check_branches_were_read(input_ids: Any) -> None:
    """Raises `RuntimeError` where no model has read the segments of a batch that branches."""
    sequences = sequences_of(input_ids)
    if sequences is not None and not sequences.are_read:
        raise RuntimeError(
            "The rows of this batch are more than one token sequence, but the model was called with a copy of its "
            "tokens, so it read them as one. Call the model with the batch's own `input_ids`."
        )
