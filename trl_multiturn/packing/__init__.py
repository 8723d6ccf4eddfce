"""
Training at a fraction of the cost: trajectories packed into one row with shared prefixes, scored only where it counts.

[`PackedForward`] gives it to a model; `trainer.packed` gives it to a trainer. `row`, `attention` and `scored_head` are
its parts; `eligibility` says which models they are proven on.
"""

from .forward import PackedForward
from .row import PackedRow, pack_rows


__all__ = ["PackedForward", "PackedRow", "pack_rows"]
