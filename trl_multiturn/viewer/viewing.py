"""See a run: `view` turns it into one page that opens from disk or in a notebook's cell."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..distributed.durable import write_whole
from .choice import choose
from .page import render_page
from .payload import Payload, build_payload
from .source import open_source


@dataclass(frozen=True)
class View:
    """
    A page, not yet written; in a notebook a cell that ends in it shows it.

    Attributes:
        title (`str`): of the page.
        payload ([`Payload`]): what it shows, as JSON.
    """

    title: str
    payload: Payload

    def __repr__(self) -> str:
        return f"View({self.title!r}: {self.payload['index']['count']} trajectories)"

    def to_html(self) -> str:
        """The page."""
        return render_page(self.payload, self.title)

    def save(self, path: str | os.PathLike) -> Path:
        """
        Writes the page, or with a name that ends in `.json` what it shows as JSON (`docs/viewer.md`).

        Returns:
            `Path`: where it is.
        """
        path = Path(path)
        if path.suffix == ".json":
            write_whole(path, json.dumps(self.payload.to_json(), ensure_ascii=False).encode("utf-8", "replace"))
        else:
            write_whole(path, self.to_html().encode("utf-8", "replace"))
        return path

    def _repr_html_(self) -> str:
        page, title = html.escape(self.to_html()), html.escape(self.title)
        style = "width:100%;height:720px;border:1px solid #8888;border-radius:4px"
        return f'<iframe sandbox="allow-scripts" title="{title}" style="{style}" srcdoc="{page}"></iframe>'


def view(
    source: Any,
    *,
    tokenizer: Any = None,
    sample: int | None = None,
    iteration: int | None = None,
    only: str | None = None,
    model: str | None = None,
    reference: str | None = None,
    value_model: str | None = None,
    title: str | None = None,
) -> View:
    """
    Turns a run, an evaluation, a search, trajectories or rows into a page to look at, search and share.

    ```python
    >>> view("outputs/iterative_multi_turn_dpo").save("run.html")
    >>> view(evaluate_policy(prompts, engine, [PythonTool()], [math_reward], n=8))  # in a notebook
    ```

    Args:
        source:
            The path of a run (`output_dir`), of a journal, of a JSONL or Parquet file of rows or trajectories, of a
            saved dataset; or an [`EvaluationResult`], trajectories, a `Dataset`, rows, a trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Shows token ids as text; a run has its own. With one, text rows get tokens and masks.
        sample (`int`, *optional*):
            At most so many trajectories, drawn evenly, the sides of a pair together.
        iteration (`int`, *optional*):
            Of a run, from 1: the only one to show.
        only (`str`, *optional*):
            `"dropped"`, `"rows"`, `"unused"`, `"correct"`, `"incorrect"`, `"undecided"`, `"tool_errors"` or
            `"evaluation"`.
        model (`str`, *optional*), reference (`str`, *optional*), value_model (`str`, *optional*):
            Folders or names of models with which log π, log π_ref and the values of all tokens are computed.
        title (`str`, *optional*):
            Of the page.

    Returns:
        [`View`]

    Raises:
        `ValueError`, `FileNotFoundError`: if there is nothing to look at, or no trajectory is chosen.
    """
    opened = open_source(source, tokenizer, iteration)
    records = choose(opened.read(), opened.pairs, only, sample)
    if model or reference or value_model:
        from .scoring import load_scorers, with_scores

        records = with_scores(records, load_scorers(model, reference, value_model))
    chosen = {"sample": sample, "iteration": iteration, "only": only}
    selection = {name: value for name, value in chosen.items() if value is not None}
    payload = build_payload(opened, records, f"{datetime.now():%Y-%m-%d %H:%M}", selection)
    return View(title or opened.title, payload)
