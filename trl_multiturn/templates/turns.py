"""A turn as the policy lived it: the prompt that it continued, and what it sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from ..messages import Message
from .endings import Endings
from .form import Form
from .probes import common_suffix
from .rendering import Renderer


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
    """

    index: int
    prompt: str
    words: str
    ending: str
    trail: str


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
            [`TemplateMismatch`]: if the rendered turn does not continue the prompt.
            `ValueError`: if the template cannot render the messages.
        """
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
        if body.startswith(prompt) and not self._opens_a_message(body[len(prompt) :]):
            return PolicyTurn(index, prompt, body[len(prompt) :], ending, trail)
        words = self._words(messages[:index], prompt, body)
        if words is None:
            raise _unprompted(prompt, alone, turn, index)
        return PolicyTurn(index, prompt, words, ending, trail)

    def words(self, messages: Sequence[Message], index: int) -> str | None:
        """What is sampled in the assistant turn at `index`, where no prompt need fit to it: all behind the header.

        Raises:
            `ValueError`: if the template cannot render the messages.
        """
        try:
            return self.read(messages, index, 0).words
        except TemplateMismatch:
            body, _ = self._endings.split(self._render(messages[: index + 1]))
            header = self._header(messages[:index])
            return None if header is None else body[_shared_length(header, body) :]

    def _opens_a_message(self, words: str) -> bool:
        """Whether what follows a prompt is the header of a turn, which no policy samples."""
        return self._endings.opener is not None and words.startswith(self._endings.opener)

    def _words(self, before: Sequence[Message], prompt: str, body: str) -> str | None:
        """What was sampled, where the finished turn does not continue its prompt but the difference is known.

        The prompt may print more than the finished turn (an empty think block), other blanks, or other words further
        up (a system message that only the last user turn shows).
        """
        header = self._header(before)
        if header is None or not body.startswith(header):
            return None
        if prompt.startswith(header):
            scaffold = prompt[len(header) :]
            return body[len(header) :] if not scaffold.strip() or self._is_closed(scaffold, header, before) else None
        if not before or not _same_after(_text(before[-1]), prompt, header):
            return None
        blanks, shown = _trailing_blanks(header), _trailing_blanks(prompt)
        lead = blanks[len(shown) :] if blanks.startswith(shown) else ""
        return lead + body[len(header) :]

    def _header(self, before: Sequence[Message]) -> str | None:
        """What the template prints before the words of an answer."""
        answers = self._form.fit([{"role": "assistant", "content": f"{letter} probe"} for letter in "AB"])
        first, second = (self._render.attempt([*before, answer]) for answer in answers)
        return None if first is None or second is None or first == second else commonprefix([first, second])

    def _is_closed(self, scaffold: str, header: str, before: Sequence[Message]) -> bool:
        """Whether what the prompt prints after a turn's header leaves no reasoning open.

        A turn with reasoning continues an open block; where none does, and reasoning is shown, the block is closed.
        """
        shown = False
        for turn in self._form.thinking_turns():
            text = self._render.attempt([*before, *self._form.fit([turn])])
            shown |= text is not None
            if text is not None and text.startswith(header + scaffold):
                return False
        return shown


def _shared_length(header: str, body: str) -> int:
    """How much of a header a rendering begins with, without the beginning of a token or tag."""
    shared = commonprefix([header, body])
    opened = max(shared.rfind("<"), shared.rfind("["))
    return opened if opened > max(shared.rfind(">"), shared.rfind("]")) else len(shared)


def _same_after(words: str, first: str, second: str) -> bool:
    """Whether two renderings are the same from the last message's words on, but for blanks."""
    shared = common_suffix(*("".join(text.split()) for text in (first, second)))
    return bool(words.strip()) and "".join(words.split()) in shared


def _text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _trailing_blanks(text: str) -> str:
    return text[len(text.rstrip()) :]


def _unprompted(prompt: str, text: str, turn: int, index: int) -> TemplateMismatch:
    at = len(commonprefix([prompt, text]))
    return TemplateMismatch(
        f"Assistant turn {turn} (message {index}): the prompt that the policy continues ends with "
        f"{prompt[at:][-60:]!r}, but the rendered conversation goes on with {text[at : at + 60]!r}. The chat template "
        "renders a finished turn differently from the prompt it was sampled from (often dropped or empty reasoning), "
        "so the sampled tokens are unknown."
    )
