"""Completions as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..messages.images import text_in
from ..messages.terminal import visible
from ..trajectory import Trajectory
from .choice import PickedCompletion


_LONGEST = 700  # characters of a prompt or a completion

_STYLES = {"assistant": "bright_green", "tool": "dim", "user": "dim"}


def completions_table(picks: Sequence[PickedCompletion], title: str) -> Table:
    """A `rich` table: why each was picked, prompt, completion, verdict with reward, and what became of the tools.

    What a model or a tool wrote is text: neither rich's mark-up nor a terminal's escape sequences in it do anything.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in ("", "prompt", "completion", "verdict"):
        table.add_column(name, overflow="fold", max_width=14 if name in ("", "verdict") else None)
    for pick in picks:
        trajectory = pick.trajectory
        prompt = Text(shortened(message_text(trajectory.prompt[-1]) if trajectory.prompt else ""), "bright_yellow")
        table.add_row(Text(visible(pick.reason)), prompt, _completion(trajectory), Text(outcome(trajectory)))
    return table


def print_completions(picks: Sequence[PickedCompletion], title: str) -> None:
    """Prints the table, as wide as it needs where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(completions_table(picks, title))


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says, and what it calls as `name(arguments)`."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    lines = [f"{call.get('name')}({json.dumps(call.get('arguments'), ensure_ascii=False)})" for call in calls]
    return "\n".join(filter(None, [text_in(message, "[image]"), *lines]))


def outcome(trajectory: Trajectory) -> str:
    """Verdict, reward, and how it stopped, on a line each."""
    reward = [] if trajectory.reward is None else [f"reward {trajectory.reward:.4g}"]
    return "\n".join([trajectory.verdict.value, *reward, f"stopped: {trajectory.stop_reason.value}"])


def shortened(text: str) -> str:
    """The text made visible, and cut in the middle where it is long."""
    if len(text) > _LONGEST:
        left_out = len(text) - _LONGEST
        text = f"{text[: _LONGEST // 2]}\n[… {left_out} characters …]\n{text[-_LONGEST // 2 :]}"
    return visible(text)


def _completion(trajectory: Trajectory) -> Text:
    parts = []
    for message in trajectory.completion:
        style = _STYLES.get(message["role"], "")
        parts.append(
            Text.assemble((f"{message['role']}: ", f"bold {style}"), (shortened(message_text(message)), style))
        )
    return Text("\n").join(parts)
