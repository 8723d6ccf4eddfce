"""Converted rows on disk, written as they come, without the nulls that Arrow would fill in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Features, List, Value

from ..distributed.durable import written_whole
from ..messages import REASONING, arguments_as_strings


_MESSAGES = ("prompt", "completion", "chosen", "rejected")
_IDS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")
_MASKS = ("action_mask", "chosen_action_mask", "rejected_action_mask")
_ROWS_PER_BATCH = 256


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: Path, string_arguments: bool = False) -> int:
    """Writes rows as JSON lines, as they are: calls' arguments as objects, or as JSON strings if asked for."""
    count = 0
    # Half of a surrogate pair is in no encoding
    with written_whole(path) as partial, open(partial, "w", encoding="utf-8", errors="replace") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(_stringed(row) if string_arguments else row, ensure_ascii=False) + "\n")
    return count


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows as Parquet: arguments, tools, and columns of objects as JSON strings.

    A struct of arguments would give every call the arguments of all, filled with null; the JSON type of `datasets`
    rounds numbers. Which columns there are, and of which types, is known at the end, so the rows are first written as
    JSON lines.
    """
    lines = path.with_name(f"{path.name}.rows")
    kinds = _Kinds()
    try:
        count = write_jsonl(kinds.watch(rows), lines, string_arguments=True)
        features = kinds.features()
        with written_whole(path) as partial, open(lines, encoding="utf-8") as file:
            with pyarrow.parquet.ParquetWriter(partial, features.arrow_schema) as writer:
                for batch in _batches(map(json.loads, file)):
                    writer.write_table(_table(batch, features))
    finally:
        lines.unlink(missing_ok=True)
    return count


def _stringed(row: Mapping[str, Any]) -> dict[str, Any]:
    changed = {name: arguments_as_strings(row[name]) for name in _MESSAGES if _is_messages(row.get(name))}
    return {**row, **changed}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


class _Kinds:
    """Which columns the rows have, and what stands in them."""

    def __init__(self) -> None:
        self._columns: dict[str, Counter[str]] = {}
        self._message_keys: set[str] = set()

    def watch(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for row in rows:
            for name, value in row.items():
                self._columns.setdefault(name, Counter())[self._kind(name, value)] += 1
                if name in _MESSAGES and _is_messages(value):
                    self._message_keys.update(key for message in value for key in message)
            yield row

    @staticmethod
    def _kind(name: str, value: Any) -> str:
        if name in _MESSAGES and _is_messages(value):
            return "messages"
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            return "floats" if any(type(item) is float for item in value) else "ints" if value else "empty"
        return "null" if value is None else type(value).__name__

    def features(self) -> Features:
        return Features({name: self._feature(name, set(kinds) - {"null"}) for name, kinds in self._columns.items()})

    def _feature(self, name: str, kinds: set[str]) -> Any:
        if kinds == {"messages"}:
            return List(self._message())
        if name in _IDS or name in _MASKS:
            return List(Value("int32" if name in _IDS else "int8"))
        if name == "behavior_logps":
            return List(Value("float32"))
        if kinds & {"ints", "floats"} and kinds <= {"ints", "floats", "empty"}:
            return List(Value("float64" if "floats" in kinds else "int64"))
        if kinds == {"bool"}:
            return Value("bool")
        if kinds == {"int"}:
            return Value("int64")
        return Value("float64") if kinds and kinds <= {"int", "float"} else Value("string")

    def _message(self) -> dict[str, Any]:
        call = {"id": Value("string"), "type": Value("string")}
        call |= {"function": {"name": Value("string"), "arguments": Value("string")}}
        kinds = {name: Value("string") for name in ("role", "content", *REASONING, "tool_call_id", "name")}
        kinds |= {"tool_calls": List(call), "train": Value("bool")}
        return {name: kind for name, kind in kinds.items() if name in self._message_keys}


def _table(batch: list[dict[str, Any]], features: Features) -> pyarrow.Table:
    columns = {name: [_value(row.get(name), feature) for row in batch] for name, feature in features.items()}
    return pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)


def _value(value: Any, feature: Any) -> Any:
    """A value as its column stores it."""
    if isinstance(feature, Value) and feature.dtype == "string" and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
