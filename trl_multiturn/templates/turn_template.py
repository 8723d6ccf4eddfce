"""A chat template seen turn by turn: prompts, actions and observations of one conversation, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..images.vision import Vision, refuse_unseen_images, vision_of
from ..messages import REASONING, Message, normalize_messages, normalize_tools, without_flags, without_reasoning
from ..messages.images import images_in
from ..messages.nulls import tell_once
from ..messages.wording import RenderingSwitches, Wording
from ..segments import RowBuilder
from .encoding import encode, encode_pieces
from .grammar import Grammar
from .probes import ANSWER, USER
from .rendering import Renderer, own_renderer, template_text
from .spans import Measured
from .turns import TemplateMismatch


_CLOSES_BLOCK = (
    "The generation prompt opens a block for reasoning, and some assistant turns have none: the policy is trained to "
    "close the block at once, as after a reasoning that is empty. Where that is not what they did, give such turns "
    "their `reasoning_content`, or switch thinking off in the template (`chat_template_kwargs`)."
)

_WRITES = {
    "tool_dialect": "calls and results are written as text",
    "write_reasoning": "reasoning is written as `<think>…</think>` before the words of its turn",
}


class TurnTemplate:
    """A chat template seen turn by turn: prompts, actions and observations of one conversation, as token ids.

    Works on a copy of the tokenizer; the user's is never changed. Where the user's template rewrites earlier turns
    (Qwen3 drops their thinking), each turn is read in the rendering that the policy saw, and a conversation is several
    token sequences. TRL's training template of the same family, which rewrites nothing, stands in where the user's own
    cannot be proven turn by turn, or first of all with `training_template=True`.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or the processor of a multimodal model used on text.
        tools (`list[dict | Callable]`, *optional*):
            Tools in the form `apply_chat_template` takes.
        drop_reasoning (`bool`, *optional*, defaults to `False`):
            Leave the reasoning of assistant turns (`reasoning_content`, `reasoning`, `thinking`) out of what is
            rendered. Without it, reasoning that the template does not show is an error.
        training_template (`bool`, *optional*, defaults to `False`):
            Prefer TRL's training template, where there is one, to several token sequences.
        tool_dialect (`str`, *optional*):
            `"hermes"` or `"fenced"`: calls and results are text in the words of this dialect, and the tools stand in
            the system message, as in a rollout with `RolloutConfig(dialect=…)`. The template's own calls are not used.
        write_reasoning (`bool`, *optional*, defaults to `False`):
            Write reasoning as `<think>…</think>` before the words of its turn, where the template cannot show any.
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
        drop_reasoning: bool = False,
        training_template: bool = False,
        tool_dialect: str | None = None,
        write_reasoning: bool = False,
        **chat_template_kwargs: Any,
    ):
        self.tools = normalize_tools(tools) or None
        shown = self.tools if tool_dialect is None else None
        own = chat_template_kwargs.pop("chat_template", None) or template_text(processing_class, shown)
        self.chat_template_kwargs = chat_template_kwargs
        self.switches = RenderingSwitches(drop_reasoning, training_template, tool_dialect, write_reasoning)
        self._own, *others = _grammars(processing_class, own, shown, chat_template_kwargs)
        self._wording = Wording(self._own.form, self.tools, self.switches)
        # Stable: the user's own template, where it proves as much
        rewritten = not training_template
        self._grammars = sorted([self._own, *others], key=lambda grammar: -grammar.proven_probes(rewritten))
        self._grammar = self._grammars[0]
        self.processing_class = self._grammar.render.processing_class
        self._tokenizer = self._grammar.render.tokenizer
        if not self._grammar.endings:
            self._grammar.render(self._grammar.form.fit([USER, ANSWER]))  # perhaps it cannot even do that
            raise ValueError(
                "The chat template prints nothing after an assistant turn that could end it, and the tokenizer has no "
                "`eos_token`, so a policy trained on it would never stop. Set the tokenizer's `eos_token`, or use a "
                "template that ends assistant turns."
            )
        if self._grammar.endings.unprinted:
            tell_once(
                "The chat template prints nothing that ends an assistant turn: the tokenizer's `eos_token` "
                f"({self._tokenizer.eos_token!r}), at which sampling stops, is trained as the end of each."
            )

    def prompt_ids(self, messages: Sequence[Message], check: bool = True) -> list[int]:
        """Ids of `messages` followed by the generation prompt: what the policy continues.

        Args:
            messages (`list[dict]`):
                The conversation so far.
            check (`bool`, *optional*, defaults to `True`):
                Whether parts of messages that the template leaves out are an error. Of turns that a policy wrote it
                may leave out what it likes.

        Raises:
            `ValueError`: if the template cannot render them, or leaves a part of them out.
        """
        messages, _ = without_flags(self._wording.written(self.normalize(messages)))
        try:
            text = self._render_prompt(messages, check)
        except ValueError as error:
            messages = self._with_thoughts_or(error, messages, len(messages))
            text = self._render_prompt(messages, check)
        images = images_in(messages)
        return self._encode(self._vision.expand([text], images).pieces[0] if images else text)

    def normalize(
        self, messages: Sequence[Message], column: str = "messages", after: Sequence[Message] = ()
    ) -> list[Message]:
        """Messages in TRL's form, as everything here renders them (see [`normalize_messages`])."""
        template = str(self.processing_class.chat_template)
        messages = normalize_messages(messages, column, after=after, schemas=self.tools, template=template)
        refuse_unseen_images(messages, self.processing_class, column)
        return without_reasoning(messages) if self.switches.drop_reasoning else messages

    def _render_prompt(self, messages: Sequence[Message], check: bool) -> str:
        text = self._grammar.render(self._grammar.form.fit(messages), generation_prompt=True)
        if check:
            self._grammar.check_rendering(messages, text)
        return text

    def _with_thoughts_or(self, error: ValueError, messages: list[Message], first: int) -> list[Message]:
        """Refused messages with their reasoning as text, where that is asked for and can make the difference.

        Raises:
            `ValueError`: the refusal, with its remedy.
        """
        written = self._wording.with_thoughts(messages)
        if written is None:
            raise self._refusal(error, messages, first) from error
        return written

    def _refusal(self, error: ValueError, messages: list[Message], first: int) -> ValueError:
        untried = partial(self._untried_switches, messages, first)
        return self._own.with_remedy(error, messages, first, untried, self.switches)

    def _untried_switches(self, messages: list[Message], first: int) -> Iterator[str]:
        """The fewest further switches that make a refused conversation trainable, if they do."""
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        thinks = any(message.get(key) for message in messages for key in REASONING)
        dialects = ["hermes"] if calls and self.switches.tool_dialect is None else []
        thoughts = [True] if thinks and not self.switches.write_reasoning else []
        found: list[dict[str, Any]] = [{"tool_dialect": dialect} for dialect in dialects]
        found += [{"write_reasoning": switch} for switch in thoughts]
        found += [{"tool_dialect": dialect, "write_reasoning": switch} for dialect in dialects for switch in thoughts]
        for further in found:
            switches = replace(self.switches, **further)
            kwargs = {"chat_template": self._own.render.template, **self.chat_template_kwargs}
            if TurnTemplate(self._own.owner, self.tools, **switches.arguments(), **kwargs)._proves(messages, first):
                yield "set " + " and ".join(f"`{name}={value!r}` ({_WRITES[name]})" for name, value in further.items())
                return

    def _proves(self, messages: list[Message], first: int) -> bool:
        try:
            prompt = self._wording.written(messages[:first])
            written = [*prompt, *self._wording.written(messages[first:], opens=False)]
        except ValueError:
            return False
        for each in (written, self._wording.with_thoughts(written)):
            try:
                if each is not None and self._prove(each, len(prompt)):
                    return True
            except ValueError:
                continue
        return False

    @cached_property
    def _vision(self) -> Vision:
        return vision_of(self.processing_class)

    def tokenize(
        self, prompt: Sequence[Message], completion: Sequence[Message], *, with_turns: bool = False
    ) -> dict[str, list[Any]]:
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
            `dict[str, list]`: `prompt_ids`, `completion_ids` and `action_mask` (aligned with `completion_ids`); and
            `branches`, where the template rewrites earlier turns, so that this is more than one token sequence (see
            `trl_multiturn.segments`).
            Of messages with images, which have all their tokens in the ids, also `images` (the prompt's),
            `completion_images`, and `completion_image_tokens`, how many image tokens each of the latter has; they are
            one sequence.

        Raises:
            `ValueError`: if the template's rendering does not show what the policy sampled; the message names the
                turn, the defect and the remedy.
            [`VanishedPartError`]: if the template leaves out a part of a message.
        """
        prompt, _ = without_flags(self.normalize(prompt, "prompt"))
        completion, flags = without_flags(
            self._wording.written(self.normalize(completion, "completion", prompt), opens=False)
        )
        prompt = self._wording.written(prompt)
        if not completion:
            raise ValueError("The completion holds no message, so there is nothing to train on. Drop the row.")
        measured, grammar, messages = self._measure(prompt + completion, len(prompt))
        prompt, completion = messages[: len(prompt)], messages[len(prompt) :]
        trains = [flag for flag, message in zip(flags, completion, strict=True) if message["role"] == "assistant"]
        images = images_in([*prompt, *completion])
        expansion = None
        if any(span.closes_block for segment in measured for span in segment.spans):
            tell_once(_CLOSES_BLOCK)
        row, turn_ids = RowBuilder(), list[int]()
        for number, segment in enumerate(measured):
            if number or completion[0]["role"] == "assistant":
                boundary = segment.spans[0].start
            else:
                boundary = len(commonprefix([grammar.render(grammar.form.fit(prompt)), segment.text]))
            pieces, turns = segment.split(boundary)
            expansion = self._vision.expand(pieces, images) if images else None
            context, *ids = encode_pieces(self._tokenizer, pieces if expansion is None else expansion.pieces)
            numbers = [turn for piece, turn in zip(ids, turns, strict=True) for _ in piece]
            bits = [int(turn >= 0 and trains[turn]) for turn in numbers]
            row.add(context, [token for piece in ids for token in piece], bits)
            turn_ids += [-1] * (len(row.ids) - len(turn_ids) - len(numbers)) + numbers
        start = row.prompt_length
        output: dict[str, list[Any]] = {
            "prompt_ids": row.ids[:start],
            "completion_ids": row.ids[start:],
            "action_mask": row.action_mask[start:],
        }
        if row.branches:
            output["branches"] = row.branches
        if expansion is not None:
            seen = len(images_in(prompt))
            output |= {
                "images": images[:seen],
                "completion_images": images[seen:],
                "completion_image_tokens": expansion.tokens[seen:],
            }
        if with_turns:
            output["turn_ids"] = turn_ids[start:]
        return output

    def sampled_text(self, messages: Sequence[Message]) -> str | None:
        """What a policy samples to say the last of `messages`, without what ends the turn.

        `None` where the template cannot render it, or where it is unknown what of the rendering is sampled.
        """
        try:
            fitted = self._grammar.form.fit(self._wording.written(self.normalize(messages)))
            return self._grammar.reader.words(fitted, len(fitted) - 1)
        except ValueError:
            return None

    def reasoning_keys(self, calls: bool) -> tuple[str, ...]:
        """The keys under which the template shows a turn's reasoning, in a turn that calls a tool or in an answer."""
        return self._grammar.form.reasoning_keys(calls and self.switches.tool_dialect is None)

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
        before, _ = without_flags(self.normalize(messages))
        messages = self._grammar.form.label(self._wording.written(before))
        fit, render = self._grammar.form.fit, self._grammar.render
        alone = render(fit(messages))
        encode_head = lru_cache(maxsize=2)(self._encode)

        def observation_ids(observations: Sequence[Message]) -> list[int]:
            answers = self._wording.written(self.normalize(observations, "observations", before), opens=False)
            text = render(fit(messages + answers), generation_prompt=True)
            try:
                end = self._grammar.spans.turn_end(text, messages, alone)
            except TemplateMismatch:  # the turn is rendered otherwise once it was answered
                end = self._grammar.turn_end_by_difference(messages, answers, text)
            if images := images_in(answers):
                return encode_pieces(self._tokenizer, self._vision.expand([text[:end], text[end:]], images).pieces)[1]
            head, whole = encode_head(text[:end]), self._encode(text)
            if whole[: len(head)] == head:  # what `encode_pieces` finds in this case, with less work
                return whole[len(head) :]
            return encode_pieces(self._tokenizer, [text[:end], text[end:]])[1]

        return observation_ids

    def rewrites(self, messages: Sequence[Message], observations: Sequence[Message]) -> bool:
        """Whether a conversation that ends with an assistant's turn is rendered otherwise once it was answered.

        The policy then reads no continuation of what it had read and sampled. `False` where the template cannot render
        the messages.
        """
        before, _ = without_flags(self.normalize(messages))
        messages = self._grammar.form.label(self._wording.written(before))
        fit, render = self._grammar.form.fit, self._grammar.render
        answers = self._wording.written(self.normalize(observations, "observations", before), opens=False)
        text = render.attempt(fit(messages + answers), generation_prompt=True)
        try:
            return text is not None and not self._grammar.spans.continues(text, fit(messages))
        except ValueError:
            return False

    @property
    def shows_tool_calls(self) -> bool:
        """Whether the template shows tool calls, their arguments and results."""
        return self.switches.tool_dialect is not None or self._grammar.shows_tool_calls

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Token ids that end an assistant turn: a plain answer's and, where it differs, a tool call's."""
        return tuple(dict.fromkeys(self._encode(text)[-1] for text in self._grammar.endings.texts))

    def close_turn(self, sampled_ids: Sequence[int], next_role: str = "user") -> list[int]:
        """Ids to append to a turn that was cut off before its end-of-turn token; they are context (mask 0).

        Empty where the turn ended by itself.

        Args:
            sampled_ids (`list[int]`):
                The turn.
            next_role (`str`, *optional*, defaults to `"user"`):
                Who speaks next: under some templates the marker of the next role ends a turn.
        """
        if sampled_ids and sampled_ids[-1] in self.end_of_turn_ids:
            return []
        return self._encode(self._grammar.endings.closing(next_role))

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)

    def _measure(self, messages: list[Message], first: int) -> tuple[list[Measured], Grammar, list[Message]]:
        """The renderings and their turns, under the first of the template and TRL's training template that proves
        them; and the messages with what of them had to be written as text."""
        try:
            return *self._prove(messages, first), messages
        except ValueError as error:
            written = self._with_thoughts_or(error, messages, first)
        try:
            return *self._prove(written, first), written
        except ValueError as error:
            raise self._refusal(error, written, first) from error

    def _prove(self, messages: list[Message], first: int) -> tuple[list[Measured], Grammar]:
        errors: list[ValueError] = []
        for grammar, rewritten in self._ways(bool(images_in(messages))):
            if grammar is not self._own and not self._stands_in(grammar, messages, first, errors):
                continue
            try:
                return grammar.measure(messages, first, rewritten), grammar
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def _ways(self, with_images: bool) -> Iterator[tuple[Grammar, bool]]:
        """Templates to try, and whether each may rewrite earlier turns; images stand in one sequence."""
        if self.switches.training_template or with_images:
            yield from ((grammar, False) for grammar in self._grammars)
        if not with_images:
            yield from ((grammar, True) for grammar in self._grammars)

    def _stands_in(self, training: Grammar, messages: list[Message], first: int, errors: list[ValueError]) -> bool:
        """Whether TRL's training template may take the place of the user's own for a conversation.

        It may where the policy's first prompt is the same under both, and the own template rewrites earlier turns.
        """
        if errors and not isinstance(errors[0], TemplateMismatch):
            return False
        prompt = self._own.form.fit(messages[:first])
        shown = self._own.render.attempt(prompt, generation_prompt=True)
        if any(message["role"] == "assistant" for message in prompt):
            return shown is not None
        return shown == training.render.attempt(training.form.fit(messages[:first]), generation_prompt=True)


def _grammars(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    own: str,
    tools: list[Any] | None,
    kwargs: dict[str, Any],
) -> list[Grammar]:
    """The user's own template, and TRL's training template of its family where there is one."""
    render = own_renderer(processing_class, own, tools, kwargs)
    grammars = [Grammar(render, processing_class)]
    training = grammars[0].training
    if training not in (None, own):
        grammars.append(Grammar(Renderer(processing_class, training, render.tools, kwargs), processing_class))
    return grammars
