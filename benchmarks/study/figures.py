"""The figures of the study's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from .claims import CLAIMS
from .results import Interval, by_seed, difference, verdict


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # the backend is chosen first: there is no screen


COLORS = {"reproduced": "tab:green", "not reproduced": "tab:red", "not decidable": "tab:gray"}


def draw(results: pd.DataFrame, folder: Path) -> list[tuple[str, str]]:
    """Draws what there are results for; names of the files and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, alt, figure in (
        ("differences.svg", "Paired differences of all claims with their 95 % intervals", _differences(results)),
        ("arms.svg", "Score of every arm, mean and 95 % interval over seeds", _arms(results)),
        ("iterations.svg", "Success on validation prompts by iteration", _iterations(results)),
        ("samples.svg", "pass@n before and after M-DPO", _samples(results)),
    ):
        if figure is not None:
            matplotlib.rcParams["svg.hashsalt"] = name  # the same results give the same file
            figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            drawn.append((name, alt))
    return drawn


def _differences(results: pd.DataFrame) -> Any:
    """One line per claim and world; distances, whose unit differs, are left out."""
    rows = [
        (f"{claim.text} ({world})", interval, verdict(claim, interval))
        for claim in CLAIMS
        if not claim.better.endswith("distance")
        for world in claim.worlds
        if (interval := difference(results, claim, world)).seeds > 1
    ]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.24 * len(rows) + 0.8))
    for place, (_, interval, judged) in enumerate(reversed(rows)):
        _whisker(axes, interval, place, COLORS.get(judged, "black"))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [text for text, _, _ in reversed(rows)], fontsize=7)
    axes.set_xlabel("difference, percentage points; green: reproduced, red: not, gray: not decidable")
    return figure


def _arms(results: pd.DataFrame) -> Any:
    worlds = [world for world in results.world.unique() if not world.startswith(("tabular", "tiny"))]
    if not worlds:
        return None
    figure, panels = plt.subplots(1, len(worlds), figsize=(3.4 * len(worlds), 4.2), squeeze=False)
    for axes, world in zip(panels[0], worlds, strict=True):
        rows = results[(results.world == world) & results.get("score", pd.Series(dtype=float)).notna()]
        means = rows.groupby("arm").score.mean().sort_values()
        for place, arm in enumerate(means.index):
            _whisker(axes, Interval.of(by_seed(results, world, arm)), place, "tab:blue")
        axes.set_yticks(range(len(means)), list(means.index), fontsize=7)
        axes.set_title(world, fontsize=9)
        axes.set_xlabel("score, %")
    figure.tight_layout()
    return figure


def _whisker(axes: Any, interval: Interval, place: int, color: str) -> None:
    """A mean and its interval, in percent."""
    axes.plot(100 * interval.mean, place, "o", color=color, markersize=4)
    axes.plot([100 * interval.low, 100 * interval.high], [place, place], color=color)


def _iterations(results: pd.DataFrame) -> Any:
    columns = sorted(column for column in results if column.startswith("iteration_"))
    rows = results[results[columns[0]].notna()] if columns else results[:0]
    if rows.empty:
        return None
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for arm, of_arm in rows.groupby("arm"):
        axes.errorbar(
            range(len(columns)), 100 * of_arm[columns].mean(), 100 * of_arm[columns].sem(), label=arm, capsize=2
        )
    axes.set_xticks(range(len(columns)))
    axes.set_xlabel("iteration")
    axes.set_ylabel("success on validation prompts, %, ± s.e.")
    axes.legend(fontsize=7)
    return figure


def _samples(results: pd.DataFrame) -> Any:
    columns = sorted((c for c in results if c.startswith("pass@") and c != "pass@1"), key=lambda c: int(c[5:]))
    rows = results[results[columns[0]].notna()] if columns else results[:0]
    if rows.empty:
        return None
    figure, axes = plt.subplots(figsize=(5, 3.4))
    means = [f"mean@{columns[-1][5:]}", *columns]
    for arm, of_arm in rows.groupby("arm"):
        at = [1, *(int(column[5:]) for column in columns)]
        axes.errorbar(at, 100 * of_arm[means].mean(), 100 * np.nan_to_num(of_arm[means].sem()), label=arm, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("samples n, temperature 0.7")
    axes.set_ylabel("pass@n, %, ± s.e.")
    axes.legend(fontsize=7)
    return figure
