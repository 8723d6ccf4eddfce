"""Rows of a decoding step that attend together: neighbours of similar length, so that little padding is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from .kv_cache import round_up


# Attention sums in lanes: with lengths rounded up to these, what is masked behind a row's own tokens changes no bit
COLUMN_MULTIPLE = 32
# What one more call costs, in columns of a row: some 80 µs, in which a core reads as many keys and values
CALL_COLUMNS = 400


class Run(NamedTuple):
    """Rows `first` to `last - 1`, which see `columns` columns."""

    first: int
    last: int
    columns: int


def runs_of(lengths: Sequence[int]) -> list[Run]:
    """The cheapest division of rows of these lengths into runs of neighbours, each as long as its longest row."""
    columns = [round_up(length, COLUMN_MULTIPLE) for length in lengths]
    # Equally long neighbours are never better apart
    ends = [row for row in range(1, len(columns)) if columns[row] != columns[row - 1]] + [len(columns)]
    starts = [0, *ends[:-1]]
    longest = np.maximum.accumulate(np.triu(np.tile([columns[start] for start in starts], (len(ends), 1))), axis=1)
    rows = np.array(ends)[:, None] - np.array(starts)  # from where a run begins to where it ends
    costs = CALL_COLUMNS + rows * longest.T
    best, begins = np.zeros(len(ends) + 1, dtype=np.int64), []  # cost of all before a block, and its run's first block
    for last, of_runs in enumerate(costs):
        totals = best[: last + 1] + of_runs[: last + 1]
        begins.append(int(totals.argmin()))
        best[last + 1] = totals[begins[-1]]
    runs, last = [], len(ends) - 1
    while last >= 0:
        first = begins[last]
        runs.append(Run(starts[first], ends[last], int(longest[first, last])))
        last = first - 1
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
