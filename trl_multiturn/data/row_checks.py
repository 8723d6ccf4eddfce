"""Mistakes in a dataset, told before anything is trained: which row or column, why it cannot work, what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal


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
    if found is None:
        half = [name for name in token_columns if name in row]
        hint = f" `{half[0]}` is there, but not {_listed(c for c in token_columns if c not in row)}." if half else ""
        formats = " or ".join(_listed(columns) for columns in text_formats)
        raise ValueError(
            f"The {dataset_name} dataset has the columns {_listed(row)}, which are rows of no format that this "
            f"trainer reads: {formats} (text or lists of messages), or {_listed(token_columns)}.{hint} Rename or add "
            "columns."
        )
    return "messages" if holds_messages(row, found) else "text"


def holds_messages(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether the conversation in a row's prompt and these columns is written as messages (`True`) or text (`False`).

    Raises:
        `ValueError`: if some hold one and some the other.
    """
    read = [name for name in _CONVERSATION if name in row and (name == "prompt" or name in columns)]
    is_text = {column: isinstance(row[column], str) for column in read}
    if len(set(is_text.values())) > 1:
        text, messages = (_listed(c for c in is_text if is_text[c] is kind) for kind in (True, False))
        raise ValueError(
            f"Text in {text}, but messages in {messages}: they cannot be joined into one conversation. Write all of "
            "them as text, or all of them as lists of messages (`[{'role': 'user', 'content': …}]`)."
        )
    return not any(is_text.values())


def check_messages(messages: Any, column: str) -> None:
    """Raises `ValueError` where a column does not hold a list of messages that a chat template can render."""
    if messages is None or isinstance(messages, (str, Mapping)):
        raise ValueError(f"`{column}` is {_brief(messages)}, not a list of messages. Write one, or drop the row.")
    if column == "prompt" and not len(messages):
        raise ValueError("`prompt` holds no message, so there is nothing to answer. Give it a user's turn.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"`{column}`: message {number} has no `role` ({_brief(message)}), so nobody knows who speaks. Give it "
                "one: 'system', 'user', 'assistant' or 'tool'."
            )
        says = any(value for key, value in message.items() if key not in ("role", "name", "content"))
        if message.get("content") is None and not says:
            raise ValueError(
                f"`{column}`: message {number} ({message['role']}) has neither `content` nor `tool_calls`. Write what "
                "was said (an empty string, if nothing was), or drop the row."
            )


def read_tools(tools: Any) -> list | None:
    """A row's `tools`: a list of JSON schemas or callables, given as such or as a JSON string.

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`tools` is no valid JSON ({error}): {_brief(tools)}. Pass a list of JSON schemas, or `json.dumps` of it."
        ) from error
    if tools is not None and not (
        isinstance(tools, (list, tuple)) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError(
            f"`tools` is {_brief(tools)}, but chat templates take a list of JSON schemas "
            "(`[{'type': 'function', 'function': {…}}]`) or of functions. Wrap a single schema in a list."
        )
    return tools


def check_label(label: Any) -> None:
    """Raises `ValueError` where a label says neither good nor bad."""
    if isinstance(label, str) or label is None or label not in (0, 1):
        raise ValueError(
            f"the label is {_brief(label)}, but it says whether the completion is good (True or 1) or not (False or "
            "0). Write one of these; drop rows that are undecided."
        )


def check_margin(margin: Any) -> None:
    """Raises `ValueError` where a margin is neither a finite number nor `None`."""
    if margin is not None and (isinstance(margin, str) or not math.isfinite(margin)):
        raise ValueError(
            f"the margin is {_brief(margin)}, which would make the loss of its whole batch NaN. Write a finite "
            "number, or `None` for no margin."
        )


def check_column(values: Iterable[Any], check: Callable[[Any], None]) -> None:
    """Checks every value of a column; what is refused is refused with the row's number."""
    for index, value in enumerate(values):
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
