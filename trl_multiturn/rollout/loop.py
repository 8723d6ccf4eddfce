"""Prompts → trajectories: the functions to call."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from datasets import Dataset

from ..concurrency import run_coroutine, run_in_thread
from ..engines.engine import Engine, check_engine
from ..errors import TooManyToolFailures as TooManyToolFailures
from ..journal.journal import Journal
from ..tools.toolbox import Toolset
from ..trajectory import Trajectory
from .config import RolloutConfig
from .judging import Judge
from .player import Player
from .rollouts import RolloutPlan, Rollouts


def generate_trajectories(
    prompts: Dataset | Sequence[Mapping[str, Any]],
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    *,
    reward_funcs: Any = None,
    reward_weights: Sequence[float] | None = None,
    correct_threshold: float = 0.5,
    reward_timeout_seconds: float | None = None,
    missing_reward: Literal["undecided", "skip"] = "undecided",
    environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
    processing_class: Any = None,
    num_generations: int | None = None,
    policy: str = "current",
    policy_revision: str | None = None,
    iteration: int = 0,
    policy_lag: int = 0,
    sample_offset: int = 0,
    prompt_indices: Sequence[int] | None = None,
    journal: Journal | str | os.PathLike | None = None,
    collect: bool = True,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    progress: bool = True,
    player: Player | None = None,
) -> list[Trajectory]:
    """Rolls out trajectories: `num_generations` for each prompt, in the order of the prompts.

    Every trajectory is a task of its own: it samples a turn, runs the turn's calls, reads the answers, and never waits
    for another trajectory's tools. Ids are kept as they were sampled; the same configuration, engine, prompts and
    weights give the same trajectories, whatever runs beside them and in whatever order they finish, as far as the
    engine's samples do (see [`TransformersEngine`]: on a CPU with one thread).

    Works with and without a running event loop (in a notebook, the cell waits as it does for any synchronous call).

    Args:
        prompts (`Dataset` or `list[dict]`):
            Rows with a conversational `prompt` and whatever columns the reward functions need.
        engine ([`Engine`]):
            Samples the turns.
        tools (`list`, *optional*):
            What the policy may call, as in [`~trl.GRPOTrainer`]: functions with type hints and a Google-style
            docstring; or session tools such as [`PythonTool`].
        config ([`RolloutConfig`], *optional*):
            How to sample.
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            TRL reward functions, plain or `async`; they run beside the rollouts. `None` for a trajectory leaves it
            `UNDECIDED`.
        reward_weights (`list[float]`, *optional*):
            One per function, 1.0 by default.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest reward of a `CORRECT` trajectory.
        reward_timeout_seconds (`float`, *optional*):
            Limit on each call of a reward function; one that is late decides nothing.
        missing_reward (`str`, *optional*, defaults to `"undecided"`):
            What a function's `None` means beside other functions' values: no verdict, or (`"skip"`) that the function
            does not apply to this row.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            An environment per trajectory, as in [`~trl.GRPOTrainer`]; or an [`EnvironmentPool`] (see
            `docs/environments.md`).
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The engine's by default.
        num_generations (`int`, *optional*):
            Overrides `config.num_generations`.
        policy (`str`, *optional*, defaults to `"current"`), policy_revision (`str`, *optional*):
            Label of the policy that samples, part of every seed; and what identifies its weights, for provenance.
        iteration (`int`, *optional*, defaults to `0`):
            Of the online loop; part of every seed.
        policy_lag (`int`, *optional*, defaults to `0`):
            How many iterations older the policy that samples is than the one that the iteration trains; for
            provenance (`policy_lag`, `policy_iteration`).
        sample_offset (`int`, *optional*, defaults to `0`):
            First `sample_index`, where several policies share the samples of a prompt.
        prompt_indices (`Sequence[int]`, *optional*):
            The rows' indices in the whole set of prompts, where `prompts` is a process's share.
        journal ([`Journal`] or path, *optional*):
            Where every trajectory is written the moment it finishes. What it already holds is not rolled out again.
        collect (`bool`, *optional*, defaults to `True`):
            Whether to return the trajectories. Without, they are in the journal only, and memory stays flat however
            many there are.
        on_trajectory (`Callable[[Trajectory], None]`, *optional*):
            Called with each finished and judged trajectory, in the order of finishing.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        player ([`Player`], *optional*):
            Plays each trajectory instead of the plain loop; [`value_guided_search`] has one.

    Returns:
        `list[Trajectory]`: by prompt, then by sample; empty with `collect=False`.

    Raises:
        `TypeError`, `ValueError`: for what the user got wrong, before the first trajectory.
        [`TooManyToolFailures`]: if the share of machine failures passes `config.max_tool_failure_share`.
        [`TooManyRewardErrors`]: if reward functions raise on a larger share of the trajectories than that.
        Whatever the engine, a reward function or an environment's `reset` raises; the other trajectories are
        cancelled.
    """
    return run_coroutine(
        agenerate_trajectories(
            prompts,
            engine,
            tools,
            config,
            reward_funcs=reward_funcs,
            reward_weights=reward_weights,
            correct_threshold=correct_threshold,
            reward_timeout_seconds=reward_timeout_seconds,
            missing_reward=missing_reward,
            environment_factory=environment_factory,
            processing_class=processing_class,
            num_generations=num_generations,
            policy=policy,
            policy_revision=policy_revision,
            iteration=iteration,
            policy_lag=policy_lag,
            sample_offset=sample_offset,
            prompt_indices=prompt_indices,
            journal=journal,
            collect=collect,
            on_trajectory=on_trajectory,
            progress=progress,
            player=player,
        )
    )


async def agenerate_trajectories(
    prompts: Dataset | Sequence[Mapping[str, Any]],
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    *,
    reward_funcs: Any = None,
    reward_weights: Sequence[float] | None = None,
    correct_threshold: float = 0.5,
    reward_timeout_seconds: float | None = None,
    missing_reward: Literal["undecided", "skip"] = "undecided",
    environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
    processing_class: Any = None,
    num_generations: int | None = None,
    policy: str = "current",
    policy_revision: str | None = None,
    iteration: int = 0,
    policy_lag: int = 0,
    sample_offset: int = 0,
    prompt_indices: Sequence[int] | None = None,
    journal: Journal | str | os.PathLike | None = None,
    collect: bool = True,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    progress: bool = True,
    player: Player | None = None,
) -> list[Trajectory]:
    """[`generate_trajectories`] for event loops."""
    config = RolloutConfig.of(config)
    if not re.fullmatch(r"[\w.-]+", policy):
        raise ValueError(f"`policy={policy!r}` names files: use letters, digits, `.`, `_` and `-` only.")
    check_engine(engine)
    rows = _checked_rows(prompts, optional_prompt=environment_factory is not None)
    toolset = Toolset(tools, environment_factory)
    judge = Judge(reward_funcs, reward_weights, correct_threshold, reward_timeout_seconds, missing_reward)
    judge.check_prompts(rows)
    plan = RolloutPlan(
        rows=rows,
        prompt_indices=range(len(rows)) if prompt_indices is None else prompt_indices,
        samples=range(
            sample_offset, sample_offset + (config.num_generations if num_generations is None else num_generations)
        ),
        engine=engine,
        toolset=toolset,
        config=config,
        judge=judge.with_environments(toolset, config.max_tool_failure_share),
        processing_class=processing_class or engine.processing_class,
        policy=policy,
        policy_revision=policy_revision,
        iteration=iteration,
        policy_lag=policy_lag,
        journal=Journal(journal) if isinstance(journal, (str, os.PathLike)) else journal,
        collect=collect,
        on_trajectory=on_trajectory,
        progress=progress,
        player=player,
    )
    try:
        rollouts = Rollouts(plan)
        if plan.journal is None or plan.journal is journal:
            return await rollouts.run()
        with plan.journal:
            return await rollouts.run()
    finally:
        await run_in_thread(toolset.close)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str)


def _checked_rows(prompts: Any, optional_prompt: bool) -> Dataset | Sequence[Mapping[str, Any]]:
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__"):
        raise TypeError(
            f"`prompts` is a {type(prompts).__name__}, whose rows cannot be counted. Pass a `Dataset` or a list of "
            "rows (of a streaming dataset, as many as one iteration takes)."
        )
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty, so there is nothing to roll out.")
    for index, row in enumerate(prompts):
        prompt = row.get("prompt")
        if prompt is None and optional_prompt:
            continue
        if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt or not _is_message(prompt[0]):
            raise ValueError(
                f"Row {index}: `prompt` is not a list of messages but {prompt!r:.80}, so no chat template can render "
                'it. Wrap text as `[{"role": "user", "content": text}]`.'
            )
    return prompts
