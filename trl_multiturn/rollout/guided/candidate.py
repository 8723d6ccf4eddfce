"""A partial trajectory of a search, and how candidates are ranked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...tools.base import RolloutContext
from ...tools.toolbox import Toolbox
from ...trajectory import StopReason
from ..transcript import Transcript


@dataclass(eq=False)
class Candidate:
    """A partial trajectory.

    `toolbox` is at the transcript's state; without one, a new one is brought there when it is needed.
    """

    transcript: Transcript
    session: str
    toolbox: Toolbox | None = None
    stop_reason: StopReason | None = None
    failure: str | None = None
    score: float = -math.inf
    draws: int = 1  # how often the policy drew its last step: equal candidates are one
    parent_share: float = 1.0  # the `share` of what it goes on from

    def share(self, candidates: int) -> float:
        """How likely the policy is to come here, as far as so many draws a step tell."""
        return self.parent_share * self.draws / candidates

    def told(self, context: RolloutContext) -> dict[str, Any]:
        """A candidate that ended, as JSON values."""
        assert self.stop_reason is not None
        trajectory = self.transcript.finish(context, self.stop_reason, 0.0, self.failure)
        return {**trajectory.to_dict(), "score": finite(self.score), "draws": self.draws}


def finite(score: float) -> float | None:
    return score if math.isfinite(score) else None


def ranked(nodes: Iterable[Candidate]) -> list[Candidate]:
    """Best first; the earlier drawn first among equals."""
    return sorted(nodes, key=lambda node: -node.score)


def best_action(children: list[Candidate]) -> Candidate:
    """The action of the highest score; one that stops without an answer only where all do."""
    going = [child for child in children if child.stop_reason in (None, StopReason.ANSWERED)]
    return ranked(going or children)[0]
