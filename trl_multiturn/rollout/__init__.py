"""Prompts to trajectories: the loop of turns, dialects, search. Uses engines, tools and the journal, no trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from ..engines.engine import Engine as Engine, Generation as Generation, SamplingParams as SamplingParams
    from ..engines.scripted_engine import ScriptedEngine as ScriptedEngine
    from ..engines.transformers.engine import TransformersEngine as TransformersEngine
    from ..journal.journal import Journal as Journal, JournalError as JournalError, read_dataset as read_dataset
    from .config import RolloutConfig as RolloutConfig
    from .loop import (
        TooManyToolFailures as TooManyToolFailures,
        agenerate_trajectories as agenerate_trajectories,
        generate_trajectories as generate_trajectories,
    )
    from .prefix_completion import (
        Prefix as Prefix,
        complete_prefixes as complete_prefixes,
        estimate_step_rewards as estimate_step_rewards,
        reward_longest_good_prefix as reward_longest_good_prefix,
    )
    from .search import avalue_guided_search as avalue_guided_search, value_guided_search as value_guided_search
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".config": ["RolloutConfig"],
            ".loop": ["TooManyToolFailures", "agenerate_trajectories", "generate_trajectories"],
            ".prefix_completion": [
                "Prefix",
                "complete_prefixes",
                "estimate_step_rewards",
                "reward_longest_good_prefix",
            ],
            ".search": ["avalue_guided_search", "value_guided_search"],
            "..engines.engine": ["Engine", "Generation", "SamplingParams"],
            "..engines.scripted_engine": ["ScriptedEngine"],
            "..engines.transformers.engine": ["TransformersEngine"],
            "..journal.journal": ["Journal", "JournalError", "read_dataset"],
        },
    )
