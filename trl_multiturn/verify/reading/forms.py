r"""What a text says: a quantity, a time, a date, a ratio, a letter, words, a list, a tuple, or an expression.

What is read here is compared exactly; an expression is math-verify's.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .notation import normalize, words
from .numerals import BasedNumber, read_based
from .quantities import Quantity, read_quantity
from .times import Clock, Date, Ratio, read_clock, read_date, read_ratio


# longer answers are left to math-verify as they are
_MAX_LENGTH = 400

_DIGITS = re.compile(r"-?\d{1,15}(?:\.\d{1,9})?")
_CHOICE = re.compile(r"(?:(?i:option|choice|answer)\s+)?\(?([A-Z])(?:\)|\.|:|$)\s*(.*)")
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_PHRASE = re.compile(r"[^\W\d_][^\d_=<>+*/^\\|{}\[\]%$]*")
_STATES = re.compile(
    r"(?i)(?:.*\b(?:is|are|was|were|equals|be|get|gives?|answer|total|has|have)\b|[A-Za-z' ]+:)[:\s]*(.+)"
)
_NUMBER = re.compile(r"(?<![\w.,])[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w.,/]*\d)")
# a number beside one of these is not what the sentence states
_HEDGES = frozenset(
    "between divided double either exceed exceeds fewer greater half if least less log maximum minimum minus more "
    "most neither no not or over plus root sqrt than times to triple twice unless until up".split()
)
_NAME = r"(?:\\text\{[^{}]*\}|\\(?:angle|overline|triangle|alpha|beta|gamma|theta|lambda|mu)|[A-Za-z'])"
_SYMBOL = rf"(?:{_NAME}\s*)+(?:_\s*\{{?\w+\}}?)?"
_ASSIGNED = re.compile(rf"({_SYMBOL}(?:\s*\([A-Za-z\d, ]*\))?|\([A-Za-z](?:\s*,\s*[A-Za-z])*\))\s*=\s*(?!.*[=<>])(.+)")
_MEMBER = re.compile(r"[A-Za-z]\s*\\in(?![A-Za-z])\s*(?=\S)")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!\\])=")


@dataclass(frozen=True)
class Choice:
    """A letter: a choice or a variable, and the text behind it (`B. 12`)."""

    letter: str
    text: str


@dataclass(frozen=True)
class Phrase:
    """Words, in lower case and without articles."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Items:
    """Texts in no order: a list, or a set in braces."""

    items: tuple[str, ...]
    braced: bool = False


@dataclass(frozen=True)
class Group:
    """Texts in their order, with the brackets around them: a tuple, a vector, or an interval."""

    opening: str
    items: tuple[str, ...]
    closing: str


Form = Quantity | BasedNumber | Clock | Date | Ratio | Choice | Phrase | Items | Group


@dataclass(frozen=True)
class Reading:
    """A text in one notation, and what it says.

    Attributes:
        text (`str`): the text as [`~trl_multiturn.verify.reading.notation.normalize`] has it, for math-verify.
        form (`Form | None`): what it says; `None` for an expression.
        ratio (`Ratio | None`): the other meaning of a time of day such as `10:30`.
    """

    text: str
    form: Form | None
    ratio: Ratio | None = None


@functools.lru_cache(maxsize=65_536)
def read(text: str) -> Reading:
    """What a text says, wherever it comes from: a gold answer or a model's."""
    if _DIGITS.fullmatch(text):  # most answers: a tenth of the time
        return Reading(text, read_quantity(text))
    if len(text) > _MAX_LENGTH:
        return Reading(text, None)
    normal = _MEMBER.sub("", normalize(text), count=1)
    plain = words(normal)
    reading = Reading(normal, _form(normal, plain), read_ratio(plain))
    if reading.form is None or isinstance(reading.form, Phrase):
        stated = _stated(plain)
        if stated is not None and stated != text:
            return read(stated)
    return reading


def _form(normal: str, plain: str) -> Form | None:
    for reader in (read_based, read_clock, read_date, read_ratio):
        form: Form | None = reader(plain)
        if form is not None:
            return form
    return read_quantity(normal) or _choice(plain) or _group(normal) or _items(normal) or _phrase(plain)


def _choice(text: str) -> Choice | None:
    if match := _LETTER.fullmatch(text):
        return Choice(match[1], "")
    match = _CHOICE.fullmatch(text)
    return Choice(match[1], match[2]) if match else None


def _group(text: str) -> Group | None:
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    items = split(text[1:-1])
    return Group(text[0], items, text[-1]) if len(items) > 1 else None


def _items(text: str) -> Items | None:
    inner = _braced(text)
    if inner is not None:
        described = not inner.strip() or re.search(r"\\mid|[:|]", inner)  # {x : x > 2}
        items = () if described else split(inner)
        return Items(items, braced=True) if items else None
    text = re.sub(r"\\text\{\s*(and|or)\s*\}", r" \1 ", text)
    items = split(re.sub(r"\s*(?:[,;]\s*)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])\s*", ",", text).replace(";", ","))
    if len(items) < 2 or any(len(words(item).split()) > 3 for item in items):
        return None
    return Items(_without_names(items))


def _braced(text: str) -> str | None:
    for opening, closing in ((r"\{", r"\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            return inner if r"\{" not in inner and (opening == r"\{" or "," in inner) else None
    return None


def _without_names(items: tuple[str, ...]) -> tuple[str, ...]:
    """`x = 1, x = 2` is a list of values of one variable; `x = 1, y = 2` stays what it is."""
    assigned = [_ASSIGNED.fullmatch(item) for item in items]
    if len({match[1].strip() if match else None for match in assigned}) > 1:
        return items
    return tuple(match[2] if match else item for match, item in zip(assigned, items, strict=True))


def split(text: str) -> tuple[str, ...]:
    """The parts of a text between commas that stand in no brackets; empty where brackets do not balance."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return ()
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return tuple(parts) if depth == 0 and all(parts) else ()


def _phrase(text: str) -> Phrase | None:
    if not _PHRASE.fullmatch(text) or len(text) < 2:
        return None
    found = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text.casefold())
    kept = tuple(word.removesuffix("'s") for word in found if word not in ("a", "an", "the"))
    return Phrase(kept) if kept else None


def _stated(text: str) -> str | None:
    """What a sentence states: what stands behind `is`, or the only number in it; `None` where that is not plain."""
    if len(text.split()) < 2 or _HEDGES.intersection(re.findall("[a-z]+", text.lower())):
        return None
    if match := _STATES.fullmatch(text):
        form = _form(normalize(match[1]), words(normalize(match[1])))
        if form is not None and not isinstance(form, Phrase):
            return match[1]
    found = re.findall(r"[A-Za-z]+", text)
    variables = any(len(word) == 1 and word not in "aAI" for word in found)
    if len(found) < 2 or variables or max(map(len, found)) < 3 or re.search(r"\\[a-z]|[=<>^]", text):
        return None
    numbers = list(_NUMBER.finditer(text))
    return text[numbers[0].start() :] if len(numbers) == 1 else None


def last_side(text: str) -> str | None:
    """The last side of an equation that only names or works out a value: `x = 10`, `3 + 7 = 10`; else `None`."""
    if match := _ASSIGNED.fullmatch(text):
        return match[2]
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) < 2 or not all(sides) or re.search(r"[<>]|\\(?:le|ge|ne)(?![a-z])", text):
        return None
    named = re.fullmatch(_SYMBOL, sides[0]) is not None
    letters = [_VARIABLE.search(words(side)) is not None for side in sides]
    if not any(letters[named:]):
        return sides[-1]
    return sides[0] if letters == [False, True] and re.fullmatch(_SYMBOL, sides[1]) else None  # 2 = x
