"""Which characters of a conversation the policy sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from ..messages import Message
from .endings import Endings
from .rendering import Renderer
from .turns import PolicyTurn, TemplateMismatch, TurnReader


@dataclass(frozen=True)
class Span:
    """Characters `[start, end)` of a conversation that the policy sampled in assistant turn `turn`.

    The turn may close at once a block for reasoning that its prompt opened (`closes_block`), and its text may have
    begun so many characters earlier, in the prompt (`printed`).
    """

    start: int
    end: int
    turn: int
    closes_block: bool = False
    printed: int = 0


@dataclass(frozen=True)
class Measured:
    """A conversation as the policy lived it, and the turns in it that it sampled, one span each."""

    text: str
    spans: tuple[Span, ...]

    def split(self, boundary: int) -> tuple[list[str], list[int]]:
        """Cuts the text into the prompt, which ends at `boundary`, and the completion's pieces; the turn of each of
        the latter, -1 for context."""
        pieces, turns, at = [self.text[:boundary]], [], boundary
        for span in self.spans:
            if span.start > at:
                pieces.append(self.text[at : span.start])
                turns.append(-1)
            pieces.append(self.text[span.start : span.end])
            turns.append(span.turn)
            at = span.end
        if at < len(self.text):
            pieces.append(self.text[at:])
            turns.append(-1)
        return pieces, turns


class SpanFinder:
    """Joins turns that were read one by one into one text, where each continues what the policy had seen before it.

    Args:
        render ([`Renderer`]), endings ([`Endings`]): the template.
        reader ([`TurnReader`]): reads its turns.
    """

    def __init__(self, render: Renderer, endings: Endings, reader: TurnReader):
        self._render = render
        self._endings = endings
        self._reader = reader

    def measure(self, messages: Sequence[Message], first: int) -> Measured:
        """The text of messages in the template's form, with a span for each assistant turn from message `first` on.

        Where the template prints no ending after the last turn, the one that stands in the history is added.

        Raises:
            [`TemplateMismatch`]: if no one text shows what the policy saw and sampled in every turn.
            `ValueError`: if the template cannot render the messages.
        """
        return self._segments(messages, first, rewritten=False)[0]

    def segments(self, messages: Sequence[Message], first: int) -> list[Measured]:
        """The texts that the policy saw: one for each run of turns that continue one another.

        Where the template rewrites earlier turns, the next turn's prompt begins a text of its own.

        Raises:
            [`TemplateMismatch`]: if a turn does not continue its prompt.
            `ValueError`: if the template cannot render the messages.
        """
        return self._segments(messages, first, rewritten=True)

    def _segments(self, messages: Sequence[Message], first: int, rewritten: bool) -> list[Measured]:
        places = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        turns = [self._reader.read(messages, index, number) for number, index in enumerate(places)]
        if not turns:
            return [Measured(self._render(messages), ())]
        prompts = [turn.prompt for turn in turns[1:]]
        if turns[-1].index < len(messages) - 1:  # the completion ends with what the policy read last
            prompts.append(self._render(messages))
        segments: list[Measured] = []
        text, spans = turns[0].prompt, list[Span]()
        for number, turn in enumerate(turns):
            start = len(text)
            text += turn.words
            following = prompts[number] if number < len(prompts) else None
            end = None if following is None else self._joined(text, following, turn, number, rewritten)
            ends_here = end is None
            if end is None:
                ending = turn.ending or self._endings.closing("tool" if _calls(messages[turn.index]) else "user")
                end = len(text) + len(ending)
                text += ending + turn.trail if turn.ending and following is None else ending
            if end <= start:
                raise TemplateMismatch(f"Assistant turn {number} (message {turn.index}) renders to nothing.")
            spans.append(Span(start, end, number, turn.closes_block, len(turn.printed)))
            if following is not None and ends_here and number + 1 < len(turns):
                segments.append(Measured(text, tuple(spans)))
                spans = []
            if following is not None and (not ends_here or number + 1 < len(turns)):
                text = following
        return [*segments, Measured(text, tuple(spans))]

    def continues(self, text: str, messages: Sequence[Message]) -> bool:
        """Whether `text` continues what the policy had read and sampled by the end of `messages`, in the template's
        form, whose last one is its turn.

        Raises:
            `ValueError`: if the template cannot render the messages.
        """
        try:
            turn = self._reader.read(messages, len(messages) - 1, 0)
        except TemplateMismatch:
            return False
        return self._joined(turn.prompt + turn.words, text, turn, None, rewritten=True) is not None

    def turn_end(self, text: str, messages: Sequence[Message], alone: str) -> int:
        """End of the last of `messages`, which render as `alone`, in `text`, a rendering that begins with them.

        Raises:
            [`TemplateMismatch`]: if it does not.
        """
        body, ending = self._endings.split(alone)
        if ending is None:
            raise TemplateMismatch(
                f"The assistant turn (message {len(messages) - 1}) renders with {alone[-40:]!r} at the end, which is "
                f"not how the chat template ends other turns ({list(self._endings.texts)})."
            )
        if self._endings.unprinted and text.startswith(body):
            return len(body)
        end = self._joined(body, text, PolicyTurn(len(messages) - 1, "", "", ending, ""), None)
        assert end is not None
        return end

    def _joined(
        self, seen: str, following: str, turn: PolicyTurn, number: int | None, rewritten: bool = False
    ) -> int | None:
        """Where `turn` ends in the `following` prompt, which must begin with all that was `seen` so far; `None` where
        it may be `rewritten` and is."""
        if following.startswith(seen):
            length = self._endings.length_at(following, len(seen), turn.ending)
            if length is not None:
                return len(seen) + length
        if rewritten:
            return None
        whole = seen + turn.ending
        at = len(commonprefix([whole, following]))
        where = "The assistant turn" if number is None else f"Assistant turn {number}"
        raise TemplateMismatch(
            f"{where} (message {turn.index}) leaves the policy with {whole[at : at + 60]!r}, which its next prompt "
            f"shows as {following[at : at + 60]!r}: the chat template rewrites earlier turns, so no rendering of the "
            "whole conversation shows what the policy sampled."
        )


def _calls(message: Message) -> bool:
    return bool(message.get("tool_calls"))
