"""What the study runs, in the order of what it tells per second."""

from __future__ import annotations

from collections.abc import Sequence

from .runner import Cell
from .tabular import TABULAR_WORLDS


SEEDS = tuple(range(5))

# Blocks in order: (worlds, arms). Within a block one seed after another, so that a study that is stopped early has all
# arms of the first seeds.
BLOCKS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("tabular-uncertain",), ("m-dpo", "m-dpo-margin", "oreo", "oreo-response")),
    (("tabular-certain",), ("m-dpo",)),
    (("noisy",), ("start", "m-dpo", "dpo", "raft", "m-kto", "kto")),
    (("noisy",), ("oreo", "oreo-response", "dqo")),
    (("uncertain",), ("start", "m-dpo", "oreo")),
    (("late",), ("start", "m-dpo", "oreo", "oreo-response", "raft", "dqo", "dro", "m-kto")),
    (("late",), ("online", "online-initial", "online-n4", "online-current")),
    (("late",), ("dpo", "kto", "dqo-lam0.95", "oreo-step", "m-dpo-nll", "dqo-unweighted", "dqo-process")),
    (("late",), ("start-samples", "m-dpo-samples")),
    (("noisy",), ("m-dpo-lr1e-4", "dpo-lr1e-4", "group", "oreo-classes")),
    (("words",), ("start", "m-dpo", "dpo", "raft", "m-kto", "kto")),
    (("late",), ("online-beta2", "online-beta0.05", "online-nll", "online-all", "online-kto")),
    (("uncertain",), ("oreo-response", "dqo", "dro", "m-kto", "raft")),
    (TABULAR_WORLDS, ("dqo", "dqo-lam0.95", "dro")),
    (("late", "words"), ("oreo-search",)),
    (("late",), ("online-oreo", "m-dpo-beta0.1", "m-dpo-beta2")),
)
# Two arms on a world of one action, and two losses on tables
QUICK = (("tiny", ("start", "m-dpo")), ("tabular-uncertain", ("m-dpo", "m-dpo-margin")))


def whole_study(seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """All cells of the study."""
    return [Cell(world, seed, arms) for worlds, arms in BLOCKS for world in worlds for seed in seeds]


def quick_study() -> list[Cell]:
    """What CI affords: it shows that everything runs, and decides nothing."""
    return [Cell(world, 0, arms) for world, arms in QUICK]
