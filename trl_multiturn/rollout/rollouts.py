"""One call of [`generate_trajectories`]: one task per trajectory, no lock-step, verdicts as they finish."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trl
from tqdm.auto import tqdm

from ..engines.engine import Engine
from ..errors import TooManyToolFailures
from ..formats import PROMPT_IMAGES, place_images
from ..journal.journal import Journal
from ..messages import normalize_messages
from ..messages.images import with_portable_images
from ..tools.base import RolloutContext
from ..tools.environments import EnvironmentType
from ..tools.toolbox import ToolLimits, Toolset
from ..trajectory import StopReason, Trajectory
from ..version import __version__
from .config import RolloutConfig
from .conversation import Conversation
from .dialects.dialect import Message
from .episode import Episode, refuse_long_prompt
from .judging import MIN_FINISHED_FOR_SHARE, Judge, refuse_other_prompt
from .player import Player
from .provenance import WatchedRow, decides_rollouts, derive_seed, describe_tokenizer, fingerprint


_MOST_WAITING_FOR_VERDICTS = 256


@dataclass(frozen=True)
class RolloutPlan:
    """What is to be rolled out, by what, and where it goes; [`generate_trajectories`] describes the fields.

    `samples` are the `sample_index`es of each prompt, and `prompt_indices` the rows' indices in the whole set.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_indices: Sequence[int]
    samples: range
    engine: Engine
    toolset: Toolset
    config: RolloutConfig
    judge: Judge
    processing_class: Any
    policy: str
    policy_revision: str | None
    iteration: int
    policy_lag: int
    journal: Journal | None
    collect: bool
    on_trajectory: Callable[[Trajectory], None] | None
    progress: bool
    player: Player | None

    def __post_init__(self) -> None:
        if len(self.prompt_indices) != len(self.rows):
            raise ValueError(f"`prompt_indices` has {len(self.prompt_indices)} entries for {len(self.rows)} prompts.")
        if self.journal is None and not self.collect:
            raise ValueError("`collect=False` keeps no trajectory in memory, so it needs a `journal` to keep them.")

    @property
    def scope(self) -> str:
        """Where these trajectories stand in the journal."""
        return f"{self.iteration}/{self.policy}"

    def provenance(self, dialects: Sequence[str]) -> dict[str, Any]:
        """What decides which trajectories come out, as JSON values."""
        provenance = {
            "engine": self.engine.describe(),
            "sampler": self.config.sampler_settings(),
            "dialects": dialects,
            "tools": self.toolset.versions(),
            **({} if self.judge else {"verifiers": self.judge.versions()}),  # else it comes with the verdict
            "versions": {"trl_multiturn": __version__, "trl": trl.__version__},
            **describe_tokenizer(self.processing_class),
            "iteration": self.iteration,
            "policy": self.policy,
            "policy_revision": self.policy_revision,
        }
        if self.policy_lag:
            provenance |= {"policy_iteration": self.iteration - self.policy_lag, "policy_lag": self.policy_lag}
        return provenance | (self.player.provenance if self.player is not None else {})


class Rollouts:
    """Carries out a plan.

    Raises:
        `ValueError`: if tools, dialect and chat template do not fit together, or a prompt is too long.
    """

    def __init__(self, plan: RolloutPlan):
        self.plan, self.config = plan, plan.config
        kinds: list[EnvironmentType | None] = list(plan.toolset.environments.types.values()) or [None]
        self.conversations = {
            kind: Conversation(plan.config, plan.processing_class, plan.toolset.schemas(kind)) for kind in kinds
        }  # what the policy may call, and hence the prompt, depends on the environment
        dialects = sorted({conversation.dialect.name for conversation in self.conversations.values()})
        self.provenance = plan.provenance(dialects)
        self.play = Episode.play if plan.player is None else plan.player
        self.limits = ToolLimits(
            plan.config.tool_timeout_seconds, plan.config.tool_retries, plan.config.max_concurrent_tools
        )
        self.results: dict[tuple[int, int], Trajectory] = {}
        self.known: dict[int, int] = {}  # rolled out by an earlier run: a bit per sample, by prompt
        self.failures, self.rolled_out = 0, 0
        self.counts: Counter[str] = Counter()
        if not plan.toolset.environments.types:
            self._refuse_long_prompts()

    async def run(self) -> list[Trajectory]:
        """Rolls out and judges what the journal does not hold yet."""
        plan, queue = self.plan, asyncio.Queue[Any]()
        if plan.journal is not None:
            plan.journal.claim(plan.scope, self.provenance, decides_rollouts)
        total = len(plan.rows) * len(plan.samples)
        self.bar = tqdm(total=total, desc=f"Rollouts ({plan.policy})", disable=not plan.progress)
        with self.bar:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(plan.judge.serve(queue, self._deliver))
                    try:
                        if plan.journal is not None:
                            await self._resume(plan.journal, queue)
                        await self._roll_out_all(queue)
                    finally:
                        queue.put_nowait(None)
            except BaseExceptionGroup as errors:
                error = _first_leaf(errors)
                raise error from error.__cause__
        if plan.journal is not None:
            plan.journal.sync()
        keys = ((index, sample) for index in plan.prompt_indices for sample in plan.samples)
        return [self.results[key] for key in keys if key in self.results]

    async def _resume(self, journal: Journal, queue: asyncio.Queue) -> None:
        """Takes over what an earlier run finished; what it did not judge, or judged otherwise, is judged now."""
        plan = self.plan
        rows = dict(zip(plan.prompt_indices, plan.rows, strict=True))
        for trajectory in journal.read(plan.scope):
            key = (trajectory.info["prompt_index"], trajectory.info["sample_index"])
            if key[0] not in rows or key[1] not in plan.samples or trajectory.stop_reason is StopReason.TOOL_FAILED:
                continue  # another process's share; or the machine's failure, which is tried again
            refuse_other_prompt(trajectory, rows[key[0]], journal)
            self.known[key[0]] = self.known.get(key[0], 0) | 1 << key[1]
            if not plan.judge or plan.judge.has_judged(trajectory, rows[key[0]]):
                self._keep(trajectory)
                plan.judge.count_earlier()
                self.bar.update()
                continue
            queue.put_nowait((trajectory, rows[key[0]]))
            if queue.qsize() >= _MOST_WAITING_FOR_VERDICTS:
                await queue.join()  # memory does not grow with what is judged anew

    def _jobs(self) -> Iterator[tuple[RolloutContext, Mapping[str, Any]]]:
        """The places of all trajectories that the journal does not hold, each with its row."""
        plan = self.plan
        for prompt_index, row in zip(plan.prompt_indices, plan.rows, strict=True):
            for sample in plan.samples:
                if not self.known.get(prompt_index, 0) >> sample & 1:
                    seed = derive_seed(plan.config.seed, plan.iteration, plan.policy, prompt_index, sample)
                    name = f"{plan.scope}/{prompt_index}/{sample}"
                    place = (name, plan.iteration, plan.policy, prompt_index, sample, seed)
                    yield RolloutContext(*place, WatchedRow(row)), row

    async def _roll_out_all(self, queue: asyncio.Queue) -> None:
        free = asyncio.Semaphore(self.config.max_concurrent_trajectories)

        async def roll_out(context: RolloutContext, row: Mapping[str, Any]) -> None:
            try:
                episode = self._episode(context, row)
                trajectory = await self.play(episode)
                trajectory.info.update(self._origin(episode, row))
            finally:
                free.release()
            if self.plan.journal is not None:
                self.plan.journal.append(self.plan.scope, trajectory)
            self._watch_failures(trajectory)
            queue.put_nowait((trajectory, row))

        async with asyncio.TaskGroup() as group:
            for context, row in self._jobs():
                await free.acquire()  # tasks start as there is room: memory does not grow with the prompts
                group.create_task(roll_out(context, row))

    def _episode(self, context: RolloutContext, row: Mapping[str, Any]) -> Episode:
        toolset = self.plan.toolset
        conversation = self.conversations[toolset.environments.for_row(row)]
        return Episode(
            prompt=self._prompt(row, conversation),
            context=context,
            open_toolbox=lambda: toolset.open(row, self.limits),
            conversation=conversation,
            engine=self.plan.engine,
            config=self.config,
        )

    def _origin(self, episode: Episode, row: Mapping[str, Any]) -> dict[str, Any]:
        """Where a trajectory comes from, for `Trajectory.info`."""
        watched = episode.context.row
        environment = bool(self.plan.toolset.environments.types)
        return {
            "prompt_index": episode.context.prompt_index,
            "prompt_fingerprint": fingerprint(dict(row)),
            "read_fingerprint": fingerprint(row.get("prompt")),
            "row_was_read": environment or not isinstance(watched, WatchedRow) or watched.was_read,
            "sample_index": episode.context.sample_index,
            "dialect": episode.conversation.dialect.name,
            **self.provenance,
        }

    def _deliver(self, trajectory: Trajectory) -> None:
        self._keep(trajectory)
        if self.plan.journal is not None and self.plan.judge:
            self.plan.journal.judge(self.plan.scope, trajectory)
        self.counts[trajectory.verdict.value if self.plan.judge else trajectory.stop_reason.value] += 1
        self.counts["tool calls"] += trajectory.info["tool_calls"]
        self.counts["tool failures"] += trajectory.stop_reason is StopReason.TOOL_FAILED
        self.counts["reward errors"] += "reward_errors" in trajectory.info
        self.bar.set_postfix({name: count for name, count in sorted(self.counts.items()) if count}, refresh=False)
        self.bar.update()
        if self.plan.on_trajectory is not None:
            self.plan.on_trajectory(trajectory)

    def _keep(self, trajectory: Trajectory) -> None:
        if self.plan.collect:
            self.results[trajectory.info["prompt_index"], trajectory.info["sample_index"]] = trajectory

    def _watch_failures(self, trajectory: Trajectory) -> None:
        self.rolled_out += 1
        self.failures += trajectory.stop_reason is StopReason.TOOL_FAILED
        share = self.failures / self.rolled_out
        if self.rolled_out >= MIN_FINISHED_FOR_SHARE and share > self.config.max_tool_failure_share:
            raise TooManyToolFailures(
                f"{self.failures} of {self.rolled_out} trajectories met a failure of the machine, more than "
                f"`max_tool_failure_share={self.config.max_tool_failure_share}`. The last one: "
                f"{trajectory.info.get('tool_failure', 'see the log')} Fix the tool and start again; with a journal, "
                "the trajectories that finished are kept."
            )

    def _prompt(self, row: Mapping[str, Any], conversation: Conversation) -> list[Message]:
        messages = row.get("prompt") or [{"role": "user", "content": ""}]
        if any(name in row for name in PROMPT_IMAGES):
            messages = place_images({"prompt": normalize_messages(messages, "prompt")}, row)["prompt"]
        messages = with_portable_images(conversation.template.normalize(messages, "prompt"))
        if self.config.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system_prompt})
        return messages

    def _refuse_long_prompts(self) -> None:
        conversation = self.conversations[None]
        for index, row in enumerate(self.plan.rows):
            try:
                prompt = self._prompt(row, conversation)
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
            refuse_long_prompt(len(conversation.prompt_ids(prompt)), index, self.config)


def _first_leaf(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
