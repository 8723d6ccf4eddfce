"""Calls whose arguments are JSON: an object that holds the name, too, or a name and an object behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .literals import flexible
from .reading import Call, call_of
from .samples import IDS, NAME, SAMPLE
from .values import DECODER


Path = tuple[str, ...]
NAME_PATTERN = r"(?P<name>[\w.\-]+)(?![\w.\-])"


@dataclass(frozen=True)
class RecordBody:
    """An object with name and arguments, or a list of such objects.

    Attributes:
        name (`tuple[str]`, *optional*): the way to the name; `None` where the name is the key of the arguments.
        arguments (`tuple[str]`): the way to the arguments, or to the object with the name as key.
        identity (`tuple[str]`, *optional*): the way to the id.
        lead (`str`): what a sample's object begins with, up to the name.
    """

    name: Path | None
    arguments: Path
    identity: Path | None = None
    lead: str = ""

    @classmethod
    def learn(cls, text: str) -> RecordBody | None:
        """The body of a sample's one call."""
        found = next(_documents(text), None)
        if found is None:
            return None
        record = found[0][0] if isinstance(found[0], list) and found[0] else found[0]
        ways = {name: path for path, value in _leaves(record) for name in _roles(value)}
        keyed = next((path[:-1] for path, value in _leaves(record) if path and path[-1] == NAME), None)
        if "name" in ways and "arguments" in ways:
            lead = text[found[1] : found[2]].partition(NAME)[0]
            return cls(ways["name"], ways["arguments"], ways.get("identity"), lead)
        return None if keyed is None else cls(None, keyed)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a sample's calls stand."""
        return [(start, end) for _, start, end in _documents(text)]

    def read(
        self, text: str, at: int, tools: Sequence[Mapping[str, Any]], after: Sequence[re.Pattern[str]]
    ) -> tuple[list[Call], int]:
        """The calls at a place, and where they end.

        Raises:
            `ValueError`: if none can be read there.
        """
        start = at + len(text[at:]) - len(text[at:].lstrip())
        if text[start : start + 1] not in ("{", "["):
            raise ValueError("There is no object.")
        document, end = DECODER.raw_decode(text, start)
        records = document if isinstance(document, list) else [document]
        calls = [call for record in records for call in self._calls(record)]
        if not calls:
            raise ValueError("There is no call in the list.")
        return calls, end

    def _calls(self, record: Any) -> list[Call]:
        if self.name is None:
            named = _at(record, self.arguments)
            if not isinstance(named, dict) or not named:
                raise ValueError("There is no name.")
            return [call_of(str(name), arguments) for name, arguments in named.items()]
        name, identity = _at(record, self.name), _at(record, self.identity) if self.identity else None
        if not isinstance(name, str):
            raise ValueError("There is no name.")
        arguments = _at(record, self.arguments)
        if arguments is None and any(isinstance(value, dict) for value in record.values()):
            if len(self.arguments) == 1:
                raise ValueError(f"There is no `{self.arguments[-1]}`.")
        identity = str(identity) if isinstance(identity, (str, int)) else None
        return [call_of(name, {} if arguments is None else arguments, identity)]


@dataclass(frozen=True)
class NamedBody:
    """A name and an object of arguments behind it."""

    start: re.Pattern[str]

    @classmethod
    def learn(cls, text: str) -> NamedBody | None:
        """The body of a sample's one call."""
        for match in re.finditer(NAME, text):
            brace = text.find("{", match.end())
            if brace >= 0 and _decoded(text, brace)[0] == SAMPLE:
                between = text[match.end() : brace]
                if len(between) < 80 and '"' not in between:
                    return cls(re.compile(r"\s*" + NAME_PATTERN + flexible(between) + r"\s*(?=\{)"))
        return None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a sample's calls stand."""
        found = []
        for match in re.finditer(NAME, text):
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
        start = self.start.match(text, at)
        if start is None:
            raise ValueError("There is no name with arguments behind it.")
        arguments, end = DECODER.raw_decode(text, start.end())
        return [call_of(start["name"], arguments)], end


def _documents(text: str) -> Iterator[tuple[Any, int, int]]:
    """JSON documents of a sample in which its tool is called, outermost first, with their places."""
    at = 0
    while at < len(text):
        if text[at] in "{[":
            document, end = _decoded(text, at)
            if end > at and any(NAME in (value, *path[-1:]) for path, value in _leaves(document)):
                yield document, at, end
                at = end
                continue
        at += 1


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except ValueError:
        return None, at


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    yield path, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)


def _roles(value: Any) -> list[str]:
    if value == NAME:
        return ["name"]
    if value == SAMPLE:
        return ["arguments"]
    return ["identity"] if value == IDS[0] else []


def _at(record: Any, path: Path) -> Any:
    for key in path:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record
