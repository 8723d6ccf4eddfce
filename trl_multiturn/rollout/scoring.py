"""One score for many searches: states that wait at the same time are scored in one call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from ..concurrency import run_in_thread


Score = Callable[[list[list[int]]], Sequence[float]]


class Scorer:
    """Calls the user's `score` in a thread, one call at a time, with all states that wait for it."""

    def __init__(self, score: Score):
        self._score = score
        self.name = getattr(score, "__qualname__", type(score).__name__)
        self._waiting: list[tuple[list[list[int]], asyncio.Future]] = []
        self._busy = asyncio.Lock()

    async def __call__(self, states: list[list[int]]) -> list[float]:
        mine: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((states, mine))
        async with self._busy:
            if not mine.done():
                batch, self._waiting = self._waiting, []
                scores = iter(await self._numbers([state for each, _ in batch for state in each]))
                for each, future in batch:
                    numbers = [next(scores) for _ in each]
                    if not future.done():  # its search was cancelled
                        future.set_result(numbers)
        return await mine

    async def _numbers(self, states: list[list[int]]) -> list[float]:
        scores = [float(score) for score in await run_in_thread(self._score, states)]
        if len(scores) != len(states):
            raise ValueError(
                f"`score` returned {len(scores)} numbers for {len(states)} states, so they cannot be matched. Return "
                "one number per state."
            )
        if not all(map(math.isfinite, scores)):
            bad = next(score for score in scores if not math.isfinite(score))
            raise ValueError(f"`score` returned {bad}, which ranks nothing. Return finite numbers.")
        return scores
