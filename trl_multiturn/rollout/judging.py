"""Verdicts while the rollouts go on: whatever has finished is judged together, off the rollouts' path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..concurrency import run_coroutine
from ..errors import JournalError, TooManyRewardErrors
from ..journal.journal import Journal
from ..tools.toolbox import Toolset
from ..trajectory import Trajectory, Verdict
from ..verify.reward_calls import brief_error
from ..verify.rewards import Judging, check_columns, resolve_reward_funcs, reward_name
from .provenance import behavior_of, fingerprint


_LOOKED_AT = 1000  # rows
MIN_FINISHED_FOR_SHARE = 20  # trajectories, before a share of failures says anything


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
        max_error_share (`float`, *optional*, defaults to `0.1`):
            Largest share of the judged trajectories (of 20 or more) on which a reward function may raise. They stay
            undecided, and are judged again when the run goes on.

    Raises:
        `TypeError`, `ValueError`: if a reward function cannot be used.
    """

    reward_funcs: Any = None
    reward_weights: Sequence[float] | None = None
    correct_threshold: float = 0.5
    reward_timeout_seconds: float | None = None
    missing_reward: Literal["undecided", "skip"] = "undecided"
    environment: str | None = None
    max_error_share: float = 0.1

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
        self._versions = self.versions()
        self._judged, self._raised = 0, 0
        self._last_error: Exception | None = None

    def __bool__(self) -> bool:
        return bool(self._funcs)

    def check_prompts(self, prompts: Any) -> None:
        """A look at the first prompts, before any rollout.

        Raises:
            `ValueError`: if a reward function asks for a column that they do not have.
        """
        first = [prompts[i] for i in range(min(len(prompts), _LOOKED_AT))]
        check_columns(self.reward_funcs, {name: [row.get(name) for row in first] for name in first[0]})

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
            "reward_funcs": [(reward_name(func), behavior_of(func)) for func in self.reward_funcs],
            "reward_weights": self.reward_weights,
            "correct_threshold": self.correct_threshold,
            "missing_reward": self.missing_reward,
        }

    def versions(self) -> dict[str, Any]:
        """Name and version of every verifier, and what makes a verdict of their values, for provenance."""
        versions: dict[str, Any] = {}
        for func in self._funcs:
            name, number = reward_name(func), 2
            while name in versions:
                name, number = f"{reward_name(func)}_{number}", number + 1
            versions[name] = behavior_of(func)
        settings = {"weights": self._weights, "threshold": self.correct_threshold, "missing": self.missing_reward}
        return json.loads(json.dumps({"rewards": versions, **settings}, default=str))

    def with_environments(self, toolset: Toolset, max_error_share: float) -> Judge:
        """A judge like this one, which also counts the reward of environments that own one."""
        owners = [kind.name for kind in toolset.environments.types.values() if kind.has_reward]
        return replace(
            self,
            reward_funcs=self.reward_funcs or None,
            environment="+".join(owners) or None,
            max_error_share=max_error_share,
        )

    def has_judged(self, trajectory: Trajectory, row: Mapping[str, Any]) -> bool:
        """Whether the verdict on a trajectory is this judge's, given with this row of the prompts."""
        decided = trajectory.verdict is not Verdict.UNDECIDED or "rewards" in trajectory.info
        decided = decided and not trajectory.info.get("reward_errors")
        same_row = trajectory.info.get("prompt_fingerprint") == fingerprint(dict(row))
        return decided and same_row and trajectory.info.get("verifiers") == self._versions

    async def judge(self, finished: Sequence[tuple[Trajectory, Mapping[str, Any]]]) -> list[Trajectory]:
        """Judges trajectories, each with its prompt's row. `info` says which judge and which row it was."""
        if not self._funcs:
            return [trajectory for trajectory, _ in finished]
        finished = [
            (replace(each, info={**each.info, "prompt_fingerprint": fingerprint(dict(row))}), row)
            for each, row in finished
        ]
        rows = [
            {**row, "environment_reward": trajectory.info.get("environment_reward")} for trajectory, row in finished
        ]
        judging = Judging(
            self._funcs,
            reward_weights=self._weights,
            threshold=self.correct_threshold,
            missing=self.missing_reward,
            timeout_seconds=self.reward_timeout_seconds,
        )
        judged = await judging.judge([trajectory for trajectory, _ in finished], rows)
        self._watch_errors(judged, judging.last_error)
        return [replace(each, info={**each.info, "verifiers": self._versions}) for each in judged]

    def count_earlier(self) -> None:
        """Counts a trajectory that an earlier run judged: what raises is a share of all, not of what is left."""
        self._judged += 1

    def _watch_errors(self, judged: Sequence[Trajectory], error: Exception | None) -> None:
        self._judged += len(judged)
        self._raised += sum("reward_errors" in trajectory.info for trajectory in judged)
        self._last_error = error or self._last_error
        if self._judged >= MIN_FINISHED_FOR_SHARE and self._raised > self.max_error_share * self._judged:
            self._end_the_run()

    def _end_the_run(self) -> None:
        error = self._last_error
        assert error is not None
        raise TooManyRewardErrors(
            f"Reward functions raised on {self._raised} of {self._judged} trajectories, more than "
            f"`max_tool_failure_share={self.max_error_share}`, so the rows would come from a part of them. The last "
            f"one: {brief_error(error)}. {' '.join(error.__notes__)} Repair it and start again; with a journal, what "
            "was rolled out is kept and judged anew."
        ) from error

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
            for _ in batch:
                queue.task_done()
        if self._raised and self._raised == self._judged and self.max_error_share < 1:
            self._end_the_run()


def judge_again(journal: Journal, rows: Sequence[Mapping[str, Any]], judge: Judge) -> None:
    """Judges those trajectories of a journal on which another judge gave the last verdict, or none did.

    Args:
        journal ([`Journal`]):
            Where they are, and where the verdicts go.
        rows (`Sequence[Mapping]`):
            The prompts' rows, by `prompt_index`.
        judge ([`Judge`]):
            What decides.
    """

    async def work() -> None:
        for group in journal.read_by_prompt():
            row = rows[group[0].info["prompt_index"]]
            for each in group:
                refuse_other_prompt(each, row, journal)
            stale = [(each, row) for each in group if not judge.has_judged(each, row)]
            for _ in range(len(group) - len(stale)):
                judge.count_earlier()
            for judged in await judge.judge(stale) if stale else ():
                journal.judge(f"{judged.info['iteration']}/{judged.info['policy']}", judged)

    if judge:
        run_coroutine(work())


def refuse_other_prompt(trajectory: Trajectory, row: Mapping[str, Any], journal: Journal) -> None:
    """Raises where a trajectory was not rolled out from this row of the prompts.

    A row may change in what nothing of the rollout has read, such as the answer that the reward function compares.

    Raises:
        [`JournalError`]: naming the prompt.
    """
    info = trajectory.info
    if info["prompt_fingerprint"] == fingerprint(dict(row)):
        return
    if not info.get("row_was_read", True) and info["read_fingerprint"] == fingerprint(row.get("prompt")):
        return
    scope = f"{info['iteration']}/{info['policy']}"
    raise JournalError(
        f"Prompt {info['prompt_index']} is not the one that the journal in {journal.folder} was begun with. Use the "
        f"earlier prompts in the earlier order (new ones at the end), or another folder. {journal.how_to_free(scope)}"
    )


def _environment_reward(name: str) -> Callable[..., list[float | None]]:
    def environment_reward(completions: list, environment_reward: list[float | None], **_: Any) -> list[float | None]:
        return environment_reward

    environment_reward.__name__ = name
    environment_reward.version = ""  # type: ignore[attr-defined]  # the environment's own is among the tools
    return environment_reward
