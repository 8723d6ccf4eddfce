"""Trajectory → verdict: answers, reward functions, filters, process rewards. Imports neither torch nor TRL."""

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
from .process_rewards import (
    Segment,
    hard_reward,
    longest_good_prefix,
    min_utility,
    prefix_rewards,
    segments,
    soft_reward,
    turn_totals,
)
from .rewards import judge, judge_async, resolve_reward_funcs, reward_name


__all__ = [
    "AUTHORS_FILTERS",
    "FILTERS",
    "PAPER_FILTERS",
    "Filter",
    "FilterResult",
    "MathVerifier",
    "Segment",
    "apply_filters",
    "canonical_answer",
    "compare_numbers",
    "exact_number",
    "final_answer",
    "gold_answer",
    "hard_reward",
    "judge",
    "judge_async",
    "last_boxed",
    "long_answer",
    "longest_good_prefix",
    "math_reward",
    "message_text",
    "min_utility",
    "over_length",
    "prefix_rewards",
    "resolve_filters",
    "resolve_reward_funcs",
    "reward_name",
    "segments",
    "soft_reward",
    "turn_totals",
]
