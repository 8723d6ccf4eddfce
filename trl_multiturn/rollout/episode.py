"""One trajectory: turn, tool, turn, tool, answer. Ids are appended as they are sampled and never tokenised again."""

from __future__ import annotations

import copy
import json
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from ..engines.engine import Engine, Generation
from ..sandbox.result import ToolFailure, ToolResult
from ..templates import TurnTemplate
from ..tools.base import RolloutContext, ToolCall, enter_rollout
from ..tools.environments import append_observation
from ..tools.toolbox import Toolbox
from ..trajectory import StopReason, Trajectory
from .config import RolloutConfig
from .dialects.choice import choose_dialect
from .dialects.dialect import Message, Turn
from .provenance import derive_seed


class Conversation:
    """What all trajectories with the same tools share: the template, the dialect, the ids that end a turn.

    Args:
        config ([`RolloutConfig`]):
            Dialect and template options.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        schemas (`list[dict]`):
            JSON schemas of the tools.

    Raises:
        `ValueError`: if tools, dialect and chat template do not fit together.
    """

    def __init__(self, config: RolloutConfig, processing_class: Any, schemas: Sequence[dict[str, Any]]):
        self.dialect = choose_dialect(config.dialect, processing_class, schemas, config)
        kwargs = config.chat_template_kwargs or {}
        self.template = TurnTemplate(processing_class, tools=self.dialect.template_tools, **kwargs)
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        eos = self._tokenizer.eos_token_id
        self.stop_token_ids = tuple(dict.fromkeys([*self.template.end_of_turn_ids, *([] if eos is None else [eos])]))
        self.stop_strings = tuple(dict.fromkeys([*self.dialect.stop_strings, *config.stop_strings]))
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        # The samples of a prompt begin one after another, and most turns look alike to the template
        self._prompt_ids = lru_cache(maxsize=64)(self._render_prompt)
        self._after_turn = lru_cache(maxsize=64)(self._render_turn)
        # A template that cannot answer a turn is the user's mistake, to be told before the first trajectory
        self.observation_ids(*self._probe())

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a prompt, the generation prompt included."""
        return list(self._prompt_ids(json.dumps(messages)))

    def read(self, generation: Generation, prefix_ids: list[int]) -> Turn:
        """Reads a turn that was sampled after `prefix_ids`, which reach back to the generation prompt at least."""
        ids = generation.token_ids
        return self.dialect.read(self.text(ids), ids, prefix_ids)

    def within_turn(self, generation: Generation) -> Generation:
        """A generation up to where its dialect ends the turn: without what the policy wrote after that.

        The turn is then what a policy would have written that was stopped there. Most dialects end no turn by
        themselves.
        """
        ids, turn_end = generation.token_ids, getattr(self.dialect, "turn_end", None)
        text = self.text(ids) if turn_end is not None else ""
        end = turn_end(text) if turn_end is not None else None
        if end is None or not text[end:].strip():
            return generation
        kept = bisect_left(range(len(ids)), end, key=lambda count: len(self.text(ids[:count])))
        return Generation(ids[:kept], generation.logps[:kept], "stop_string")

    def longest_text(self, config: RolloutConfig) -> int:
        """How many characters fit into a trajectory at most: no token stands for more than its own text."""
        return config.max_trajectory_tokens * self._longest_token

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The text of a sampled turn, without the token that ended it."""
        return self._tokenizer.decode(
            self.without_end(sampled_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def without_end(self, sampled_ids: Sequence[int]) -> list[int]:
        """A turn's ids without the token that ended it, where one did."""
        ended = bool(sampled_ids) and sampled_ids[-1] in self.stop_token_ids
        return list(sampled_ids[:-1] if ended else sampled_ids)

    def observation_ids(self, turn: Turn, observations: list[Message]) -> list[int]:
        """Ids from a turn's end to the end of the next generation prompt.

        They are measured behind a stand-in for the turn with the same calls: what a policy wrote, however odd, cannot
        break the rendering, and the cost does not grow with the conversation. Templates that print one call per turn
        are given one, as in [`~trl.GRPOTrainer`].

        Raises:
            `ValueError`: if the template cannot render these observations.
        """
        calls = [_without_arguments(call) for call in turn.message.get("tool_calls") or []]
        if len(calls) > 1:
            try:
                return self._observation_ids(calls, observations)
            except ValueError:
                calls = calls[:1]
        return self._observation_ids(calls, observations)

    def _observation_ids(self, calls: list[dict[str, Any]], observations: list[Message]) -> list[int]:
        skeleton: Message = {"role": "assistant", "content": "turn"}
        if calls:
            skeleton = {**skeleton, "content": "", "tool_calls": calls}
        return self._after_turn(json.dumps(skeleton))(observations)

    def _render_prompt(self, messages: str) -> list[int]:
        return self.template.prompt_ids(json.loads(messages))

    def _render_turn(self, skeleton: str) -> Callable[[list[Message]], list[int]]:
        return self.template.after_turn([{"role": "user", "content": "prompt"}, json.loads(skeleton)])

    def _probe(self) -> tuple[Turn, list[Message]]:
        if self.dialect.template_tools:
            name = self.dialect.template_tools[0]["function"]["name"]
            call = {"type": "function", "function": {"name": name, "arguments": {}}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            turn = Turn(message, [ToolCall(name, {})], answered=False)
            return turn, self.dialect.observe(turn, [ToolResult("result")])
        turn = Turn({"role": "assistant", "content": "turn"}, [], answered=False, problem="result")
        return turn, self.dialect.observe(turn, [])


def _without_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": {}}}
    return {**call, "arguments": {}}


@dataclass
class Transcript:
    """A trajectory as it grows; `turns` are those that were answered, each with the messages that answered it."""

    prompt: list[Message]
    prompt_ids: list[int] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turns: list[tuple[Turn, list[Message]]] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    result_turns: list[int] = field(default_factory=list)  # the assistant turn of each result, from 0
    sampling_seconds: list[float] = field(default_factory=list)  # of each turn, where it was sampled in one piece
    malformed: int = 0
    final_observation: str | None = None
    unrenderable: str | None = None
    replays_differ: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def ids(self) -> list[int]:
        """All that the policy reads before the next token."""
        return self.prompt_ids + self.completion_ids

    @property
    def last_read(self) -> list[int]:
        """What the policy has read since it last sampled: the last observation and the generation prompt, at first
        the whole prompt."""
        start = len(self.action_mask)
        while start and not self.action_mask[start - 1]:
            start -= 1
        return self.completion_ids[start:] if start else self.ids

    def fork(self) -> Transcript:
        """A copy that grows on its own."""
        lists = {f.name: list(v) for f in fields(self) if isinstance(v := getattr(self, f.name), list)}
        return replace(self, **lists)

    def add_sampled(self, generation: Generation) -> None:
        """Appends what the policy sampled."""
        self.completion_ids += generation.token_ids
        self.action_mask += [1] * len(generation.token_ids)
        self.logps += generation.logps

    def add_context(self, ids: list[int]) -> None:
        """Appends what the policy read."""
        self.completion_ids += ids
        self.action_mask += [0] * len(ids)
        self.logps += [0.0] * len(ids)

    def counts(self) -> dict[str, Any]:
        """How the tools fared, for `Trajectory.info`."""
        return {
            "turns": sum(message["role"] == "assistant" for message in self.completion),
            "tool_calls": len(self.results),
            "tool_errors": sum(not result.ok for result in self.results),
            "tool_statuses": [result.status for result in self.results],
            "tool_turns": self.result_turns,
            "malformed_calls": self.malformed,
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


@dataclass(frozen=True)
class Opening:
    """What a trajectory begins with instead of sampling it: answered turns, and tokens of the turn after them."""

    transcript: Transcript
    started: Generation


async def replay(transcript: Transcript, toolbox: Toolbox, conversation: Conversation) -> int:
    """Runs again, in a new toolbox, the calls of a transcript's turns that leave something behind.

    Sessions and the environment are then as the transcript left them, if the calls are deterministic. Plain functions
    keep nothing for a trajectory and are not called.

    Returns:
        `int`: how many turns were answered otherwise than recorded. The transcript keeps what was recorded.

    Raises:
        [`ToolFailure`]: if the machine failed.
    """
    differing = 0
    for turn, observations in transcript.turns:
        calls = [copy.deepcopy(call) for call in turn.calls if toolbox.keeps_state(call.name)]
        results = await toolbox.call(calls)
        if calls and len(calls) == len(turn.calls):
            differing += conversation.dialect.observe(turn, results) != observations
    return differing


async def play_episode(
    prompt: list[Message],
    context: RolloutContext,
    toolbox: Toolbox,
    conversation: Conversation,
    engine: Engine,
    config: RolloutConfig,
    opening: Opening | None = None,
) -> Trajectory:
    """Rolls out one trajectory; only a user's mistake, or the engine's error, raises.

    Args:
        prompt (`list[dict]`):
            Messages before the first sampled token.
        context ([`RolloutContext`]):
            The trajectory's name, place and seed; tools can read it.
        toolbox ([`Toolbox`]):
            Its tools; closed at the end.
        conversation ([`Conversation`]):
            Template and dialect.
        engine ([`Engine`]):
            Samples the turns.
        config ([`RolloutConfig`]):
            Limits and sampling.
        opening ([`Opening`], *optional*):
            Recorded turns to go on from; their calls are run again first.
    """
    enter_rollout(context)
    start = time.monotonic()
    transcript = Transcript(prompt) if opening is None else opening.transcript.fork()
    failure, reward = None, None
    try:
        observation = await toolbox.reset()
        if opening is None:
            transcript.prompt = append_observation(prompt, observation)
            transcript.prompt_ids = conversation.prompt_ids(transcript.prompt)
            refuse_long_prompt(len(transcript), context.prompt_index, config)
        else:
            transcript.replays_differ = await replay(transcript, toolbox, conversation)
        started = None if opening is None else opening.started
        stop_reason = await _converse(transcript, context, toolbox, conversation, engine, config, started)
        reward = await toolbox.reward()
    except ToolFailure as error:
        stop_reason, failure = StopReason.TOOL_FAILED, str(error)
        if not transcript.prompt_ids:  # the environment never started
            transcript.prompt_ids = conversation.prompt_ids(transcript.prompt)
    finally:
        engine.release(context.trajectory_id)
        await toolbox.close()
    return finish_trajectory(transcript, context, stop_reason, time.monotonic() - start, failure, reward)


def finish_trajectory(
    transcript: Transcript,
    context: RolloutContext,
    stop_reason: StopReason,
    seconds: float,
    failure: str | None = None,
    reward: float | None = None,
) -> Trajectory:
    """The trajectory that a transcript has become, with how it went in `info`."""
    info: dict[str, Any] = {"trajectory_id": context.trajectory_id, "seed": context.seed, **transcript.counts()}
    if failure is not None:
        info["tool_failure"] = failure
    if reward is not None:
        info["environment_reward"] = reward
    for name in ("final_observation", "unrenderable", "replays_differ"):
        if getattr(transcript, name) is not None:
            info[name] = getattr(transcript, name)
    info["timing"] = transcript.timing(seconds)
    return Trajectory(
        prompt=transcript.prompt,
        completion=transcript.completion,
        prompt_ids=transcript.prompt_ids,
        completion_ids=transcript.completion_ids,
        action_mask=transcript.action_mask,
        logps=transcript.logps,
        stop_reason=stop_reason,
        info=info,
    )


def refuse_long_prompt(length: int, prompt_index: int, config: RolloutConfig) -> None:
    """Raises `ValueError` where a prompt of `length` tokens leaves no room for a turn."""
    if length >= config.max_trajectory_tokens:
        raise ValueError(
            f"Row {prompt_index}: the prompt has {length} tokens, which leaves no room for a turn within "
            f"`max_trajectory_tokens={config.max_trajectory_tokens}`. Raise it or drop the row."
        )


async def _converse(
    transcript: Transcript,
    context: RolloutContext,
    toolbox: Toolbox,
    conversation: Conversation,
    engine: Engine,
    config: RolloutConfig,
    started: Generation | None,
) -> StopReason:
    for number in range(len(transcript.turns), config.max_tool_calling_iterations + 1):
        begun = started if started is not None else Generation([], [], "stop")
        started = None
        room = turn_room(transcript, begun, config)
        sampling = config.sampling(
            room,
            context.sample_index,
            stop_token_ids=conversation.stop_token_ids,
            stop_strings=conversation.stop_strings,
            seed=derive_seed(context.seed, number),
        )
        prefix_ids, start = transcript.ids + begun.token_ids, time.monotonic()
        generation = await engine.generate(prefix_ids, sampling, session=context.trajectory_id)
        transcript.sampling_seconds.append(time.monotonic() - start)
        generation = conversation.within_turn(joined(begun, generation))
        turn, stop_reason = end_turn(generation, transcript, conversation, config)
        if stop_reason is None:
            stop_reason = await answer_turn(turn, generation, transcript, toolbox, conversation, config)
        if stop_reason is not None:
            return stop_reason
    raise AssertionError("unreachable: the last round returns")


def turn_room(transcript: Transcript, begun: Generation, config: RolloutConfig) -> int:
    """How many tokens may still be sampled in a turn of which `begun` stands already."""
    left = min(config.max_turn_tokens, config.max_trajectory_tokens - len(transcript))
    return left - len(begun.token_ids)


def joined(first: Generation, second: Generation) -> Generation:
    """One turn that was sampled in two pieces."""
    return Generation(first.token_ids + second.token_ids, first.logps + second.logps, second.finish_reason)


def end_turn(
    generation: Generation, transcript: Transcript, conversation: Conversation, config: RolloutConfig
) -> tuple[Turn, StopReason | None]:
    """Reads a sampled turn and appends it; why the trajectory stops there, `None` where its calls are to be run."""
    turn = conversation.read(generation, transcript.last_read)
    transcript.add_sampled(generation)
    transcript.completion.append(turn.message)
    transcript.malformed += turn.problem is not None
    return turn, _after_turn(turn, generation, len(transcript.turns), config)


async def answer_turn(
    turn: Turn,
    generation: Generation,
    transcript: Transcript,
    toolbox: Toolbox,
    conversation: Conversation,
    config: RolloutConfig,
) -> StopReason | None:
    """Runs the calls of the last turn and appends the answers; why the trajectory stops there, if it does.

    Raises:
        [`ToolFailure`]: if the machine failed.
    """
    results = await toolbox.call(turn.calls)
    transcript.results += results
    transcript.result_turns += [len(transcript.turns)] * len(results)
    observations = conversation.dialect.observe(turn, results)
    if toolbox.done:
        transcript.final_observation = "\n".join(result.output for result in results)
        return StopReason.ANSWERED
    # A tool may answer with megabytes: what cannot fit is not tokenized, which would hold up all trajectories
    if max((len(result.output) for result in results), default=0) > conversation.longest_text(config):
        return StopReason.MAX_TOKENS
    try:
        context_ids = conversation.observation_ids(turn, observations)
    except ValueError as error:  # the policy's doing: the template did render an ordinary call's answer
        transcript.unrenderable = str(error)
        return StopReason.ENDED
    context_ids = conversation.template.close_turn(generation.token_ids) + context_ids
    if len(transcript) + len(context_ids) >= config.max_trajectory_tokens:
        return StopReason.MAX_TOKENS  # no room for another turn: the observation would be read by nobody
    transcript.add_context(context_ids)
    transcript.completion += observations
    transcript.turns.append((turn, observations))
    return None


def _after_turn(turn: Turn, generation: Generation, number: int, config: RolloutConfig) -> StopReason | None:
    """Why the trajectory stops after this turn; `None` where its calls are to be run."""
    if generation.finish_reason == "length":
        return StopReason.MAX_TOKENS
    if turn.answered:
        return StopReason.ANSWERED
    if not turn.calls and (turn.problem is None or config.malformed_calls == "end"):
        return StopReason.ENDED
    if number == config.max_tool_calling_iterations:
        return StopReason.MAX_TURNS
    return None
