"""Mistakes in a dataset, told before anything is trained: which row or column, why it cannot work, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from ..formats import begins_both_sides, columns_read, conversation_column, describe, listed, recognize
from ..messages.text import brief


Sides = tuple[tuple[str, str], ...]

_CONVERSATION = ("prompt", "chosen", "rejected", "completion")


def first_row(dataset: Iterable[dict[str, Any]], dataset_name: str) -> dict[str, Any]:
    """The first row, whose columns are those of all.

    Raises:
        `ValueError`: if there is none.
    """
    for row in dataset:
        return row
    raise ValueError(f"The {dataset_name} dataset has no rows. Give it some, or leave it out.")


def find_format(
    row: Mapping[str, Any], text_formats: Sequence[tuple[str, ...]], sides: Sides, dataset_name: str
) -> Literal["tokens", "messages", "text"]:
    """What a dataset's rows hold, by the first of them.

    Args:
        row (`Mapping[str, Any]`):
            The first row.
        text_formats (`Sequence[tuple[str, ...]]`):
            The columns of each format of text or messages that the trainer reads; of a row with several, the first.
            Columns that [`formats.read_row`] finds under other names count as there.
        sides (`tuple[tuple[str, str], ...]`):
            `(ids, mask)` column names of its token rows.
        dataset_name (`str`):
            `"train"`, or a name of an evaluation dataset.

    Returns:
        `"tokens"`, `"messages"` or `"text"`.

    Raises:
        `ValueError`: if the columns are those of no format, or some hold text and others messages.
    """
    token_columns = ["prompt_ids", *(column for side in sides for column in side)]
    if row.keys() >= set(token_columns):
        return "tokens"
    found = next((columns for columns in text_formats if row.keys() >= set(columns)), None)
    if found is not None and ("prompt" in row or conversation_column(row) is None):
        return "messages" if holds_messages(row, found) else "text"
    if any(columns_read(row) >= set(columns) for columns in text_formats):
        return "messages"
    raise _unreadable(row, text_formats, token_columns, dataset_name)


def _unreadable(
    row: Mapping[str, Any], text_formats: Sequence[tuple[str, ...]], token_columns: Sequence[str], dataset_name: str
) -> ValueError:
    half = [name for name in token_columns if name in row]
    hint = f" `{half[0]}` is there, but not {listed(c for c in token_columns if c not in row)}." if half else ""
    remedy = "Rename or add columns."
    known, read = recognize(row), columns_read(row)
    if known == "logs":
        hint, remedy = f" They are {describe(known)}.", "Write them as token rows with `trl-multiturn convert`."
    elif known is not None and read:
        lacking = min(([c for c in columns if c not in read] for columns in text_formats), key=len)
        hint = f" They are {describe(known)}, read as {listed(sorted(read))}, so {listed(lacking)} is missing."
        if lacking == ["label"] or lacking == ["reward"]:
            remedy = f"Add the column {listed(lacking)}, which says how good a completion is."
    formats = " or ".join(listed(columns) for columns in text_formats)
    return ValueError(
        f"The {dataset_name} dataset has the columns {listed(row)}, which are rows of no format that this trainer "
        f"reads: {formats} (text or lists of messages), or {listed(token_columns)}.{hint} {remedy}"
    )


def holds_messages(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether the conversation in a row's prompt and these columns is written as messages (`True`) or text (`False`).

    Raises:
        `ValueError`: if some hold one and some the other.
    """
    read = [name for name in _CONVERSATION if name in row and (name == "prompt" or name in columns)]
    if "chosen" in columns and "prompt" in row and begins_both_sides(row):
        read.remove("prompt")  # the same words as the first of both sides
    is_text = {column: isinstance(row[column], str) for column in read}
    if len(set(is_text.values())) > 1:
        text, messages = (listed(c for c in is_text if is_text[c] is kind) for kind in (True, False))
        raise ValueError(
            f"Text in {text}, but messages in {messages}: they cannot be joined into one conversation. Write all of "
            "them as text, or all of them as lists of messages (`[{'role': 'user', 'content': …}]`)."
        )
    return not any(is_text.values())


def check_label(label: Any) -> None:
    """Raises `ValueError` where a label says neither good nor bad."""
    if isinstance(label, str) or label is None or label not in (0, 1):
        raise ValueError(
            f"the label is {brief(label)}, but it says whether the completion is good (True or 1) or not (False or "
            "0). Write one of these; drop rows that are undecided."
        )


def check_margin(margin: Any) -> None:
    """Raises `ValueError` where a margin is neither a finite number nor `None`."""
    if margin is not None and (isinstance(margin, str) or not math.isfinite(margin)):
        raise ValueError(
            f"the margin is {brief(margin)}, which would make the loss of its whole batch NaN. Write a finite "
            "number, or `None` for no margin."
        )


def check_logp(logp: Any) -> None:
    """Raises `ValueError` where a reference log-probability of a completion is no finite number."""
    if logp is None or isinstance(logp, (str, list)) or not math.isfinite(logp):
        raise ValueError(
            f"the reference log-probability is {brief(logp)}, but it is the sum over the completion's trained tokens, "
            "one finite number. Write it, or remove the column from all rows."
        )


def check_column(values: Iterable[Any], check: Callable[[Any], None]) -> None:
    """Checks every value of a column; what is refused is refused with the row's number."""
    for index, value in enumerate(values):
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error
