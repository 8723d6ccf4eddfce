"""What the losses of a value-based trainer are given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..outcomes.outcome_batch import OutcomeBatch


@dataclass(kw_only=True)
class TrajectoryBatch(OutcomeBatch):
    """
    An [`OutcomeBatch`] with what a value model says of it. `(B, T)` unless said.

    Args:
        values (`Tensor`): `V` of the state in which each token was chosen; with gradient.
        kl (`Tensor`, *optional*): exact KL to the reference, with gradient.
    """

    values: Tensor
    kl: Tensor | None = None
