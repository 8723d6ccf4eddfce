"""
Training at a fraction of the cost: trajectories packed into one row with shared prefixes, scored only where it counts.

[`PackedTrainerMixin`] gives it to a trainer, [`PackedForward`] to a model. `row`, `attention` and `scored_head` are
its parts; `eligibility` says which models they are proven on.
"""

from .forward import PackedForward
from .row import PackedRow, pack_rows
from .trainer_mixin import PackedTrainerMixin


__all__ = ["PackedForward", "PackedRow", "PackedTrainerMixin", "pack_rows"]
