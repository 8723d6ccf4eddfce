"""What ends an assistant's turn, found by rendering turns that differ in one character."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..messages import Message
from .form import Form
from .probes import USER, call_turn, common_suffix, result, tool_name
from .rendering import Renderer


# What a tokenizer that does not know a template's special tokens still shows as one
_LOOKS_SPECIAL = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|[^<\[\s]+|[<\[]")


@dataclass(frozen=True)
class Ending:
    """What a template prints after an assistant turn's content: `text` ends the turn, `trail` follows it."""

    text: str
    trail: str


@dataclass(frozen=True)
class Endings:
    """How a template ends turns.

    Attributes:
        printed (`tuple[Ending]`): what it prints after the last turn: an answer's and, where it differs, a call's.
        replaced (`tuple[str]`): what stands instead of the first of them once other messages follow (GPT-OSS).
        by_next_role (`dict[str, str]`): where the last turn has no ending, what ends a turn before a message of a
            role: a token of its own, or the marker of the next role, which the policy samples (GLM-4.6).
        trails (`tuple[str]`): blanks that follow a last turn that has no ending.
        opener (`str`, *optional*): the special token with which messages begin, where they do.
        unprinted (`bool`): whether the template prints no ending anywhere. What the policy samples then is the
            tokenizer's end-of-sequence token, and its next prompt does not show it.
    """

    printed: tuple[Ending, ...] = ()
    replaced: tuple[str, ...] = ()
    by_next_role: Mapping[str, str] = field(default_factory=dict)
    trails: tuple[str, ...] = ()
    opener: str | None = None
    unprinted: bool = False

    def __bool__(self) -> bool:
        return bool(self.printed or self.by_next_role)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text that ends a turn which the policy samples."""
        return tuple(dict.fromkeys([*(ending.text for ending in self.printed), *self.by_next_role.values()]))

    def closing(self, next_role: str) -> str:
        """What ends a turn in the history, before a message of a role."""
        if self.replaced:
            return self.replaced[0]
        if self.by_next_role:
            return self.by_next_role.get(next_role) or next(iter(self.by_next_role.values()))
        return self.printed[0].text

    def split(self, alone: str) -> tuple[str, str | None]:
        """A rendering that ends with an assistant's turn, without that turn's ending; and the ending that it has.

        The latter is `""` where the template prints none after the last turn, and `None` where what it prints is
        unknown.
        """
        for ending in self.printed:
            if alone.endswith(ending.text + ending.trail):
                return alone[: len(alone) - len(ending.text + ending.trail)], ending.text
        for trail in self.trails:
            if alone.endswith(trail):
                return alone[: len(alone) - len(trail)], ""
        return alone, None

    def length_at(self, text: str, at: int, ending: str) -> int | None:
        """Characters of the ending that stands at `at` in `text`, where `ending` does if the turn is the last."""
        for option in (ending, *self.replaced) if ending else self.by_next_role.values():
            blanks = 0 if ending else len(text[at:]) - len(text[at:].lstrip())
            if text.startswith(option, at + blanks):
                return blanks + len(option)
        return None


class EndingProbe:
    """Finds the [`Endings`] of a template.

    Args:
        render ([`Renderer`]), form ([`Form`]): the template.
    """

    def __init__(self, render: Renderer, form: Form):
        self._render = render
        self._form = form
        self._tool = tool_name(render.tools)
        self._added = sorted(render.tokenizer.get_added_vocab(), key=len, reverse=True)
        self._answers: list[Message] = [{"role": "assistant", "content": f"probe {c}"} for c in "AB"]
        self._calls: list[Message] = [call_turn(self._tool, {"value": c}) for c in "AB"]

    def find(self) -> Endings:
        """The endings; none where the template shows no answer, or nothing could end one."""
        return replace(self._find(), opener=self._opener())

    def _find(self) -> Endings:
        tail = self._tail(self._answers)
        if tail is None:
            return Endings()
        history = self._tail(self._answers, USER) or ""
        if not tail.strip():
            return self._open_endings(tail, history)
        answer = self._first_ending(tail, history)
        return Endings((answer, *self._call_ending(answer)), self._replacement(answer, history))

    def _tail(self, turns: Sequence[Message], *following: Message) -> str | None:
        """What follows the differing character of two turns, `None` where the template shows neither."""
        first, second = (self._render.attempt(self._form.fit([USER, turn, *following])) for turn in turns)
        return None if first is None or second is None or first == second else common_suffix(first, second)

    def _first_ending(self, tail: str, history: str) -> Ending:
        """The ending that a tail begins with, as far as the history confirms it: a template may print more, such as
        the header of a turn that nobody has asked for."""
        run = re.match(r"\s*\S+", tail)
        assert run is not None
        blanks = len(tail) - len(tail.lstrip())
        end, opener = blanks, self._opener()
        for piece in self._pieces(run[0][blanks:]):
            if piece == opener or not history.startswith(tail[: end + len(piece)]):
                break
            end += len(piece)
        end = end if end > blanks else run.end()
        return Ending(tail[:end], tail[end:])

    def _opener(self) -> str | None:
        """The special token with which messages begin, where they do."""
        text = self._render.attempt(self._form.fit([USER])) or ""
        header = text[: text.find(str(USER["content"]))]
        first = next((piece for piece in self._pieces(header) if piece != self._render.tokenizer.bos_token), None)
        return first if first in self._added else None

    def _pieces(self, text: str) -> list[str]:
        """A text without blanks in its special tokens and what stands between them."""
        known = "|".join(map(re.escape, self._added))
        return re.findall(f"{known}|{_LOOKS_SPECIAL.pattern}" if known else _LOOKS_SPECIAL, text)

    def _call_ending(self, answer: Ending) -> list[Ending]:
        """The ending of a turn that calls a tool, where it is another one."""
        tail = self._tail(self._calls)
        if not tail or tail.endswith(answer.text + answer.trail):
            return []
        # Only a special token can end a turn; anything else is the call's own text
        token = self._last_special(tail.rstrip())
        return [Ending(token, tail[len(tail.rstrip()) :])] if token else []

    def _replacement(self, answer: Ending, history: str) -> tuple[str, ...]:
        """The special token that replaces an answer's end once a user turn follows, where it also ends user turns."""
        token = self._special_at(history, 0)
        if token is None or token == answer.text:
            return ()
        users = [self._render.attempt(self._form.fit([{"role": "user", "content": f"probe {c}"}])) for c in "AB"]
        if users[0] is None or users[1] is None:
            return ()
        return (token,) if common_suffix(users[0], users[1]).startswith(token) else ()

    def _open_endings(self, trail: str, history: str) -> Endings:
        """The endings of a template whose last turn has none: they stand in the history."""
        token = self._special_at(history, len(history) - len(history.lstrip()))
        if token is None or token == self._render.tokenizer.bos_token:
            return self._unprinted_ending(trail)
        ends, trails = {"user": token}, [trail]
        tail = self._tail(self._calls)
        before_result = self._tail(self._calls, result(self._tool)) if tail is not None else None
        printed: list[Ending] = []
        if tail is not None and before_result is not None:
            body = tail.rstrip()
            rest = before_result.removeprefix(body)
            after = self._special_at(rest, len(rest) - len(rest.lstrip()))
            own = self._last_special(body)
            if own is not None and (own == token or after is None):  # a call has an ending, though an answer has none
                printed.append(Ending(own, tail[len(body) :]))
            elif before_result.startswith(body) and after is not None:
                ends["tool"] = after
                trails.append(tail[len(body) :])
        return Endings(tuple(printed), (), ends, tuple(sorted(dict.fromkeys(trails), key=len, reverse=True)))

    def _unprinted_ending(self, trail: str) -> Endings:
        eos = self._render.tokenizer.eos_token
        return Endings(by_next_role={"user": eos}, trails=(trail,), unprinted=True) if eos else Endings()

    def _special_at(self, text: str, at: int) -> str | None:
        return next((token for token in self._added if text.startswith(token, at)), None)

    def _last_special(self, text: str) -> str | None:
        return next((token for token in self._added if text.endswith(token)), None)
