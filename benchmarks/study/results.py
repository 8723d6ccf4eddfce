"""The results of all cells as one table, and what is estimated from it; statistics are scipy's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from .claims import Claim


def collect(out: Path) -> pd.DataFrame:
    """A row per world, seed and arm, from the files of the cells."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]
    return pd.DataFrame(records).sort_values(["world", "arm", "seed"], ignore_index=True)


def save(results: pd.DataFrame, path: Path) -> None:
    """Writes the table as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results.to_parquet(path, index=False)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval of Student's t.

    Attributes:
        mean (`float`), low (`float`), high (`float`): NaN bounds for fewer than two seeds.
        seeds (`int`): how many.
        p_value (`float`): of no difference from 0, two-sided.
    """

    mean: float
    low: float
    high: float
    seeds: int
    p_value: float

    @classmethod
    def of(cls, values: pd.Series) -> Interval:
        """Of one number per seed."""
        known = values.dropna().to_numpy(float)
        if len(known) < 2:
            return cls(float(known.mean()) if len(known) else np.nan, np.nan, np.nan, len(known), np.nan)
        if np.ptp(known) < 1e-12:  # the same for every seed, to rounding: there is nothing to estimate
            return cls(known.mean(), known.mean(), known.mean(), len(known), np.nan)
        test = stats.ttest_1samp(known, 0.0)
        bounds = test.confidence_interval(0.95)
        return cls(known.mean(), bounds.low, bounds.high, len(known), test.pvalue)


def by_seed(results: pd.DataFrame, world: str, arm: str) -> pd.Series:
    """One number per seed; `arm` may name a metric after a colon, `score` by default, and `"zero"` is 0 for all."""
    name, _, metric = arm.partition(":")
    rows = results[results.world == world]
    if name == "zero":
        return pd.Series(0.0, index=rows.seed.unique())
    rows = rows[rows.arm == name].set_index("seed")
    return rows[metric or "score"] if (metric or "score") in rows else pd.Series(dtype=float)


def difference(results: pd.DataFrame, claim: Claim, world: str) -> Interval:
    """Of the claim's two arms, paired by seed."""
    better, worse = by_seed(results, world, claim.better), by_seed(results, world, claim.worse)
    return Interval.of((better - worse).dropna())


REPRODUCED, REVERSED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "not decidable", "not run"


def verdict(claim: Claim, interval: Interval) -> str:
    """What the interval says of the claim: decided only where at least five seeds leave no doubt."""
    if interval.seeds == 0:
        return NOT_RUN
    if interval.seeds < 5 or np.isnan(interval.low):
        return UNDECIDED
    if claim.kind == "equal":
        if max(-interval.low, interval.high) <= claim.margin:
            return REPRODUCED
        return REVERSED if interval.low > claim.margin or interval.high < -claim.margin else UNDECIDED
    return REPRODUCED if interval.low > 0 else REVERSED if interval.high < 0 else UNDECIDED
