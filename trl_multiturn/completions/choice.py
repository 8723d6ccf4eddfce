"""Which trajectories are logged: the best, the worst, and one for each reason for which some were dropped."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from ..trajectory import Trajectory, Verdict


@dataclass(frozen=True)
class PickedCompletion:
    """A trajectory, and why it was picked: `"best"`, `"worst"`, `"undecided"` or `"dropped: …"`."""

    reason: str
    trajectory: Trajectory


class CompletionPicker:
    """
    Picks a few of many trajectories, which are seen one at a time; memory holds a few.

    The rule: first the best (correct, of the highest reward), then the worst (incorrect, of the lowest reward), then
    one for each reason for which some were left out, the most frequent first; then the second best, the second worst
    and so on. Among equals a hash of their names decides, so that it is not always the first prompt, and the same
    trajectories give the same picks.

    Args:
        count (`int`):
            How many to pick at most.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"`num_completions_to_print` must be at least 1, got {count}.")
        self.count = count
        self._best: list[tuple[float, int, Trajectory]] = []  # heaps, the least good ones on top
        self._worst: list[tuple[float, int, Trajectory]] = []
        self._left_out: dict[str, tuple[int, Trajectory]] = {}
        self._reasons: Counter[str] = Counter()

    def see(self, trajectory: Trajectory, dropped: str | None = None) -> None:
        """Takes a judged trajectory into account, and the name of the filter that dropped it."""
        name = str(trajectory.info.get("trajectory_id", trajectory.completion_ids))
        lot = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        reward = trajectory.reward if trajectory.reward is not None else 0.0
        if dropped or trajectory.verdict is Verdict.UNDECIDED:
            reason = f"dropped: {dropped}" if dropped and dropped != "undecided" else "undecided"
            self._reasons[reason] += 1
            if lot <= self._left_out.get(reason, (lot, None))[0]:
                self._left_out[reason] = (lot, trajectory)
        elif trajectory.verdict is Verdict.CORRECT:
            self._keep(self._best, (reward, -lot, trajectory))
        else:
            self._keep(self._worst, (-reward, -lot, trajectory))

    def see_all(self, trajectories: Iterable[Trajectory]) -> CompletionPicker:
        """Takes several into account; itself, to go on with."""
        for trajectory in trajectories:
            self.see(trajectory)
        return self

    def picks(self) -> list[PickedCompletion]:
        """The picks of those seen so far, at most `count`."""
        best, worst = (self._ranked(heap, name) for heap, name in ((self._best, "best"), (self._worst, "worst")))
        left_out = [PickedCompletion(name, self._left_out[name][1]) for name, _ in self._reasons.most_common()]
        rest = [pick for pair in zip_longest(best[1:], worst[1:]) for pick in pair if pick is not None]
        return [*best[:1], *worst[:1], *left_out, *rest][: self.count]

    def _keep(self, heap: list[tuple[float, int, Trajectory]], entry: tuple[float, int, Trajectory]) -> None:
        if any(entry[:2] == other[:2] for other in heap):  # the same trajectory again, and none can be compared
            return
        (heapq.heappush if len(heap) < self.count else heapq.heappushpop)(heap, entry)

    @staticmethod
    def _ranked(heap: list[tuple[float, int, Trajectory]], reason: str) -> list[PickedCompletion]:
        ranked = sorted(heap, key=lambda entry: entry[:2], reverse=True)
        return [PickedCompletion(reason, trajectory) for _, _, trajectory in ranked]
