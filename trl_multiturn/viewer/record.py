"""What the viewer shows: one record per trajectory or side of a row, pairs of them, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..online.report import IterationReport
from ..trajectory import Trajectory, Verdict
from ..verify.answers import final_answer


Message = dict[str, Any]

# Layers of numbers per token; each is aligned with `completion_ids`
LAYERS = {
    "logps": "log π, sampler",
    "ref_logps": "log π_ref",
    "trainer_logps": "log π, trainer",
    "policy_logps": "log π, --model",
    "values": "value",
    "rewards": "reward",
}


@dataclass
class Record:
    """
    One trajectory, as far as it is known.

    Attributes:
        id (`str`): unique in its source, and the same whenever the same source is read: deep links hold it.
        prompt, completion (`list[dict]`): messages; empty where only tokens are known.
        prompt_ids, completion_ids, action_mask (`list[int]`): tokens; empty where only messages are known.
        branches (`list[list[int]]`): where the tokens are more than one sequence (see `trl_multiturn.segments`).
        layers (`dict[str, Sequence[float]]`): numbers per completion token, by a name of `LAYERS`.
        split (`str`): `"rollout"`, `"evaluation"`, `"row"`.
        iteration (`int`, *optional*): of a rollout, from 1; of an evaluation, iterations trained before it.
        policy (`str`): label of the policy that sampled, or side of the row.
        prompt_key (`str`): equal for trajectories of the same prompt, in whatever iteration.
        fate (`str`): what training made of it: `"row"`, `"dropped: duplicate"`, …
        kept (`int`, *optional*): completion tokens that training kept, where it cut the row.
        info (`dict`): whatever else is known.
    """

    id: str
    prompt: list[Message] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)
    branches: list[list[int]] = field(default_factory=list)
    layers: dict[str, Sequence[float]] = field(default_factory=dict)
    split: str = "row"
    iteration: int | None = None
    policy: str = ""
    prompt_key: str = ""
    prompt_index: int | None = None
    sample: int | None = None
    verdict: str = Verdict.UNDECIDED.value
    reward: float | None = None
    stop_reason: str = ""
    fate: str = ""
    kept: int | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str | None:
        """The last boxed answer of the last turn."""
        return final_answer([message for message in self.completion if "role" in message])

    @property
    def num_turns(self) -> int:
        """Assistant turns, by messages or, where there are none, by the mask."""
        if self.completion:
            return sum(message.get("role") == "assistant" for message in self.completion)
        return len(turn_spans(self.action_mask))

    @classmethod
    def of(cls, trajectory: Trajectory, number: int, split: str = "rollout", **known: Any) -> Record:
        """A trajectory, which is the `number`-th of its source."""
        info = trajectory.info
        iteration = info.get("iteration")
        record = cls(
            id=info.get("trajectory_id", str(number)),
            prompt=trajectory.prompt,
            completion=trajectory.completion,
            prompt_ids=trajectory.prompt_ids,
            completion_ids=trajectory.completion_ids,
            action_mask=trajectory.action_mask,
            branches=trajectory.branches,
            layers={} if trajectory.logps is None else {"logps": trajectory.logps},
            split=split,
            iteration=None if iteration is None else iteration + 1,
            policy=info.get("policy", ""),
            prompt_key=prompt_key(trajectory.prompt, info.get("prompt_fingerprint", "")),
            prompt_index=info.get("prompt_index"),
            sample=info.get("sample_index"),
            verdict=trajectory.verdict.value,
            reward=trajectory.reward,
            stop_reason=trajectory.stop_reason.value,
            info=info,
        )
        rewards = token_rewards(
            trajectory.action_mask, trajectory.reward, info.get("turn_rewards"), info.get("process_rewards")
        )
        if rewards is not None:
            record.layers["rewards"] = rewards
        for name, value in known.items():
            setattr(record, name, value)
        return record


@dataclass
class PairRecord:
    """
    Two records that make a preference row.

    Attributes:
        chosen, rejected (`str`): ids of the records.
        prompt_tokens (`int`, *optional*): tokens of the pair's prompt, to which the turns belong that both share
            (`strategy="step"`).
        trained (`bool`): whether the row reached training.
        ref_chosen_logps, ref_rejected_logps (`float`, *optional*): the reference's, summed over a side.
    """

    chosen: str
    rejected: str
    iteration: int | None = None
    prompt_tokens: int | None = None
    trained: bool = True
    margin: float | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None


@dataclass
class Source:
    """
    Something to look at.

    Attributes:
        title (`str`): for the page.
        kind (`str`): `"run"`, `"trajectories"` or `"rows"`.
        read (`Callable[[], Iterator[Record]]`): reads the records from the start, one at a time.
        pairs (`list[PairRecord]`): pairs of the records.
        iterations (`list[IterationReport]`): of a run; complete once the records were read.
        start (`dict[str, float]`, *optional*): the evaluation before the first iteration.
        log (`list[dict]`): what the trainer logged.
        metrics (`dict[str, float]`): of an evaluation.
        tokenizer: reads token ids as text; `None` where there is none.
        notes (`list[str]`): what the reader of the page should know, such as what could not be read.
    """

    title: str
    kind: str
    read: Callable[[], Iterator[Record]]
    pairs: list[PairRecord] = field(default_factory=list)
    iterations: list[IterationReport] = field(default_factory=list)
    start: dict[str, float] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)


def turn_spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open spans of the tokens that the policy sampled, one per turn."""
    edges = np.flatnonzero(np.diff(np.asarray(mask, bool), prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def prompt_key(prompt: list[Message], fingerprint: str = "") -> str:
    """What tells a prompt from another: the messages, and the row behind them where that is known."""
    return fingerprint or json.dumps(prompt, sort_keys=True, default=str)


def token_rewards(
    mask: Sequence[int],
    reward: float | None,
    turn_rewards: Sequence[float] | None = None,
    process_rewards: Sequence[tuple[int, float]] | None = None,
) -> list[float] | None:
    """What is paid at each completion token, as OREO and DQO read it; `None` where nothing is known.

    Args:
        mask (`Sequence[int]`):
            1 on sampled tokens.
        reward (`float`, *optional*):
            Paid at the last sampled token.
        turn_rewards (`Sequence[float]`, *optional*):
            One per turn, paid at its last token.
        process_rewards (`Sequence[tuple[int, float]]`, *optional*):
            Pairs of a position and what is paid there.
    """
    ends = [stop - 1 for _, stop in turn_spans(mask)]
    if not ends or (reward is None and not turn_rewards and not process_rewards):
        return None
    rewards = [0.0] * len(mask)
    for position, paid in (*(process_rewards or ()), *zip(ends, turn_rewards or (), strict=False)):
        rewards[int(position)] += paid
    rewards[ends[-1]] += reward or 0.0
    return rewards
