"""What may be said of a rollout beside prompts, engine, tools and configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from ..journal.journal import Journal
from ..trajectory import Trajectory


class RolloutOptions(TypedDict, total=False):
    """Keyword-only arguments of [`generate_trajectories`], which describes each, for functions that hand them on.

    `reward_funcs`, `num_generations` and `player` are missing: such functions have them as arguments of their own, or
    set them.
    """

    reward_weights: Sequence[float] | None
    correct_threshold: float
    reward_timeout_seconds: float | None
    missing_reward: Literal["undecided", "skip"]
    environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None
    processing_class: Any
    policy: str
    policy_revision: str | None
    iteration: int
    policy_lag: int
    sample_offset: int
    prompt_indices: Sequence[int] | None
    journal: Journal | str | os.PathLike | None
    collect: bool
    on_trajectory: Callable[[Trajectory], None] | None
    progress: bool
