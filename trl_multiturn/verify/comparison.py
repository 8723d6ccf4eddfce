r"""Is an answer the gold answer? Decided here where reading is enough; expressions are left to math-verify.

`True` and `False` are what a mathematician would say; `None` is said where nobody can know: a percent sign that one
side may have left away, another unit that the question may have asked for, two names that may mean the same.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from .amounts import Open, Outcome, compare_quantities, value_latex
from .reading.forms import Choice, Form, Group, Items, Phrase, Reading, last_side, read
from .reading.numerals import BasedNumber
from .reading.quantities import Quantity, fraction_latex
from .reading.times import Clock, Date, Ratio


_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_CHOICES = frozenset("ABCDEFGHabcd")
_MOST_ITEMS = 12


def compare(gold: str, answer: str, in_percent: bool = False) -> Outcome:
    r"""Whether two texts say the same.

    Args:
        gold (`str`), answer (`str`):
            LaTeX or plain text.
        in_percent (`bool`, *optional*, defaults to `False`):
            Whether the question asks for a percentage, so that `25` and `25\%` are the same answer.

    Returns:
        `True`, `False`, `None` where that cannot be known, or [`Open`] for math-verify.
    """
    left, right = read(gold), read(answer)
    if left.text.casefold() in ("", "nan"):
        return None
    if left.text == right.text:
        return True
    left, right = _shortened(left, right), _shortened(right, left)
    if left.form is None and right.form is None:
        return Open(((left.text, right.text),))
    if left.form is None or right.form is None:
        return _with_expression(left, right)
    return _forms(left, right, in_percent)


def compare_numbers(gold: str, answer: str) -> bool | None:
    r"""Compares two numbers, percentages or quantities by reading alone, in this process.

    `True` or `False` where that is certain; `None` where it is not, or where either needs math-verify.
    """
    left, right = read(gold), read(answer)
    if isinstance(left.form, Quantity) and isinstance(right.form, Quantity):
        outcome = compare_quantities(left.form, right.form)
        return None if isinstance(outcome, Open) else outcome
    return None


def _shortened(reading: Reading, other: Reading) -> Reading:
    """`x = 10` beside `10` is 10; beside another equation it stays one."""
    side = last_side(reading.text)
    if side is None:
        return reading
    others = last_side(other.text)
    if "=" in other.text and (others is None or _name(reading.text) != _name(other.text)):
        return reading
    return read(side)


def _name(text: str) -> str:
    return text.partition("=")[0].replace(" ", "")


def _with_expression(left: Reading, right: Reading) -> Outcome:
    """An expression beside something that was read."""
    known, expression = (right, left) if left.form is None else (left, right)
    form = known.form
    if isinstance(form, Quantity):
        latex = known.text if form.doubtful else value_latex(form, expression.text)
    elif isinstance(form, BasedNumber):
        latex = str(form.value)
    elif isinstance(form, Ratio) and form.value is not None:
        latex = fraction_latex(form.value)
    elif isinstance(form, Group) and "matrix}" in expression.text:
        latex = _matrix(form)
    elif isinstance(form, Items | Group | Choice):
        latex = known.text
    elif isinstance(form, Phrase) and max(map(len, form.words)) <= 3:  # `ab` may be a product
        latex = known.text
    else:
        return None
    return Open(((expression.text, latex),)) if left.form is None else Open(((latex, expression.text),))


def _matrix(group: Group) -> str:
    """A tuple as the column that it stands for, a list of lists as the matrix."""
    rows = [read(item) for item in group.items]
    cells = [list(row.form.items) if isinstance(row.form, Group) else [row.text] for row in rows]
    return r"\begin{pmatrix}" + r"\\".join("&".join(row) for row in cells) + r"\end{pmatrix}"


def _forms(left: Reading, right: Reading, in_percent: bool) -> Outcome:
    if type(left.form) is type(right.form):
        return _alike(left, right, in_percent)
    for reading, other in ((left, right), (right, left)):
        if isinstance(reading.form, Choice) and isinstance(other.form, Items | Group):
            return False
        if isinstance(reading.form, Choice):
            return _choice(reading.form, other, in_percent)
        if isinstance(reading.form, Clock | Date | Ratio):
            return _special(reading, other)
        if isinstance(reading.form, BasedNumber) and isinstance(other.form, Quantity):
            return _based(reading.form, other.form)
        if isinstance(reading.form, Phrase) and isinstance(other.form, Quantity | BasedNumber):
            return False  # no number is in the words, or they would have been read as one
    if isinstance(left.form, Items | Group) and isinstance(right.form, Items | Group):
        return _mixed_lists(left, right, in_percent)
    return _beside_list(left, right)


def _alike(left: Reading, right: Reading, in_percent: bool) -> Outcome:
    """Two things of one kind."""
    match left.form, right.form:
        case Quantity() as gold, Quantity() as answer:
            return compare_quantities(gold, answer, in_percent)
        case Items(), Items():
            return _items(left, right, in_percent)
        case Group() as gold, Group() as answer:
            return _groups(gold, answer, in_percent)
        case Phrase() as gold, Phrase() as answer:
            return _phrases(gold, answer)
        case Choice() as gold, Choice() as answer:
            return gold.letter.upper() == answer.letter.upper()
        case BasedNumber() as gold, BasedNumber() as answer:
            return gold.value == answer.value
    return _special(left, right)


def _beside_list(left: Reading, right: Reading) -> Outcome:
    """A list or a tuple beside one thing."""
    for reading, other in ((left, right), (right, left)):
        if isinstance(reading.form, Items) and len(reading.form.items) == 1:
            return Open(((left.text, right.text),))
        if _DECIMAL_COMMA.fullmatch(reading.text) and isinstance(other.form, Quantity):
            return None if other.form.number == Fraction(reading.text.replace(",", ".")) else False
    return False if isinstance(left.form, Items | Group) or isinstance(right.form, Items | Group) else None


def _based(one: BasedNumber, other: Quantity) -> bool | None:
    if other.number == one.value:
        return True
    return None if other.number == one.as_decimal else False  # the base may have been left out


def _items(left: Reading, right: Reading, in_percent: bool) -> Outcome:
    assert isinstance(left.form, Items) and isinstance(right.form, Items)
    golds, answers = left.form.items, right.form.items
    if max(len(golds), len(answers)) > _MOST_ITEMS:
        return Open(((left.text, right.text),))
    table = [[compare(gold, answer, in_percent) for answer in answers] for gold in golds]
    if any(isinstance(outcome, Open) for row in table for outcome in row):
        return Open(((left.text, right.text),))
    certain = all(map(any, table)) and all(map(any, zip(*table, strict=True)))  # each has an equal on the other side
    if certain:
        return True if len(golds) == len(answers) else None  # a double root may be told once
    possible = [[outcome is not False for outcome in row] for row in table]
    return None if all(map(any, possible)) and all(map(any, zip(*possible, strict=True))) else False


def _groups(gold: Group, answer: Group, in_percent: bool) -> Outcome:
    if len(gold.items) != len(answer.items):
        return False
    if len(gold.items) == 2 and (gold.opening, gold.closing) != (answer.opening, answer.closing):
        return False  # intervals with other ends
    outcomes = [compare(one, other, in_percent) for one, other in zip(gold.items, answer.items, strict=True)]
    if False in outcomes:
        return False
    pairs = tuple(pair for outcome in outcomes if isinstance(outcome, Open) for pair in outcome.pairs)
    if None in outcomes:
        return None
    return Open(pairs) if pairs else True


def _mixed_lists(left: Reading, right: Reading, in_percent: bool) -> Outcome:
    """A list or a set beside a tuple or an interval.

    `1, 2` may be the tuple `(1, 2)`, and `[1, 2, 3]` is how Python prints a list. A set in braces has no order, and
    `[1, 2]` is an interval, too: where the members agree, nobody knows what was meant.
    """
    assert isinstance(left.form, Items | Group) and isinstance(right.form, Items | Group)
    golds, answers = Items(left.form.items), Items(right.form.items)
    same = _items(replace(left, form=golds), replace(right, form=answers), in_percent)
    if same is not True:
        return same
    items, group = (left.form, right.form) if isinstance(left.form, Items) else (right.form, left.form)
    assert isinstance(items, Items) and isinstance(group, Group)
    if items.braced:
        return None
    if group.opening + group.closing == "[]":
        return True if len(group.items) > 2 else None
    in_order = all(compare(*pair, in_percent) is True for pair in zip(golds.items, answers.items, strict=True))
    return True if in_order else None


def _phrases(gold: Phrase, answer: Phrase) -> bool | None:
    one, other = ([word.removesuffix("s") for word in phrase.words] for phrase in (gold, answer))
    if one == other:
        return True
    return False if len(one) == len(other) == 1 else None


def _choice(choice: Choice, other: Reading, in_percent: bool) -> Outcome:
    if choice.text:
        outcome = compare(choice.text, other.text, in_percent)
        return True if outcome is True else None
    if choice.letter not in _CHOICES:  # a variable, or a constant such as e and i
        return False if isinstance(other.form, Quantity) else None
    return None  # what the choices say is not known


def _special(special: Reading, other: Reading) -> bool | None:
    """Times, dates and ratios; a time of day such as `10:20` may be a ratio, too."""
    form: Form | None = special.form
    if isinstance(form, Date):
        return form.equals(other.form) if isinstance(other.form, Date) else _only_words(other)
    if isinstance(form, Clock) and isinstance(other.form, Clock):
        same = form.equals(other.form)
        return None if same is False and special.ratio and special.ratio == other.ratio else same
    ratio = form if isinstance(form, Ratio) else special.ratio
    if isinstance(other.form, Ratio):
        return ratio == other.form
    if isinstance(other.form, Quantity) and other.form.number is not None:
        return _ratio_or_clock(form, ratio, other.form)
    return _only_words(other)


def _ratio_or_clock(form: Form | None, ratio: Ratio | None, other: Quantity) -> bool | None:
    if isinstance(form, Ratio):
        return form.value == other.number
    assert isinstance(form, Clock) and other.number is not None
    amounts = {unit.amount(other.number) for unit in other.units}
    hour = form.seconds % 3600 == 0 and other.number % 12 == form.seconds // 3600 % 12 and not other.units
    doubtful = hour or form.seconds in amounts or (ratio is not None and ratio.value == other.number)
    return None if doubtful else False


def _only_words(other: Reading) -> bool | None:
    return None if isinstance(other.form, Phrase) else False


def asks_for_percent(question: str) -> bool:
    """Whether a question asks for a percentage: its last sentence with a question mark, or its last, says so."""
    sentences = [sentence for sentence in re.split(r"(?<=[.?!])\s+", question.strip()) if sentence]
    asked = next((sentence for sentence in reversed(sentences) if sentence.endswith("?")), "".join(sentences[-1:]))
    return re.search(r"(?i)\bper\s?cent|%", asked) is not None
