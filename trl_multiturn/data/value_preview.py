"""See where a trajectory goes wrong: the value of the state after each step, in a terminal or a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..messages.terminal import visible
from ..steps import StepDelimiter, step_ids
from .preview import show_preview


class Scorer(Protocol):
    """Whatever values token sequences by the state after their last token, such as [`ValueModel`]."""

    def score(self, sequences: list[list[int]]) -> list[float]: ...


@dataclass(frozen=True)
class ValuedStep:
    """A step of the policy and the value of the state after it; `value` is `None` for what the policy only read."""

    text: str
    value: float | None


@dataclass(frozen=True)
class ValuePreview:
    """
    Trajectories step by step; prints itself in a terminal (`rich`) and in a notebook (HTML).

    Attributes:
        trajectories (`list[tuple[str, list[ValuedStep]]]`): a title and the steps of each trajectory.
    """

    trajectories: list[tuple[str, list[ValuedStep]]]

    def __rich__(self) -> Group:
        panels = []
        for title, steps in self.trajectories:
            table = Table.grid(padding=(0, 2))
            for step in steps:
                value = "" if step.value is None else f"{step.value:6.3f}"
                table.add_row(
                    Text(value, style=_terminal(step.value)), Text(visible(step.text.strip("\n")), _weight(step.value))
                )
            panels.append(Panel(table, title=Text(title), title_align="left"))
        return Group(*panels)

    def _repr_html_(self) -> str:
        blocks = []
        for title, steps in self.trajectories:
            lines = "".join(
                f'<tr><td style="{_css(step.value)};padding:2px 8px;text-align:right;vertical-align:top">'
                f"{'' if step.value is None else f'{step.value:.3f}'}</td>"
                f'<td style="white-space:pre-wrap;{"color:#777" if step.value is None else ""}">'
                f"{html.escape(visible(step.text.strip(chr(10))))}</td></tr>"
                for step in steps
            )
            blocks.append(f'<p><b>{html.escape(title)}</b></p><table style="font-family:monospace">{lines}</table>')
        return f"<div>{''.join(blocks)}</div>"

    def save(self, path: str) -> None:
        """Writes a page that a browser opens."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><meta charset="utf-8"><title>Values</title>{self._repr_html_()}\n')


def preview_values(
    rows: Any,
    value_model: Scorer | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_rows: int = 1,
    step_delimiter: StepDelimiter = "line",
    show: bool = True,
) -> ValuePreview:
    """
    Values a trajectory step by step, as in the case studies of OREO and DQO: where reasoning breaks, the value drops.

    Args:
        rows (`Dataset` or `list[dict]`): token rows (`prompt_ids`, `completion_ids`, `action_mask`, optionally `label`
            or `reward` for the title). Or a trainer of OREO or DQO, which brings its `eval_dataset` (without one its
            training rows), its value model and its tokenizer.
        value_model (*optional*): anything with `score(sequences) -> list[float]`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer.
        num_rows (`int`, *optional*, defaults to `1`): rows to show.
        step_delimiter (`str`, *optional*, defaults to `"line"`): where steps end: `"turn"`, `"line"` or `"sentence"`.
        show (`bool`, *optional*, defaults to `True`): print at once: in a terminal, or as HTML in a notebook.

    Returns:
        [`ValuePreview`]. The last step's value is that of the state before its last token, which ends the trajectory.

    Raises:
        `ValueError`: if there is no value model, no tokenizer, or the rows hold no single trajectories.
    """
    if hasattr(rows, "train_dataset"):
        trainer = rows
        rows = _rows_of(trainer)
        value_model = value_model or _value_model_of(trainer)
        processing_class = processing_class or trainer.processing_class
    _refuse_missing(rows, value_model, processing_class)
    assert value_model is not None  # refused above
    trajectories = []
    for index in range(min(num_rows, len(rows))):
        row = rows[index]
        outcome = next((f" · {name} {row[name]}" for name in ("reward", "label") if row.get(name) is not None), "")
        trajectories.append(
            (f"trajectory {index}{outcome}", _steps(row, value_model, processing_class, step_delimiter))
        )
    preview = ValuePreview(trajectories)
    if show:
        show_preview(preview)
    return preview


def _rows_of(trainer: Any) -> Any:
    """The rows of a trainer: those it evaluates on, or else those it trains on; the first of several sets."""
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    return next(iter(rows.values())) if isinstance(rows, dict) else rows


def _value_model_of(trainer: Any) -> Any:
    value_model = getattr(trainer, "value_model", None)
    if value_model is None:
        raise ValueError(
            f"A {type(trainer).__name__} trains no value model, so there are no values to show. Pass a trainer of "
            "OREO or DQO, or `value_model=ValueModel.from_pretrained(folder)`."
        )
    return value_model.standing_on(trainer.accelerator.unwrap_model(trainer.model))


def _refuse_missing(rows: Any, value_model: Any, processing_class: Any) -> None:
    if value_model is None:
        raise ValueError("Nothing was passed that values states. Pass `value_model=`, or a trainer of OREO or DQO.")
    if processing_class is None:
        raise ValueError("Steps are found in text, which needs a tokenizer. Pass `processing_class=`.")
    columns = getattr(rows, "column_names", None) or (sorted(rows[0]) if len(rows) else [])
    wanted = ("prompt_ids", "completion_ids", "action_mask") if columns else ()
    if missing := [name for name in wanted if name not in columns]:
        raise ValueError(
            f"The rows have the columns {columns} but no `{missing[0]}`, so there are no tokens of one trajectory to "
            "value. Pass token rows, such as a trainer's own, or those of `build_unpaired_dataset`."
        )


def _steps(
    row: dict[str, Any], value_model: Scorer, tokenizer: Any, step_delimiter: StepDelimiter
) -> list[ValuedStep]:
    ids, mask = row["completion_ids"], row["action_mask"]
    numbers = step_ids(tokenizer, ids, mask, step_delimiter)
    spans = []  # (start, stop, sampled) of steps and of what lies between turns
    for (sampled, _), group in groupby(range(len(ids)), key=lambda t: (bool(mask[t]), numbers[t])):
        positions = list(group)
        spans.append((positions[0], positions[-1] + 1, sampled))
    ends = [stop for _, stop, sampled in spans if sampled]
    if ends:
        ends[-1] = max(ends[-1] - 1, 0)
    values = iter(value_model.score([row["prompt_ids"] + ids[:end] for end in ends]) if ends else [])
    return [ValuedStep(tokenizer.decode(ids[a:b]), next(values) if sampled else None) for a, b, sampled in spans]


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _css(value: float | None) -> str:
    return "" if value is None else f"background:hsl({round(120 * _share(value))},70%,75%)"


def _terminal(value: float | None) -> str:
    if value is None:
        return ""
    return "bold green" if value > 2 / 3 else "bold yellow" if value > 1 / 3 else "bold red"


def _weight(value: float | None) -> str:
    return "dim" if value is None else ""
