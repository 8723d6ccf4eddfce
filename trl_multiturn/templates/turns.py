"""A turn as the policy lived it: the prompt that it continued, and what it sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix

from ..messages import Message
from .endings import Endings
from .form import Form
from .probes import USER, call_turn, tool_name
from .rendering import Renderer
from .unprompted import UnpromptedTurn, find_header, shared_length, thought_of


class TemplateMismatch(ValueError):
    """A rendering does not show what the policy sampled: the template renders a turn otherwise than it was prompted,
    or otherwise once more turns follow."""


@dataclass(frozen=True)
class PolicyTurn:
    """An assistant turn as the policy saw and sampled it.

    Attributes:
        index (`int`): place of its message in the conversation.
        prompt (`str`): the rendering of all before it, with the generation prompt.
        words (`str`): what was sampled, without what ended it.
        ending (`str`): what ends it as the last turn; `""` where the template prints nothing there.
        trail (`str`): what the template prints after it.
        closes_block (`bool`): whether it has no reasoning, and closes at once the block that its prompt opened.
        printed (`str`): the end of the prompt, where that had begun the text of the turn.
    """

    index: int
    prompt: str
    words: str
    ending: str
    trail: str
    closes_block: bool = False
    printed: str = ""


class TurnReader:
    """Reads single turns off renderings of one template.

    Args:
        render ([`Renderer`]), form ([`Form`]), endings ([`Endings`]): the template.
    """

    def __init__(self, render: Renderer, form: Form, endings: Endings):
        self._render = render
        self._form = form
        self._endings = endings

    def read(self, messages: Sequence[Message], index: int, turn: int) -> PolicyTurn:
        """The assistant turn at `index` of messages in this template's form.

        Raises:
            [`TemplateMismatch`]: if it is unknown what of the rendered turn was sampled.
            `ValueError`: if the template cannot render the messages.
        """
        found = self._read(messages, index, turn)
        thought = thought_of(messages[index])
        if not thought or thought.strip() in found.words or self._around_thoughts is None:
            return found
        before, after = self._around_thoughts
        return replace(found, words=before + thought + after + found.words)

    def _read(self, messages: Sequence[Message], index: int, turn: int) -> PolicyTurn:
        """As far as the template shows the turn."""
        prompt = self._render(messages[:index], generation_prompt=True)
        alone = self._render(messages[: index + 1])
        body, ending = self._endings.split(alone)
        if ending is None:
            raise TemplateMismatch(
                f"Assistant turn {turn} (message {index}): the rendering ends with {alone[-40:]!r}, which is not how "
                f"the chat template ends other assistant turns ({list(self._endings.texts)}), so it is unknown which "
                "token ends it."
            )
        trail = alone[len(body) + len(ending) :]
        unprompted = UnpromptedTurn(self._render, self._form, self._endings, messages[: index + 1], prompt, body)
        if body.startswith(prompt) and not self._opens_a_message(body[len(prompt) :]):
            return PolicyTurn(index, prompt, unprompted.with_thought(body[len(prompt) :]), ending, trail)
        words = unprompted.words()
        if words is None:
            raise _unprompted(prompt, alone, turn, index)
        return PolicyTurn(index, prompt, words, ending, trail, unprompted.closes_block, unprompted.printed)

    @cached_property
    def _around_thoughts(self) -> tuple[str, str] | None:
        """What stands before and after the reasoning of a call, under a template that leaves out an answer's.

        A policy writes both in the same way, for it does not know yet which of the two a turn will be.
        """
        keys = self._form.reasoning_keys(calls=True)
        if not keys or self._form.reasoning_keys(calls=False):
            return None
        call, thought = call_turn(tool_name(self._render.tools), {"value": "probe"}), "prb1thought"
        try:
            silent, aloud = (
                self._read(self._form.fit([USER, turn]), 1, 0).words for turn in (call, {**call, keys[0]: thought})
            )
        except ValueError:
            return None
        before, shown, rest = aloud.partition(thought)
        return (before, rest.removesuffix(silent)) if shown and rest.endswith(silent) else None

    def words(self, messages: Sequence[Message], index: int) -> str | None:
        """What is sampled in the assistant turn at `index`, where no prompt need fit to it: all behind the header.

        Raises:
            `ValueError`: if the template cannot render the messages.
        """
        try:
            return self.read(messages, index, 0).words
        except TemplateMismatch:
            body, _ = self._endings.split(self._render(messages[: index + 1]))
            header = find_header(self._render, self._form, messages[:index])
            return None if header is None else body[shared_length(header, body) :]

    def _opens_a_message(self, words: str) -> bool:
        """Whether what follows a prompt is the header of a turn, which no policy samples."""
        return self._endings.opener is not None and words.startswith(self._endings.opener)


def _unprompted(prompt: str, text: str, turn: int, index: int) -> TemplateMismatch:
    at = len(commonprefix([prompt, text]))
    return TemplateMismatch(
        f"Assistant turn {turn} (message {index}): the prompt that the policy continues ends with "
        f"{prompt[at:][-60:]!r}, but the rendered conversation goes on with {text[at : at + 60]!r}. The chat template "
        "renders a finished turn differently from the prompt it was sampled from (often dropped or empty reasoning), "
        "so the sampled tokens are unknown."
    )
