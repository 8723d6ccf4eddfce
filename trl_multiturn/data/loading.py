"""Datasets by name: from the Hub, from a folder, or from a file of rows."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}


def load_rows(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Loads the splits of a dataset.

    Args:
        name (`str`):
            A dataset on the Hub or in a local folder (`load_dataset` or `save_to_disk`), or one file: JSONL, JSON,
            Parquet, Arrow or CSV, which becomes the split `train`.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.

    Raises:
        `ValueError`: if no name is given, or a file holds no rows that can be read.
        `FileNotFoundError`: if `name` looks like a file but is none.
    """
    if not name:
        raise ValueError("No dataset was named. Pass `--dataset_name` with a Hub name or the path of a file.")
    path = Path(name)
    if path.suffix in _BUILDERS:
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist. Give the path of a file, or a dataset's name on the Hub.")
        if not path.stat().st_size:
            raise ValueError(f"{name} is empty. Give a file with rows.")
        try:
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), streaming=streaming)
        except DatasetGenerationError as error:
            raise ValueError(
                f"{name} cannot be read as {_BUILDERS[path.suffix]}: {error.__cause__ or error}. Mend the file; in "
                "a JSONL file each line is one object. Where rows are of other types after the first megabytes (calls "
                f"that name other arguments), `trl-multiturn convert {name} OUT.parquet` writes them so that they "
                "load."
            ) from error
    if (path / "state.json").exists():
        return DatasetDict(train=load_from_disk(path))
    if (path / "dataset_dict.json").exists():
        return load_from_disk(path)
    return load_dataset(name, name=config, streaming=streaming)


def load_split(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Loads one split of a dataset, or of a file.

    Args:
        name (`str`), config (`str`, *optional*), streaming (`bool`, *optional*, defaults to `False`):
            As in [`load_rows`].
        split (`str`, *optional*, defaults to `"train"`):
            Its name; where a dataset has one split alone, as a file does, that is taken for `"train"`.

    Raises:
        `ValueError`: if the dataset has no such split.
    """
    return choose_split(load_rows(name, config, streaming), split, name)


def choose_split(
    dataset: DatasetDict | IterableDatasetDict, split: str, name: str = "The dataset"
) -> Dataset | IterableDataset:
    """One split of a loaded dataset; see [`load_split`]."""
    if split in dataset:
        return dataset[split]
    if split == "train" and len(dataset) == 1:
        return next(iter(dataset.values()))
    raise ValueError(
        f"{name} has no split {split!r}, only {', '.join(map(repr, dataset))}. Name one of them "
        "(`--dataset_train_split`, `--dataset_test_split`), or give held-out rows in a dataset or file of their own "
        "where the script takes one (`--eval_dataset_name`); without evaluation none is needed."
    )
