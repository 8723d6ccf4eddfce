r"""Two quantities: numbers exactly, units converted, percentages, and what a rounded number may stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from .reading.quantities import Quantity, fraction_latex
from .reading.units import Unit


_RADIANS = frozenset({("radian", 1)})
_DEGREES = frozenset({("degree", 1)})
_CALENDAR = (frozenset({("month", 1)}), frozenset({("time", 1)}))
# amounts of a dimension that a question may ask for, in base units: seconds, minutes, hours, days, weeks; cm, m, km, …
_ASKED_FOR = {"time": (1, 60, 3600, 86400, 604800), "month": (1, 12), "dollar": (1, "1/100"), "euro": (1, "1/100"),
              "length": (1, "1/100", "1/1000", 1000, "0.0254", "0.3048", "0.9144"),
              "mass": (1, 1000, "453.59237", "28.349523125")}  # fmt: skip
_ROUNDED_DIGITS = 6  # as many as math-verify compares
_FLOAT_DIGITS = 12  # Python prints up to 17 digits, of which the last few may be noise


@dataclass(frozen=True)
class Open:
    """What math-verify has to decide: every gold answer against its answer, all of which must be equal."""

    pairs: tuple[tuple[str, str], ...]

    def decide(self, verdicts: Sequence[bool | None]) -> bool | None:
        """The verdict on the whole: `False` where one pair differs, else `None` where one is not known."""
        return False if False in verdicts else None if None in verdicts else True


Outcome = bool | None | Open


def compare_quantities(gold: Quantity, answer: Quantity, in_percent: bool = False) -> Outcome:
    """Whether two quantities are equal; one without a unit may mean the other's."""
    if gold.percent != answer.percent:
        return _percentages(gold, answer, in_percent)
    if gold.units and answer.units:
        return _measured(gold, answer)
    if gold.number is None or answer.number is None:
        return Open(((value_latex(gold, answer.latex), value_latex(answer, gold.latex)),))
    same = _numbers(gold, answer)
    if same is not True:
        return None if same is False and _in_another_unit(gold, answer) else same
    if gold.doubtful is not answer.doubtful or (gold.label and answer.label and (gold.units or answer.units)):
        return None  # 5m may be a product, and 5 cups may be the 5 beans
    return _same_label(gold, answer)


def _same_label(gold: Quantity, answer: Quantity) -> bool | None:
    """Two nouns for what is counted may mean the same, as `eggs` and `chicken eggs` do."""
    return True if gold.label <= answer.label or answer.label <= gold.label else None


def _percentages(gold: Quantity, answer: Quantity, in_percent: bool) -> bool | None:
    percent, plain = (gold, answer) if gold.percent else (answer, gold)
    if percent.number is None or plain.number is None:
        return None
    if percent.number == 100 * plain.number:
        return not plain.units or None
    if percent.number == plain.number and not plain.units:  # the sign may have been left away
        return True if in_percent else None
    return False


def _measured(gold: Quantity, answer: Quantity) -> Outcome:
    """Two quantities with units: equal in the meanings of them that have one dimension."""
    pairs = [(one, other) for one, other in product(gold.units, answer.units) if one.dimension == other.dimension]
    if not pairs:
        return _angles(gold, answer) or _unlike(gold, answer)
    if gold.number is not None and answer.number is not None:
        same = any(one.amount(gold.number) == other.amount(answer.number) for one, other in pairs)
        return _same_label(gold, answer) if same else False
    one, other = pairs[0]
    factor = one.factor / other.factor
    latex = gold.latex if factor == 1 else rf"{fraction_latex(factor)} \cdot ({gold.latex})"
    return Open(((latex, answer.latex),))


def _angles(gold: Quantity, answer: Quantity) -> Open | None:
    dimensions = [{unit.dimension for unit in quantity.units} for quantity in (gold, answer)]
    if not any(_RADIANS in found for found in dimensions) or not any(_DEGREES in found for found in dimensions):
        return None
    return Open(((value_latex(gold, r"\pi"), value_latex(answer, r"\pi")),))


def _unlike(gold: Quantity, answer: Quantity) -> bool | None:
    """Two dimensions are different, but that a month has no fixed number of days."""
    both = {unit.dimension for unit in (*gold.units, *answer.units)}
    return None if both.issuperset(_CALENDAR) else False


def _in_another_unit(gold: Quantity, answer: Quantity) -> bool:
    """Whether a bare number is the other quantity in another unit: `90` may be 1.5 hours."""
    measured, bare = (gold, answer) if gold.units else (answer, gold)
    if not measured.units or bare.units or bare.label or measured.number is None or bare.number is None:
        return False
    return any(
        bare.number * Fraction(amount) == unit.amount(measured.number)
        for unit in measured.units
        for amount in _amounts(unit)
    )


def _amounts(unit: Unit) -> tuple[int | str, ...]:
    ((base, power), *rest) = unit.dimension or (("", 0),)
    return _ASKED_FOR.get(base, ()) if power == 1 and not rest else ()


def _numbers(gold: Quantity, answer: Quantity) -> bool | None:
    """Exactly equal, or one the other rounded to many digits."""
    assert gold.number is not None and answer.number is not None
    if gold.number == answer.number:
        return True
    if gold.decimals is not None and answer.decimals is not None:
        noise = _float_noise(gold, answer) or _float_noise(answer, gold)
        return True if noise else None if answer.decimals >= 10 and _may_be_rounded(gold, answer.number) else False
    if gold.decimals is not None:
        rounded = _rounds_to(answer.number, gold, _ROUNDED_DIGITS)
        return True if rounded else None if _may_be_rounded(gold, answer.number) else False
    return answer.decimals is not None and _rounds_to(gold.number, answer, _ROUNDED_DIGITS)


def _may_be_rounded(gold: Quantity, exact: Fraction) -> bool:
    """Whether a gold answer with two to five decimals may be rounded because the question said so."""
    assert gold.decimals is not None
    return 2 <= gold.decimals <= 5 and _rounds_to(exact, gold, 3)


def _significant_digits(decimal: Quantity) -> int:
    assert decimal.number is not None and decimal.decimals is not None
    return len(str(abs(int(decimal.number * 10**decimal.decimals))).lstrip("0"))


def _rounds_to(exact: Fraction, rounded: Quantity, digits: int) -> bool:
    """Whether a number rounds, or is cut, to one that is written with so many significant digits."""
    assert rounded.number is not None and rounded.decimals is not None
    if _significant_digits(rounded) < digits:
        return False
    unit = Fraction(1, 10**rounded.decimals)
    error = abs(exact - rounded.number)
    return error <= unit / 2 or (rounded.decimals >= 10 and error < unit)


def _float_noise(short: Quantity, long: Quantity) -> bool:
    """Whether a number is what binary arithmetic makes of a shorter one: 0.30000000000000004 of 0.3."""
    if not long.number or not 15 <= _significant_digits(long) <= 17:
        return False
    scale = _FLOAT_DIGITS - 1 - math.floor(math.log10(abs(long.number)))
    return round(long.number, scale) == short.number


def value_latex(quantity: Quantity, beside: str) -> str:
    """A quantity as it compares with an expression: percentages as hundredths, degrees in radians beside π."""
    if quantity.percent and quantity.number is not None:
        return fraction_latex(quantity.number / 100)
    if "\\pi" in beside and any(unit.dimension == _DEGREES for unit in quantity.units):
        return rf"\frac{{{quantity.latex} \cdot \pi}}{{180}}"
    return quantity.latex


def compare_loosely(gold: str, answer: str) -> bool | Open:
    """Numbers that differ by at most one part in 10,000 are equal, also times or over 100 (ToRA, arXiv:2309.17452)."""
    if gold.strip().casefold() == answer.strip().casefold():
        return True
    golds, answers = _as_float(gold), _as_float(answer)
    if golds is None or answers is None:
        return Open(((gold, answer),))
    return any(math.isclose(golds * scale, answers, rel_tol=1e-4) for scale in (0.01, 1.0, 100.0))


def _as_float(text: str) -> float | None:
    bare = text.strip().strip("$").replace(",", "").replace("\\", "")
    try:
        return float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        return None
