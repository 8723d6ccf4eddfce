"""Rows of a decoding step that attend together: neighbours of similar length, so that little padding is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from .kv_cache import round_up


# Attention sums in lanes: with lengths rounded up to these, what is masked behind a row's own tokens changes no bit
COLUMN_MULTIPLE = 32
# What one more call costs, in columns of a row: some 20 µs, in which a core reads as many keys and values
CALL_COLUMNS = 160


class Run(NamedTuple):
    """Rows `first` to `last - 1`, which see `columns` columns."""

    first: int
    last: int
    columns: int


def runs_of(lengths: Sequence[int]) -> list[Run]:
    """The cheapest division of rows of these lengths into runs of neighbours, each as long as its longest row."""
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n rows, and where their last run begins
    for last in range(1, len(lengths) + 1):
        columns, choices = 0, []
        for first in range(last - 1, -1, -1):
            columns = max(columns, round_up(lengths[first], COLUMN_MULTIPLE))
            choices.append((best[first][0] + CALL_COLUMNS + (last - first) * columns, first))
        best.append(min(choices))
    runs, last = [], len(lengths)
    while last:
        first = best[last][1]
        runs.append(Run(first, last, round_up(max(lengths[first:last]), COLUMN_MULTIPLE)))
        last = first
    return runs[::-1]


_RUNS: ContextVar[list[Run] | None] = ContextVar("step_runs", default=None)


def step_runs() -> list[Run] | None:
    """Those of the step that runs now, if its rows attend in runs."""
    return _RUNS.get()


@contextmanager
def in_runs(runs: list[Run] | None) -> Iterator[None]:
    """Computes a step whose rows attend in these runs, or all together."""
    token = _RUNS.set(runs)
    try:
        yield
    finally:
        _RUNS.reset(token)
