"""Any TRL reward function → a reward and a verdict on every trajectory."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..concurrency import run_coroutine
from ..trajectory import StopReason, Trajectory, Verdict
from .reward_calls import RewardCall, RewardFunc, brief_error, reward_name as reward_name


logger = logging.getLogger(__name__)

# what TRL passes by name beside the dataset's columns
_RESERVED = ("prompt", "completion", "completion_ids")
# what every function is called with, and an environment's own reward
_ALWAYS_PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
                  "environment_reward")  # fmt: skip


def resolve_reward_funcs(reward_funcs: RewardFunc | str | Sequence[RewardFunc | str]) -> list[RewardFunc]:
    """Reward functions from functions and names.

    A name is `"math_reward"`, `"math_verify_reward"` or `"paper_reward"`, a function of `trl.rewards`
    (`"accuracy_reward"`) or a dotted path (`"my_package.my_module.my_reward"`).
    """
    if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence):
        reward_funcs = [reward_funcs]
    if not reward_funcs:
        raise ValueError("`reward_funcs` is empty, so no trajectory can be judged. Pass at least one reward function.")
    return [_by_name(func) if isinstance(func, str) else _checked(func) for func in reward_funcs]


def _by_name(name: str) -> RewardFunc:
    if name in ("math_reward", "math_verify_reward", "paper_reward"):
        from . import mathematics

        return getattr(mathematics, name)
    module, _, attribute = name.rpartition(".")
    try:
        return _checked(getattr(importlib.import_module(module or "trl.rewards"), attribute))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`reward_funcs` names {name!r}, which could not be loaded ({error}). Use 'math_reward', a function of "
            "`trl.rewards`, or the dotted path of a function. A reward model is passed as a function that calls it."
        ) from error


def _checked(reward_func: Any) -> RewardFunc:
    if hasattr(reward_func, "forward") or not callable(reward_func):
        raise TypeError(
            f"`reward_funcs` holds a {type(reward_func).__name__}, which is not a reward function. Pass a function "
            "`(prompts, completions, completion_ids, **columns) -> list[float | None]`; wrap a model in one."
        )
    return reward_func


def check_columns(reward_funcs: Sequence[RewardFunc], columns: Mapping[str, Sequence[Any]]) -> None:
    """Whether reward functions find what they ask for, before the first rollout.

    Args:
        reward_funcs (`Sequence[Callable]`):
            Resolved functions. One with a function `check_columns` as an attribute, such as [`math_reward`], or a
            method of an object that has one, looks at the columns itself, too.
        columns (`Mapping[str, Sequence]`):
            The columns of the prompts dataset, or the first rows of each.

    Raises:
        `ValueError`: if a function has a parameter without a default that is no column.
    """
    given = {*_ALWAYS_PASSED, *columns} - {"prompt", "completion"}
    for func in reward_funcs:
        missing = [name for name in _required_parameters(func) if name not in given]
        if missing:
            raise ValueError(
                f"The reward function {reward_name(func)!r} needs {', '.join(f'`{name}`' for name in missing)}, which "
                f"the prompts do not have (their columns: {sorted(columns)}). Add the column, or give the parameter a "
                "default."
            )
        of_object = getattr(getattr(func, "__self__", None), "check_columns", None)  # where it is a method
        check = getattr(func, "check_columns", of_object)
        if check is not None:
            check(columns)


def _required_parameters(func: RewardFunc) -> list[str]:
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # a function that does not tell
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty]


def judge(
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | str | Sequence[RewardFunc | str],
    reward_weights: Sequence[float] | None = None,
    threshold: float = 0.5,
    missing: Literal["undecided", "skip"] = "undecided",
    timeout_seconds: float | None = None,
    reward_kwargs: Mapping[str, Any] | None = None,
) -> list[Trajectory]:
    """Gives every trajectory a reward and a verdict.

    The reward is the weighted sum of the functions' values; the verdict is `CORRECT` where it reaches `threshold`,
    `INCORRECT` below. A trajectory that stopped with `TOOL_FAILED` is not shown to the functions: it is `UNDECIDED`
    with reward `None`, like one on which a function could not decide. The single values go to `info["rewards"]`.

    A function that raises is called again for each trajectory by itself. Those on which it raises again are
    `UNDECIDED` whatever the others say, with the error in `info["reward_errors"]`.

    Args:
        trajectories (`Sequence[Trajectory]`):
            What to judge.
        rows (`Sequence[Mapping]`):
            The prompts dataset's row of each trajectory, in the same order. Its columns reach the functions as keyword
            lists, as in TRL.
        reward_funcs (`Callable`, `str` or list of them):
            TRL reward functions, plain or `async`, or names ([`resolve_reward_funcs`]).
        reward_weights (`Sequence[float]`, *optional*):
            One weight per function; 1.0 each by default.
        threshold (`float`, *optional*, defaults to `0.5`):
            Smallest reward of a correct trajectory.
        missing (`str`, *optional*, defaults to `"undecided"`):
            What a function's `None` (or NaN) means. `"undecided"`: no verdict, whatever the other functions say, so
            that a verifier that timed out never makes a rejected row. `"skip"`: the function does not apply to this
            row, and the others decide (TRL's multi-task idiom); undecided only where all return `None`.
        timeout_seconds (`float`, *optional*):
            Limit on each function's call. One that is late returned `None` for every trajectory of the call; a plain
            function's thread is abandoned, since nothing can stop it. Without a limit, a function that takes longer
            than a minute is told.
        reward_kwargs (`Mapping`, *optional*):
            Further keyword arguments for every function, such as `environments`.

    Returns:
        `list[Trajectory]`: the same trajectories, in order, judged.

    Raises:
        What a reward function raises on every trajectory, with its name as a note, except `TimeoutError`, which counts
        as "no verdict in time"; `TypeError` or `ValueError` where a function returns something other than one number
        or `None` per trajectory.
    """
    judging = Judging(reward_funcs, reward_weights, threshold, missing, timeout_seconds, reward_kwargs)
    # Without a limit, plain functions run in the caller's thread, where their signal handlers work, as in TRL.
    judging.in_threads = timeout_seconds is not None
    return run_coroutine(_judge_or_raise(judging, trajectories, rows))


async def judge_async(
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | str | Sequence[RewardFunc | str],
    reward_weights: Sequence[float] | None = None,
    threshold: float = 0.5,
    missing: Literal["undecided", "skip"] = "undecided",
    timeout_seconds: float | None = None,
    reward_kwargs: Mapping[str, Any] | None = None,
) -> list[Trajectory]:
    """[`judge`] for a running event loop: plain functions run in threads, so a slow one holds up nobody else."""
    judging = Judging(reward_funcs, reward_weights, threshold, missing, timeout_seconds, reward_kwargs)
    return await _judge_or_raise(judging, trajectories, rows)


async def _judge_or_raise(
    judging: Judging, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]]
) -> list[Trajectory]:
    judged = await judging.judge(trajectories, rows)
    live = [trajectory for trajectory in judged if trajectory.stop_reason is not StopReason.TOOL_FAILED]
    if live and judging.last_error is not None and all("reward_errors" in trajectory.info for trajectory in live):
        raise judging.last_error
    return judged


@dataclass
class Judging:
    """How trajectories are judged; [`judge`] describes the fields. `last_error` is what a function raised last."""

    reward_funcs: Any
    reward_weights: Sequence[float] | None = None
    threshold: float = 0.5
    missing: str = "undecided"
    timeout_seconds: float | None = None
    reward_kwargs: Mapping[str, Any] | None = None
    in_threads: bool = True
    last_error: Exception | None = None

    def __post_init__(self) -> None:
        self.funcs = resolve_reward_funcs(self.reward_funcs)
        self.names = _unique_names(self.funcs)
        self.weights = [1.0] * len(self.funcs) if self.reward_weights is None else list(self.reward_weights)
        if len(self.weights) != len(self.funcs):
            raise ValueError(
                f"`reward_weights` has {len(self.weights)} entries for {len(self.funcs)} functions. Give one each."
            )
        if self.missing not in ("undecided", "skip"):
            raise ValueError(f"`missing={self.missing!r}` is unknown. Use 'undecided' or 'skip'.")

    async def judge(self, trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
        """[`judge`], except that no error of a reward function is raised."""
        if len(rows) != len(trajectories):
            raise ValueError(
                f"`rows` has {len(rows)} entries for {len(trajectories)} trajectories, so columns cannot be matched. "
                "Give each trajectory the row of its prompt."
            )
        live = [i for i, trajectory in enumerate(trajectories) if trajectory.stop_reason != StopReason.TOOL_FAILED]
        judged = [trajectory.judged(Verdict.UNDECIDED, None) for trajectory in trajectories]
        if not live:
            return judged
        kwargs = _keyword_arguments([trajectories[i] for i in live], [rows[i] for i in live], self.reward_kwargs)
        calls = [RewardCall(func, self.timeout_seconds, self.in_threads) for func in self.funcs]
        outcomes = await asyncio.gather(*(call.outcomes(kwargs, len(live)) for call in calls))
        self.last_error = next((call.last_error for call in calls if call.last_error is not None), self.last_error)
        by_row = list(zip(*outcomes, strict=True))  # (number of live trajectories, number of functions)
        for i, row_outcomes in zip(live, by_row, strict=True):
            judged[i] = self._judged(trajectories[i], dict(zip(self.names, row_outcomes, strict=True)))
        self._warn_where_none_is_decided(by_row)
        return judged

    def _judged(self, trajectory: Trajectory, outcomes: Mapping[str, float | Exception | None]) -> Trajectory:
        errors = {name: brief_error(value) for name, value in outcomes.items() if isinstance(value, Exception)}
        values = {name: None if isinstance(value, Exception) else value for name, value in outcomes.items()}
        reward = None if errors else _total(list(values.values()), self.weights, self.missing)
        verdict = Verdict.UNDECIDED
        if reward is not None:
            verdict = Verdict.CORRECT if reward >= self.threshold else Verdict.INCORRECT
        info = {name: value for name, value in trajectory.info.items() if name != "reward_errors"}
        info |= {"rewards": values, **({"reward_errors": errors} if errors else {})}
        return replace(trajectory, reward=reward, verdict=verdict, info=info)

    def _warn_where_none_is_decided(self, by_row: Sequence[Sequence[float | Exception | None]]) -> None:
        if self.missing == "undecided" and all(None in row and any(v is not None for v in row) for row in by_row):
            logger.warning(
                "Each of %d trajectories got `None` from one reward function and a value from another, so none has a "
                "verdict. If `None` means 'does not apply to this row', pass `missing='skip'`.",
                len(by_row),
            )


def _keyword_arguments(
    trajectories: Sequence[Trajectory], rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _RESERVED}
    return {
        "prompts": [trajectory.prompt for trajectory in trajectories],
        "completions": [trajectory.completion for trajectory in trajectories],
        "completion_ids": [trajectory.completion_ids for trajectory in trajectories],
        **columns,
        # GRPOTrainer passes these three always; a function written for it may require them
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
        **(extra or {}),
    }


def _total(values: Sequence[float | None], weights: Sequence[float], missing: str) -> float | None:
    known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not known or (missing == "undecided" and len(known) < len(values)):
        return None
    return math.fsum(known)


def _unique_names(funcs: Sequence[RewardFunc]) -> list[str]:
    names: list[str] = []
    for func in funcs:
        name, n = reward_name(func), 2
        while name in names:
            name, n = f"{reward_name(func)}_{n}", n + 1
        names.append(name)
    return names
