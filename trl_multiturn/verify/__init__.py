"""Trajectory → verdict: answers, reward functions, filters. Imports only the standard library and `trajectory`."""

from .answers import canonical_answer, exact_number, final_answer, gold_answer, last_boxed, message_text
from .filters import (
    AUTHORS_FILTERS,
    FILTERS,
    PAPER_FILTERS,
    Filter,
    FilterResult,
    apply_filters,
    long_answer,
    over_length,
    resolve_filters,
)
from .mathematics import MathVerifier, compare_numbers, math_reward
from .rewards import judge, judge_async, resolve_reward_funcs, reward_name


__all__ = [
    "AUTHORS_FILTERS",
    "FILTERS",
    "PAPER_FILTERS",
    "Filter",
    "FilterResult",
    "MathVerifier",
    "apply_filters",
    "canonical_answer",
    "compare_numbers",
    "exact_number",
    "final_answer",
    "gold_answer",
    "judge",
    "judge_async",
    "last_boxed",
    "long_answer",
    "math_reward",
    "message_text",
    "over_length",
    "resolve_filters",
    "resolve_reward_funcs",
    "reward_name",
]
