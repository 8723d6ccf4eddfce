"""Verdicts while the rollouts go on: whatever has finished is judged together, off the rollouts' path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..trajectory import Trajectory
from ..verify.rewards import judge_async, resolve_reward_funcs, reward_name
from .provenance import version_of


@dataclass
class Judge:
    """Judges trajectories as they finish.

    Args:
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            TRL reward functions. Without any, and without an environment that owns its reward, trajectories stay
            unjudged.
        reward_weights (`list[float]`, *optional*):
            One per function.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest reward of a correct trajectory.
        reward_timeout_seconds (`float`, *optional*):
            Limit on each function's call; one that is late decides nothing.
        missing_reward (`str`, *optional*, defaults to `"undecided"`):
            What a function's `None` means beside the others' values (see [`judge`]).
        environment (`str`, *optional*):
            Name of the environment that owns a reward. It counts with weight 1, as in [`~trl.GRPOTrainer`].

    Raises:
        `TypeError`, `ValueError`: if a reward function cannot be used.
    """

    reward_funcs: Any = None
    reward_weights: Sequence[float] | None = None
    correct_threshold: float = 0.5
    reward_timeout_seconds: float | None = None
    missing_reward: Literal["undecided", "skip"] = "undecided"
    environment: str | None = None

    def __post_init__(self) -> None:
        self.reward_funcs = [] if self.reward_funcs is None else resolve_reward_funcs(self.reward_funcs)
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"`reward_weights` has {len(weights)} entries for {len(self.reward_funcs)} reward functions. Give one "
                "each."
            )
        if self.missing_reward not in ("undecided", "skip"):
            raise ValueError(f"`missing_reward={self.missing_reward!r}` is unknown. Use 'undecided' or 'skip'.")
        self._funcs, self._weights = list(self.reward_funcs), [1.0] * len(self.reward_funcs)
        if weights is not None:
            self._weights = list(weights)
        if self.environment is not None:
            self._funcs.append(_environment_reward(self.environment))
            self._weights.append(1.0)

    def __bool__(self) -> bool:
        return bool(self._funcs)

    def arguments(self) -> dict[str, Any]:
        """What [`generate_trajectories`] and [`evaluate_policy`] are told of it."""
        return {
            "reward_funcs": self.reward_funcs or None,  # an environment may own its reward
            "reward_weights": self.reward_weights,
            "correct_threshold": self.correct_threshold,
            "missing_reward": self.missing_reward,
            "reward_timeout_seconds": self.reward_timeout_seconds,
        }

    def describe(self) -> dict[str, Any]:
        """What decides its verdicts, by the names of its arguments, as JSON values."""
        return {
            "reward_funcs": [(reward_name(func), version_of(func)) for func in self.reward_funcs],
            "reward_weights": self.reward_weights,
            "correct_threshold": self.correct_threshold,
            "missing_reward": self.missing_reward,
        }

    def versions(self) -> dict[str, Any]:
        """Name and version of every verifier, and what makes a verdict of their values, for provenance."""
        versions = {reward_name(func): version_of(func) for func in self._funcs}
        settings = {"weights": self._weights, "threshold": self.correct_threshold, "missing": self.missing_reward}
        return {"rewards": versions, **settings}

    async def judge(self, finished: Sequence[tuple[Trajectory, Mapping[str, Any]]]) -> list[Trajectory]:
        """Judges trajectories, each with its prompt's row."""
        if not self._funcs:
            return [trajectory for trajectory, _ in finished]
        rows = [
            {**row, "environment_reward": trajectory.info.get("environment_reward")} for trajectory, row in finished
        ]
        return await judge_async(
            [trajectory for trajectory, _ in finished],
            rows,
            self._funcs,
            reward_weights=self._weights,
            threshold=self.correct_threshold,
            missing=self.missing_reward,
            timeout_seconds=self.reward_timeout_seconds,
        )

    async def serve(self, queue: asyncio.Queue, deliver: Callable[[Trajectory], None]) -> None:
        """Judges all that waits in `queue` at a time, and hands it to `deliver`, until the queue brings `None`."""
        more = True
        while more:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            more = batch[-1] is not None  # nothing follows the `None`
            for trajectory in await self.judge(batch if more else batch[:-1]):
                deliver(trajectory)


def _environment_reward(name: str) -> Callable[..., list[float | None]]:
    def environment_reward(completions: list, environment_reward: list[float | None], **_: Any) -> list[float | None]:
        return environment_reward

    environment_reward.__name__ = name
    environment_reward.version = ""  # the environment's own is among the tools
    return environment_reward
