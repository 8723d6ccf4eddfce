"""Prompts → trajectories: engines, dialects, the loop, the journal. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any


_MODULES = {
    "config": ["RolloutConfig"],
    "engine": ["Engine", "Generation", "SamplingParams"],
    "journal": ["Journal", "JournalError", "read_dataset"],
    "loop": ["TooManyToolFailures", "agenerate_trajectories", "generate_trajectories"],
    "prefix_completion": ["Prefix", "complete_prefixes", "estimate_step_rewards", "reward_longest_good_prefix"],
    "scripted_engine": ["ScriptedEngine"],
    "search": ["avalue_guided_search", "value_guided_search"],
    "transformers_engine": ["TransformersEngine"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
