"""Prompts → trajectories: one task per trajectory, no lock-step, verdicts as they finish."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import trl
from datasets import Dataset
from tqdm.auto import tqdm

from ..concurrency import run_coroutine
from ..engines.engine import Engine
from ..errors import TooManyToolFailures as TooManyToolFailures
from ..journal.journal import Journal
from ..tools.base import RolloutContext
from ..tools.toolbox import Toolbox, ToolLimits, Toolset
from ..trajectory import StopReason, Trajectory
from ..version import __version__
from .config import RolloutConfig
from .episode import Conversation, play_episode, refuse_long_prompt
from .judging import Judge, refuse_other_prompt
from .provenance import WatchedRow, decides_rollouts, derive_seed, describe_tokenizer, fingerprint


logger = logging.getLogger(__name__)

_MIN_FINISHED_FOR_SHARE = 20
_MOST_WAITING_FOR_VERDICTS = 256


def generate_trajectories(
    prompts: Dataset | Sequence[Mapping[str, Any]],
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    **kwargs: Any,
) -> list[Trajectory]:
    """Rolls out trajectories: `num_generations` for each prompt, in the order of the prompts.

    Every trajectory is a task of its own: it samples a turn, runs the turn's calls, reads the answers, and never waits
    for another trajectory's tools. Ids are kept as they were sampled; the same configuration, engine, prompts and
    weights give the same trajectories, whatever runs beside them and in whatever order they finish.

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
            An environment per trajectory, as in [`~trl.GRPOTrainer`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The engine's by default.
        num_generations (`int`, *optional*):
            Overrides `config.num_generations`.
        policy (`str`, *optional*, defaults to `"current"`), policy_revision (`str`, *optional*):
            Label of the policy that samples, part of every seed; and what identifies its weights, for provenance.
        iteration (`int`, *optional*, defaults to `0`):
            Of the online loop; part of every seed.
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
        Whatever the engine, a reward function or an environment's `reset` raises; the other trajectories are
        cancelled.
    """
    return run_coroutine(agenerate_trajectories(prompts, engine, tools, config, **kwargs))


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
    sample_offset: int = 0,
    prompt_indices: Sequence[int] | None = None,
    journal: Journal | str | os.PathLike | None = None,
    collect: bool = True,
    on_trajectory: Callable[[Trajectory], None] | None = None,
    progress: bool = True,
    player: Player | None = None,
) -> list[Trajectory]:
    """[`generate_trajectories`] for event loops."""
    config = config or RolloutConfig()
    if not re.fullmatch(r"[\w.-]+", policy):
        raise ValueError(f"`policy={policy!r}` names files: use letters, digits, `.`, `_` and `-` only.")
    rows = _checked_rows(prompts, optional_prompt=environment_factory is not None)
    toolset = Toolset(tools, environment_factory)
    judge = Judge(reward_funcs, reward_weights, correct_threshold, reward_timeout_seconds, missing_reward)
    judge = judge.with_environments(toolset)
    rollouts = _Rollouts(rows, engine, toolset, config, judge, processing_class or engine.processing_class)
    rollouts.provenance |= {"iteration": iteration, "policy": policy, "policy_revision": policy_revision}
    if player is not None:
        rollouts.player = player
        rollouts.provenance |= player.provenance
    rollouts.place(
        prompt_indices=range(len(rows)) if prompt_indices is None else prompt_indices,
        samples=range(
            sample_offset, sample_offset + (config.num_generations if num_generations is None else num_generations)
        ),
    )
    if journal is None and not collect:
        raise ValueError("`collect=False` keeps no trajectory in memory, so it needs a `journal` to keep them.")
    rollouts.collect = collect
    if isinstance(journal, (str, os.PathLike)):
        with Journal(journal) as journal:
            return await rollouts.run(journal, on_trajectory, progress)
    return await rollouts.run(journal, on_trajectory, progress)


class Player(Protocol):
    """Plays one trajectory, with as many toolboxes as it opens; it closes them. `provenance` joins that of the run."""

    provenance: dict[str, Any]

    async def __call__(
        self,
        prompt: list[dict[str, Any]],
        context: RolloutContext,
        open_toolbox: Callable[[], Toolbox],
        conversation: Conversation,
        engine: Engine,
        config: RolloutConfig,
    ) -> Trajectory: ...


class PlainPlayer:
    """Turn by turn, nothing else: [`play_episode`]."""

    provenance: dict[str, Any] = {}

    async def __call__(self, prompt, context, open_toolbox, conversation, engine, config) -> Trajectory:
        return await play_episode(prompt, context, open_toolbox(), conversation, engine, config)


class _Rollouts:
    """One call of [`generate_trajectories`]."""

    player: Player = PlainPlayer()

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        engine: Engine,
        toolset: Toolset,
        config: RolloutConfig,
        judge: Judge,
        processing_class: Any,
    ):
        self.rows, self.engine, self.toolset, self.config, self.judge = rows, engine, toolset, config, judge
        kinds = list(toolset.environments.types.values()) or [None]
        self.conversations = {
            kind: Conversation(config, processing_class, toolset.schemas(kind)) for kind in kinds
        }  # what the policy may call, and hence the prompt, depends on the environment
        self.limits = ToolLimits(config.tool_timeout_seconds, config.tool_retries, config.max_concurrent_tools)
        self.provenance: dict[str, Any] = {
            "engine": engine.describe(),
            "sampler": config.sampler_settings(),
            "dialects": sorted({conversation.dialect.name for conversation in self.conversations.values()}),
            "tools": toolset.versions(),
            **({} if judge else {"verifiers": judge.versions()}),  # else it comes with the verdict
            "versions": {"trl_multiturn": __version__, "trl": trl.__version__},
            **describe_tokenizer(processing_class),
        }
        if not toolset.environments.types:
            self._refuse_long_prompts()

    def place(self, prompt_indices: Sequence[int], samples: range) -> None:
        """Which prompts of the whole set these are, and which samples of each to draw."""
        if len(prompt_indices) != len(self.rows):
            raise ValueError(f"`prompt_indices` has {len(prompt_indices)} entries for {len(self.rows)} prompts.")
        self.prompt_indices, self.samples = prompt_indices, samples

    async def run(
        self, journal: Journal | None, on_trajectory: Callable[[Trajectory], None] | None, progress: bool
    ) -> list[Trajectory]:
        """Rolls out and judges what the journal does not hold yet."""
        self.results: dict[tuple[int, int], Trajectory] = {}
        self.known: dict[int, int] = {}  # rolled out by an earlier run: a bit per sample, by prompt
        self.journal, self.on_trajectory = journal, on_trajectory
        self.failures, self.rolled_out = 0, 0
        queue: asyncio.Queue = asyncio.Queue()
        if journal is not None:
            journal.claim(self._scope(), self.provenance, decides_rollouts)
        total = len(self.rows) * len(self.samples)
        self.counts: Counter[str] = Counter()
        self.bar = tqdm(total=total, desc=f"Rollouts ({self.provenance['policy']})", disable=not progress)
        with self.bar:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.judge.serve(queue, self._deliver))
                    try:
                        if journal is not None:
                            await self._resume(journal, queue)
                        await self._roll_out_all(queue)
                    finally:
                        queue.put_nowait(None)
            except BaseExceptionGroup as errors:
                raise _first_leaf(errors) from None
        if journal is not None:
            journal.sync()
        keys = ((index, sample) for index in self.prompt_indices for sample in self.samples)
        return [self.results[key] for key in keys if key in self.results]

    async def _resume(self, journal: Journal, queue: asyncio.Queue) -> None:
        """Takes over what an earlier run finished; what it did not judge, or judged otherwise, is judged now."""
        rows = dict(zip(self.prompt_indices, self.rows, strict=True))
        for trajectory in journal.read(self._scope()):
            key = (trajectory.info["prompt_index"], trajectory.info["sample_index"])
            if key[0] not in rows or key[1] not in self.samples or trajectory.stop_reason is StopReason.TOOL_FAILED:
                continue  # another process's share; or the machine's failure, which is tried again
            refuse_other_prompt(trajectory, rows[key[0]], journal)
            self.known[key[0]] = self.known.get(key[0], 0) | 1 << key[1]
            if not self.judge or self.judge.has_judged(trajectory, rows[key[0]]):
                self._keep(trajectory)
                self.bar.update()
                continue
            queue.put_nowait((trajectory, rows[key[0]]))
            if queue.qsize() >= _MOST_WAITING_FOR_VERDICTS:
                await queue.join()  # memory does not grow with what is judged anew

    def _jobs(self) -> Iterator[tuple[RolloutContext, Mapping[str, Any]]]:
        policy, iteration = self.provenance["policy"], self.provenance["iteration"]
        for prompt_index, row in zip(self.prompt_indices, self.rows, strict=True):
            for sample in self.samples:
                if not self.known.get(prompt_index, 0) >> sample & 1:
                    seed = derive_seed(self.config.seed, iteration, policy, prompt_index, sample)
                    name = f"{self._scope()}/{prompt_index}/{sample}"
                    watched = WatchedRow(row)
                    yield RolloutContext(name, iteration, policy, prompt_index, sample, seed, watched), row

    async def _roll_out_all(self, queue: asyncio.Queue) -> None:
        free = asyncio.Semaphore(self.config.max_concurrent_trajectories)

        async def roll_out(context: RolloutContext, row: Mapping[str, Any]) -> None:
            try:
                trajectory = await self._roll_out(context, row)
            finally:
                free.release()
            if self.journal is not None:
                self.journal.append(self._scope(), trajectory)
            self._watch_failures(trajectory)
            queue.put_nowait((trajectory, row))

        async with asyncio.TaskGroup() as group:
            for context, row in self._jobs():
                await free.acquire()  # tasks start as there is room: memory does not grow with the prompts
                group.create_task(roll_out(context, row))

    async def _roll_out(self, context: RolloutContext, row: Mapping[str, Any]) -> Trajectory:
        conversation = self.conversations[self.toolset.environments.for_row(row)]
        trajectory = await self.player(
            self._prompt(row),
            context,
            lambda: self.toolset.open(row, self.limits),
            conversation,
            self.engine,
            self.config,
        )
        trajectory.info.update(
            prompt_index=context.prompt_index,
            prompt_fingerprint=fingerprint(dict(row)),
            read_fingerprint=fingerprint(row.get("prompt")),
            row_was_read=bool(self.toolset.environments.types) or context.row.was_read,
            sample_index=context.sample_index,
            dialect=conversation.dialect.name,
            **self.provenance,
        )
        return trajectory

    def _deliver(self, trajectory: Trajectory) -> None:
        self._keep(trajectory)
        if self.journal is not None and self.judge:
            self.journal.judge(self._scope(), trajectory)
        self.counts[trajectory.verdict.value if self.judge else trajectory.stop_reason.value] += 1
        self.counts["tool calls"] += trajectory.info["tool_calls"]
        self.counts["tool failures"] += trajectory.stop_reason is StopReason.TOOL_FAILED
        self.bar.set_postfix({name: count for name, count in sorted(self.counts.items()) if count}, refresh=False)
        self.bar.update()
        if self.on_trajectory is not None:
            self.on_trajectory(trajectory)

    def _keep(self, trajectory: Trajectory) -> None:
        if self.collect:
            self.results[trajectory.info["prompt_index"], trajectory.info["sample_index"]] = trajectory

    def _watch_failures(self, trajectory: Trajectory) -> None:
        self.rolled_out += 1
        self.failures += trajectory.stop_reason is StopReason.TOOL_FAILED
        share = self.failures / self.rolled_out
        if self.rolled_out >= _MIN_FINISHED_FOR_SHARE and share > self.config.max_tool_failure_share:
            raise TooManyToolFailures(
                f"{self.failures} of {self.rolled_out} trajectories met a failure of the machine, more than "
                f"`max_tool_failure_share={self.config.max_tool_failure_share}`. The last one: "
                f"{trajectory.info.get('tool_failure', 'see the log')} Fix the tool and start again; with a journal, "
                "the trajectories that finished are kept."
            )

    def _prompt(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = list(row.get("prompt") or [{"role": "user", "content": ""}])
        if self.config.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system_prompt})
        return messages

    def _refuse_long_prompts(self) -> None:
        conversation = self.conversations[None]
        for index, row in enumerate(self.rows):
            refuse_long_prompt(len(conversation.prompt_ids(self._prompt(row))), index, self.config)

    def _scope(self) -> str:
        return f"{self.provenance['iteration']}/{self.provenance['policy']}"


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
        if not isinstance(prompt, Sequence) or isinstance(prompt, str) or not prompt or "role" not in prompt[0]:
            raise ValueError(
                f"Row {index}: `prompt` is not a list of messages but {prompt!r:.80}, so no chat template can render "
                'it. Wrap text as `[{"role": "user", "content": text}]`.'
            )
    return prompts


def _first_leaf(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
