"""`trl-multiturn view`."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

from .choice import ONLY


def add_view(commands: Any) -> None:
    """Adds the sub-command to an `argparse` parser's sub-commands."""
    view = commands.add_parser("view", help="Turn a run, an evaluation or rows into one page of HTML to look at.")
    view.add_argument(
        "source", type=Path, help="A run (`output_dir`), a journal, a JSONL or Parquet file of rows or trajectories."
    )
    view.add_argument("-o", "--output", type=Path, help="The page, or what it shows as `.json`. Beside the source.")
    view.add_argument("--sample", type=int, help="At most so many trajectories, drawn evenly.")
    view.add_argument("--iteration", type=int, help="The only iteration to show, from 1.")
    view.add_argument("--only", choices=list(ONLY), help="Which trajectories to show.")
    view.add_argument("--tokenizer", help="Shows token ids as text: a folder or a name. A run has its own.")
    view.add_argument("--model", help="Policy whose log-probabilities are computed for all tokens.")
    view.add_argument("--reference", help="The same for the reference.")
    view.add_argument("--value_model", help="Value model whose values are computed for all tokens.")
    view.add_argument("--title", help="Title of the page.")
    view.add_argument("--no_open", action="store_true", help="Write the page, but do not show it in a browser.")
    view.set_defaults(run=run_view)


def run_view(options: argparse.Namespace) -> int:
    """Writes the page, says where it is, and shows it where a person at a screen asked for it."""
    from .viewing import view

    names = ("tokenizer", "sample", "iteration", "only", "model", "reference", "value_model", "title")
    page = view(options.source, **{name: getattr(options, name) for name in names})
    path = page.save(options.output or page_beside(options.source))
    index = page.payload["index"]
    print(f"{index['count']} trajectories and {len(index['pairs']['chosen'])} pairs: {path}")
    if not options.no_open and path.suffix != ".json" and _at_a_screen():
        webbrowser.open(path.absolute().as_uri())
    return 0


def page_beside(source: Path) -> Path:
    """Where the page of a source goes: into a folder, beside a file."""
    return source / "view.html" if source.is_dir() else source.with_suffix(".html")


def _at_a_screen() -> bool:
    graphical = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return graphical and sys.stdout.isatty()
