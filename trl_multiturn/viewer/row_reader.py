"""Rows, and trajectories outside a run, as records: files, datasets, results of evaluations and searches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk

from ..data.tokenization import tokenize_preference_row, tokenize_unpaired_row
from ..data.turns import branches_column
from ..formats import images_of
from ..journal.journal import Journal
from ..messages import normalize_messages
from ..messages.images import before_first_user_turn, fill_placeholders, images_in, with_portable_images
from ..segments import branches_of
from ..trajectory import Trajectory, Verdict
from .record import PairRecord, Record, Source, prompt_key, token_rewards


_SIDES = ("chosen", "rejected")
_TEXT_COLUMNS = ("prompt", "completion", "info")


def read_file(path: Path, tokenizer: Any = None) -> Source:
    """
    A `.jsonl` or `.parquet` file, of rows or of trajectories as `trl-multiturn export` writes them.

    Raises:
        `FileNotFoundError`, `ValueError`: if it is not there, holds nothing, or a line of it is no JSON object.
    """
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path} is no run, and ends in neither `.jsonl` nor `.parquet`, so its format is unknown.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give a run, or a JSONL or Parquet file of rows.")
    rows = _parquet_rows if path.suffix == ".parquet" else _json_rows
    return read_rows(lambda: rows(path), str(path), tokenizer)


def read_journal(folder: Path) -> Source:
    """A journal, such as `evaluate_policy(journal=…)` or `generate_trajectories(journal=…)` writes."""
    return read_trajectories(lambda: Journal(folder).read(), str(folder))


def read_dataset_folder(folder: Path, tokenizer: Any = None) -> Source:
    """What `Dataset.save_to_disk` wrote."""
    saved = load_from_disk(folder)
    parts = saved.values() if isinstance(saved, DatasetDict) else [saved]
    return read_rows(lambda: (row for part in parts for row in part), str(folder), tokenizer)


def read_trajectories(read: Callable[[], Iterable[Trajectory]], title: str, **known: Any) -> Source:
    """Trajectories, e.g. those of [`value_guided_search`] or of an [`EvaluationResult`]."""

    def records() -> Iterator[Record]:
        seen: set[str] = set()
        for number, trajectory in enumerate(read()):
            split = "evaluation" if trajectory.info.get("policy", "").startswith("evaluation") else "rollout"
            record = Record.of(trajectory, number, split, fate=_dropped(trajectory))
            if record.id in seen:  # of two runs in one list
                record.id = f"{record.id}#{number}"
            seen.add(record.id)
            yield record

    return Source(title=title, kind="trajectories", read=records, **known)


def read_rows(read: Callable[[], Iterable[Mapping[str, Any]]], title: str, tokenizer: Any = None) -> Source:
    """
    Rows of any kind that the trainers take, as text or as tokens; or trajectories as rows.

    Args:
        read (`Callable`):
            Reads the rows from the start.
        title (`str`):
            For the page.
        tokenizer (*optional*):
            Gives text rows their tokens and masks, as the trainers do.

    Raises:
        `ValueError`: if there is no row, or the first is neither.
    """
    first = next(iter(read()), None)
    if first is None:
        raise ValueError(f"{title} holds no row, so there is nothing to show.")
    if {"stop_reason", "completion_ids"} <= set(first):
        return read_trajectories(lambda: map(_trajectory, read()), title)
    paired = "chosen" in first or "chosen_ids" in first
    if not paired and not {"completion", "completion_ids", "messages"} & set(first):
        raise ValueError(
            f"{title} has the columns {sorted(first)}, but rows have `prompt`, `chosen` and `rejected`, or `prompt` "
            "and `completion` (or `…_ids` with masks), and trajectories what `trl-multiturn export` writes."
        )
    source = Source(title=title, kind="rows", read=lambda: iter(()))
    names = _SIDES if paired else ("completion",)

    def records() -> Iterator[Record]:
        source.pairs.clear()
        for number, row in enumerate(read()):
            row = _with_tokens(row, number, paired, tokenizer, source.notes)
            sides = [_side(row, name, number, source.notes) for name in names]
            if paired:
                source.pairs.append(_pair(row, *sides))
            yield from sides

    source.read = records
    return source


def _with_tokens(
    row: Mapping[str, Any], number: int, paired: bool, tokenizer: Any, notes: list[str]
) -> Mapping[str, Any]:
    """A text row with its tokens and masks, where there is a tokenizer and they can be known."""
    if tokenizer is None or "chosen_ids" in row or "completion_ids" in row or not isinstance(row.get("prompt"), list):
        return row
    try:
        return {**row, **(tokenize_preference_row if paired else tokenize_unpaired_row)(dict(row), tokenizer)}
    except ValueError as error:  # a row that cannot train is worth a look all the more
        notes.append(f"Some rows have no tokens, first row {number}: {error}")
        return row


def _side(row: Mapping[str, Any], name: str, number: int, notes: list[str]) -> Record:
    """A row's completion, or one of its two."""
    paired = name != "completion"
    info = _object(row.get(f"{name}_info" if paired else "info"))
    prompt = _messages(row, "prompt", notes)
    completion = _messages(row, name if name in row or f"{name}_messages" in row else "messages", notes)
    reward = row.get(f"{name}_reward" if paired else "reward")
    record = Record(
        id=f"{number}/{name}" if paired else str(number),
        prompt=prompt,
        completion=completion,
        prompt_ids=list(row.get("prompt_ids") or []),
        completion_ids=list(row.get(f"{name}_ids") or []),
        branches=branches_of(row.get(branches_column(f"{name}_ids"))),
        action_mask=list(row.get(f"{name}_action_mask" if paired else "action_mask") or []),
        layers={short: row[long] for short, long in _layer_columns(row, paired)},
        iteration=info["iteration"] + 1 if "iteration" in info else None,
        policy=name if paired else info.get("policy", ""),
        prompt_key=prompt_key(prompt or [{"ids": row.get("prompt_ids")}], info.get("prompt_fingerprint", "")),
        prompt_index=row.get("prompt_index", number),
        verdict=_verdict(row, name, reward),
        reward=reward,
        stop_reason=info.get("stop_reason", ""),
        fate="row",
        info=info,
    )
    if record.action_mask and not paired:
        rewards = _row_rewards(row, record)
        record.layers |= {} if rewards is None else {"rewards": rewards}
    return record


def _layer_columns(row: Mapping[str, Any], paired: bool) -> Iterator[tuple[str, str]]:
    for layer, column in (("logps", "behavior_logps"), ("ref_logps", "ref_logps")):
        if not paired and isinstance(row.get(column), Sequence):
            yield layer, column


def _row_rewards(row: Mapping[str, Any], record: Record) -> list[float] | None:
    process = [(i, reward) for i, reward in enumerate(row.get("process_rewards") or []) if reward]
    return token_rewards(record.action_mask, record.reward, row.get("turn_rewards"), process)


def _pair(row: Mapping[str, Any], chosen: Record, rejected: Record) -> PairRecord:
    return PairRecord(
        chosen.id,
        rejected.id,
        chosen.iteration,
        prompt_tokens=len(chosen.prompt_ids) or None,
        margin=row.get("margin"),
        ref_chosen_logps=row.get("ref_chosen_logps"),
        ref_rejected_logps=row.get("ref_rejected_logps"),
    )


def _verdict(row: Mapping[str, Any], name: str, reward: float | None) -> str:
    if name != "completion":
        return (Verdict.CORRECT if name == "chosen" else Verdict.INCORRECT).value
    label = row.get("label")
    if label is None and reward is None:
        return Verdict.UNDECIDED.value
    good = bool(label) if label is not None else float(reward or 0) > 0
    return (Verdict.CORRECT if good else Verdict.INCORRECT).value


def _messages(row: Mapping[str, Any], name: str, notes: list[str]) -> list[dict[str, Any]]:
    """A column of messages in TRL's form; as they are, with a note, where they cannot be brought into it."""
    value = row.get(f"{name}_messages", row.get(name))
    if isinstance(value, str) and f"{name}_messages" in row:
        value = json.loads(value)
    if isinstance(value, str):
        return [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    try:
        return with_portable_images(_with_images(normalize_messages(value or [], name), row, name))
    except ValueError as error:
        notes.append(f"Some messages are shown as they were written, first because: {error}")
        return [dict(message) for message in value if isinstance(message, Mapping)]


def _with_images(messages: list[dict[str, Any]], row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Messages with the images that their row has for them, where these fit."""
    images = images_of(row, "" if name == "prompt" else name)
    places = images_in(messages).count(None)
    if len(images) == places:
        return fill_placeholders(messages, images)
    return before_first_user_turn(messages, images) if images and not places else messages


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    texts = {name: json.loads(row[name]) for name in _TEXT_COLUMNS if isinstance(row.get(name), str)}
    known = set(Trajectory.__dataclass_fields__)
    return Trajectory.from_dict({name: value for name, value in {**row, **texts}.items() if name in known})


def _dropped(trajectory: Trajectory) -> str:
    return f"dropped: {trajectory.info['dropped']}" if "dropped" in trajectory.info else ""


def _object(text: Any) -> dict[str, Any]:
    """The JSON object in a provenance column; rows of other origin may hold anything there."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Line by line: `load_dataset` would fill the gaps of a message with nulls."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {number} is no JSON ({error}). In JSONL each line is one object."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}: line {number} is no object but {line.strip()!r:.40}. Give one row per line."
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}.") from error
