"""Rewards for the steps of a trajectory, from how often the policy reaches a correct answer from there.

The estimates need completions of a trajectory's prefixes, which `rollout.prefix_completion` samples; here is the
arithmetic. A completion without a verdict says nothing about the step and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..steps import StepDelimiter, step_ids
from ..trajectory import Trajectory, Verdict


@dataclass(frozen=True)
class Segment:
    """A step of the policy: the sampled tokens `[start, stop)` of `completion_ids`, in assistant turn `turn`."""

    start: int
    stop: int
    turn: int


def segments(trajectory: Trajectory, delimiter: StepDelimiter = "turn", tokenizer: Any = None) -> list[Segment]:
    """The steps of a trajectory; observations belong to none.

    Args:
        trajectory ([`Trajectory`]):
            Whatever was rolled out.
        delimiter (`str`, *optional*, defaults to `"turn"`):
            Where steps end beside the ends of turns: `"turn"` (nowhere), `"line"` or `"sentence"`, as in OREO.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Reads lines and sentences; turns are read from the mask.
    """
    if tokenizer is None and delimiter != "turn":
        raise ValueError(f"`delimiter={delimiter!r}` is read from text, so it needs a `tokenizer`. Pass the policy's.")
    ids, mask = trajectory.completion_ids, trajectory.action_mask
    numbers = step_ids(tokenizer, ids, mask, delimiter)
    turns = list(trajectory.turn_spans())
    found, turn = [], 0
    for (sampled, _), group in groupby(range(len(ids)), key=lambda t: (bool(mask[t]), numbers[t])):
        positions = list(group)
        if sampled:
            while positions[0] >= turns[turn][1]:
                turn += 1
            found.append(Segment(positions[0], positions[-1] + 1, turn))
    return found


def soft_reward(verdicts: Iterable[Verdict]) -> float | None:
    r"""
    The share of correct completions, $r(s_h, a_h) = \frac{1}{N}\sum_j 1(a_H^j = \text{gold})$ (M-DPO,
    https://huggingface.co/papers/2409.02392, eq. 2); `None` where no completion is decided.
    """
    decided = [verdict is Verdict.CORRECT for verdict in verdicts if verdict is not Verdict.UNDECIDED]
    return sum(decided) / len(decided) if decided else None


def hard_reward(verdicts: Iterable[Verdict]) -> float | None:
    """1.0 if some completion is correct, else 0.0 (M-DPO, eq. 3); `None` where no completion is decided."""
    share = soft_reward(verdicts)
    return None if share is None else float(share > 0)


def longest_good_prefix(hard_rewards: Sequence[float | None]) -> int:
    """How many steps the longest prefix has from which a correct answer was reached; 0 without any.

    Args:
        hard_rewards (`Sequence[float | None]`):
            [`hard_reward`] after each step, in order. A step without a verdict counts for nothing.
    """
    return max((count for count, reward in enumerate(hard_rewards, start=1) if reward), default=0)


def prefix_rewards(num_steps: int, num_good: int) -> list[float]:
    """`1 / num_steps` for each of the first `num_good` steps, 0 for the others.

    DQO's process rewards (https://huggingface.co/papers/2410.09302, section 4.4): `num_good` is that of
    [`longest_good_prefix`] for a failed answer, and `num_steps` for a correct one. They are added to the outcome.

    ```python
    >>> prefix_rewards(4, 3)
    [0.25, 0.25, 0.25, 0.0]
    ```
    """
    if not 0 <= num_good <= num_steps:
        raise ValueError(f"{num_good} of {num_steps} steps cannot be good. Pass a count within the trajectory.")
    return [1 / num_steps if step < num_good else 0.0 for step in range(num_steps)]


def turn_totals(steps: Sequence[Segment], rewards: Sequence[float]) -> list[float]:
    """The sum of its steps' rewards for every assistant turn: the `turn_rewards` of a row."""
    totals = [0.0] * (steps[-1].turn + 1 if steps else 0)
    for step, reward in zip(steps, rewards, strict=True):
        totals[step.turn] += reward
    return totals


def min_utility(step_rewards: Iterable[float]) -> float:
    """The utility of a trajectory whose steps have these rewards: the least of them (M-DPO, example 3)."""
    rewards = list(step_rewards)
    if not rewards:
        raise ValueError("The trajectory has no step, so no utility. Leave out what the policy did not sample.")
    return min(rewards)
