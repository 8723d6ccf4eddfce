"""What became of the rows that were converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

from rich.console import Console

from ..formats import FORMATS
from ..messages.terminal import visible


_MAX_REASONS = 50
_STYLES = {"not read": "red", "not paired": "yellow", "left out": "yellow"}


@dataclass
class ConversionReport:
    """What [`convert_rows`] did. Rows are counted from 0, as they stand in the input.

    Attributes:
        rows_read (`int`): rows of the input.
        rows_written (`int`): rows of the output.
        formats (`Counter`): rows by what they were taken for, by the names of `--from`.
        unreadable (`list[tuple[int, str]]`): number and reason of each row that is not in the output.
        left_out (`Counter`): keys of messages that nobody knows and that were left out, by the number of messages.
        unpaired (`list[str]`): of episodes that were to be paired, why some were not.
        asked_for (`str`): the form that was asked for; `"auto"` where it was to be found.
    """

    rows_read: int = 0
    rows_written: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unpaired: list[str] = field(default_factory=list)
    asked_for: str = "auto"

    def lines(self) -> list[str]:
        """The report in words, line by line; every unreadable row is named."""
        lines = [f"{n} rows were taken for {FORMATS[name].description}." for name, n in self.formats.most_common()]
        lines += [f"{self.rows_read} rows read, {self.rows_written} written."]
        if self.left_out:
            keys = ", ".join(f"`{key}` ({n} messages)" for key, n in self.left_out.most_common())
            lines.append(f"left out, keys of messages that no chat template prints: {keys}")
        lines += self.unpaired
        reasons: dict[str, list[int]] = {}
        for number, reason in self.unreadable:
            reasons.setdefault(reason, []).append(number)
        for reason, numbers in list(reasons.items())[:_MAX_REASONS]:
            lines.append(f"not read, {_rows(numbers)}: {reason}")
        others = sorted(n for numbers in list(reasons.values())[_MAX_REASONS:] for n in numbers)
        if others:
            lines.append(f"not read for {len(reasons) - _MAX_REASONS} other reasons, {_rows(others)}")
        return lines


def print_conversion(report: ConversionReport) -> None:
    """Prints a [`ConversionReport`]."""
    console = Console()
    for line in report.lines():
        style = next((style for start, style in _STYLES.items() if line.startswith(start)), None)
        console.print(visible(line), style=style, markup=False, highlight=False)


def _rows(numbers: Sequence[int]) -> str:
    """Rows by number, those in a line as a range."""
    steps = count()
    runs = [list(run) for _, run in groupby(numbers, key=lambda number: number - next(steps))]
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"row{'s' if len(numbers) > 1 else ''} {ranges}"
