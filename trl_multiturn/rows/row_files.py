"""Rows on disk, written as they are selected: memory holds a few of them, and a file is whole or not there."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, Features, load_from_disk

from ..data.columns import in_batches
from ..distributed.checksums import DamagedFileError, find_damage, write_checksums
from ..distributed.durable import put_in_place, writing
from .pairing import (
    OPTIONAL_COLUMNS,
    branches,
    common_columns,
    dataset_of,
    optional_columns,
    preference_features,
    preference_row,
    unpaired_features,
    unpaired_row,
    without_unseen_images,
)
from .selection import Selection


def write_rows(selections: Iterable[Selection], folder: Path, row_format: Literal["preference", "unpaired"]) -> None:
    """
    Writes the rows of one selection after another to a folder that `datasets.load_from_disk` reads.

    They are those of [`build_preference_dataset`] or [`build_unpaired_dataset`] on all of them at once.

    Args:
        selections (`Iterable[Selection]`):
            Such as [`select_by_prompt`] finds.
        folder (`Path`):
            What is there is replaced, when all rows are written.
        row_format (`"preference"` or `"unpaired"`):
            Which rows to write.
    """
    brings: Counter[str] = Counter()
    count = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for selection in selections:
            if row_format == "preference":
                for pair in selection.pairs:
                    brings["branches"] += branches(pair)
                    yield preference_row(pair)
                continue
            for trajectory in selection.trajectories:
                count += 1
                brings.update(optional_columns(trajectory))
                yield unpaired_row(trajectory)

    # Which columns all rows have is known at the end, so they are first written with every column
    found = folder.with_name(f"{folder.name}.found")
    preference = row_format == "preference"
    features = preference_features(branching=True) if preference else unpaired_features(OPTIONAL_COLUMNS)
    schema = Features(features).arrow_schema
    with writing(found):
        found.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(found), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in in_batches(rows()):
                stream.write_table(dataset_of(batch, features).data.table)
    dataset = Dataset.from_file(str(found))
    if row_format == "unpaired":
        common = common_columns(brings, count)
        dataset = dataset.remove_columns([name for name in OPTIONAL_COLUMNS if name not in common])
    elif not brings["branches"]:
        dataset = dataset.remove_columns(["chosen_branches", "rejected_branches"])
    save_rows(without_unseen_images(dataset), folder)
    found.unlink()


def save_rows(rows: Dataset, folder: Path) -> None:
    """Saves rows to a folder, whole or not at all; what was there is replaced."""
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        rows.save_to_disk(partial, num_shards=1)  # without a number, an empty dataset is written as no shard at all
        write_checksums(partial)
        if folder.exists():
            shutil.rmtree(folder)
        put_in_place(partial, folder)


def load_rows(folder: Path) -> Dataset:
    """The rows that [`save_rows`] wrote.

    Raises:
        `ValueError`: naming the file, if one is missing or is not what was written.
    """
    damage, cause = find_damage(folder), None
    if damage is None:
        try:
            return load_from_disk(folder)
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            damage, cause = f"{folder} cannot be read ({error})", error
    raise DamagedFileError(
        f"{damage}, so its rows cannot be trained on. Restore it, or delete {folder.parent / 'report.json'} and start "
        "again: the rows are then selected anew from the journal, and no rollout is lost."
    ) from cause


def forget_caches(rows: Dataset, within: Path) -> None:
    """Deletes what was computed, and not saved, beside the files of rows in a folder; rows that rest on it stay."""
    for folder in {Path(file["filename"]).resolve().parent for file in rows.cache_files}:
        for cache in folder.glob("cache-*.arrow") if within.resolve() in folder.parents else ():
            cache.unlink(missing_ok=True)  # another process was quicker
