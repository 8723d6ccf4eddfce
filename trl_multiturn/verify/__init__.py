"""Trajectory → verdict: answers, reward functions, filters, process rewards. Imports neither torch nor TRL."""

from .answers import canonical_answer, final_answer, last_boxed, message_text
from .comparison import compare_numbers
from .filters import (
    AUTHORS_FILTERS,
    CODE_FILTERS,
    FILTERS,
    PAPER_FILTERS,
    Filter,
    FilterResult,
    apply_filters,
    default_filters,
    long_answer,
    over_length,
    resolve_filters,
)
from .golds import gold_answer, look_at_golds
from .mathematics import MathVerifier, math_reward, math_verify_reward, paper_reward
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
from .reading.numerals import exact_number
from .reasoning_gym import ReasoningGymReward, reasoning_gym_prompts, reasoning_gym_reward
from .rewards import judge, judge_async, resolve_reward_funcs, reward_name


__all__ = [
    "AUTHORS_FILTERS",
    "CODE_FILTERS",
    "FILTERS",
    "PAPER_FILTERS",
    "Filter",
    "FilterResult",
    "MathVerifier",
    "ReasoningGymReward",
    "Segment",
    "apply_filters",
    "canonical_answer",
    "compare_numbers",
    "default_filters",
    "exact_number",
    "final_answer",
    "gold_answer",
    "hard_reward",
    "judge",
    "judge_async",
    "last_boxed",
    "long_answer",
    "look_at_golds",
    "longest_good_prefix",
    "math_reward",
    "math_verify_reward",
    "message_text",
    "min_utility",
    "reasoning_gym_prompts",
    "reasoning_gym_reward",
    "over_length",
    "paper_reward",
    "prefix_rewards",
    "resolve_filters",
    "resolve_reward_funcs",
    "reward_name",
    "segments",
    "soft_reward",
    "turn_totals",
]
