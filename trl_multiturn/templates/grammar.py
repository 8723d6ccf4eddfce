"""One chat template seen turn by turn: how it wants messages, what ends a turn, which parts it shows."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import VanishedPartError
from ..messages import Message
from ..messages.wording import AS_WRITTEN, RenderingSwitches
from .endings import EndingProbe, Endings
from .form import Form
from .parts import Part, changes, is_verbatim, parts_of, replaced, surroundings, unmistakable
from .probes import USER, call_turn, common_suffix, conversations, result, tool_name
from .remedies import find_remedies
from .rendering import Renderer
from .spans import Measured, SpanFinder
from .training import training_template
from .turns import TemplateMismatch, TurnReader


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
    def owner(self) -> Any:
        """The user's tokenizer, or its copy where that is gone."""
        return self._owner() or self.render.processing_class

    @property
    def training(self) -> str | None:
        """TRL's training template for this one, where there is one."""
        return self._facts.training

    def measure(self, messages: Sequence[Message], first: int, rewritten: bool = True) -> list[Measured]:
        """The renderings of messages in TRL's form, with the spans of the assistant turns from message `first` on.

        One rendering shows all turns, unless the template rewrites earlier ones: then each turn stands in the
        rendering that the policy saw.

        Args:
            messages (`list[dict]`), first (`int`): the conversation, trained from message `first` on.
            rewritten (`bool`, *optional*, defaults to `True`): whether several renderings are accepted.

        Raises:
            `ValueError`: if the renderings do not show what the policy sampled (see [`SpanFinder`]).
            [`VanishedPartError`]: if they leave a part of a message out.
        """
        messages = self.form.label(messages)
        measured = self._measured(messages, first, rewritten)
        self._refuse_vanished(messages, first, _zones(messages, measured, first))
        return measured

    def _measured(self, messages: Sequence[Message], first: int, rewritten: bool = True) -> list[Measured]:
        fitted = self.form.fit(messages)
        return self.spans.segments(fitted, first) if rewritten else [self.spans.measure(fitted, first)]

    def check_rendering(self, messages: Sequence[Message], text: str) -> None:
        """Refuses messages, which render as `text`, where the template leaves a part of them out.

        Raises:
            [`VanishedPartError`]: naming the part.
        """
        self._refuse_vanished(messages, len(messages), [text] * len(messages))

    def turn_end_by_difference(self, messages: Sequence[Message], answers: list[Message], text: str) -> int:
        """Where the last of messages ends in `text`, which shows them and their answers, however the template rewrites
        the turn; found by rendering it with another last letter.

        Raises:
            [`TemplateMismatch`]: if that does not show where it ends.
        """
        turn = messages[-1]
        content = str(turn.get("content") or "")
        other = None
        if content and not turn.get("tool_calls"):
            twin = [*messages[:-1], {**turn, "content": f"{content}{'y' if content.endswith('x') else 'x'}"}]
            other = self.render.attempt(self.form.fit(twin + answers), generation_prompt=True)
        start = len(text) - len(common_suffix(text, other or ""))
        endings = [ending.text for ending in self.endings.printed] or [""]
        lengths = (self.endings.length_at(text, start, ending) for ending in endings)
        length = next((length for length in lengths if length is not None), None)
        if other is None or length is None:
            raise TemplateMismatch(
                "The assistant turn is rendered otherwise once it was answered, and it cannot be told where it ends: "
                "the chat template rewrites earlier turns."
            )
        return start + length

    def proves(self, messages: Sequence[Message], rewritten: bool) -> bool:
        """Whether every turn of a conversation can be measured; in several renderings, where these are accepted."""
        try:
            self._measured(messages, 1, rewritten)
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

    def proven_probes(self, rewritten: bool) -> int:
        """How many of the probing conversations can be measured; -1 if no turn has an end."""
        name = tool_name(self.render.tools)
        return sum(self.proves(each, rewritten) for each in conversations(name)) if self.endings else -1

    def with_remedy(
        self,
        error: ValueError,
        messages: Sequence[Message],
        first: int,
        further: Callable[[], Iterable[str]] = tuple,
        switches: RenderingSwitches = AS_WRITTEN,
    ) -> ValueError:
        """The error that refused a conversation under some switches, with what makes it trainable.

        `further` finds remedies that this grammar knows nothing of.
        """
        key = (type(error), switches, *surroundings(messages, first))
        if key not in self._facts.remedies:
            template = self.render.template
            self._facts.remedies[key] = find_remedies(messages, first, template, self._works, further)
        return type(error)(f"{error} {self._facts.remedies[key]}")

    def _works(self, messages: list[Message], first: int, kwargs: dict[str, Any]) -> bool:
        grammar = Grammar(self.render.with_kwargs(**kwargs), self.owner) if kwargs else self
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
            measured = self._measured(twins, first)
        except ValueError:  # a template that accepts some words only: nothing is known then
            return parts
        places = {(index, part.path) for index, part in _not_verbatim(twins, _zones(twins, measured, first))}
        return [(index, part) for index, part in parts if (index, part.path) in places]

    def _shows(self, messages: Sequence[Message], index: int, part: Part, trained: bool) -> bool:
        """Whether the rendering of a message changes with one of its parts: within the turn, where that is trained."""
        others = [
            [*messages[:index], replaced(messages[index], part, value), *messages[index + 1 :]]
            for value in changes(part)
        ]
        # An assistant's turn is shown where it is the last one: later on a template may leave its reasoning out
        is_turn = messages[index]["role"] == "assistant"
        for upto in ([] if trained and is_turn else [len(messages)]) + [index + 1] * is_turn:
            text, *texts = (self.render.attempt(self.form.fit(each[:upto])) for each in [list(messages), *others])
            if text not in texts:
                return True
        return False


def vanished(messages: Sequence[Message], index: int, part: Part) -> VanishedPartError:
    """The error for a part of message `index` that a template leaves out."""
    return VanishedPartError(
        f"Message {index} ({messages[index]['role']}): the chat template leaves out {part.describe()}, so it would "
        "be lost to training."
    )


def _zones(messages: Sequence[Message], measured: Sequence[Measured], first: int) -> list[str]:
    """Where each message must be shown: a trained turn in its span, any other in what the next turn read."""
    spans = iter([(each.text, span) for each in measured for span in each.spans])
    text, span = next(spans, (measured[-1].text, None))
    zones = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= first and span is not None:
            zones.append(text[span.start - span.printed : span.end])
            text, span = next(spans, (measured[-1].text, None))
        else:
            zones.append(text)
    return zones


def _not_verbatim(messages: Sequence[Message], zones: Sequence[str]) -> list[tuple[int, Part]]:
    return [
        (index, part)
        for index, (message, zone) in enumerate(zip(messages, zones, strict=True))
        for part in parts_of(message)
        if not is_verbatim(part, zone)
    ]
