"""Calls whose arguments stand between marks, one after another, as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .json_bodies import NAME_PATTERN
from .literals import Literals, flexible
from .reading import Call, call_of
from .samples import COUNT, NAME, NUMBER, VALUE, WORTH, Samples
from .values import literal, properties, typed


_KEY = r"(?P<key>[^\s<>\"'={}\[\]/]+?)"
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)


@dataclass(frozen=True)
class TaggedBody:
    """A name, and for each argument an opening with its name and a closing.

    Attributes:
        start (`re.Pattern`): the name and what opens the arguments.
        key (`re.Pattern`): what opens an argument; of the groups `text` and `other` the one that matched says what
            its value is, where the template marks that.
        close (`str`): a pattern for what closes an argument; `{key}` in it stands for its name.
        cdata (`bool`): whether values may stand in CDATA sections.
    """

    start: re.Pattern[str]
    key: re.Pattern[str]
    close: str
    cdata: bool = False

    @classmethod
    def learn(cls, samples: Samples, literals: Literals, cdata: bool = False) -> TaggedBody | None:
        """The body of the samples' calls."""
        texts = samples.calls({"prbalpha": VALUE, "prbbeta": WORTH})
        numbers = samples.calls({"prbcount": NUMBER, "prbdigits": COUNT})
        marks = _marks(texts, "prbalpha", VALUE, "prbbeta", WORTH)
        others = _marks(numbers, "prbcount", str(NUMBER), "prbdigits", str(COUNT))
        if marks is None:
            return None
        head, of_text, between, end = marks
        close, lead, _ = literals.prefix(between, end)
        if not close.strip():
            return None
        blanks = between[: len(between) - len(between.lstrip())]  # those before the closing are no value's
        close = blanks + close.lstrip()
        opening = literals.suffix(head, lead)
        separator = lead[: len(lead) - len(opening)] if lead.endswith(opening) else ""
        head = head[: len(head) - len(opening)] if opening else head
        of_other = others[1] if others is not None else of_text
        ways = {"text": of_text} if of_other == of_text else {"text": of_text, "other": of_other}
        options = "|".join(f"(?P<{name}>{flexible(mark, value_after=True)})" for name, mark in ways.items())
        separated = f"(?:{flexible(separator)})?" if separator.strip() else ""
        return cls(
            start=re.compile(r"\s*" + NAME_PATTERN + flexible(head)),
            key=re.compile(rf"{separated}{flexible(opening)}{_KEY}(?:{options})"),
            close=flexible(close, value_before=True).replace(r"\{key\}", "{key}"),
            cdata=cdata,
        )

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a sample's calls stand."""
        found = []
        for match in re.finditer(NAME, text):
            try:
                calls, end = self.read(text, match.start(), (), ())
            except ValueError:
                continue
            if calls[0]["function"]["arguments"]:
                found.append((match.start(), end))
        return found

    def read(
        self, text: str, at: int, tools: Sequence[Mapping[str, Any]], after: Sequence[re.Pattern[str]]
    ) -> tuple[list[Call], int]:
        """The call at a place, and where it ends.

        Raises:
            `ValueError`: if none can be read there.
        """
        start = self.start.match(text, at)
        if start is None:
            raise ValueError("There is no name.")
        schemas = properties(tools, start["name"])
        arguments: dict[str, Any] = {}
        at = start.end()
        while (key := self.key.match(text, at)) is not None:
            if key["key"] in arguments:
                raise ValueError(f"The argument `{key['key']}` stands twice.")
            written, at = self._written(text, key, after)
            arguments[key["key"]] = self._value(written, key, schemas)
        return [call_of(start["name"], arguments)], at

    def _written(self, text: str, key: re.Match[str], after: Sequence[re.Pattern[str]]) -> tuple[str, int]:
        """What stands between an argument's opening and its closing, which may stand in the argument, too."""
        closing = re.compile(self.close.replace("{key}", re.escape(key["key"])))
        start = _behind_cdata(text, key.end()) if self.cdata else key.end()
        places = [match.span() for match in closing.finditer(text, start)]
        if not places:
            raise ValueError(f"The argument `{key['key']}` is not closed.")
        begin, end = first_that_goes_on(text, places, (self.key, *after))
        return text[key.end() : begin], end

    def _value(self, written: str, key: re.Match[str], schemas: Mapping[str, Any]) -> Any:
        if self.cdata and (sections := _CDATA.findall(written)) and not _CDATA.sub("", written).strip():
            written = "".join(sections)
        if "other" in self.key.groupindex:
            return written if key["text"] is not None else literal(written)
        return typed(written, schemas.get(key["key"]))


def _marks(text: str | None, key: str, value: str, last: str, worth: str) -> tuple[str, str, str, str] | None:
    """What stands between name, first argument, its value, second argument, its value and the end."""
    if text is None:
        return None
    places, at = [], 0
    for word in (NAME, key, value, last, worth):
        at = text.rfind(NAME, 0, text.find(key)) if word == NAME else text.find(word, at)
        if at < 0:
            return None
        places.append((at, at := at + len(word)))
    head, opened, between, again = (text[end:start] for (_, end), (start, _) in zip(places, places[1:], strict=False))
    end = text[places[-1][1] :]
    if opened != again:
        return None
    # A template may close with the name of the argument
    return head, opened, between.replace(key, "{key}", 1), end.replace(last, "{key}", 1)


def first_that_goes_on(
    text: str, places: Sequence[tuple[int, int]], following: Sequence[re.Pattern[str]]
) -> tuple[int, int]:
    """The first of the places where an argument may end behind which one of the patterns follows.

    The last pattern counts only where no place has one of the others behind it; where it has not either, the first
    place is as good as any.
    """
    for patterns in (following[:-1] or following, following):
        for place in places:
            if any(pattern.match(text, place[1]) for pattern in patterns):
                return place
    return places[0]


def _behind_cdata(text: str, at: int) -> int:
    section = _CDATA.match(text, at)
    while section is not None:
        at = section.end()
        section = _CDATA.match(text, at)
    return at
