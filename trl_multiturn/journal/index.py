"""Where each trajectory of a journal is, in 24 bytes: so that millions are read in the order of their places."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


_MOST_OPEN_SHARDS = 64


class LineIndex:
    """
    The places of a journal's lines. Lines go in as they are scanned; out come those that count, in order.

    Of several trajectories at one place the last counts, and of the verdicts on it the last one that follows it.

    A place is a scope, a prompt and a sample. A position counts bytes through all shards, one after another.
    """

    def __init__(self) -> None:
        self._scopes: dict[str, int] = {}
        self._kinds = array("i")  # twice the number of the scope, and one more for a verdict
        self._prompts, self._samples, self._positions = array("q"), array("q"), array("q")

    def add(self, scope: str, prompt: int, sample: int, position: int, is_verdict: bool) -> None:
        """Adds a line; lines are added in the order in which they were written."""
        self._kinds.append(2 * self._scopes.setdefault(scope, len(self._scopes)) + is_verdict)
        self._prompts.append(prompt)
        self._samples.append(sample)
        self._positions.append(position)

    def latest(
        self,
        scope: str | None = None,
        by_prompt: bool = False,
        scope_order: Callable[[str], Any] = str,
        within: Mapping[str, Sequence[range]] | None = None,
    ) -> np.ndarray:
        """
        What counts, 24 bytes per trajectory.

        Args:
            scope (`str`, *optional*):
                The only scope to look at.
            by_prompt (`bool`, *optional*, defaults to `False`):
                Sort by prompt, scope and sample; otherwise by scope, prompt and sample.
            scope_order (`Callable`, *optional*):
                Key by which scopes are sorted.
            within (`Mapping[str, Sequence[range]]`, *optional*):
                The only scopes to look at, with the samples to look at of each.

        Returns:
            `np.ndarray` of int64, (trajectories, 3): prompt, position of the trajectory, position of its verdict (-1
            where there is none).
        """
        ranks = np.zeros(len(self._scopes), np.int32)
        for rank, name in enumerate(sorted(self._scopes, key=scope_order)):
            ranks[self._scopes[name]] = rank
        kinds, prompts = np.frombuffer(self._kinds, np.int32), np.frombuffer(self._prompts, np.int64)
        samples, positions = np.frombuffer(self._samples, np.int64), np.frombuffer(self._positions, np.int64)
        scopes = ranks[kinds >> 1] if len(ranks) else kinds

        place = (prompts, scopes, samples) if by_prompt else (scopes, prompts, samples)
        order = np.lexsort(place[::-1])  # stable: lines of one place stay in the order of writing
        if scope is not None:
            order = order[kinds[order] >> 1 == self._scopes.get(scope, -1)]
        if not len(order):
            return np.empty((0, 3), np.int64)

        if within is not None:
            order = order[self._within(within)[order]]
            if not len(order):
                return np.empty((0, 3), np.int64)

        first = np.zeros(len(order), bool)  # of the lines of its place
        first[0] = True
        for part in place:
            first[1:] |= np.diff(part[order]) != 0
        starts = np.flatnonzero(first)
        is_verdict = (kinds[order] & 1).astype(bool)
        numbers = np.arange(len(order))
        trajectory = np.maximum.reduceat(np.where(is_verdict, -1, numbers), starts)
        verdict = np.maximum.reduceat(np.where(is_verdict, numbers, -1), starts)

        there = trajectory >= 0  # a verdict alone is of a trajectory that was torn
        trajectory, verdict = trajectory[there], verdict[there]
        found = np.empty((len(trajectory), 3), np.int64)
        found[:, 0] = prompts[order[trajectory]]
        found[:, 1] = positions[order[trajectory]]
        found[:, 2] = np.where(verdict > trajectory, positions[order[verdict]], -1)
        return found

    def finished(self, scope: str) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and samples of the trajectories of a scope; a place may come more than once."""
        kinds = np.frombuffer(self._kinds, np.int32)
        here = kinds == 2 * self._scopes.get(scope, -1)
        return np.frombuffer(self._prompts, np.int64)[here], np.frombuffer(self._samples, np.int64)[here]

    def _within(self, within: Mapping[str, Sequence[range]]) -> np.ndarray:
        """Which lines are of these scopes and samples."""
        kinds, samples = np.frombuffer(self._kinds, np.int32), np.frombuffer(self._samples, np.int64)
        wanted = np.zeros(len(kinds), bool)
        for scope, spans in within.items():
            of_scope = kinds >> 1 == self._scopes.get(scope, -1)
            for span in spans:
                wanted |= of_scope & (samples >= span.start) & (samples < span.stop)
        return wanted


class ShardReader:
    """
    Reads lines by position; a context manager that closes what it opened.

    Args:
        shards (`list[Path]`):
            The files, in order.
        starts (`list[int]`):
            The position of each file's first line.
    """

    def __init__(self, shards: list[Path], starts: list[int]):
        self._shards, self._starts = shards, starts
        self._open: dict[int, BinaryIO] = {}

    def line(self, position: int) -> bytes:
        """The line at a position."""
        number = bisect_right(self._starts, position) - 1
        file = self._open.get(number)
        if file is None:
            if len(self._open) == _MOST_OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[number] = open(self._shards[number], "rb")
        file.seek(position - self._starts[number])
        return file.readline()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
