"""Calls in Python's spelling: a name with keyword arguments in parentheses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .python_values import PythonReader
from .reading import Call, call_of
from .samples import NAME
from .tagged_body import first_that_goes_on
from .values import properties, typed


_START = re.compile(r"[\s,]*(?P<name>[\w.\-]+)\(")
_KEY = re.compile(r"[\s,]*(?P<key>\w+)\s*=\s*")
_NEXT_KEY = re.compile(r"\s*,?\s*\w+\s*=\s*[\['\"{\w\-]")
_NEXT_CALL = re.compile(r"\s*\)\s*,\s*[\w.\-]+\(")


@dataclass(frozen=True)
class PythonBody:
    """`name(key=value, …)`.

    Attributes:
        escaped (`bool`): whether the template escapes quoted text; otherwise it ends where a call can go on.
    """

    escaped: bool

    @classmethod
    def learn(cls, text: str, escaped: bool) -> PythonBody | None:
        """The body of a sample's one call."""
        body = cls(escaped)
        return body if body.spans(text) else None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a sample's calls stand."""
        found = []
        for match in re.finditer(re.escape(NAME) + r"\(", text):
            try:
                found.append((match.start(), self.read(text, match.start(), (), ())[1]))
            except ValueError:
                continue
        return found

    def read(
        self, text: str, at: int, tools: Sequence[Mapping[str, Any]], after: Sequence[re.Pattern[str]]
    ) -> tuple[list[Call], int]:
        """The call at a place, and where it ends.

        Raises:
            `ValueError`: if none can be read there.
        """
        start = _START.match(text, at)
        if start is None:
            raise ValueError("There is no name with a parenthesis behind it.")
        schemas = properties(tools, start["name"])
        reader = PythonReader(text, None if self.escaped else lambda place, quote: _raw_end(text, place, quote, after))
        arguments, at = {}, start.end()
        while (key := _KEY.match(text, at)) is not None:
            if key["key"] in arguments:
                raise ValueError(f"The argument `{key['key']}` stands twice.")
            value, at = reader.value(key.end())
            arguments[key["key"]] = _meant(value, text[key.end() : at], schemas.get(key["key"]))
        at = reader.blanks(at)
        if not text.startswith(")", at):
            raise ValueError("The parenthesis is not closed.")
        return [call_of(start["name"], arguments)], at + 1


def _meant(value: Any, written: str, schema: Mapping[str, Any] | None) -> Any:
    """A value as its schema has it: some templates quote numbers, others leave out the quotes of text."""
    if schema is None:
        return value
    if isinstance(value, str):
        return typed(value, schema)
    as_text = typed(written.strip(), schema)
    return as_text if isinstance(as_text, str) and not isinstance(value, (dict, list)) else value


def _raw_end(text: str, at: int, quote: str, after: Sequence[re.Pattern[str]]) -> int:
    """Where quoted text without escapes ends: at the first quote behind which the call goes on, or ends."""
    places = [match.span() for match in re.finditer(re.escape(quote), text[at:])]
    if not places:
        raise ValueError(f"The text that begins at character {at} has no end.")
    ends = [re.compile(rf"\s*\)(?:{pattern.pattern})") for pattern in after]
    moved = [(at + start, at + end) for start, end in places]
    return first_that_goes_on(text, moved, (_NEXT_KEY, _NEXT_CALL, *ends))[0]
