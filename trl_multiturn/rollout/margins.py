"""Margins for M-DPO with tools that are not certain: term C of the paper's eq. 11, estimated with a value model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset

from ..concurrency import run_coroutine
from ..engines.engine import Generation
from ..tools.base import RolloutContext, ToolCall, enter_rollout
from ..tools.toolbox import ToolLimits, Toolset
from .config import RolloutConfig
from .conversation import Conversation
from .dialects.dialect import Turn
from .provenance import derive_seed


class Scorer(Protocol):
    """Whatever values token sequences by the state after their last token, such as [`ValueModel`]."""

    def score(self, sequences: list[list[int]]) -> list[float]: ...


@dataclass(frozen=True)
class _Call:
    """An assistant turn whose observation the policy went on to read: tokens `[start, end)`, observation to `stop`."""

    turn: Turn
    start: int
    end: int
    stop: int


def observation_margins(
    trajectories: Dataset,
    value_model: Scorer,
    tools: Sequence[Any],
    k: int = 8,
    *,
    processing_class: Any,
    config: RolloutConfig | None = None,
    seed: int = 0,
) -> Dataset:
    r"""
    Write the `margin` column: by how much luckier a trajectory's tools were than was to be expected.

    With tools (or users) whose answers are not certain, a trajectory's log-ratios fall short of its reward by
    $C = \sum_h [V(s_{h+1}) - E_o V(s_{h+1})]$ (M-DPO, https://huggingface.co/papers/2409.02392, eq. 11), and M-DPO
    without it converges to another policy. The margin $C(\text{chosen}) - C(\text{rejected})$ inside the sigmoid
    mends that. Unpaired rows get $C$ itself, which [`GroupRegressionTrainer`] takes from what the trajectory earned.
    $E_o$ is the mean over `k` repetitions of the trajectory's own tool calls. The estimate's noise falls with
    $\sqrt{k}$ and does harm of its own: see `tests/test_tabular_optimum.py` for sizes.

    Each repetition runs all calls of a trajectory in order in fresh sessions, so a session holds what the calls before
    it leave behind; a tool that draws random numbers from `current_rollout().seed` gets another seed. Where all
    repetitions give the recorded answer the term is exactly 0, and no value is computed.

    Args:
        trajectories (`Dataset`): preference rows with `prompt_ids`, `chosen_ids`, `chosen_action_mask`,
            `rejected_ids`, `rejected_action_mask`; or unpaired ones with `prompt_ids`, `completion_ids`,
            `action_mask`.
        value_model: values prefixes in the units of the reward (that the preferences stand for), learned at the β of
            the policy's training; anything with `score(sequences) -> list[float]`.
        tools (`list`): the tools that the trajectories called.
        k (`int`, *optional*, defaults to `8`): repetitions.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer that wrote the rows.
        config ([`RolloutConfig`], *optional*): of the rollouts that wrote the rows: dialect, template, tool limits.
        seed (`int`, *optional*, defaults to 0): of the repetitions.

    Returns:
        `Dataset`: the rows with `margin` (float, in units of reward), which M-DPO adds inside σ and group regression
        takes from the returns.

    Raises:
        `ValueError`: if columns are missing or `k` is not positive.
        [`ToolFailure`]: if the machine failed, also when tried again.
    """
    sides = [("chosen_ids", "chosen_action_mask"), ("rejected_ids", "rejected_action_mask")]
    if "completion_ids" in trajectories.column_names:
        sides = [("completion_ids", "action_mask")]
    missing = {"prompt_ids", *(name for side in sides for name in side)} - set(trajectories.column_names)
    if missing:
        raise ValueError(
            f"The rows lack {sorted(missing)}, so it is unknown what the policy sampled and what the tools answered. "
            "Pass token rows, as `build_preference_dataset` and `build_unpaired_dataset` write them."
        )
    branching = [name for name in ("chosen_branches", "rejected_branches") if name in trajectories.column_names]
    if any(any(start for start, _ in row or ()) for name in branching for row in trajectories[name]):
        raise ValueError(
            "Some trajectories are more than one token sequence: what the policy would have read after another answer "
            "depends on the whole conversation, which token rows do not hold. Estimate margins for plain rows only "
            "(`earlier_turns='as_sampled'` rolls such out)."
        )
    if k < 1:
        raise ValueError(f"`k={k}` repetitions give no expectation. Use at least 1.")
    config = RolloutConfig.of(config)
    toolset = Toolset(tools)
    replay = _Replay(Conversation(config, processing_class, toolset.schemas()), toolset, config, k, seed)
    # A trajectory that is in several rows is repeated once
    keys: dict[tuple, int] = {}
    unique: list[tuple[list[int], list[int], list[int]]] = []
    for row in trajectories:
        for ids, mask in sides:
            key = (*row["prompt_ids"], -1, *row[ids])
            if key not in keys:
                keys[key] = len(unique)
                unique.append((row["prompt_ids"], row[ids], row[mask]))
    surprises = _surprises(run_coroutine(replay.all(unique)), value_model, k)
    margins = []
    for row in trajectories:
        first, *second = (surprises[keys[(*row["prompt_ids"], -1, *row[ids])]] for ids, _ in sides)
        margins.append(first - sum(second))
    if "margin" in trajectories.column_names:
        trajectories = trajectories.remove_columns("margin")
    return trajectories.add_column("margin", margins)


class _Replay:
    """Runs the tool calls of recorded trajectories again."""

    def __init__(self, conversation: Conversation, toolset: Toolset, config: RolloutConfig, k: int, seed: int):
        self.conversation, self.toolset, self.config, self.k, self.seed = conversation, toolset, config, k, seed

    async def all(
        self, trajectories: list[tuple[list[int], list[int], list[int]]]
    ) -> list[list[tuple[list[int], list[list[int]]]]]:
        """For each trajectory and call: the state's tokens after the recorded answer, and after each repeated one."""
        limits = ToolLimits(
            self.config.tool_timeout_seconds, self.config.tool_retries, self.config.max_concurrent_tools
        )
        return await asyncio.gather(*(self._trajectory(i, *t, limits) for i, t in enumerate(trajectories)))

    async def _trajectory(
        self, index: int, prompt_ids: list[int], ids: list[int], mask: list[int], limits: ToolLimits
    ) -> list[tuple[list[int], list[list[int]]]]:
        calls = self._calls(prompt_ids, ids, mask)
        if not calls:
            return []
        draws = await asyncio.gather(*(self._draw(index, draw, calls, limits) for draw in range(self.k)))
        states = []
        for position, call in enumerate(calls):
            before = prompt_ids + ids[: call.end] + self.conversation.template.close_turn(ids[call.start : call.end])
            repeated = [before + draw[position] for draw in draws]
            states.append((prompt_ids + ids[: call.stop], repeated))
        return states

    def _calls(self, prompt_ids: list[int], ids: list[int], mask: list[int]) -> list[_Call]:
        borders = [t for t in range(len(mask) + 1) if bool(t < len(mask) and mask[t]) != bool(t > 0 and mask[t - 1])]
        turns = list(zip(borders[::2], borders[1::2], strict=True))
        calls = []
        for (start, end), (stop, _) in zip(turns, turns[1:], strict=False):
            sampled = Generation(ids[start:end], [0.0] * (end - start), "stop")
            turn = self.conversation.read(sampled, prompt_ids + ids[:start])
            if turn.calls:  # what a user said cannot be asked again, and the answer to a malformed call is certain
                calls.append(_Call(turn, start, end, stop))
        return calls

    async def _draw(self, index: int, draw: int, calls: list[_Call], limits: ToolLimits) -> list[list[int]]:
        seed = derive_seed(self.seed, "margin", index, draw)
        enter_rollout(RolloutContext(f"margin/{index}/{draw}", 0, "recorded", index, draw, seed, {}))
        toolbox = self.toolset.open({}, limits)
        try:
            observations = []
            for call in calls:
                results = await toolbox.call(_copied(call.turn.calls))
                messages = self.conversation.dialect.observe(call.turn, results)
                observations.append(self.conversation.observation_ids(call.turn, messages))
            return observations
        finally:
            await toolbox.close()


def _copied(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """A tool may change its arguments; the next repetition must find them as the policy wrote them."""
    return [ToolCall(c.name, dict(c.arguments) if isinstance(c.arguments, dict) else c.arguments, c.id) for c in calls]


def _surprises(states: list[list[tuple[list[int], list[list[int]]]]], value_model: Scorer, k: int) -> list[float]:
    """C of each trajectory; each distinct state is valued once, and only where the answers differ."""
    uncertain = [
        [(recorded, drawn) for recorded, drawn in calls if any(state != recorded for state in drawn)]
        for calls in states
    ]
    distinct = {tuple(ids) for calls in uncertain for recorded, drawn in calls for ids in (recorded, *drawn)}
    ordered = sorted(distinct)
    values = dict(zip(ordered, value_model.score([list(ids) for ids in ordered]) if ordered else [], strict=True))
    return [
        sum(values[tuple(recorded)] - sum(values[tuple(ids)] for ids in drawn) / k for recorded, drawn in calls)
        for calls in uncertain
    ]
