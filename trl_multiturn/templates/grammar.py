"""One chat template seen turn by turn: how it wants messages, what ends a turn, which parts it shows."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import VanishedPartError
from ..messages import Message
from .endings import EndingProbe, Endings
from .form import Form
from .parts import Part, changes, is_verbatim, parts_of, replaced, surroundings, unmistakable
from .probes import USER, call_turn, conversations, result, tool_name
from .remedies import find_remedies
from .rendering import Renderer
from .spans import Measured, SpanFinder
from .training import training_template
from .turns import TurnReader


@dataclass
class _Facts:
    """What was learned of a template, whatever the tools of a row are: it is the same for all with tools."""

    form: Form
    endings: Endings
    shown: set[tuple[Any, ...]] = field(default_factory=set)
    remedies: dict[tuple[Any, ...], str] = field(default_factory=dict)
    training: str | None = None


# By tokenizer; rows of a dataset often have tools of their own, and probing anew would cost more than the row
_FACTS: weakref.WeakKeyDictionary[Any, dict[str, _Facts]] = weakref.WeakKeyDictionary()


class Grammar:
    """A chat template, read by rendering with it.

    Args:
        render ([`Renderer`]): the template, with a row's tools.
        owner (`Any`): the user's tokenizer, with which what was learned is kept.
    """

    def __init__(self, render: Renderer, owner: Any):
        self.render = render
        self._owner = weakref.ref(owner)  # which keeps this grammar
        known = _FACTS.setdefault(owner, {})
        key = json.dumps([render.template, render.kwargs, bool(render.tools)], sort_keys=True, default=repr)
        if key not in known:
            form = Form(render)
            known[key] = _Facts(form, EndingProbe(render, form).find(), training=training_template(render))
        self._facts = known[key]
        self.form = self._facts.form
        self.endings = self._facts.endings
        self.reader = TurnReader(render, self.form, self.endings)
        self.spans = SpanFinder(render, self.endings, self.reader)

    @property
    def training(self) -> str | None:
        """TRL's training template for this one, where there is one."""
        return self._facts.training

    def measure(self, messages: Sequence[Message], first: int) -> Measured:
        """The rendering of messages in TRL's form, with the spans of the assistant turns from message `first` on.

        Raises:
            `ValueError`: if the rendering does not show what the policy sampled (see [`SpanFinder`]).
            [`VanishedPartError`]: if it leaves a part of a message out.
        """
        messages = self.form.label(messages)
        measured = self.spans.measure(self.form.fit(messages), first)
        self._refuse_vanished(messages, first, _zones(messages, measured, first))
        return measured

    def check_rendering(self, messages: Sequence[Message], text: str) -> None:
        """Refuses messages, which render as `text`, where the template leaves a part of them out.

        Raises:
            [`VanishedPartError`]: naming the part.
        """
        self._refuse_vanished(messages, len(messages), [text] * len(messages))

    def proves(self, messages: Sequence[Message]) -> bool:
        """Whether every turn of a conversation can be measured."""
        try:
            self.spans.measure(self.form.fit(messages), first=1)
        except ValueError:
            return False
        return True

    @cached_property
    def shows_tool_calls(self) -> bool:
        """Whether a call, its argument and its result are shown."""
        name = tool_name(self.render.tools)
        messages = [USER, call_turn(name, {"value": "probed argument"}), result(name, "probed result")]
        text = self.render.attempt(self.form.fit(messages)) or ""
        try:
            self.check_rendering(messages, text)
        except ValueError:
            return False
        return "probed argument" in text and "probed result" in text

    @cached_property
    def proven_probes(self) -> int:
        """How many of the probing conversations can be measured; -1 if no turn has an end."""
        name = tool_name(self.render.tools)
        return sum(map(self.proves, conversations(name))) if self.endings else -1

    def with_remedy(self, error: ValueError, messages: Sequence[Message], first: int) -> ValueError:
        """The error that refused a conversation, with what makes it trainable."""
        key = (type(error), *surroundings(messages, first))
        if key not in self._facts.remedies:
            self._facts.remedies[key] = find_remedies(messages, first, self.render.template, self._works)
        return type(error)(f"{error} {self._facts.remedies[key]}")

    def _works(self, messages: list[Message], first: int, kwargs: dict[str, Any]) -> bool:
        owner = self._owner() or self.render.processing_class
        grammar = Grammar(self.render.with_kwargs(**kwargs), owner) if kwargs else self
        try:
            grammar.measure(messages, first)
        except ValueError:
            return False
        return bool(grammar.endings)

    # Which parts are shown

    def _refuse_vanished(self, messages: Sequence[Message], first: int, zones: Sequence[str]) -> None:
        """Refuses a part that its message's zone of the rendering does not show, and would not if it were another."""
        doubtful = _not_verbatim(messages, zones)
        new = set(surroundings(messages, first)) - self._facts.shown
        if new:
            doubtful += self._not_shown_unmistakably(messages, first)
        for index, part in doubtful:
            if not self._shows(messages, index, part, trained=index >= first):
                raise vanished(messages, index, part)
        self._facts.shown |= new

    def _not_shown_unmistakably(self, messages: Sequence[Message], first: int) -> list[tuple[int, Part]]:
        """Parts of messages whose counterparts with unmistakable words are not shown in the same place."""
        twins = unmistakable(messages)
        parts = [(index, part) for index, message in enumerate(messages) for part in parts_of(message)]
        try:
            measured = self.spans.measure(self.form.fit(twins), first)
        except ValueError:  # a template that accepts some words only: nothing is known then
            return parts
        places = {(index, part.path) for index, part in _not_verbatim(twins, _zones(twins, measured, first))}
        return [(index, part) for index, part in parts if (index, part.path) in places]

    def _shows(self, messages: Sequence[Message], index: int, part: Part, trained: bool) -> bool:
        """Whether the rendering of a message changes with one of its parts: within the turn, where that is trained."""
        upto = index + 1 if trained and messages[index]["role"] == "assistant" else len(messages)
        others = [
            [*messages[:index], replaced(messages[index], part, value), *messages[index + 1 :]]
            for value in changes(part)
        ]
        text, *texts = (self.render.attempt(self.form.fit(each[:upto])) for each in [list(messages), *others])
        return text not in texts


def vanished(messages: Sequence[Message], index: int, part: Part) -> VanishedPartError:
    """The error for a part of message `index` that a template leaves out."""
    return VanishedPartError(
        f"Message {index} ({messages[index]['role']}): the chat template leaves out {part.describe()}, so it would "
        "be lost to training."
    )


def _zones(messages: Sequence[Message], measured: Measured, first: int) -> list[str]:
    """Where each message must be shown: a trained turn in its span."""
    spans = iter(measured.spans)
    zones = []
    for index, message in enumerate(messages):
        span = next(spans) if message["role"] == "assistant" and index >= first else None
        zones.append(measured.text if span is None else measured.text[span.start : span.end])
    return zones


def _not_verbatim(messages: Sequence[Message], zones: Sequence[str]) -> list[tuple[int, Part]]:
    return [
        (index, part)
        for index, (message, zone) in enumerate(zip(messages, zones, strict=True))
        for part in parts_of(message)
        if not is_verbatim(part, zone)
    ]
