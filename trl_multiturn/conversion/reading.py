"""Rows of a file, one after another, each with its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset

from ..data.loading import load_rows
from ..formats import column_shapes, shape_of
from ..messages import EXACT, NEVER, SET, Shape


# A row, or why there is none
Read = Mapping[str, Any] | ValueError

_ROWS_PER_BATCH = 256
# Where a JSON file that is one object keeps its rows, beside what they have in common
_ROW_LISTS = ("simulations", "episodes", "rollouts", "trajectories", "results", "rows", "data", "conversations")


class Source:
    """Rows of a file, a dataset, or anything that gives rows.

    Args:
        rows (`str`, `Path`, `Dataset`, `IterableDataset` or `Iterable[dict]`):
            A JSONL, JSON or Parquet file, what [`load_rows`] loads by its name, or the rows themselves.
        split (`str`, *optional*):
            The split of a dataset that has several.

    Attributes:
        shapes (`dict[str, Shape]`): how the columns were stored, as far as it is known.
        size (`int`, *optional*): how far a progress bar goes.
    """

    def __init__(self, rows: Any, split: str | None = None):
        self.shapes: dict[str, Shape] = {}
        self.size: int | None = None
        self._start: Callable[[Callable[[int], None]], Iterator[Read]]
        if isinstance(rows, (str, Path)):
            self._open(Path(rows), split)
        else:
            self._take(rows)

    def read(self, advance: Callable[[int], None] = lambda steps: None) -> Iterator[Read]:
        """The rows; `advance` is told how far each goes."""
        return self._start(advance)

    def _open(self, path: Path, split: str | None) -> None:
        ending = path.suffix if path.is_file() else ""
        if ending == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            features = Features.from_arrow_schema(file.schema_arrow)
            self.size = file.metadata.num_rows
            self.shapes = {name: shape_of(feature) for name, feature in features.items()}
            self._start = lambda advance: _parquet_rows(file, features, advance)
        elif ending in (".jsonl", ".json", ".ndjson"):
            whole = _load_whole(path) if ending == ".json" else None
            if whole is not None:
                self._take(whole)
            else:
                self.size = path.stat().st_size
                self.shapes = _shapes_of_lines(path)
                self._start = lambda advance: _json_lines(path, advance)
        else:
            splits = load_rows(str(path))
            if split is None and len(splits) > 1:
                raise ValueError(f"{path} has the splits {sorted(splits)}. Name one: `--split`.")
            if split is not None and split not in splits:
                raise ValueError(f"{path} has the splits {sorted(splits)} but no `{split}`.")
            self._take(splits[split or next(iter(splits))])

    def _take(self, rows: Iterable[Any]) -> None:
        if isinstance(rows, (Dataset, IterableDataset)):
            self.shapes = column_shapes(rows)
        elif isinstance(rows, list):
            self.shapes = shapes_of_rows(rows)
        self.size = len(rows) if isinstance(rows, (list, Dataset)) else None

        def start(advance: Callable[[int], None]) -> Iterator[Read]:
            for row in rows:
                yield row if isinstance(row, Mapping) else ValueError("it is no object with columns.")
                advance(1)

        self._start = start


def _parquet_rows(
    file: pyarrow.parquet.ParquetFile, features: Features, advance: Callable[[int], None]
) -> Iterator[Mapping[str, Any]]:
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH):
        table = pyarrow.Table.from_batches([batch]).replace_schema_metadata(file.schema_arrow.metadata)
        for row in Dataset(table, info=None):
            yield row
            advance(1)


def _json_lines(path: Path, advance: Callable[[int], None]) -> Iterator[Read]:
    with open(path, "rb") as file:
        for line in file:
            advance(len(line))
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # broken JSON, or no UTF-8
                yield ValueError(f"the line is no valid JSON ({error}).")
                continue
            yield row if isinstance(row, dict) else ValueError("the line is no JSON object.")


def _load_whole(path: Path) -> list[Any] | None:
    """The rows of a JSON file: of a list, or of an object that keeps them in a list; `None` for JSON lines."""
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except ValueError as error:
        if len(text.splitlines()) > 1 and text.lstrip().startswith("{"):
            return None
        raise ValueError(f"{path} is no valid JSON ({error}). Mend the file.") from error
    if isinstance(whole, list):
        return whole
    lists = [name for name in _ROW_LISTS if isinstance(whole.get(name), list) and _rows_of_objects(whole[name])]
    return [whole] if not lists or "messages" in whole or "from" in whole[lists[0]][0] else whole[lists[0]]


def _rows_of_objects(rows: list[Any]) -> bool:
    return bool(rows) and all(isinstance(row, dict) for row in rows)


# How JSON was stored: where all objects in one place have the same keys, an Arrow struct may have written them


def shapes_of_rows(rows: Iterable[Any]) -> dict[str, Shape]:
    """The shape of every column of rows that are JSON."""
    shapes: dict[str, Shape] = {}
    for row in rows:
        if isinstance(row, Mapping):
            for name, value in row.items():
                shapes[name] = _merged(shapes.get(name, NEVER), value)
    return shapes


def _shapes_of_lines(path: Path) -> dict[str, Shape]:
    with open(path, "rb") as file:
        if not any(b"null" in line for line in file):
            return {}
    return shapes_of_rows(row for row in _json_lines(path, lambda steps: None) if isinstance(row, dict))


def _merged(shape: Any, value: Any) -> Any:
    """The shape of a place with one more value in it."""
    if value is None or shape == EXACT:
        return shape
    if isinstance(value, Mapping):
        if shape == NEVER:
            return {key: _merged(NEVER, inner) for key, inner in value.items()}
        if not isinstance(shape, dict) or shape.keys() != value.keys():
            return EXACT
        return {key: _merged(shape[key], inner) for key, inner in value.items()}
    if isinstance(value, list):
        if shape not in (NEVER, SET) and not isinstance(shape, list):
            return EXACT
        inner = shape[0] if isinstance(shape, list) else NEVER
        for item in value if any(isinstance(item, (dict, list)) for item in value[:1]) else value[:1]:
            inner = _merged(inner, item)
        return [inner]
    return EXACT if isinstance(shape, (dict, list)) else SET
