"""Which tokens of a conversation the policy would have sampled, under any chat template.

The definition: an assistant turn's tokens run from the end of the generation prompt to the end-of-turn token, that
token included. Role headers, scaffolding that the generation prompt prints (an opened `<think>`), the newline after
the end-of-turn token, tool results and user turns are context.

Nothing here knows a model family and nothing searches for marker strings inside text, so text that imitates markers
cannot move a mask. A turn's span is measured by rendering: it starts where the rendering of everything before it, with
the generation prompt, ends; it ends where the rendering up to and including it ends, less what the template prints
after the end-of-turn token (found once by rendering two turns that differ in one character). Every span is checked
against the rendering of the whole conversation. A template that renders a turn differently once more turns follow
fails the check, and the row is refused with the reason: what the policy saw cannot be read off such a rendering.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from . import _upstream
from .messages import Message, normalize_messages, normalize_tools, without_flags


_REMEDY = (
    "Use a chat template that renders earlier turns the same whatever follows (TRL ships training templates for many "
    "families, see `trl.get_training_chat_template`), or rows that carry token ids and masks."
)


@dataclass(frozen=True)
class _Ending:
    """What a template prints after an assistant turn's content: `text` ends the turn, `trail` follows it."""

    text: str
    trail: str


@dataclass(frozen=True)
class _Span:
    """Characters `[start, end)` of a rendering that the policy sampled in assistant turn `turn`."""

    start: int
    end: int
    turn: int


class TurnTemplate:
    """A chat template seen turn by turn: prompts, actions and observations of one conversation, as token ids.

    Works on a copy of the tokenizer; the user's is never changed. The copy carries the user's own template where the
    template can be proven turn by turn, and TRL's training template of the same family where that proves more (Qwen3
    drops the thinking of earlier turns; its training template keeps it).

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or the processor of a multimodal model used on text.
        tools (`list[dict | Callable]`, *optional*):
            Tools in the form `apply_chat_template` takes.
        **chat_template_kwargs:
            Passed on to the template (e.g. `enable_thinking=False`). `chat_template` replaces the tokenizer's own.

    Raises:
        `ValueError`: if there is no chat template, or if it prints nothing that ends an assistant turn.

    Example:

    ```python
    >>> template = TurnTemplate(tokenizer)
    >>> template.tokenize([{"role": "user", "content": "2+2?"}], [{"role": "assistant", "content": "4"}])
    {'prompt_ids': [...], 'completion_ids': [19, 151645, 198], 'action_mask': [1, 1, 0]}
    ```
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        tools: list | None = None,
        **chat_template_kwargs: Any,
    ):
        self.tools = normalize_tools(tools) or None
        own = chat_template_kwargs.pop("chat_template", None) or _template_text(processing_class, self.tools)
        self.chat_template_kwargs = chat_template_kwargs
        self._multimodal = isinstance(processing_class, ProcessorMixin)
        training = _training_template(_with_template(processing_class, own))
        templates = [own] if training in (None, own) else [own, training]
        # `max` keeps the first of equals: the user's own template, where it proves as much
        candidates = [_with_template(processing_class, template) for template in templates]
        self._adopt(max(candidates, key=self._count_proven_probes))
        self._tools_supported: bool | None = None
        if not self._endings:
            raise ValueError(
                "The chat template prints nothing after an assistant turn that could end it (no end-of-turn token and "
                "no end-of-sequence token), so a policy trained on it would never stop. Use a template that ends "
                "assistant turns, e.g. with the tokenizer's `eos_token`."
            )

    # Public face

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of `messages` followed by the generation prompt: what the policy continues."""
        messages, _ = without_flags(self.normalize(messages))
        return self._encode(self._render(messages, generation_prompt=True))

    def normalize(
        self, messages: Sequence[Message], column: str = "messages", after: Sequence[Message] = ()
    ) -> list[Message]:
        """Messages in TRL's form, as everything here renders them (see [`normalize_messages`])."""
        template = self.processing_class.chat_template
        return normalize_messages(messages, column, after=after, schemas=self.tools, template=template)

    def tokenize(
        self, prompt: Sequence[Message], completion: Sequence[Message], *, with_turns: bool = False
    ) -> dict[str, list[int]]:
        """Tokenizes a trajectory with the mask of what the policy sampled.

        Args:
            prompt (`list[dict]`):
                Messages before the completion. Assistant turns here are context.
            completion (`list[dict]`):
                Assistant turns and the observations between them. Every assistant turn is an action; one with
                `"train": False` has mask 0 all the same.
            with_turns (`bool`, *optional*, defaults to `False`):
                Also return `turn_ids`: per completion token the index of its assistant turn, -1 outside actions.

        Returns:
            `dict[str, list[int]]`: `prompt_ids`, `completion_ids` and `action_mask` (aligned with `completion_ids`).

        Raises:
            `ValueError`: if the template's rendering does not show what the policy sampled; the message names the
                turn, the defect and the remedy.
        """
        prompt, _ = without_flags(self.normalize(prompt, "prompt"))
        completion, flags = without_flags(self.normalize(completion, "completion", prompt))
        if not completion:
            raise ValueError("The completion holds no message, so there is nothing to train on. Drop the row.")
        messages = prompt + completion
        self._refuse_dropped_tool_calls(messages)
        text = self._render(messages)
        spans = self._spans(text, messages, first=len(prompt))
        if completion[0].get("role") == "assistant":
            boundary = spans[0].start
        else:
            boundary = len(commonprefix([self._render(prompt), text]))
        pieces, turns = _split(text, boundary, spans)
        ids = self._encode_pieces(pieces)
        trains = [flag for flag, message in zip(flags, completion, strict=True) if message["role"] == "assistant"]
        bits = [int(turn >= 0 and trains[turn]) for turn in turns]
        output = {
            "prompt_ids": ids[0],
            "completion_ids": [token for piece in ids[1:] for token in piece],
            "action_mask": [bit for piece, bit in zip(ids[1:], bits, strict=True) for _ in piece],
        }
        if with_turns:
            output["turn_ids"] = [turn for piece, turn in zip(ids[1:], turns, strict=True) for _ in piece]
        return output

    def observation_ids(self, messages: Sequence[Message], observations: Sequence[Message]) -> list[int]:
        """Ids between an assistant turn's end-of-turn token and the end of the next generation prompt.

        `prompt_ids(prompt) + sampled + observation_ids(...) + sampled + ...` is the conversation as the policy saw it:
        what was sampled is never rendered and tokenized again.

        Args:
            messages (`list[dict]`):
                The conversation up to and including the assistant turn.
            observations (`list[dict]`):
                The tool or user messages that answer it.
        """
        return self.after_turn(messages)(observations)

    def after_turn(self, messages: Sequence[Message]) -> Callable[[Sequence[Message]], list[int]]:
        """[`observation_ids`] for many observations after the same turn, which is rendered by itself only once."""
        messages, _ = without_flags(self.normalize(messages))
        alone = self._render(messages)
        encode_head = lru_cache(maxsize=2)(self._encode)

        def observation_ids(observations: Sequence[Message]) -> list[int]:
            answers = self.normalize(observations, "observations", messages)
            text = self._render(messages + answers, generation_prompt=True)
            end = self._turn_end(text, messages, alone)
            head, whole = encode_head(text[:end]), self._encode(text)
            if whole[: len(head)] == head:  # what `_encode_pieces` finds in this case, with less work
                return whole[len(head) :]
            return self._encode_pieces([text[:end], text[end:]])[1]

        return observation_ids

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end an assistant turn: a plain answer's and, where it differs, a tool call's."""
        ids = [self._encode(ending.text)[-1] for ending in self._endings]
        return tuple(dict.fromkeys(ids))

    def close_turn(self, sampled_ids: Sequence[int]) -> list[int]:
        """Ids to append to a turn that was cut off before its end-of-turn token; they are context (mask 0).

        Empty where the turn ended by itself.
        """
        if sampled_ids and sampled_ids[-1] in self.end_of_turn_ids:
            return []
        return self._encode(self._history_endings[0] if self._history_endings else self._endings[0].text)

    # Rendering

    def _adopt(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.processing_class = processing_class
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._endings = self._probe_endings()
        self._history_endings = self._probe_history_endings()

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        messages = list(messages)
        if self._multimodal:
            messages = _upstream.prepare_multimodal_messages(messages)
        try:
            return self.processing_class.apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.chat_template_kwargs,
            )
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"The chat template cannot render a conversation of roles {roles}: {error}. Change the conversation "
                "to what the template accepts, or use a template that accepts it."
            ) from error

    def _encode(self, text: str) -> list[int]:
        # As `apply_chat_template` tokenizes: the template prints the special tokens itself
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Tokenizes consecutive pieces so that no token crosses from one into the next.

        Where tokens of the whole text fall on the boundaries anyway (a special token stands there) this is the
        tokenization of the whole. Where a merge crosses a boundary (a turn that begins with a newline after a header
        that ends with one), the split is what the policy saw: its prompt ended there.
        """
        text = "".join(pieces)
        whole = self._encode(text)
        parts = [self._encode(piece) if piece else [] for piece in pieces]
        if [token for part in parts for token in part] == whole:
            return parts
        # Pieces alone may tokenize differently than in place (a tokenizer that marks the beginning of the text), so
        # measure with prefixes of the text and fall back to a piece alone only where a merge crosses its boundary.
        result, before, end = [], [], 0
        for piece, part in zip(pieces, parts, strict=True):
            end += len(piece)
            upto = self._encode(text[:end])
            result.append(upto[len(before) :] if upto[: len(before)] == before else part)
            before = upto
        joined = self._tokenizer.decode([token for part in result for token in part])
        if joined != self._tokenizer.decode(whole):
            raise ValueError(
                "The tokenizer merges text across the boundary of a turn in a way that cannot be undone, so the "
                "tokens that the policy sampled are unknown. Use a chat template that puts special tokens around "
                "turns, or rows that carry token ids and masks."
            )
        return result

    # Where turns begin and end

    def _spans(self, text: str, messages: list[Message], first: int) -> list[_Span]:
        """Sampled characters of `text`, the rendering of `messages`, in assistant turns from message `first` on."""
        spans = []
        for index in range(first, len(messages)):
            if messages[index].get("role") != "assistant":
                continue
            turn = len(spans)
            header = self._render(messages[:index], generation_prompt=True)
            if not text.startswith(header):
                at = len(commonprefix([header, text]))
                raise ValueError(
                    f"Assistant turn {turn} (message {index}): the prompt that the policy continues ends with "
                    f"{header[at:][-60:]!r}, but the rendered conversation goes on with {text[at : at + 60]!r}. The "
                    "chat template renders a finished turn differently from the prompt it was sampled from (often "
                    "dropped or empty reasoning), so the sampled tokens are unknown. Give the turn its "
                    "`reasoning_content`, choose the template's mode that matches the data (e.g. "
                    "`enable_thinking=False` in `chat_template_kwargs`), or change the template. " + _REMEDY
                )
            turns = messages[: index + 1]
            end = self._turn_end(text, turns, self._render(turns), turn)
            if end < len(header):
                raise ValueError(f"Assistant turn {turn} (message {index}) renders to nothing. " + _REMEDY)
            self._refuse_dropped_words(text[len(header) : end], messages[: index + 1], turn)
            spans.append(_Span(len(header), end, turn))
        return spans

    def _refuse_dropped_words(self, action: str, messages: list[Message], turn: int) -> None:
        content = messages[-1].get("content")
        if not isinstance(content, str) or content.strip() in action:
            return
        # Not verbatim, but perhaps escaped or split: then other words render otherwise
        changed = [*messages[:-1], {**messages[-1], "content": content + " changed"}]
        if self._render(changed) == self._render(messages):
            raise ValueError(
                f"Assistant turn {turn} (message {len(messages) - 1}): the chat template leaves out the turn's text "
                f"{content[:60]!r} (some templates print tool calls only), so words that the policy sampled would "
                "silently vanish from training. Use a template that prints both, or rows that carry token ids."
            )

    def _turn_end(self, text: str, messages: list[Message], alone: str, turn: int | None = None) -> int:
        """End of the last of `messages`, which render as `alone`, in `text`, a rendering that begins with them."""
        where = "The assistant turn" if turn is None else f"Assistant turn {turn}"
        ending = next((e for e in self._endings if alone.endswith(e.text + e.trail)), None)
        if ending is None:
            raise ValueError(
                f"{where} (message {len(messages) - 1}): the rendering ends with {alone[-40:]!r}, which is not how "
                f"the chat template ends other assistant turns ({[e.text for e in self._endings]}), so it is unknown "
                "which token ends it. " + _REMEDY
            )
        body = alone[: len(alone) - len(ending.text + ending.trail)]
        if text.startswith(body):
            if text.startswith(ending.text, len(body)):
                return len(body) + len(ending.text)
            # GPT-OSS ends the last turn with one token and writes another in the history
            for other in self._history_endings:
                if text.startswith(other, len(body)):
                    return len(body) + len(other)
        at = len(commonprefix([alone, text]))
        raise ValueError(
            f"{where} (message {len(messages) - 1}) renders as {alone[at : at + 60]!r} while it is the last turn, and "
            f"as {text[at : at + 60]!r} once other messages follow: the chat template rewrites earlier turns, so the "
            "rendering does not show what the policy sampled. " + _REMEDY
        )

    def _refuse_dropped_tool_calls(self, messages: list[Message]) -> None:
        if not any(message.get("tool_calls") for message in messages):
            return
        if self._tools_supported is None:
            self._tools_supported = _upstream.supports_tool_calling(self.processing_class)
        if not self._tools_supported:
            raise ValueError(
                "The conversation holds tool calls, but the chat template leaves out tool calls or tool results when "
                "it renders, so they would silently vanish from training. Use a template that supports tools, or "
                "write calls and results as text (a fenced code block, and a user turn with its output)."
            )

    # Probes: what a template prints around a turn, found by rendering two turns that differ in one character

    def _probe_endings(self) -> list[_Ending]:
        endings = []
        tail = self._probe_tail([{"role": "assistant", "content": f"probe {c}"} for c in "AB"])
        match = re.match(r"(\s*\S+)(.*)", tail or "", re.DOTALL)
        if match is None:
            return []
        endings.append(_Ending(match[1], match[2]))
        calls = [{"type": "function", "function": {"name": "probe", "arguments": {"value": c}}} for c in "AB"]
        tail = self._probe_tail([{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls])
        if tail and not tail.endswith(endings[0].text + endings[0].trail):
            stripped = tail.rstrip()
            last = self._encode(stripped)[-1:]
            # Only a token of the added vocabulary can end a turn; anything else is the call's own text
            if last and last[0] in set(self._tokenizer.get_added_vocab().values()):
                endings.append(_Ending(self._tokenizer.decode(last), tail[len(stripped) :]))
        return endings

    def _probe_tail(self, turns: list[Message]) -> str | None:
        """What follows the differing character of two assistant turns, or None where the template shows neither."""
        try:
            first, second = (self._render([{"role": "user", "content": "probe"}, turn]) for turn in turns)
        except ValueError:
            return None
        return None if first == second else _common_suffix(first, second)

    def _probe_history_endings(self) -> tuple[str, ...]:
        """The special token that replaces a turn's end once a user turn follows, where it also ends user turns."""
        if not self._endings:
            return ()
        user = {"role": "user", "content": "probe"}
        try:
            texts = [self._render([user, {"role": "assistant", "content": f"probe {c}"}, user]) for c in "AB"]
            users = [self._render([{"role": "user", "content": f"probe {c}"}]) for c in "AB"]
        except ValueError:
            return ()
        after, after_user = _common_suffix(*texts), _common_suffix(*users)
        for token in self._tokenizer.get_added_vocab():
            if after.startswith(token) and after_user.startswith(token) and token != self._endings[0].text:
                return (token,)
        return ()

    def _count_proven_probes(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> int:
        self._adopt(processing_class)
        if not self._endings:
            return -1
        return sum(self._proves(conversation) for conversation in _probe_conversations())

    def _proves(self, messages: list[Message]) -> bool:
        try:
            self._spans(self._render(messages), messages, first=1)
        except ValueError:
            return False
        return True


def _probe_conversations() -> Iterator[list[Message]]:
    call = {"type": "function", "function": {"name": "probe", "arguments": {"value": "1"}}}
    user = {"role": "user", "content": "probe"}
    answer = {"role": "assistant", "content": "answer"}
    result = {"role": "tool", "name": "probe", "content": "result"}
    yield [user, answer]
    yield [user, answer, user, answer]
    yield [user, {"role": "assistant", "content": "", "tool_calls": [call]}, result, answer, user, answer]
    yield [user, {**answer, "reasoning_content": "thought"}, user, {**answer, "reasoning_content": "thought"}]


def _template_text(processing_class: PreTrainedTokenizerBase | ProcessorMixin, tools: list | None) -> str:
    template = processing_class.chat_template
    if isinstance(template, dict):
        template = template["tool_use"] if tools and "tool_use" in template else template.get("default")
    if template is None:
        raise ValueError(
            f"`{type(processing_class).__name__}` has no chat template, so messages cannot be rendered. Set "
            "`processing_class.chat_template` (see `trl.clone_chat_template`), or use rows that carry token ids."
        )
    return template


def _with_template(processing_class: Any, template: str) -> Any:
    clone = copy.copy(processing_class)
    clone.chat_template = template
    return clone


def _training_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    try:
        return _upstream.get_training_chat_template(processing_class)
    except (ValueError, TypeError, TemplateError):
        return None  # none shipped for this family, or the template was edited


def _split(text: str, boundary: int, spans: list[_Span]) -> tuple[list[str], list[int]]:
    """Cuts `text` into the prompt and the completion's pieces; the turn of each of the latter, -1 for context."""
    pieces, turns, at = [text[:boundary]], [], boundary
    for span in spans:
        if span.start > at:
            pieces.append(text[at : span.start])
            turns.append(-1)
        pieces.append(text[span.start : span.end])
        turns.append(span.turn)
        at = span.end
    if at < len(text):
        pieces.append(text[at:])
        turns.append(-1)
    return pieces, turns


def _common_suffix(first: str, second: str) -> str:
    return commonprefix([first[::-1], second[::-1]])[::-1]
