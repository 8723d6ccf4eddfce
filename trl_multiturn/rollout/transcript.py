"""A trajectory as it grows. Ids are appended as they are sampled, and never tokenized again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from ..engines.engine import Generation
from ..messages.images import images_in
from ..sandbox.result import ToolResult
from ..segments import find_parent, path
from ..tools.base import RolloutContext
from ..trajectory import StopReason, Trajectory
from .config import RolloutConfig
from .dialects.dialect import Message, Turn


@dataclass
class Transcript:
    """A trajectory as it grows, by one piece of a turn, one turn or one answer at a time.

    Attributes:
        prompt (`list[dict]`), prompt_ids (`list[int]`): what the policy reads before it first samples.
        completion (`list[dict]`), completion_ids (`list[int]`), action_mask (`list[int]`), logps (`list[float]`):
            what follows, as in [`Trajectory`].
        branches (`list[list[int]]`): as in [`Trajectory`].
        read_instead (`list[dict]`, *optional*), read_from (`int`): what the policy reads instead of the prompt and the
            first `read_from` messages of the completion, where the user's function said so.
        begun ([`Generation`]): what is sampled of a turn that has not been read yet.
        unanswered ([`Turn`], *optional*), unanswered_ids (`list[int]`): the last turn with its ids, until its answer.
        turns (`list[tuple[Turn, list[dict]]]`): the turns that were answered, each with the messages that answer it.
        results (`list[ToolResult]`), result_turns (`list[int]`): of all calls, each with its assistant turn, from 0.
        sampling_seconds (`list[float]`): of each turn, where it was sampled in one piece.
        malformed (`int`): turns with a call that could not be read.
        final_observation (`str`, *optional*): what the environment said last; no token holds it.
        unrenderable (`str`, *optional*): why the chat template could not render the answer of the last turn.
        replays_differ (`int`, *optional*): turns whose tools answered otherwise when they were run again.
    """

    prompt: list[Message]
    prompt_ids: list[int] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    branches: list[list[int]] = field(default_factory=list)
    read_instead: list[Message] | None = None
    read_from: int = 0
    begun: Generation = field(default_factory=lambda: Generation([], [], "stop"))
    unanswered: Turn | None = None
    unanswered_ids: list[int] = field(default_factory=list)
    turns: list[tuple[Turn, list[Message]]] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    result_turns: list[int] = field(default_factory=list)
    sampling_seconds: list[float] = field(default_factory=list)
    malformed: int = 0
    final_observation: str | None = None
    unrenderable: str | None = None
    replays_differ: int | None = None

    def __len__(self) -> int:
        """Tokens that the policy reads, of the prompt and of the turns that were read."""
        whole = len(self.prompt_ids) + len(self.completion_ids)
        return len(path(self.branches, whole)) if self.branches else whole

    @property
    def _read_ids(self) -> list[int]:
        return self.read_before(len(self.prompt_ids) + len(self.completion_ids))

    def read_before(self, column: int) -> list[int]:
        """All that the policy had read before a token, counted over prompt and completion."""
        ids = self.prompt_ids + self.completion_ids
        return [ids[each] for each in path(self.branches, column)] if self.branches else ids[:column]

    @property
    def ids(self) -> list[int]:
        """All that the policy reads before the next token."""
        return self._read_ids + self.begun.token_ids

    @property
    def history(self) -> list[Message]:
        """The messages that the policy reads, its last turn included."""
        return (self.prompt if self.read_instead is None else self.read_instead) + self.completion[self.read_from :]

    @property
    def images(self) -> list[str]:
        """The images that the policy has seen, in order."""
        return images_in([*self.prompt, *self.completion])

    @property
    def last_read(self) -> list[int]:
        """What the policy has read since it last sampled: the last observation and the generation prompt, at first
        the whole prompt; more of it in a later segment."""
        if self.branches:
            return self._read_ids
        start = len(self.action_mask)
        while start and not self.action_mask[start - 1]:
            start -= 1
        return self.completion_ids[start:] if start else self.prompt_ids + self.completion_ids

    def room(self, config: RolloutConfig) -> int:
        """How many tokens may still be sampled in this turn."""
        left = min(config.max_turn_tokens, config.max_trajectory_tokens - len(self))
        return left - len(self.begun.token_ids)

    def fork(self) -> Transcript:
        """A copy that grows on its own."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(twin, name, list(value))
        return twin

    def add_sampled(self, piece: Generation, seconds: float | None = None) -> None:
        """Appends to the turn under way; `seconds` is the time that the piece took, if it is the whole turn."""
        begun = self.begun
        self.begun = Generation(begun.token_ids + piece.token_ids, begun.logps + piece.logps, piece.finish_reason)
        if seconds is not None:
            self.sampling_seconds.append(seconds)

    def end_turn(self, turn: Turn, config: RolloutConfig) -> StopReason | None:
        """Appends the turn under way, which was read as `turn`; why the trajectory stops there, `None` where the calls
        are to be run."""
        sampled, self.begun = self.begun, Generation([], [], "stop")
        self.unanswered, self.unanswered_ids = turn, sampled.token_ids
        self.completion_ids += sampled.token_ids
        self.action_mask += [1] * len(sampled.token_ids)
        self.logps += sampled.logps
        self.completion.append(turn.message)
        self.malformed += turn.problem is not None
        if sampled.finish_reason == "length":
            return StopReason.MAX_TOKENS
        if turn.answered:
            return StopReason.ANSWERED
        if not turn.calls and (turn.problem is None or config.malformed_calls == "end"):
            return StopReason.ENDED
        if len(self.turns) >= config.max_tool_calling_iterations:
            return StopReason.MAX_TURNS
        return None

    def add_answer(self, observations: list[Message], ids: list[int]) -> None:
        """Appends what answers the last turn: messages, and the ids up to where the policy samples again."""
        assert self.unanswered is not None
        self.turns.append((self.unanswered, observations))
        self.unanswered = None
        self.completion += observations
        self.completion_ids += ids
        self.action_mask += [0] * len(ids)
        self.logps += [0.0] * len(ids)

    def begin_segment(self, observations: list[Message], ids: list[int], messages: list[Message] | None) -> None:
        """Appends what answers the last turn where the policy reads no continuation of it.

        Args:
            observations (`list[dict]`): the answer.
            ids (`list[int]`): all that the policy reads next.
            messages (`list[dict]`, *optional*): the messages that it reads, where they are not all there are.
        """
        row = self.prompt_ids + self.completion_ids
        parent, shared = find_parent(row, self.branches, ids)
        self.branches.append([len(row), parent])
        self.add_answer(observations, ids[shared:])
        if messages is not None:
            self.read_instead, self.read_from = messages, len(self.completion)

    def counts(self) -> dict[str, Any]:
        """How the tools fared, for `Trajectory.info`."""
        return {
            "turns": sum(message["role"] == "assistant" for message in self.completion),
            "tool_calls": len(self.results),
            "tool_errors": sum(not result.ok for result in self.results),
            "tool_statuses": [result.status for result in self.results],
            "tool_turns": self.result_turns,
            "malformed_calls": self.malformed,
            **({"segments": len(self.branches) + 1} if self.branches else {}),
        }

    def timing(self, seconds: float) -> dict[str, Any]:
        """Wall-clock times for `Trajectory.info`: of the whole, of the tools, of each turn and of each call."""
        calls = [result.seconds for result in self.results]
        return {
            "seconds": seconds,
            "tool_seconds": sum(calls),
            "sampling_seconds": self.sampling_seconds,
            "call_seconds": calls,
        }

    def finish(
        self,
        context: RolloutContext,
        stop_reason: StopReason,
        seconds: float,
        failure: str | None = None,
        reward: float | None = None,
    ) -> Trajectory:
        """The trajectory that this has become, with how it went in `info`."""
        info: dict[str, Any] = {"trajectory_id": context.trajectory_id, "seed": context.seed, **self.counts()}
        if failure is not None:
            info["tool_failure"] = failure
        if reward is not None:
            info["environment_reward"] = reward
        for name in ("final_observation", "unrenderable", "replays_differ"):
            if getattr(self, name) is not None:
                info[name] = getattr(self, name)
        info["timing"] = self.timing(seconds)
        return Trajectory(
            prompt=self.prompt,
            completion=self.completion,
            prompt_ids=self.prompt_ids,
            completion_ids=self.completion_ids,
            action_mask=self.action_mask,
            logps=self.logps,
            stop_reason=stop_reason,
            info=info,
            branches=self.branches,
        )
