r"""Quantities: a number, or an expression for one, with what it counts or measures.

`18 eggs`, `€18`, `7 cm`, `5\sqrt{2} \text{ cm}`, `25\%`, `2 hours 30 minutes` (one quantity, in minutes or hours).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from .notation import words
from .numerals import read_number
from .units import Unit, read_unit


_DECIMAL = re.compile(r"[+-]?[\d, ]*\.(\d+)")
_PERCENT = re.compile(r"(?i)(.+?)\s*(?:%|\b(?:per\s?cent|percentage(?: points?)?|pct)$)")
_MONEY = re.compile(r"([+-]?)\s*(?:US|CA|AU)?((?i:usd|eur|gbp|inr|rs\.?)(?=[\s\d])|[$€£¥₹])\s*([+-]?[\d.,]*\d)(.*)")
_THOUSANDS = re.compile(r"([\d.,]+)\s?([kKMB])")
_GLUED = re.compile(r"([+-]?[\d.,]*\d(?:/\d+)?|.*\\frac\{\d+\}\{\d+\})-?(?=[A-Za-z€£$¥₹¢'\"^μ])(.+)")
_PART = re.compile(
    r"\s*(?:,|and\b)?\s*(\d[\d,]*(?:\.\d+)?(?:\s+\d+/\d+|/\d+)?)\s*([^\d,]+?)(?=\s*(?:,|and\b)?\s*\d|$)"
)
_TEXT_TAIL = re.compile(r"(.*[^\s\\])\s*\\text\{([^{}]*)\}\s*((?:\^\s*\{?[23]\}?)?)")
_WORD_TAIL = re.compile(
    r"(.*[\d})!])\s+((?:(?:square|sq\.?|cubic|cu\.?) )?[A-Za-z]{2,}(?:[ /][A-Za-z]+)*(?:\s*\^\{?[23]\}?)?)"
)
_DEGREES = re.compile(r"(.*[^\s])\s*\^\{\\circ\}")
_ONE_LETTER = re.compile(r"[A-Za-z](?:\s*\^\s*\{?\d\}?)?")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*[.]?")
_FILLERS = frozenset(
    "a all altogether an apart away be deep each every high in left long longer more of old older on only remaining "
    "tall taller the there thick total wide".split()
)
_NO_LABEL = frozenset(
    "choose cos cubed factorial gcd if lcm least less ln log max minus mod most not or plus sin sqrt squared tan than "
    "through to until".split()
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Attributes:
        number (`Fraction | None`): exactly; `None` for an expression, which `latex` holds.
        latex (`str`): the number as LaTeX.
        units (`tuple[Unit, ...]`): the meanings of its unit of measurement; empty where it has none.
        label (`frozenset[str]`): what is counted, where that is no unit of measurement.
        percent (`bool`): whether it is in hundredths.
        doubtful (`bool`): whether the unit may be a variable (`5m`) or a short form (`5k`) may be a product.
        decimals (`int | None`): digits after the decimal point as written; `None` where it is no decimal.
    """

    number: Fraction | None
    latex: str
    units: tuple[Unit, ...] = ()
    label: frozenset[str] = frozenset()
    percent: bool = False
    doubtful: bool = False
    decimals: int | None = None


def read_quantity(text: str) -> Quantity | None:
    """A quantity from a normalized text ([`~trl_multiturn.verify.reading.notation.normalize`]); else `None`."""
    plain = words(text)
    for read in (_bare, _percent, _money, _compound, _counted, _short):
        quantity = read(plain)
        if quantity is not None:
            return quantity
    return _measured_expression(text)


def _bare(text: str) -> Quantity | None:
    number = read_number(text)
    if number is None:
        return None
    match = _DECIMAL.fullmatch(text)
    decimals = len(match[1]) if match else 0 if number.denominator == 1 else None
    latex = fraction_latex(number) if not decimals else decimal_latex(number, decimals)
    return Quantity(number, latex, decimals=decimals)


def fraction_latex(number: Fraction) -> str:
    """An exact number as LaTeX."""
    if number.denominator == 1:
        return str(number)
    sign = "-" if number < 0 else ""
    return rf"{sign}\frac{{{abs(number.numerator)}}}{{{number.denominator}}}"


def decimal_latex(number: Fraction, decimals: int) -> str:
    """An exact number with so many digits after the point."""
    digits = str(abs(int(number * 10**decimals))).zfill(decimals + 1)
    return f"{'-' if number < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"


def _percent(text: str) -> Quantity | None:
    match = _PERCENT.fullmatch(text)
    bare = _bare(match[1]) if match else None
    return replace(bare, percent=True) if bare else None


def _money(text: str) -> Quantity | None:
    """A sign of money stands before its number; every other unit behind: `$18 per hour` is `18 $ per hour`."""
    match = _MONEY.fullmatch(text)
    if not match:
        return None
    sign, unit, number, rest = match.groups()
    if scale := re.match(r"\s?([kKMB])\b|\s(million|billion|thousand)", rest):
        number, rest = f"{number} {_SHORT_SCALES.get(scale[1], scale[2])}", rest[scale.end() :]
    text = f"{sign}{number} {unit} {rest}".strip()
    return _compound(text) or _counted(text)


_SHORT_SCALES = {"k": "thousand", "K": "thousand", "M": "million", "B": "billion"}


def _short(text: str) -> Quantity | None:
    """`5k`, `1.2M`: thousands and millions, unless they are products."""
    match = _THOUSANDS.fullmatch(text)
    number = _bare(f"{match[1]} {_SHORT_SCALES[match[2]]}") if match else None
    return replace(number, latex=text, doubtful=True) if number else None


def _compound(text: str) -> Quantity | None:
    """Several parts of one dimension, each smaller than the one before: their sum, in the unit of the first."""
    parts = _parts(text)
    if len(parts) < 2:
        return None
    for first in parts[0][1]:
        same = [next((unit for unit in units if unit.dimension == first.dimension), None) for _, units in parts]
        if None in same:
            continue
        factors = [unit.factor for unit in same if unit is not None]
        if factors == sorted(factors, reverse=True) and len(set(factors)) == len(factors):
            amounts = (number * factor for (number, _), factor in zip(parts, factors, strict=True))
            number = sum(amounts, Fraction(0)) / factors[0]
            return Quantity(number, fraction_latex(number), (first,))
    return None


def _parts(text: str) -> list[tuple[Fraction, tuple[Unit, ...]]]:
    """The numbers of a text with their units; empty where it holds anything else."""
    parts, position = [], 0
    while position < len(text):
        match = _PART.match(text, position)
        number = read_number(match[1]) if match else None
        units = read_unit(match[2]) if match else ()
        if match is None or number is None or not units:
            return []
        parts.append((number, units))
        position = match.end()
    return parts


def _counted(text: str) -> Quantity | None:
    """A number and what follows it: a unit of measurement, or what is counted."""
    if match := _GLUED.fullmatch(text):
        quantity, tail = _bare(match[1]), match[2]
        if quantity and (units := read_unit(tail)):
            return replace(quantity, units=units, doubtful=_ONE_LETTER.fullmatch(tail) is not None)
    tokens = text.split(" ")
    if tokens[0].lower() in ("a", "an") and (units := read_unit(" ".join(tokens[1:]))):
        return Quantity(Fraction(1), "1", units, decimals=0)
    for count in range(len(tokens) - 1, 0, -1):
        quantity = _bare(" ".join(tokens[:count]))
        if quantity:
            tail = " ".join(tokens[count:])
            units, label = _unit_and_label(tail)
            if units or label is not None:
                return replace(quantity, units=units, label=label or frozenset())
    return None


def _unit_and_label(tail: str) -> tuple[tuple[Unit, ...], frozenset[str] | None]:
    """What follows a number: the unit of measurement it begins with, and what is counted; `None` for other text."""
    tail = re.sub(r"^(?:an?|the|of)\s+", "", tail.strip("()[]-, "))
    if units := read_unit(tail):
        return units, frozenset()
    tokens = tail.split()
    for count in range(min(4, len(tokens) - 1), 0, -1):
        units = read_unit(" ".join(tokens[:count]))
        if units and (len(tokens[count - 1]) > 2 or tokens[count] in ("of", "long", "wide", "tall", "high", "deep")):
            return units, _label(tokens[count:])
    return (), _label(tokens)


def _label(tokens: list[str]) -> frozenset[str] | None:
    if not 0 < len(tokens) <= 12 or not all(_WORD.fullmatch(token.strip(",()")) for token in tokens):
        return None
    kept = [token.strip(",().").lower() for token in tokens]
    if _NO_LABEL.intersection(kept) or any(len(token) == 1 and token != "a" for token in kept):
        return None
    if len(kept) == 1 and (len(kept[0]) < 3 or kept[0] in _ALPHABET):  # ab, xyz: variables
        return None
    return frozenset(_singular(token) for token in kept if token not in _FILLERS)


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _measured_expression(text: str) -> Quantity | None:
    r"""An expression with a unit behind it: `5\sqrt{2} \text{ cm}`, `4\pi square inches`, `\sqrt{3}^{\circ}`."""
    if match := _TEXT_TAIL.fullmatch(text):
        latex, tail = match[1], words(match[2] + match[3])
    elif match := _WORD_TAIL.fullmatch(text):
        latex, tail = match[1], match[2]
    elif (match := _DEGREES.fullmatch(text)) and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        latex, tail = match[1], r"^{\circ}"
    else:
        return None
    units, label = _unit_and_label(tail)
    if not units and not label:
        return None
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", latex) or not re.search(r"\d|\\pi|\\sqrt", latex):
        return None
    if re.search(r"\\text|[=<>,;]|\\(?:le|ge|in|cup|ne)(?![a-z])", latex):
        return None
    return Quantity(None, latex.rstrip(r"\ "), units, label or frozenset())
