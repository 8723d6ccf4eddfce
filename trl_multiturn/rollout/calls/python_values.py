"""Values in Python's spelling, read without running anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


MOST_LEVELS = 64
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*)?\.?\d+(?:[eE][-+]?\d+)?|[-+]?\d+\.")
_BARE = re.compile(r"[^,()\[\]{}]*")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_PLAIN = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": "", "/": "/"}
_KEEPS = "\\'\""


class PythonReader:
    """Reads a value at a place of a text.

    Args:
        text (`str`): the text.
        end_of_raw (`Callable`, *optional*): where a quoted text without escapes ends, given the place of its first
            character and its quote; by default quoted text has Python's escapes.
    """

    def __init__(self, text: str, end_of_raw: Callable[[int, str], int] | None = None):
        self._text = text
        self._end_of_raw = end_of_raw

    def value(self, at: int, levels: int = MOST_LEVELS) -> tuple[Any, int]:
        """The value at a place, and where it ends.

        Raises:
            `ValueError`: if there is none.
        """
        at = self.blanks(at)
        first = self._text[at : at + 1]
        if first in ("'", '"'):
            return self._quoted(at, first, raw=levels == MOST_LEVELS)
        if first in ("[", "(", "{"):
            if levels == 0:
                raise ValueError(f"The value is nested in more than {MOST_LEVELS} levels.")
            return self._container(at, first, levels - 1)
        word = _BARE.match(self._text, at)
        assert word is not None
        if not word[0].strip():
            raise ValueError(f"There is no value at character {at}.")
        return _bare(word[0].strip()), word.end()

    def blanks(self, at: int) -> int:
        """The next place that holds no blank."""
        while at < len(self._text) and self._text[at].isspace():
            at += 1
        return at

    def _quoted(self, at: int, quote: str, raw: bool) -> tuple[str, int]:
        if raw and self._end_of_raw is not None:
            end = self._end_of_raw(at + 1, quote)
            return self._text[at + 1 : end], end + 1
        mark = quote * 3 if self._text.startswith(quote * 3, at) else quote
        end = at + len(mark)
        while not self._text.startswith(mark, end):
            if end >= len(self._text):
                raise ValueError(f"The text that begins at character {at} has no end.")
            end += 2 if self._text[end] == "\\" else 1
        return _unescaped(self._text[at + len(mark) : end]), end + len(mark)

    def _container(self, at: int, opening: str, levels: int) -> tuple[Any, int]:
        closing = {"[": "]", "(": ")", "{": "}"}[opening]
        items: list[Any] = []
        mapping: dict[Any, Any] = {}
        at = self.blanks(at + 1)
        while not self._text.startswith(closing, at):
            item, at = self._key(at) if opening == "{" else self.value(at, levels)
            at = self.blanks(at)
            if opening == "{":
                if not self._text.startswith(":", at):
                    raise ValueError(f"A colon is missing at character {at}.")
                mapping[item], at = self.value(at + 1, levels)
                at = self.blanks(at)
            items.append(item)
            if self._text.startswith(",", at):
                at = self.blanks(at + 1)
            elif not self._text.startswith(closing, at):
                raise ValueError(f"A comma or {closing} is missing at character {at}.")
        return (mapping if opening == "{" else items), at + 1

    def _key(self, at: int) -> tuple[str, int]:
        if self._text[at : at + 1] in ("'", '"'):
            return self._quoted(at, self._text[at], raw=False)
        end = self._text.find(":", at)
        if end < 0:
            raise ValueError(f"There is no key at character {at}.")
        return self._text[at:end].strip(), end


def read_python(text: str) -> Any:
    """The value that a whole text spells.

    Raises:
        `ValueError`: if it spells none.
    """
    reader = PythonReader(text)
    value, end = reader.value(0)
    if reader.blanks(end) < len(text):
        raise ValueError(f"Something stands behind the value, at character {end}.")
    return value


def _bare(word: str) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if _NUMBER.fullmatch(word):
        digits = word.replace("_", "")
        return int(digits) if re.fullmatch(r"[-+]?\d{1,4000}", digits) else float(digits)
    return word


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    code = escape[1]
    if code in _PLAIN:
        return _PLAIN[code]
    if code in _KEEPS:
        return code
    if code[0] in "xuU" and len(code) > 1:
        number = int(code[1:], 16)
        return chr(number) if number < 0x110000 else escape[0]
    return chr(int(code, 8)) if code[0] in "01234567" else escape[0]
