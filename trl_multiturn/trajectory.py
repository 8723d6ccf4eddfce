"""The value that flows through the package: one finished rollout and how it ended.

Everything else produces trajectories (`rollout`), judges them (`verify`), or turns them into rows (`data`). The module
needs only the standard library, so that a trajectory can be read, stored and tested without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from .segments import Segment, check_branches, join_segments, split_segments


class StopReason(str, Enum):
    """Why a rollout stopped."""

    ANSWERED = "answered"  # the policy gave a final answer
    MAX_TURNS = "max_turns"  # the limit on tool-calling turns was reached
    MAX_TOKENS = "max_tokens"  # a turn or the trajectory hit its token limit
    ENDED = "ended"  # the policy ended its turn with neither a tool call nor an answer
    TOOL_FAILED = "tool_failed"  # the machine's failure: never evidence about the policy


class Verdict(str, Enum):
    """What a verifier said. `UNDECIDED` (verifier timed out, machine failed) is not `INCORRECT`."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Trajectory:
    """One rollout: what the policy read, what it sampled, what the tools answered, and the verdict.

    Args:
        prompt (`list[dict]`):
            Messages before the first sampled token.
        completion (`list[dict]`):
            Messages after the prompt: assistant turns and observations (tool or user turns).
        prompt_ids (`list[int]`):
            Token ids of the prompt, generation prompt included.
        completion_ids (`list[int]`):
            Token ids after the prompt, exactly as sampled and as the tools' text was tokenized: never re-tokenized.
        action_mask (`list[int]`):
            Aligned with `completion_ids`: 1 on the tokens that the policy sampled (the end-of-turn token included), 0
            on observations and on whatever the chat template printed.
        stop_reason ([`StopReason`]):
            Why the rollout stopped.
        logps (`list[float]`, *optional*):
            Log-probabilities (nats) under the policy that sampled the tokens (the behavior policy), aligned with
            `completion_ids`, 0.0 outside the mask.
        reward (`float`, *optional*):
            Terminal reward; `None` until judged, or where no judgement was possible.
        verdict ([`Verdict`]):
            `UNDECIDED` until judged.
        info (`dict`):
            Provenance: ids, seeds, settings, counts. JSON values only.
        branches (`list[list[int]]`):
            Empty for a trajectory that is one token sequence. Otherwise where the next prompt did not continue the
            tokens so far: `[start, parent]` per further segment, columns of `prompt_ids + completion_ids` (see
            `trl_multiturn.segments`). `segments` has the sequences themselves.
    """

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    prompt_ids: list[int]
    completion_ids: list[int]
    action_mask: list[int]
    stop_reason: StopReason
    logps: list[float] | None = None
    reward: float | None = None
    verdict: Verdict = Verdict.UNDECIDED
    info: dict[str, Any] = field(default_factory=dict)
    branches: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.completion_ids)
        if len(self.action_mask) != n:
            raise ValueError(
                f"`action_mask` has {len(self.action_mask)} entries for {n} `completion_ids`, so it cannot say which "
                "tokens were sampled. Give one entry per completion token."
            )
        if self.logps is not None and len(self.logps) != n:
            raise ValueError(
                f"`logps` has {len(self.logps)} entries for {n} `completion_ids`. Give one per completion token "
                "(0.0 outside the mask), or `None`."
            )
        object.__setattr__(self, "branches", self.branches or [])  # rows of files have nulls
        if self.branches:
            check_branches(self.branches, len(self.prompt_ids), len(self.prompt_ids) + n)
        # Rows read back from JSON carry plain strings; both spellings mean the same value.
        object.__setattr__(self, "stop_reason", StopReason(self.stop_reason))
        object.__setattr__(self, "verdict", Verdict(self.verdict))

    @property
    def num_turns(self) -> int:
        """Number of assistant turns in the completion."""
        return sum(message["role"] == "assistant" for message in self.completion)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.action_mask)

    @property
    def segments(self) -> list[Segment]:
        """The token sequences that this trajectory is, in the order of time: one, unless its history was rewritten."""
        return split_segments(self.prompt_ids, self.completion_ids, self.action_mask, self.branches, self.logps)

    @property
    def provenance(self) -> dict[str, Any]:
        """`info` without wall-clock times: what is the same whenever the same command makes this trajectory."""
        return {name: value for name, value in self.info.items() if name != "timing"}

    def turn_spans(self) -> Iterator[tuple[int, int]]:
        """Half-open `(start, stop)` spans of `completion_ids` that the policy sampled, one per assistant turn."""
        start = None
        for i, bit in enumerate([*self.action_mask, 0]):
            if bit and start is None:
                start = i
            elif not bit and start is not None:
                yield start, i
                start = None

    @property
    def turn_calls(self) -> list[int]:
        """Per assistant turn (of `turn_spans`) 1 where it calls a tool, or acts in an environment, else 0.

        A rollout goes on after calls, readable or not, and after nothing else, so only the last turn may be an answer.
        """
        turns = sum(1 for _ in self.turn_spans())
        last: dict[str, Any] = next(
            (message for message in reversed(self.completion) if message.get("role") == "assistant"), {}
        )
        calls = last.get("tool_calls") or turns - 1 in self.info.get("tool_turns", ())
        return [1] * (turns - 1) + [int(bool(calls) or self.stop_reason is StopReason.MAX_TURNS)] * (turns > 0)

    def judged(self, verdict: Verdict, reward: float | None) -> Trajectory:
        """The same trajectory with a verdict and a reward."""
        return replace(self, verdict=verdict, reward=reward)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; [`Trajectory.from_dict`] reads it back unchanged."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "branches" or self.branches}
        return {**row, "stop_reason": self.stop_reason.value, "verdict": self.verdict.value}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Trajectory:
        """The inverse of [`Trajectory.to_dict`]."""
        return cls(**row)

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], **fields: Any) -> Trajectory:
        """The trajectory that is these token sequences, in the order of time.

        Args:
            segments (`Sequence[Segment]`):
                At least one. What one of them reads of those before it is kept once.
            **fields:
                `prompt`, `completion`, `stop_reason` and the other fields that hold no tokens.
        """
        row = join_segments(segments)
        start = row.prompt_length
        return cls(
            prompt_ids=row.ids[:start],
            completion_ids=row.ids[start:],
            action_mask=row.action_mask[start:],
            logps=None if any(segment.logps is None for segment in segments) else row.logps[start:],
            branches=row.branches,
            **fields,
        )
