r"""Units of measurement: which name means what, and how much one is in another.

A name may have several meanings (a pound is a mass and money, `'` a foot and a minute of arc); all are kept, and a
comparison takes the pair that has one dimension.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


Dimension = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Unit:
    """`(number + offset) * factor` is the amount in the base units of the dimension."""

    factor: Fraction
    dimension: Dimension
    offset: Fraction = Fraction(0)

    def __mul__(self, other: Unit) -> Unit:
        powers = Counter(dict(self.dimension))
        powers.update(dict(other.dimension))
        return Unit(self.factor * other.factor, frozenset((base, n) for base, n in powers.items() if n))

    def __pow__(self, exponent: int) -> Unit:
        return Unit(self.factor**exponent, frozenset((base, n * exponent) for base, n in self.dimension))

    def amount(self, number: Fraction) -> Fraction:
        """A number of this unit, in base units."""
        return (number + self.offset) * self.factor


# (names, how many, of what). `*` takes metric prefixes in full (kilo-), `~` their symbols (k-).
# The last column is a base unit where nothing above defines it. All numbers are exact by definition.
_DEFINITIONS = (
    ("*meter *metre ~m", "1", "[length]"),
    ("inch inches in \"", "0.0254", "m"),
    ("foot feet ft '", "12", "inch"),
    ("yard yd", "3", "foot"),
    ("mile mi", "5280", "foot"),
    ("*gram *gramme ~g", "1", "[mass]"),
    ("pound lb", "453.59237", "g"),
    ("ounce oz", "1/16", "lb"),
    ("ton", "2000", "lb"),
    ("ton tonne t", "1000000", "g"),
    ("*second ~s sec", "1", "[time]"),
    ("minute min m", "60", "s"),
    ("hour h hr", "60", "min"),
    ("day", "24", "h"),
    ("week wk", "7", "day"),
    ("month mo", "1", "[month]"),
    ("year yr", "12", "month"),
    ("decade", "10", "year"),
    ("century centuries", "100", "year"),
    ("*liter *litre ~l ~L", "1/1000", "m^3"),
    ("cc", "1", "cm^3"),
    ("gallon gal", "231", "inch^3"),
    ("quart qt", "1/4", "gallon"),
    ("pint pt", "1/8", "gallon"),
    ("cup", "1/16", "gallon"),
    ("ounce oz floz", "1/128", "gallon"),
    ("tablespoon tbsp", "1/2", "floz"),
    ("teaspoon tsp", "1/3", "tablespoon"),
    ("acre", "4840", "yd^2"),
    ("hectare ha", "10000", "m^2"),
    ("mph", "1", "mile/hour"),
    ("kmh kph kmph", "1", "km/hour"),
    ("knot", "1852", "m/hour"),
    ("fps", "1", "ft/s"),
    ("dollar $ usd buck", "1", "[dollar]"),
    ("cent c ¢", "1/100", "dollar"),
    ("euro € eur", "1", "[euro]"),
    ("cent", "1/100", "euro"),
    ("pound £ gbp", "1", "[sterling]"),
    ("penny pence p", "1/100", "£"),
    ("penny pennies", "1/100", "dollar"),
    ("yen ¥ jpy", "1", "[yen]"),
    ("rupee ₹ rs rs. inr", "1", "[rupee]"),
    ("paisa paise", "1/100", "rupee"),
    ("yuan cny rmb", "1", "[yuan]"),
    ("degree deg ^{\\circ}", "1", "[degree]"),
    ("minute arcminute '", "1/60", "^{\\circ}"),
    ("second arcsecond \"", "1/3600", "^{\\circ}"),
    ("revolution", "360", "degree"),
    ("radian rad", "1", "[radian]"),
    ("*newton ~N", "1", "kg*m/s^2"),
    ("*joule ~J", "1", "N*m"),
    ("*calorie ~cal", "4.184", "J"),
    ("*watt ~W", "1", "J/s"),
    ("*watthour ~Wh", "3600", "J"),
    ("*pascal ~Pa", "1", "N/m^2"),
    ("*hertz ~Hz", "1", "s^-1"),
    ("*volt ~V", "1", "[volt]"),
    ("*ampere *amp ~A", "1", "[ampere]"),
    ("*ohm", "1", "[ohm]"),
    ("*mole ~mol", "1", "[mole]"),
    ("*byte", "8", "[bit]"),
    ("bit", "1", "[bit]"),
    ("kelvin", "1", "[kelvin]"),
    ("unit", "1", "[unit]"),
    ("person people", "1", "[person]"),
)  # fmt: skip
_PREFIXES = {"kilo k": "1000", "centi c": "1/100", "milli m": "1/1000", "mega M": "1000000", "deci d": "1/10",
             "micro μ": "1/1000000", "nano n": "1/1000000000", "giga G": "1000000000"}  # fmt: skip
# a unit beside a number only where nothing else is meant: 5 N is a force, 5 n is not, and 5 A may be either
_LONE_LETTERS = frozenset("msghlLNJWV$€£¥₹¢'\"")
_TEMPERATURES = {"c": Unit(Fraction(1), frozenset({("kelvin", 1)}), Fraction("273.15")),
                 "f": Unit(Fraction(5, 9), frozenset({("kelvin", 1)}), Fraction("459.67"))}  # fmt: skip
_TEMPERATURE = re.compile(r"(?i)(?:\^\{\\circ\}|degrees?)\s*(celsius|fahrenheit|centigrade|[CF])|(celsius|fahrenheit)")

_METERS_PER_SECOND = re.compile(r"\bms(?=\s*\^\s*\{?-[12])")  # ms^{-1} is no millisecond

_TOKEN = re.compile(r"""
    (?P<frac>\\frac\s*\{(?P<above>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\s*\{(?P<below>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\})
  | (?P<per>/|\bper\b|\ban?\b)
  | (?P<times>\\cdot|\\times|\*|⋅|-(?=[A-Za-z]))
  | (?P<before>(?i:square|sq\.?|cubic|cu\.?)\s)
  | (?P<after>(?i:squared|cubed))
  | \^\s*\{?\s*(?P<power>-?[1-9])\s*\}?
  | (?P<name>\^\{\\circ\}|[A-Za-zμ]+\.?|[$€£¥₹¢'"])(?P<digit>[23](?!\d))?
  | \s+
""", re.VERBOSE)  # fmt: skip


@functools.cache
def _table() -> dict[str, tuple[Unit, ...]]:
    table: dict[str, tuple[Unit, ...]] = {}

    def add(name: str, unit: Unit) -> None:
        table[name] = (*table.get(name, ()), unit)

    for names, number, of_what in _DEFINITIONS:
        base = re.fullmatch(r"\[(\w+)\]", of_what)
        one = Unit(Fraction(1), frozenset({(base[1], 1)})) if base else _algebra(of_what, table)[0]
        for name in names.split():
            unit = Unit(one.factor * Fraction(number), one.dimension)
            add(name.lstrip("*~"), unit)
            for prefixes, factor in _PREFIXES.items() if name[0] in "*~" else ():
                prefix = prefixes.split()["*~".index(name[0])]
                add(prefix + name[1:], Unit(unit.factor * Fraction(factor), unit.dimension))
    return table


def _named(name: str, table: dict[str, tuple[Unit, ...]]) -> tuple[Unit, ...]:
    """The meanings of a name: as it stands, in lower case, and in the singular."""
    name = name.removesuffix(".")
    lower = name.lower()
    singular = [lower[: -len(ending)] for ending in ("s", "es") if lower.endswith(ending)]
    for candidate in (name, *((lower, *singular) if len(name) > 1 else ())):
        if candidate in table and (len(candidate) > 1 or candidate == name):
            return table[candidate]
    return ()


def read_unit(text: str) -> tuple[Unit, ...]:
    r"""The meanings of a unit as written (`cm`, `square feet`, `km/h`, `\frac{m}{s^2}`); empty for anything else."""
    text = _METERS_PER_SECOND.sub("m s", text.strip())
    if match := _TEMPERATURE.fullmatch(text):
        return (_TEMPERATURES[(match[1] or match[2])[0].lower()],)
    if len(text) == 1 and text not in _LONE_LETTERS:
        return ()
    return _algebra(text, _table()) if len(text) <= 60 else ()


def _algebra(text: str, table: dict[str, tuple[Unit, ...]]) -> tuple[Unit, ...]:
    """Products, quotients and powers of named units, one result per combination of meanings."""
    factors: list[tuple[tuple[Unit, ...], int]] = []
    position, sign, power = 0, 1, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return ()
        position = match.end()
        if match["frac"]:
            factors += [(_algebra(match["above"], table), sign), (_algebra(match["below"], table), -sign)]
        elif match["per"]:
            sign = -1
        elif match["before"]:
            power = 2 if match["before"].lower().startswith("s") else 3
        elif (match["power"] or match["after"]) and factors:
            exponent = int(match["power"] or (2 if match["after"].lower().startswith("s") else 3))
            factors[-1] = (factors[-1][0], factors[-1][1] * exponent)
        elif match["name"]:
            factors.append((_named(match["name"], table), sign * power * int(match["digit"] or 1)))
            power = 1
    meanings = []
    for units in itertools.islice(itertools.product(*(units for units, _ in factors)), 16):
        product = Unit(Fraction(1), frozenset())
        for unit, (_, exponent) in zip(units, factors, strict=True):
            product = product * unit**exponent
        meanings.append(product)
    return tuple(meanings) if factors else ()
