"""The options of a rollout are spelled once more, for functions that hand them on; both spellings agree."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

import trl_multiturn
from trl_multiturn import agenerate_trajectories, generate_trajectories
from trl_multiturn.rollout import avalue_guided_search
from trl_multiturn.rollout.options import RolloutOptions


NOT_HANDED_ON = {"reward_funcs", "num_generations", "player"}


def keyword_only(function):
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_the_options_are_the_keyword_only_arguments_with_the_same_types():
    spelled, hints = keyword_only(generate_trajectories), get_type_hints(generate_trajectories)
    options = get_type_hints(RolloutOptions)
    assert set(spelled) == set(options) | NOT_HANDED_ON
    assert {name: hints[name] for name in options} == options


@pytest.mark.parametrize(
    ("plain", "asynchronous"),
    [
        (generate_trajectories, agenerate_trajectories),
        (trl_multiturn.value_guided_search, avalue_guided_search),
    ],
)
def test_the_function_for_event_loops_has_the_same_signature(plain, asynchronous):
    assert inspect.signature(plain).parameters == inspect.signature(asynchronous).parameters


@pytest.mark.parametrize(
    "name",
    [
        "value_guided_search",
        "evaluate_policy",
        "complete_prefixes",
        "estimate_step_rewards",
        "reward_longest_good_prefix",
    ],
)
def test_functions_that_hand_options_on_name_them_in_their_type(name):
    parameters = inspect.signature(getattr(trl_multiturn, name)).parameters.values()
    (options,) = (p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD)
    assert options.annotation == "Unpack[RolloutOptions]"


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="no_such_option"):
        trl_multiturn.value_guided_search([], None, None, len, no_such_option=1)
