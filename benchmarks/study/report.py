"""Tables and figures of the study's page."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from .arms import ARMS
from .claims import CLAIMS, OURS, Claim
from .results import NOT_RUN, REPRODUCED, REVERSED, UNDECIDED, Interval, difference, verdict


BEGIN, END = "<!-- study: begin, written by `python -m benchmarks.study --docs` -->", "<!-- study: end -->"
MEASURES = {
    "score": ("score %", 100.0),
    "sampled": ("sampled %", 100.0),
    "kl": ("KL, nats", 1.0),
    "length": ("tokens", 1.0),
    "tool_calls": ("calls", 1.0),
    "tool_errors": ("errors %", 100.0),
    "distance": ("distance to π*", 1.0),
    "rollouts": ("rollouts", 1.0),
    "steps": ("steps", 1.0),
    "processor_seconds": ("CPU s", 1.0),
}


def report(results: pd.DataFrame, page: Path | None = None) -> str:
    """
    The tables as Markdown.

    Args:
        results (`pd.DataFrame`): of [`results.collect`].
        page (`Path`, *optional*): a page whose marked part becomes the tables; figures go into a folder of its name.
    """
    text = "\n\n".join([decided(results), claims_table(results), *world_tables(results), conditions(results)])
    if page is not None:
        from .figures import draw

        folder = page.with_suffix("")
        figures = [f"![{alt}]({folder.name}/{name})" for name, alt in draw(results, folder)]
        write_between(page, "\n\n".join([text, *figures]))
    return text


def claims_table(results: pd.DataFrame) -> str:
    """Claim by claim: the paper's numbers, the paired difference, its interval and the verdict."""
    judged = [entry for entry in _comparisons(results) if entry[2].seeds]
    adjusted = _adjusted([interval.p_value for _, _, interval in judged])
    lines = [
        "| paper | claim | theirs | here | difference [95 %] | seeds | p, adjusted | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (claim, world, interval), p in zip(judged, adjusted, strict=True):
        shown = _interval(interval, _scale(claim))
        p_value = "" if np.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"
        cells = (f"{claim.paper}, {claim.where}", claim.text, claim.theirs, f"{world}: {_names(claim)}", shown)
        lines.append(f"| {' | '.join(cells)} | {interval.seeds} | {p_value} | {verdict(claim, interval)} |")
    return "\n".join(lines)


def decided(results: pd.DataFrame) -> str:
    """How many orderings are decided, and which were not run."""
    judged = [(claim, world, verdict(claim, interval)) for claim, world, interval in _comparisons(results)]
    of_papers = {claim for claim in CLAIMS if claim.paper != OURS}
    some = {claim for claim, _, judgement in judged if judgement in (REPRODUCED, REVERSED)} & of_papers
    counts = Counter(judgement for _, _, judgement in judged)
    summary = ", ".join(f"{counts[name]} {name}" for name in (REPRODUCED, REVERSED, UNDECIDED, NOT_RUN))
    missing: dict[str, list[str]] = {}
    for claim, world, judgement in judged:
        if judgement == NOT_RUN:
            missing.setdefault(claim.text, []).append(world)
    lines = [
        f"{len(some)} of {len(of_papers)} orderings of the papers are decided in one world at least. "
        f"Comparisons of two arms in a world: {summary}."
    ]
    if missing:
        lines += ["", "Not run: " + "; ".join(f"{text} ({', '.join(w)})" for text, w in missing.items()) + "."]
    return "\n".join(lines)


def world_tables(results: pd.DataFrame) -> list[str]:
    """A table per world: every arm's means over seeds."""
    tables = []
    for world in results.world.unique():
        rows = results[results.world == world]
        known = [name for name in MEASURES if name in rows and rows[name].notna().any()]
        header = " | ".join(["arm", "seeds", *(MEASURES[name][0] for name in known)])
        lines = [f"**{world}**", "", f"| {header} |", f"|{' --- |' * (len(known) + 2)}"]
        for arm in sorted(rows.arm.unique(), key=_order):
            of_arm = rows[rows.arm == arm]
            cells = [arm, str(len(of_arm)), *(_mean(of_arm[name], name) for name in known)]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return tables


def conditions(results: pd.DataFrame) -> str:
    """Where and with what the results came about."""
    hours = results.processor_seconds.sum() / 3600
    columns = ("machine", "python", "trl_multiturn", "trl", "transformers", "torch")
    described = [f"{name} {', '.join(sorted(set(results[name])))}" for name in columns]
    finished = f"{results.finished.min()} to {results.finished.max()}"
    return f"{len(results)} arms, {hours:.1f} processor hours, finished {finished}; {'; '.join(described)}."


def write_between(page: Path, text: str) -> None:
    """Puts text between the page's marks."""
    old = page.read_text(encoding="utf-8")
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not marked.search(old):
        raise ValueError(
            f"{page} lacks the lines {BEGIN!r} and {END!r}, so nobody knows where the tables go. Add them."
        )
    page.write_text(marked.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old), encoding="utf-8")


def _comparisons(results: pd.DataFrame) -> list[tuple[Claim, str, Interval]]:
    """Every claim in every world that it is asked in."""
    return [(claim, world, difference(results, claim, world)) for claim in CLAIMS for world in claim.worlds]


def _adjusted(p_values: list[float]) -> np.ndarray:
    """Benjamini–Hochberg over all comparisons that have a p-value."""
    adjusted = np.full(len(p_values), np.nan)
    known = ~np.isnan(p_values)
    if known.any():
        adjusted[known] = stats.false_discovery_control(np.array(p_values)[known])
    return adjusted


def _scale(claim: Claim) -> float:
    """Scores are shown in percentage points, distances as they are."""
    return 1.0 if claim.better.endswith("distance") else 100.0


def _names(claim: Claim) -> str:
    return f"`{claim.better}` − `{claim.worse}`" if claim.worse != "zero" else f"`{claim.better}`"


def _interval(interval: Interval, scale: float) -> str:
    digits = 1 if scale == 100 else 3
    if interval.seeds < 2:
        return f"{scale * interval.mean:+.{digits}f}"
    mean, low, high = (f"{scale * x:+.{digits}f}" for x in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _mean(values: pd.Series, name: str) -> str:
    """Mean and half the width of its 95 % interval."""
    interval, scale = Interval.of(values), MEASURES[name][1]
    if interval.seeds == 0:
        return ""
    digits = 0 if name in ("rollouts", "steps", "processor_seconds") else 3 if name == "distance" else 1
    mean = f"{scale * interval.mean:.{digits}f}"
    if name not in ("score", "sampled", "distance", "kl") or interval.seeds < 2:
        return mean
    return f"{mean} ± {scale * (interval.high - interval.mean):.{digits}f}"


def _order(arm: str) -> tuple[int, str]:
    """Arms in the order of their file."""
    names = list(ARMS)
    return (names.index(arm) if arm in names else len(names), arm)
