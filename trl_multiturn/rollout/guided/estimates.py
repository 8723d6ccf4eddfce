"""A mean over prompts with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value (`float`): the mean; NaN where no prompt could be decided.
        standard_error (`float`): of the mean; NaN for fewer than two prompts.
        num_prompts (`int`): prompts that entered it.
    """

    value: float
    standard_error: float
    num_prompts: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Estimate:
        """The mean of per-prompt values; `None` (undecided) does not enter."""
        known = [value for value in values if value is not None]
        m = len(known)
        if m == 0:
            return cls(math.nan, math.nan, 0)
        mean = math.fsum(known) / m
        if m == 1:
            return cls(mean, math.nan, 1)
        return cls(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (m * (m - 1))), m)

    @classmethod
    def of_differences(cls, ones: Iterable[float | None], others: Iterable[float | None]) -> Estimate:
        """The mean of `one − other` in pairs over prompts; a pair with `None` does not enter."""
        pairs = zip(ones, others, strict=True)
        return cls.of(None if one is None or other is None else one - other for one, other in pairs)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.standard_error:.1f} %"
