"""Numbers, read exactly: decimals, fractions, mixed numbers, powers of ten, repeating decimals, words, bases."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from .notation import normalize, words


# longer numbers are no answers, and Python refuses to convert those beyond 4,300 digits
_MAX_LENGTH = 100
_MAX_EXPONENT = 400

_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_GROUPED = r"\d{1,3}(?:([ ,_'])\d{3})(?:\1\d{3})*(?:\.\d+)?"
_PLAIN = re.compile(rf"{_GROUPED}|{_DIGITS}")
_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?")
_CONTINENTAL = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}")  # 1.234,56 and 1.234.567
_SIGN = re.compile(r"(?i)([+-]|(?:minus|negative)\s)\s*")
_FRACTION = re.compile(
    r"\\frac\{([^{}]+)\}\{([^{}]+)\}|\(?([^{}()/]+?)\)?\s*(?:/|\bover\b|\bout of\b)\s*\(?([^{}()/]+)\)?"
)
_CHANCE = re.compile(r"(\d+) in (\d+)")
_MIXED = re.compile(r"(\d[\d,]*)(?:\s+|\s*(?:and|&)\s+|(?=\\))(\\frac\{\d+\}\{\d+\}|\d+\s*/\s*\d+)")
_POWER = re.compile(r"(?:(.+?)\s*(?:\\times|\\cdot|x|\*)\s*)?10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?")
_EXPONENT = re.compile(rf"({_DIGITS})[eE]([+-]?\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{?(\d+)\}?|\((\d+)\))")
_ONGOING = re.compile(r"(\d*)\.(\d*?)(\d{1,6}?)\3\3+\s*(?:\.{2,}|\\[lc]?dots)")  # 0.333…, 0.1666…, 0.272727…
_ORDINAL = re.compile(r"(?i)(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\}?")

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
          "lakh": 10**5, "crore": 10**7, "bn": 10**9}  # fmt: skip
_SCALED = re.compile(rf"(?i)(.+?)\s*\b({'|'.join(SCALES)})s?")
_ONES = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
          "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000}  # fmt: skip

_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*(?:_\s*\{?\s*(\w+)\s*\}?|\(?\s*(?:in\s+)?base[ -](\w+)\s*\)?)")
_PREFIXED = re.compile(r"(?i)0(?:x[0-9a-f]+|b[01]+|o[0-7]+)")


class BasedNumber(NamedTuple):
    """A number in another base than ten: its value, and what its digits would say in base ten."""

    value: int
    as_decimal: int | None


def exact_number(text: str) -> Fraction | None:
    r"""The value of a number, exactly; `None` for anything else.

    Read are integers, decimals and fractions (`-3.50`, `1,234`, `7\,000`, `3/4`, `\frac34`), mixed numbers (`1 1/2`),
    powers of ten (`1.5e3`, `2\times10^{-4}`), repeating decimals (`0.\overline{3}`, `0.333…`), words (`twenty-one`,
    `7 million`, `two thirds`), each with a sign, in Markdown or in math delimiters. Percentages, quantities, numbers
    in other bases and expressions are not numbers here; a dollar sign is passed over.
    """
    return read_number(words(normalize(text)).replace("$", ""))


def read_number(text: str) -> Fraction | None:
    """[`exact_number`] of a text in words ([`~trl_multiturn.verify.reading.notation.words`])."""
    text = text.strip()
    if not text or len(text) > _MAX_LENGTH:
        return None
    if match := _SIGN.match(text):
        value = _unsigned(text[match.end() :].strip())
        return value if value is None or match[1] == "+" else -value
    return _unsigned(text)


def _unsigned(text: str) -> Fraction | None:
    for read in (_plain, _mixed, _fraction, _power, _repeating, _worded, _scaled):
        value = read(text)
        if value is not None:
            return value
    match = _ORDINAL.fullmatch(text)
    return Fraction(match[1]) if match else None


def _plain(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text) or _INDIAN.fullmatch(text):
        return Fraction(re.sub("[ ,_']", "", text))
    if _CONTINENTAL.fullmatch(text):
        return Fraction(text.replace(".", "").replace(",", "."))
    return None


def _fraction(text: str) -> Fraction | None:
    if match := _CHANCE.fullmatch(text):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    numerator, denominator = (read_number(part) for part in (match[1] or match[3], match[2] or match[4]))
    return numerator / denominator if numerator is not None and denominator else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    if not match:
        return None
    whole, part = _plain(match[1]), _fraction(match[2])
    # 2 \frac{3}{2} is a product
    return whole + part if whole is not None and part is not None and 0 < part < 1 else None


def _power(text: str) -> Fraction | None:
    if match := _EXPONENT.fullmatch(text):
        factor: Fraction | None = Fraction(match[1])
    elif match := _POWER.fullmatch(text):
        factor = read_number(match[1]) if match[1] else Fraction(1)
    else:
        return None
    exponent = int(match[2])
    return factor * Fraction(10) ** exponent if factor is not None and abs(exponent) <= _MAX_EXPONENT else None


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text) or _ONGOING.fullmatch(text)
    if not match:
        return None
    whole, fixed, *periods = match.groups()
    period = next(filter(None, periods))
    digits = int(f"{whole}{fixed}{period}") - int(f"0{whole}{fixed}")
    return Fraction(digits, 10 ** len(fixed) * (10 ** len(period) - 1))


def _scaled(text: str) -> Fraction | None:
    match = _SCALED.fullmatch(text)
    if not match:
        return None
    factor = read_number("1" if match[1].lower() == "a" else match[1])
    return None if factor is None else factor * SCALES[match[2].lower()]


def _worded(text: str) -> Fraction | None:
    """`twenty-one`, `two hundred and five`, `one half`, `two and three quarters`."""
    tokens = [token for token in re.split(r"[\s-]+", text.lower()) if token not in ("", "and")]
    if not tokens or not all(token.isalpha() or token.isdigit() for token in tokens):
        return None
    last = tokens[-1].removesuffix("s") if tokens[-1] not in _PARTS else tokens[-1]
    if last not in _PARTS:
        return _cardinal(tokens)
    if len(tokens) == 1:
        return Fraction(1, 2) if last == "half" else None
    *whole, count = tokens[:-1]
    part = Fraction(1) if count in ("a", "an") else _cardinal([count])
    rest = _cardinal(whole) if whole else Fraction(0)
    return None if part is None or rest is None else rest + part / _PARTS[last]


def _cardinal(tokens: list[str]) -> Fraction | None:
    total, group = 0, 0
    for token in tokens:
        if token in _ONES or token in _TENS:
            group += _ONES.get(token, 0) + _TENS.get(token, 0)
        elif len(tokens) == 1 and token.isdigit():
            group = int(token)
        elif token == "hundred":
            group = max(group, 1) * 100
        elif token in SCALES and token != "dozen":
            total, group = total + max(group, 1) * SCALES[token], 0
        else:
            return None
    return Fraction(total + group)


def read_based(text: str) -> BasedNumber | None:
    r"""A number written with its base: `101_2`, `2516_{8}`, `101 (base 2)`, `0x1F`; `None` for anything else."""
    if _PREFIXED.fullmatch(text):
        return BasedNumber(int(text, 0), None)
    match = _BASED.fullmatch(text)
    if not match:
        return None
    base = read_number(match[2] or match[3])
    try:
        value = int(match[1], int(base)) if base is not None else None
    except ValueError:  # a base that is none, or digits that it does not have
        return None
    if value is None:
        return None
    return BasedNumber(value, int(match[1]) if match[1].isdigit() and base != 10 else None)
