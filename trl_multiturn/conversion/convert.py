"""Files of rows that other tools wrote, in TRL's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..formats import is_trace, read_trace
from ..messages import normalize_tools
from ..rows.selection import PairingConfig
from .pairs import EpisodePairs
from .reading import Source
from .report import ConversionReport
from .row import RowConverter, check_form
from .writing import write_jsonl, write_parquet


def convert_rows(
    rows: Any,
    output: str | Path,
    form: str = "auto",
    *,
    split: str | None = None,
    reward_column: str | None = None,
    label_above: float | None = None,
    tools: Any = None,
    string_arguments: bool = False,
    pairing: PairingConfig | None = None,
    correct_above: float = 0.5,
    task_column: str | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Writes rows that other tools wrote in the form that the trainers, and TRL's, read.

    Messages come into TRL's form as at the trainers' own door. A row with one completion has `prompt` (all before the
    policy's first turn that trains), `completion`, `tools`, and `reward` and `label` where the input has them; a pair
    has `prompt`, `chosen`, `rejected`; a log with token ids becomes a token row, a trace of `verifiers` one for each
    path through it. Other columns stay as they are.

    Rows are read and written one after another. What cannot be read is left out and told by number in the report;
    nothing else is.

    Args:
        rows (`str`, `Path`, `Dataset` or `Iterable[dict]`):
            A JSONL, JSON or Parquet file, a dataset by name (see [`load_rows`]), or the rows.
        output (`str` or `Path`):
            A `.jsonl` file, whose calls have their arguments as objects, or a `.parquet` file, in which arguments and
            tools are JSON strings: `load_dataset` then fills in no nulls, and rounds no numbers.
        form (`str`, *optional*, defaults to `"auto"`):
            `"openai"`, `"function-call"`, `"tool-roles"`, `"sharegpt"`, `"episodes"`, `"rollouts"`, `"logs"` or
            `"trl"`; by default what each row is taken for. `"logs"` reads token ids; another name reads the messages
            of rows that hold both.
        split (`str`, *optional*):
            Of a dataset that has several.
        reward_column (`str`, *optional*):
            The column of the rewards, where it is none of `reward`, `total_reward` and `reward_info`.
        label_above (`float`, *optional*):
            Adds `label`: whether the reward is above it.
        tools (`list` or `str`, *optional*):
            Schemas for rows that say none.
        string_arguments (`bool`, *optional*, defaults to `False`):
            JSON strings as arguments in JSONL, too.
        pairing ([`PairingConfig`], *optional*):
            Writes pairs of episodes of one task instead; they are held in memory. Filters by name read what only
            rollouts of this package record, so leave them empty (`filters=[]`).
        correct_above (`float`, *optional*, defaults to `0.5`):
            For pairs: an episode is correct where its reward is above it.
        task_column (`str`, *optional*):
            For pairs: the column that says which episodes are of one task (`task_id`, `example_id`, …, else the
            prompt).
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`ConversionReport`]

    Raises:
        `ValueError`: if the input cannot be read at all, or the output's name says no format.

    Example:

    ```python
    >>> report = convert_rows("conversations.jsonl", "rows.parquet")
    >>> report.formats, report.unreadable
    (Counter({'sharegpt': 120}), [(7, '`conversations`: message 3 has the role ...')])
    ```
    """
    output = Path(output)
    check_form(form)
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{output} ends in neither `.jsonl` nor `.parquet`, so its format is unknown.")
    source = Source(rows, split)
    report = ConversionReport(asked_for=form)
    converter = RowConverter(form, source.shapes, reward_column, label_above, normalize_tools(tools), report.left_out)
    pairs = None if pairing is None else EpisodePairs(pairing, correct_above, task_column)
    with _bar(source.size, progress) as advance:
        converted = _converted(source, converter, pairs, report, advance)
        if output.suffix == ".parquet":
            report.rows_written = write_parquet(converted, output)
        else:
            report.rows_written = write_jsonl(converted, output, string_arguments)
    return report


def _converted(
    source: Source,
    converter: RowConverter,
    pairs: EpisodePairs | None,
    report: ConversionReport,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(source.read(advance)):
        report.rows_read += 1
        try:
            if isinstance(row, ValueError):
                raise row
            read = [converter.convert(each) for each in (read_trace(row) if is_trace(row) else (row,))]
            for _, output in read:
                if pairs is not None:
                    pairs.add(number, output)
        except ValueError as error:
            report.unreadable.append((number, str(error)))
            continue
        report.formats.update([found for found, _ in read])
        if pairs is None:
            yield from (output for _, output in read)
    if pairs is not None:
        yield from pairs.rows(report)


@contextmanager
def _bar(size: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar, which ends with the block."""
    columns = (TextColumn("Converting"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task("", total=size)
        yield lambda steps: progress.advance(task, steps)
