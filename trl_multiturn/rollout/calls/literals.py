"""The literal text around calls, as patterns that allow other blanks than the template prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix

from .samples import IDS, NAME


# Tags and the beginnings of tags stay whole, so that two of them have nothing in common but by being the same
_TAG = r"</?[^<>\s]+>|</?[^\s<>=\"']+=?|"
_PIECE = r"\[[A-Z_/]+\]|\w+|\s+|."
_IDENTITY = r"[^\s<>\[\]{}\"']+?"


class Literals:
    """Cuts and patterns of the literal text that a template prints around calls.

    Args:
        added (`Sequence[str]`): the tokenizer's special tokens, longest first.
    """

    def __init__(self, added: Sequence[str]):
        known = "".join(f"{re.escape(token)}|" for token in added if not token.isspace())
        self._piece = re.compile(_TAG + known + _PIECE, re.DOTALL)

    def pieces(self, text: str) -> list[str]:
        """Special tokens, tags, words and punctuation of a text, without blanks."""
        return [piece for piece in self._piece.findall(text) if piece.strip()]

    def prefix(self, first: str, second: str) -> tuple[str, str, str]:
        """What two texts begin with, but for blanks, as the first has it; and the rest of each."""
        count = len(commonprefix([self.pieces(first), self.pieces(second)]))
        shared, rest = self.cut(first, count)
        return shared, rest, self.cut(second, count)[1]

    def suffix(self, first: str, second: str) -> str:
        """What two texts end with, but for blanks, as the first has it."""
        ours, theirs = self.pieces(first), self.pieces(second)
        count = len(commonprefix([ours[::-1], theirs[::-1]]))
        return self.cut(first, len(ours) - count)[1]

    def cut(self, text: str, count: int) -> tuple[str, str]:
        """Cuts a text behind `count` of its pieces; the blanks between stand in the second part."""
        end = 0
        for piece in self.pieces(text)[:count]:
            end = text.index(piece, end) + len(piece)
        return text[:end], text[end:]

    def marker(self, text: str) -> str:
        """The first special token or tag of a text; `""` where it has none."""
        return next((piece for piece in self.pieces(text) if _is_mark(piece)), "")


def _is_mark(piece: str) -> bool:
    return len(piece) > 2 and not piece[0].isalnum()


def flexible(literal: str, *, value_before: bool = False, value_after: bool = False) -> str:
    """A pattern for a literal: blanks are optional; beside a value exactly those that the template prints count.

    Ids, numbers and names of the samples stand for any.
    """
    lead = literal[: len(literal) - len(literal.lstrip())] if value_before else ""
    rest = literal[len(lead) :]
    trail = rest[len(rest.rstrip()) :] if value_after else ""
    core = rest[: len(rest) - len(trail)]
    spaced = r"\s*".join(_word(word) for word in core.split())
    if spaced and not value_before:
        spaced = r"\s*" + spaced
    if spaced and not value_after:
        spaced += r"\s*"
    return _optional(lead) + spaced + _optional(trail)


def _optional(blanks: str) -> str:
    return "".join(re.escape(blank) + "?" for blank in blanks)


def _word(word: str) -> str:
    pattern = re.escape(word)
    for sample in (*IDS, NAME):
        pattern = pattern.replace(re.escape(sample), _IDENTITY)
    return re.sub(r"(?<![\w\\])\d+(?!\w)", r"\\d+", pattern)
