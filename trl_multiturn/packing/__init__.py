"""
Training at a fraction of the cost: trajectories packed into one row with shared prefixes, scores only where they count.

[`PackedTrainerMixin`] gives it to a trainer; [`PackedForward`] to a model. `row`, `attention` and `scored_head` are the
parts, `eligibility` says which models they are proven on.
"""

from .forward import PackedForward
from .row import PackedRow, pack_rows


__all__ = ["PackedForward", "PackedRow", "pack_rows"]
