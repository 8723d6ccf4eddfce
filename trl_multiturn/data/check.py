"""Reads a dataset as the trainers will, row by row, and says what is wrong with it before any training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from .. import _upstream
from ..formats import (
    FORMATS,
    Shapes,
    column_shapes,
    columns_read,
    conversation_column,
    describe,
    find_reward,
    has_images,
    recognize,
)
from ..images.vision import vision_of
from ..messages.terminal import visible
from ..messages.wording import RenderingSwitches
from ..segments import branches_of
from ..templates import TurnTemplate
from .images.rows import read_token_row, tokenize_image_text
from .loading import load_rows
from .preview import MaskPreview, preview_masks
from .row_checks import check_label, check_margin, holds_messages
from .segments import TokenRow, fit_segments
from .tokenization import tokenize_preference_row, tokenize_unpaired_row
from .truncation import PREFERENCE_SIDES, UNPAIRED_SIDES, completion_cut
from .turns import branches_column, choose_tokens, columns_of_turns


Kind = Literal["preference", "unpaired", "trajectory", "supervised"]

_COLUMNS = (
    "Columns must be `prompt`, `chosen`, `rejected` (preference), or `prompt`, `completion` with `label` (unpaired) "
    "or `reward` (trajectory), or their token columns (`prompt_ids`, `chosen_ids`, `chosen_action_mask`, …), or a "
    "whole "
    "conversation (`messages`, `conversations`, `traj`)."
)
_MAX_SHOWN = 20


@dataclass
class CheckReport:
    """What [`check_dataset`] found.

    Attributes:
        rows (`dict[str, int]`): rows read, by split.
        kinds (`Counter`): rows by kind: `preference`, `unpaired`, `trajectory`; `supervised` where a conversation has
            no outcome.
        formats (`Counter`): rows by the form they are written in (`trl`, `tokens`, `sharegpt`, …; see `formats`).
        errors (`list[str]`): one per malformed row, with split, number, reason and remedy; defects of the template.
        warnings (`list[str]`): what trains, but perhaps not as meant.
        lengths, trained (`list[int]`): tokens, and trained tokens, of each sequence.
        segments (`list[int]`): token sequences of each trajectory that is more than one.
        previews (`list[MaskPreview]`): the first rows, with their masks.
        notes (`list[str]`): what the rows were taken for, where they are not written in TRL's form.
    """

    rows: dict[str, int] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    previews: list[MaskPreview] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_dataset(
    dataset: Any,
    model: str | PreTrainedTokenizerBase | ProcessorMixin,
    config: str | None = None,
    split: str | None = None,
    max_length: int | None = None,
    num_previews: int = 0,
    progress: bool = True,
    drop_reasoning: bool = False,
    tool_dialect: str | None = None,
    write_reasoning: bool = False,
) -> CheckReport:
    """Checks every row of a preference, unpaired or trajectory dataset.

    Args:
        dataset (`str`, `Dataset` or `dict[str, Dataset]`):
            Name on the Hub, folder or file (see [`load_rows`]), or the dataset itself.
        model (`str` or [`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or processor for rows with images, or what it is loaded from.
        config (`str`, *optional*), split (`str`, *optional*):
            Configuration on the Hub, and the only split to read.
        max_length (`int`, *optional*):
            The trainer's `max_length`: rows that lose their trained tokens to it are errors, cut rows a warning.
        num_previews (`int`, *optional*, defaults to `0`):
            Rows to keep a preview of.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        drop_reasoning (`bool`, *optional*), tool_dialect (`str`, *optional*), write_reasoning (`bool`, *optional*):
            As in the trainers' configurations.

    Returns:
        [`CheckReport`]
    """
    splits = load_rows(dataset, config) if isinstance(dataset, str) else dataset
    splits = dict(splits) if isinstance(splits, Mapping) else {"train": splits}
    if split is not None:
        if split not in splits:
            raise ValueError(f"The dataset has the splits {sorted(splits)} but no `{split}`.")
        splits = {split: splits[split]}

    tokenizer: Any = _load_tokenizer(model, splits) if isinstance(model, str) else model
    report = CheckReport()
    rendering = RenderingSwitches(drop_reasoning, tool_dialect=tool_dialect, write_reasoning=write_reasoning)
    _check_template(tokenizer, rendering, report)
    cut, last_token = 0, max(getattr(tokenizer, "tokenizer", tokenizer).get_vocab().values())
    for name, rows in splits.items():
        report.rows[name] = len(rows)
        shapes = column_shapes(rows)
        for index, row in enumerate(tqdm(rows, desc=f"Checking {name}", disable=not progress, unit="row")):
            try:
                tokens, kind = _read(row, tokenizer, shapes, report, rendering)
                cut += _check_row(tokens, kind, last_token, max_length, report)
                if len(report.previews) < num_previews:
                    report.previews.append(preview_masks([tokens], 1, tokenizer, max_length, show=False))
            except (ValueError, TypeError, KeyError) as error:
                report.errors.append(f"{name}, row {index}: {_reason(error)}")
    _warn(report, cut, max_length)
    _note_segments(report)
    _note_formats(report, dataset if isinstance(dataset, str) else "IN")
    return report


def _load_tokenizer(name: str, splits: Mapping[str, Any]) -> PreTrainedTokenizerBase | ProcessorMixin:
    """A model's tokenizer, or its processor where rows hold images."""
    images = any(has_images(row) for rows in splits.values() for row in islice(rows, 1))
    return (AutoProcessor if images else AutoTokenizer).from_pretrained(name)


def _check_template(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, rendering: RenderingSwitches, report: CheckReport
) -> None:
    if tokenizer.chat_template is None:
        report.warnings.append(
            "The tokenizer has no chat template: rows of messages cannot be read, only plain text and token rows."
        )
        return
    try:
        template = TurnTemplate(tokenizer, **rendering.arguments())
    except ValueError as error:
        report.errors.append(f"Chat template: {error}")
        return
    if not template.shows_tool_calls:
        report.warnings.append(
            "The chat template leaves out tool calls or tool results when it renders. Rows with `tool_calls` are "
            "refused; set `tool_dialect='hermes'`, which writes them as text, or use a template that supports tools."
        )


def _read(
    row: dict[str, Any],
    tokenizer: Any,
    shapes: Shapes,
    report: CheckReport,
    rendering: RenderingSwitches,
) -> tuple[dict[str, Any], Kind]:
    """A row's tokens, with masks of what trains, and its kind."""
    written = recognize(row)
    if written is not None:
        report.formats[written] += 1
    kind = _kind(row, written)
    if kind == "preference":
        check_margin(row.get("margin"))
    elif kind == "unpaired":
        check_label(row["label"])
    sides = PREFERENCE_SIDES if kind == "preference" else UNPAIRED_SIDES
    if sides[0][1] not in row:
        row = row | _tokenize(row, kind, tokenizer, shapes, rendering)
    elif has_images(row):
        row = row | read_token_row(row, sides, vision_of(tokenizer))
    for ids, mask in sides:
        if len(row[ids]) != len(row[mask] or []):
            raise ValueError(
                f"`{mask}` has {len(row[mask] or [])} entries but `{ids}` has {len(row[ids])}, so it is unknown which "
                "tokens are trained. Write one mask entry per token."
            )
        row = row | {mask: choose_tokens(row, ids, row[mask]), columns_of_turns(ids)[0]: None}
    return row, kind


def _check_row(row: dict[str, Any], kind: Kind, last_token: int, max_length: int | None, report: CheckReport) -> int:
    """Adds the counts of a row's tokens, and returns how many of its sides `max_length` cuts."""
    cut, sequences = 0, []
    for ids, mask in PREFERENCE_SIDES if kind == "preference" else UNPAIRED_SIDES:
        if branches_of(row.get(branches_column(ids))):
            side = TokenRow.read(row, ids, row[mask], {})
            report.segments.append(len(side.branches) + 1)
            side, dropped = (side, 0) if max_length is None else fit_segments(side, max_length)
            cut += bool(dropped)
            row = row | {"prompt_ids": side.prompt_ids, ids: side.completion_ids, mask: side.action_mask}
        length = len(row["prompt_ids"]) + len(row[ids])
        kept = len(row[ids]) if max_length is None else completion_cut(row[mask], max_length - len(row["prompt_ids"]))
        if not any(row[mask][: max(kept, 0)]):
            limit = "" if max_length is None else f" within `max_length={max_length}`"
            raise ValueError(
                f"`{ids.removesuffix('_ids')}` has {length} tokens, none of them sampled by the policy{limit}, so the "
                "row carries no gradient. Raise `max_length` or drop the row."
            )
        largest = max([*row["prompt_ids"], *row[ids]])
        if largest > last_token:  # which may lie beyond the vocabulary's size: ids leave gaps
            raise ValueError(
                f"`{ids}` or `prompt_ids` holds the token {largest}, but the tokenizer ends at {last_token}. "
                "The rows were written for another tokenizer: pass that one, or write them anew."
            )
        cut += kept < len(row[ids])
        sequences.append(row[ids][:kept])
        report.lengths.append(length)
        report.trained.append(sum(row[mask][:kept]))
    if len(sequences) == 2 and sequences[0] == sequences[1]:
        raise ValueError("`chosen` and `rejected` are the same tokens, so the row carries no gradient. Drop the row.")
    report.kinds[kind] += 1
    return cut


def _kind(row: dict[str, Any], written: str | None) -> Kind:
    if {"chosen", "rejected"} <= row.keys() or {"chosen_ids", "rejected_ids"} <= row.keys():
        return "preference"
    if written == "logs":
        raise ValueError(f"the row is of {describe(written)}. Write such rows as token rows with that converter.")
    read = columns_read(row)
    if "chosen" in read:
        return "preference"
    if "completion" in row or "completion_ids" in row or "completion" in read:
        if row.get("label") is not None:
            return "unpaired"
        if find_reward(row) is not None:
            return "trajectory"
        if "completion" not in row and "completion_ids" not in row and not {"label", "reward"} & row.keys():
            return "supervised"
        raise ValueError("there is neither a `label` nor a `reward`, so nothing says how good the completion is.")
    if (inner := _inner_rows(row)) is not None:
        raise ValueError(
            f"the rows stand in `{inner[0]}` of one object: {describe(inner[1])}. Write them out with that converter."
        )
    raise ValueError(f"the columns are {sorted(row)}. {_COLUMNS}")


def _inner_rows(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The column that holds rows of its own, and what they are."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            written = recognize(value[0])
            if written is not None:
                return name, written
    return None


def _tokenize(
    row: dict[str, Any], kind: Kind, tokenizer: Any, shapes: Shapes, rendering: RenderingSwitches
) -> dict[str, Any]:
    sides = ("chosen", "rejected") if kind == "preference" else ("completion",)
    if conversation_column(row) is None and not holds_messages(row, sides):
        if has_images(row):
            return tokenize_image_text(row, PREFERENCE_SIDES if kind == "preference" else UNPAIRED_SIDES, tokenizer)
        if kind == "preference" and "prompt" not in row:
            row = row | _upstream.extract_prompt(row)
        encoded = {"prompt_ids": tokenizer(row["prompt"])["input_ids"]}
        for side in sides:
            ids = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            mask = "action_mask" if side == "completion" else f"{side}_action_mask"
            encoded |= {f"{side}_ids": ids, mask: [1] * len(ids)}
        return encoded
    tokenize = tokenize_preference_row if kind == "preference" else tokenize_unpaired_row
    return tokenize(row, tokenizer, shapes, rendering=rendering)


def _warn(report: CheckReport, cut: int, max_length: int | None) -> None:
    if len(report.kinds) > 1:
        report.errors.append(f"The rows are of several kinds ({dict(report.kinds)}), but a trainer takes one.")
    if not any(report.rows.values()):
        report.errors.append("The dataset has no rows.")
    if cut:
        report.warnings.append(
            f"`max_length={max_length}` cuts {cut} of {len(report.lengths)} sequences. Raise it to train on whole "
            "trajectories."
        )


def _note_segments(report: CheckReport) -> None:
    if report.segments:
        report.notes.append(
            f"{len(report.segments)} trajectories are more than one token sequence, {np.mean(report.segments):.1f} on "
            "average: the chat template rewrites earlier turns, and each turn is read as the policy saw it. "
            "`training_template=True` prefers TRL's training template, where there is one."
        )


def _note_formats(report: CheckReport, name: str) -> None:
    for written, count in report.formats.items():
        if written in ("logs", "trl", "tokens", "text"):
            continue
        report.notes.append(
            f"{count} rows are {FORMATS[written].description}. They are read as they are; `trl-multiturn convert "
            f"{name} "
            f"OUT --from {written}` writes them in TRL's form."
        )
    if supervised := report.kinds["supervised"]:
        report.warnings.append(
            f"{supervised} conversations have neither a `reward` nor a `label`: `supervised_rows` takes them, but no "
            "preference or value trainer does. Add the column that says how good they are."
        )


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def print_check(report: CheckReport) -> None:
    """Prints a [`CheckReport`]."""
    console = Console()
    for preview in report.previews:
        console.print(preview)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items()) or "none readable"
    console.print(f"{sum(report.rows.values())} rows in {len(report.rows)} split(s): {kinds}")
    if report.lengths:
        table = Table("tokens per sequence", "mean", "median", "95th percentile", "max")
        for name, values in (("all", report.lengths), ("trained", report.trained)):
            numbers = (np.mean(values), np.median(values), np.percentile(values, 95), np.max(values))
            table.add_row(name, *(f"{number:.0f}" for number in numbers))
        console.print(table)
        share = sum(report.trained) / max(sum(report.lengths), 1)
        console.print(f"{100 * share:.1f} % of all tokens are trained.")
    for note in report.notes:
        console.print(visible(f"note: {note}"), markup=False)
    for warning in report.warnings:
        console.print(visible(f"warning: {warning}"), style="yellow", markup=False)
    for error in report.errors[:_MAX_SHOWN]:
        console.print(visible(f"error: {error}"), style="red", markup=False)
    if len(report.errors) > _MAX_SHOWN:
        console.print(f"… and {len(report.errors) - _MAX_SHOWN} more errors.", style="red")
    if not report.errors:
        console.print("No errors.", style="green")
