"""Any TRL reward function → a reward and a verdict on every trajectory."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ..concurrency import run_coroutine, run_in_thread
from ..trajectory import StopReason, Trajectory, Verdict


logger = logging.getLogger(__name__)

RewardFunc = Callable[..., Any]

# what TRL passes by name beside the dataset's columns
_RESERVED = ("prompt", "completion", "completion_ids")
# what every function is called with, and an environment's own reward
_ALWAYS_PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
                  "environment_reward")  # fmt: skip


def reward_name(reward_func: RewardFunc) -> str:
    """The name under which a reward function's values are kept."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


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


def _is_async(reward_func: RewardFunc) -> bool:
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        getattr(reward_func, "__call__", None)  # noqa: B004  (an object whose `__call__` is a coroutine function)
    )


def check_columns(reward_funcs: Sequence[RewardFunc], columns: Mapping[str, Sequence[Any]]) -> None:
    """Whether reward functions find what they ask for, before the first rollout.

    Args:
        reward_funcs (`Sequence[Callable]`):
            Resolved functions. One with a function `check_columns` as an attribute, such as [`math_reward`], looks at
            the columns itself, too.
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
        if hasattr(func, "check_columns"):
            func.check_columns(columns)


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
            function's thread is abandoned, since nothing can stop it.
        reward_kwargs (`Mapping`, *optional*):
            Further keyword arguments for every function, such as `environments`.

    Returns:
        `list[Trajectory]`: the same trajectories, in order, judged.

    Raises:
        Whatever a reward function raises, except `TimeoutError`, which counts as "no verdict in time"; `ValueError`
        where a function returns something other than one number or `None` per trajectory.
    """
    arguments = (trajectories, rows, reward_funcs, reward_weights, threshold, missing, timeout_seconds, reward_kwargs)
    # Without a limit, plain functions run in the caller's thread, where their signal handlers work, as in TRL.
    return run_coroutine(_judge(*arguments, in_threads=timeout_seconds is not None))


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
    arguments = (trajectories, rows, reward_funcs, reward_weights, threshold, missing, timeout_seconds, reward_kwargs)
    return await _judge(*arguments, in_threads=True)


async def _judge(
    trajectories: Sequence[Trajectory],
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: RewardFunc | str | Sequence[RewardFunc | str],
    reward_weights: Sequence[float] | None,
    threshold: float,
    missing: str,
    timeout_seconds: float | None,
    reward_kwargs: Mapping[str, Any] | None,
    in_threads: bool,
) -> list[Trajectory]:
    funcs = resolve_reward_funcs(reward_funcs)
    weights = [1.0] * len(funcs) if reward_weights is None else list(reward_weights)
    if len(weights) != len(funcs):
        raise ValueError(f"`reward_weights` has {len(weights)} entries for {len(funcs)} functions. Give one each.")
    if len(rows) != len(trajectories):
        raise ValueError(
            f"`rows` has {len(rows)} entries for {len(trajectories)} trajectories, so columns cannot be matched. Give "
            "each trajectory the row of its prompt."
        )
    if missing not in ("undecided", "skip"):
        raise ValueError(f"`missing={missing!r}` is unknown. Use 'undecided' or 'skip'.")

    live = [i for i, trajectory in enumerate(trajectories) if trajectory.stop_reason != StopReason.TOOL_FAILED]
    judged = [trajectory.judged(Verdict.UNDECIDED, None) for trajectory in trajectories]
    if not live:
        return judged
    kwargs = _keyword_arguments([trajectories[i] for i in live], [rows[i] for i in live], reward_kwargs)
    calls = (_call(func, kwargs, len(live), timeout_seconds, in_threads) for func in funcs)
    values = await asyncio.gather(*calls)  # (number of functions, number of live trajectories)

    names = _unique_names(funcs)
    by_row = list(zip(*values, strict=True))
    for i, row_values in zip(live, by_row, strict=True):
        reward = _total(row_values, weights, missing)
        verdict = Verdict.UNDECIDED
        if reward is not None:
            verdict = Verdict.CORRECT if reward >= threshold else Verdict.INCORRECT
        info = {**trajectories[i].info, "rewards": dict(zip(names, row_values, strict=True))}
        judged[i] = replace(trajectories[i], reward=reward, verdict=verdict, info=info)
    if missing == "undecided" and all(None in row and any(v is not None for v in row) for row in by_row):
        logger.warning(
            "Each of %d trajectories got `None` from one reward function and a value from another, so none has a "
            "verdict. If `None` means 'does not apply to this row', pass `missing='skip'`.",
            len(live),
        )
    return judged


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


async def _call(
    func: RewardFunc, kwargs: dict[str, Any], count: int, timeout_seconds: float | None, in_threads: bool
) -> list[float | None]:
    name = reward_name(func)
    try:
        if _is_async(func):
            values = await asyncio.wait_for(func(**kwargs), timeout_seconds)
        elif in_threads:
            values = await asyncio.wait_for(run_in_thread(func, **kwargs), timeout_seconds)
        else:
            values = func(**kwargs)
    except TimeoutError as error:
        logger.warning("The reward function %r gave no verdict on %d trajectories in time (%s).", name, count, error)
        return [None] * count
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"The reward function {name!r} returned {len(values)} values for {count} trajectories, so they cannot be "
            "matched. Return exactly one number or `None` per completion."
        )
    return [_number(value, name) for value in values]


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward function {name!r} returned {value!r}, which is not a number. Return a number or `None`."
        ) from error
    if math.isinf(value):
        raise ValueError(f"The reward function {name!r} returned {value}. Return a finite number or `None`.")
    return None if math.isnan(value) else value


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
