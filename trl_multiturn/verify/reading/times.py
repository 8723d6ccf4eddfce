"""What looks like arithmetic and is not: times of day, dates, ratios. `10:30` is not 10.5."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import date
from fractions import Fraction

from .numerals import read_number


_CLOCK = re.compile(r"(?i)(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:(a|p)\.?\s?m\b\.?|(o'clock)|(noon|midnight))?")
_RATIO = re.compile(r"[\d.,/]+(?:\s*:\s*[\d.,/]+)+|[\d.,]+[\s-]+to[\s-]+[\d.,]+(?:\s+to\s+[\d.,]+)*")
_MONTHS = ("january february march april may june july august september october november december").split()
_MONTH = "(?P<month>" + "|".join(f"{month[:3]}(?:{month[3:]}|t)?\\.?" for month in _MONTHS) + ")"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
_DATES = tuple(
    re.compile(rf"(?i)(?:\w+day,?\s+)?{pattern}")
    for pattern in (
        rf"{_MONTH}\s+{_DAY}(?:\s*,?\s+{_YEAR})?",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+)?{_MONTH}(?:\s*,?\s+{_YEAR})?",
        rf"{_MONTH}\s*,?\s+{_YEAR}",
        rf"{_YEAR}[-/](?P<month>\d{{1,2}})[-/](?P<day>\d{{1,2}})",
    )
)
_SLASHED = re.compile(r"(\d{1,2})[/.-](\d{1,2})[/.-](\d{4})")


@dataclass(frozen=True)
class Clock:
    """A time of day: seconds after midnight or, where neither morning nor afternoon is told, after twelve o'clock."""

    seconds: int
    half: str | None  # "a", "p", or not told

    def equals(self, other: Clock) -> bool | None:
        """Whether both are the same moment; where a half of the day is left out, the other's is meant."""
        if self.half and other.half or self.half is other.half:
            return self == other
        if self.seconds == other.seconds:
            return True
        return None if (self.seconds - other.seconds) % 43200 == 0 else False


@dataclass(frozen=True)
class Date:
    """The days that a date may mean, as (year, month, day) with 0 for what is left out."""

    meanings: frozenset[tuple[int, int, int]]

    def equals(self, other: Date) -> bool | None:
        """Whether both are the same day; `None` where that hangs on the order of day and month, or on a year."""
        if self.meanings == other.meanings:
            return True
        pairs = itertools.product(self.meanings, other.meanings)
        return None if any(all(x == y or not x * y for x, y in zip(*pair, strict=True)) for pair in pairs) else False


@dataclass(frozen=True)
class Ratio:
    """Proportions, the last of which is 1."""

    parts: tuple[Fraction, ...]

    @property
    def value(self) -> Fraction | None:
        """The ratio of two numbers as one."""
        return self.parts[0] if len(self.parts) == 2 else None


_WORDS = {"noon": Clock(43200, "p"), "midnight": Clock(0, "a")}


def read_clock(text: str) -> Clock | None:
    """`10:30`, `3 pm`, `15:00`, `noon`; `None` for anything else, a number alone included."""
    lower = text.lower().strip()
    if lower in _WORDS:
        return _WORDS[lower]
    match = _CLOCK.fullmatch(text)
    if not match or not (match[2] or match[4] or match[5] or match[6]):
        return None
    hour, minute, second = (int(match[i] or 0) for i in (1, 2, 3))
    if hour > 24 or minute > 59 or second > 59:
        return None
    half: str | None = {"noon": "p", "midnight": "a"}.get((match[6] or "").lower(), (match[4] or "").lower() or None)
    if half and hour > 12:
        return None
    if half is None and (hour > 12 or hour == 0):  # 15:00 tells its half
        half = "p" if 12 < hour < 24 else "a"
    return Clock(hour % 12 * 3600 + minute * 60 + second + (43200 if half == "p" else 0), half)


def read_date(text: str) -> Date | None:
    """`July 4, 1776`, `4 July`, `1776-07-04`, `7/4/1776` (two days, unless one is none); `None` for anything else."""
    if match := _SLASHED.fullmatch(text):
        first, second, year = map(int, match.groups())
        meanings = {(year, first, second), (year, second, first)}
    else:
        match = next(filter(None, (pattern.fullmatch(text) for pattern in _DATES)), None)
        if not match:
            return None
        parts = match.groupdict()
        month = parts["month"].lower()
        number = int(month) if month.isdigit() else [name[:3] for name in _MONTHS].index(month[:3]) + 1
        meanings = {(int(parts.get("year") or 0), number, int(parts.get("day") or 0))}
    days = frozenset(meaning for meaning in meanings if _exists(*meaning))
    return Date(days) if days else None


def _exists(year: int, month: int, day: int) -> bool:
    try:
        date(year or 2000, month, day or 1)
    except ValueError:
        return False
    return True


def read_ratio(text: str) -> Ratio | None:
    """`3:2`, `1:2:3`, `3 to 2`; `None` for anything else."""
    if not _RATIO.fullmatch(text):
        return None
    numbers = [read_number(part) for part in re.split(r":|[\s-]+to[\s-]+", text)]
    parts = [number for number in numbers if number is not None]
    if len(parts) < len(numbers) or not parts[-1]:
        return None
    return Ratio(tuple(part / parts[-1] for part in parts))
