"""Pairing strategies and filters of the user's own; what is none is named before anything is selected."""

from __future__ import annotations

import pytest
from datasets import Dataset
from trl import TrlParser

from tests.support import user
from trl_multiturn import PairingConfig, StopReason, ToolRolloutGenerator, Trajectory, UnpairedConfig, Verdict
from trl_multiturn.rows.pairing import build_preference_dataset, build_unpaired_dataset
from trl_multiturn.rows.selection import Pair
from trl_multiturn.verify.filters import resolve_filters


HERE = __name__


def trajectory(token, correct):
    return Trajectory(
        prompt=[user("Question?")],
        completion=[{"role": "assistant", "content": str(token)}],
        prompt_ids=[1],
        completion_ids=[token],
        action_mask=[1],
        logps=None,
        stop_reason=StopReason.ANSWERED,
        reward=float(correct),
        verdict=Verdict.CORRECT if correct else Verdict.INCORRECT,
        info={"prompt_index": 0},
    )


GROUP = [trajectory(10, True), trajectory(11, True), trajectory(20, False), trajectory(21, False)]


def last_against_last(trajectories, config, rng):
    winners = [t for t in trajectories if t.verdict is Verdict.CORRECT]
    losers = [t for t in trajectories if t.verdict is Verdict.INCORRECT]
    return [Pair(winners[-1], losers[-1])]


def last_alone(trajectories, config, rng):
    return trajectories[-1:]


def small(trajectory):
    """Tokens below 11."""
    return trajectory.completion_ids[0] < 11


@pytest.mark.parametrize("strategy", [last_against_last, f"{HERE}.last_against_last"])
def test_pairs_are_chosen_by_a_function_or_its_dotted_path(strategy):
    rows = build_preference_dataset(GROUP, PairingConfig(strategy=strategy, filters=[]))
    assert (rows["chosen_ids"][:], rows["rejected_ids"][:]) == ([[11]], [[21]])


@pytest.mark.parametrize("strategy", [last_alone, f"{HERE}.last_alone"])
def test_unpaired_rows_are_chosen_by_a_function_or_its_dotted_path(strategy):
    rows = build_unpaired_dataset(GROUP, UnpairedConfig(strategy=strategy))
    assert rows["completion_ids"][:] == [[21]]


@pytest.mark.parametrize("item", [small, f"{HERE}.small"])
def test_a_function_is_a_filter_under_its_own_name(item):
    (found,) = resolve_filters([item])
    assert (found.name, found.description) == ("small", "Tokens below 11.")
    rows = build_unpaired_dataset(GROUP, UnpairedConfig(strategy="all", filters=[item]))
    assert sorted(rows["completion_ids"][:]) == [[11], [20], [21]]


def test_the_command_line_takes_a_dotted_path():
    (config,) = TrlParser(PairingConfig).parse_args_and_config(["--strategy", f"{HERE}.last_against_last"])
    assert config.strategy == f"{HERE}.last_against_last"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PairingConfig(strategy="rendom"),
            ValueError,
            "is unknown. Use one of 'random', 'best_worst', 'step'",
        ),
        (lambda: UnpairedConfig(strategy="no.such"), ValueError, "could not be loaded"),
        (lambda: PairingConfig(strategy=3), TypeError, r"cannot be called as `strategy\(trajectories, config, rng\)`"),
        (lambda: PairingConfig(strategy=lambda group: []), TypeError, "cannot be called as"),
        (lambda: PairingConfig(filters=[3]), TypeError, "`filters` holds a int"),
        (lambda: PairingConfig(filters="over_length"), TypeError, r"Pass a list: `filters=\['over_length'\]`"),
        (lambda: PairingConfig(filters=["no_such"]), ValueError, "There is no filter 'no_such'"),
        (lambda: build_preference_dataset(GROUP, last_alone), TypeError, r"PairingConfig\(strategy=last_alone\)"),
        (lambda: build_unpaired_dataset(GROUP, {"seed": 1}), TypeError, "`pairing` is a dict"),
    ],
)
def test_what_is_no_strategy_or_filter_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (lambda g: [GROUP[0]], TypeError, "returned a Trajectory among its pairs"),
        (lambda g: [Pair(g[0], g[-1]), Pair(g[0], g[-2])], ValueError, r"chose a trajectory twice \(prompt 0\)"),
        (lambda g: [Pair(trajectory(1, True), g[-1])], ValueError, "returned a trajectory that it was not given"),
    ],
)
def test_what_a_strategy_chooses_is_checked(chosen, error, message):
    config = PairingConfig(strategy=lambda group, config, rng: chosen(group), filters=[])
    with pytest.raises(error, match=message):
        build_preference_dataset(GROUP, config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tools": [{}]}, "Tool {} is neither a named callable nor a session tool"),
        ({"tools": 3}, "`tools` is a int. Pass a list"),
        ({"pairing": last_against_last}, r"`pairing` is a function.*PairingConfig\(strategy=last_against_last\)"),
        ({"config": {"seed": 1}}, "`config` is a dict. Pass a `RolloutConfig`"),
        ({"reward_funcs": [3]}, "`reward_funcs` holds a int, which is not a reward function"),
        ({"environment_factory": 3}, "`environment_factory` must be callable without arguments, got int"),
    ],
)
def test_the_generator_refuses_wrong_types_with_its_constructor(wrong, message):
    prompts = Dataset.from_list([{"prompt": [user("Question?")]}])
    with pytest.raises(TypeError, match=message):
        ToolRolloutGenerator(prompts, **{"reward_funcs": lambda completions, **columns: [None], **wrong})
