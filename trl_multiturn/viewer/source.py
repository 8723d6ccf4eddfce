"""From whatever a user wants to look at to a [`Source`]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..trajectory import Trajectory
from .record import Source
from .row_reader import read_dataset_folder, read_file, read_journal, read_rows, read_trajectories
from .run_reader import read_run, tokenizer_folders


def open_source(source: Any, tokenizer: Any = None, iteration: int | None = None) -> Source:
    """
    Opens something to look at.

    Args:
        source:
            A run (`output_dir`), a journal, a JSONL or Parquet file of rows or trajectories, a saved dataset; or in
            Python an [`EvaluationResult`], trajectories, a `Dataset`, rows, a trainer.
        tokenizer (*optional*):
            Or its name; a run has its own.
        iteration (`int`, *optional*):
            Of a run, from 1: the only one to read.

    Raises:
        `ValueError`, `FileNotFoundError`: if there is nothing to look at in it.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    opened = _open(source, tokenizer, iteration)
    opened.tokenizer = tokenizer or opened.tokenizer
    return opened


def _open(source: Any, tokenizer: Any, iteration: int | None) -> Source:
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source), tokenizer, iteration)
    if hasattr(source, "trajectories") and hasattr(source, "metrics"):  # an `EvaluationResult`
        return read_trajectories(lambda: source.trajectories, "Evaluation", metrics=source.metrics())
    if hasattr(source, "train_dataset"):
        return _open_trainer(source, iteration)
    first = next(iter(source), None) if isinstance(source, Sequence) else None
    if isinstance(first, Trajectory):
        return read_trajectories(lambda: source, "Trajectories")
    if hasattr(source, "column_names") or isinstance(first, Mapping):
        return read_rows(lambda: iter(source), "Rows", tokenizer)
    raise ValueError(
        f"A {type(source).__name__} is nothing to look at. Pass the path of a run or a file, an `EvaluationResult`, "
        "trajectories, rows or a trainer."
    )


def _open_path(path: Path, tokenizer: Any, iteration: int | None) -> Source:
    if not path.is_dir():
        return read_file(path, tokenizer)
    if any(path.glob("shard-*.jsonl")):
        return read_journal(path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return read_dataset_folder(path, tokenizer)
    opened = read_run(path, iteration)
    opened.tokenizer = next(map(AutoTokenizer.from_pretrained, tokenizer_folders(path)), None)
    return opened


def _open_trainer(trainer: Any, iteration: int | None) -> Source:
    """The run behind a trainer, or its rows where it trains on given ones."""
    run_folder = getattr(getattr(trainer, "_row_source", None), "run_folder", None)
    if run_folder is not None:
        opened = read_run(Path(run_folder), iteration)
    else:
        opened = read_rows(lambda: iter(trainer.train_dataset), "Training rows")
    opened.tokenizer = trainer.processing_class
    return opened
