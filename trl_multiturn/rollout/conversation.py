"""What all trajectories with the same tools share: how a turn is read, and how its answer is rendered."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ..engines.engine import Generation
from ..messages.history import resolve_rewriter, rewritten
from ..messages.images import images_in
from ..sandbox.result import ToolResult
from ..templates import TurnTemplate
from ..tools.base import ToolCall
from .config import RolloutConfig
from .dialects.choice import choose_dialect
from .dialects.dialect import EndsTurns, Message, Turn, WritesTools


# Characters of answers whose ids are kept: longer ones hardly come twice
SHORT_ANSWER = 200


class UnrenderableHistory(RuntimeError):
    """What a user's `rewrite_history` returned cannot be rendered."""


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
        # Once, as looking at a protocol costs more than reading a turn
        self._turn_end = self.dialect.turn_end if isinstance(self.dialect, EndsTurns) else None
        kwargs: Any = config.chat_template_kwargs or {}  # a dict, once the configuration has read it
        if isinstance(self.dialect, WritesTools):
            kwargs = {**kwargs, "tool_dialect": self.dialect.tool_dialect}
        self.template = TurnTemplate(processing_class, tools=self.dialect.template_tools, **kwargs)
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        eos = self._tokenizer.eos_token_id
        self.stop_token_ids = tuple(dict.fromkeys([*self.template.end_of_turn_ids, *([] if eos is None else [eos])]))
        self.stop_strings = tuple(dict.fromkeys([*self.dialect.stop_strings, *config.stop_strings]))
        # No trajectory has more characters, for no token stands for more than its own text
        vocabulary = self._tokenizer.get_vocab()
        self.most_characters = config.max_trajectory_tokens * max(map(len, vocabulary))
        self.vocab_size = 1 + max(vocabulary.values())
        # The samples of a prompt begin one after another, and most turns look alike to the template
        self._prompt_ids = lru_cache(maxsize=64)(self._render_prompt)
        self._observations_after = lru_cache(maxsize=64)(self._render_turn)
        # Interpreters answer many trajectories alike: with a number, with the same error
        self._short_answer = lru_cache(maxsize=1024)(self._render_answer)
        # A template that cannot answer a turn is the user's mistake, to be told before the first trajectory
        turn, observations = self._probe()
        self.observation_ids(turn, observations)
        self._rewrite = resolve_rewriter(config.rewrite_history)
        self._follows_template = config.earlier_turns == "rendered" and self._template_rewrites(turn, observations)

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
        if self._turn_end is None:
            return generation
        ids = generation.token_ids
        text = self.text(ids)
        end = self._turn_end(text)
        if end is None or not text[end:].strip():
            return generation
        kept = bisect_left(range(len(ids)), end, key=lambda count: len(self.text(ids[:count])))
        return Generation(ids[:kept], generation.logps[:kept], "stop_string")

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The text of a sampled turn, without the token that ended it."""
        return self._tokenizer.decode(
            self.without_end(sampled_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def without_end(self, sampled_ids: Sequence[int]) -> list[int]:
        """A turn's ids without the token that ended it, where one did."""
        ended = bool(sampled_ids) and sampled_ids[-1] in self.stop_token_ids
        return list(sampled_ids[:-1] if ended else sampled_ids)

    def answer_ids(self, turn: Turn, sampled_ids: list[int], observations: list[Message]) -> list[int]:
        """Ids between a turn, as it was sampled, and the next: its end, where it has none, and the observations.

        Raises:
            `ValueError`: if the template cannot render these observations.
        """
        observation_ids = self.observation_ids(turn, observations)
        return self.template.close_turn(sampled_ids) + observation_ids

    def observation_ids(self, turn: Turn, observations: list[Message]) -> list[int]:
        """Ids from a turn's end to the end of the next generation prompt.

        They are measured behind a stand-in for the turn with the same calls: what a policy wrote, however odd, cannot
        break the rendering, and the cost does not grow with the conversation. Templates that print one call per turn
        are given one, as in [`~trl.GRPOTrainer`].

        Raises:
            `ValueError`: if the template cannot render these observations.
        """
        calls = [_without_arguments(call) for call in turn.message.get("tool_calls") or []]
        try:
            return self._ids_after(_stand_in(calls), observations)
        except ValueError:
            if len(calls) < 2 or images_in(observations):
                raise
            return self._ids_after(_stand_in(calls[:1]), observations)

    def rewritten(
        self, history: list[Message], observations: list[Message]
    ) -> tuple[list[int], list[Message] | None] | None:
        """What the policy reads next where that does not continue what it has read and sampled; `None` where it does.

        Args:
            history (`list[dict]`): the messages that the policy has read, and its turn.
            observations (`list[dict]`): what answers the turn.

        Returns:
            The ids, and where the user's function changed them the messages; `None` where nothing is rewritten.

        Raises:
            [`UnrenderableHistory`]: if the template cannot render what the user's function returned.
        """
        messages = rewritten(self._rewrite, history + observations)
        if messages is not None:
            try:
                return self.template.prompt_ids(messages, check=False), messages
            except ValueError as error:
                raise UnrenderableHistory(
                    f"`rewrite_history` returned messages that cannot be read. {error}"
                ) from error
        if self._follows_template and self.template.rewrites(history, observations):
            try:
                return self.template.prompt_ids(history + observations, check=False), None
            except ValueError:  # the policy's doing
                return None
        return None

    def _template_rewrites(self, turn: Turn, observations: list[Message]) -> bool:
        """Whether the template rewrites turns such as a policy may write; else no turn needs to be looked at."""
        user, system = {"role": "user", "content": "prompt"}, {"role": "system", "content": "rules"}
        thought = "<think>\nthought\n</think>\n\n"
        content = turn.message.get("content") or ""
        turns = [turn.message, {**turn.message, "content": thought + content}]
        turns.append({**turn.message, "reasoning_content": "thought"})
        return any(
            self.template.rewrites([*prompt, *before, each], observations)
            for each in turns
            for prompt in ([user], [system, user])
            for before in ([], [each, *observations])
        )

    def _render_prompt(self, messages: str) -> list[int]:
        return self.template.prompt_ids(json.loads(messages))

    def _render_turn(self, skeleton: str) -> Callable[[list[Message]], list[int]]:
        return self.template.after_turn([{"role": "user", "content": "prompt"}, json.loads(skeleton)])

    def _ids_after(self, skeleton: str, observations: list[Message]) -> list[int]:
        texts = [text for message in observations if isinstance(text := message.get("content"), str)]
        if len(texts) == len(observations) and sum(map(len, texts)) <= SHORT_ANSWER:
            return list(self._short_answer(skeleton, json.dumps(observations)))
        return self._observations_after(skeleton)(observations)

    def _render_answer(self, skeleton: str, observations: str) -> list[int]:
        return self._observations_after(skeleton)(json.loads(observations))

    def _probe(self) -> tuple[Turn, list[Message]]:
        if self.dialect.template_tools:
            name = self.dialect.template_tools[0]["function"]["name"]
            call = {"type": "function", "function": {"name": name, "arguments": {}}}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            turn = Turn(message, [ToolCall(name, {})], answered=False)
            return turn, self.dialect.observe(turn, [ToolResult("result")])
        turn = Turn({"role": "assistant", "content": "turn"}, [], answered=False, problem="result")
        return turn, self.dialect.observe(turn, [])


def _stand_in(calls: list[dict[str, Any]]) -> str:
    """A turn with these calls, as the cache's key: what the policy wrote besides changes nothing after it."""
    skeleton: Message = {"role": "assistant", "content": "turn"}
    return json.dumps({**skeleton, "content": "", "tool_calls": calls} if calls else skeleton)


def _without_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": {}}}
    return {**call, "arguments": {}}
