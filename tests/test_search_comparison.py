"""A search beside samples and votes at the same number of sampled tokens, worked out by hand."""

from __future__ import annotations

from functools import partial

import pytest

from tests.rollout.notebook import Notebook, boxed
from tests.rollout.test_search import CONFIG, Table, by_seed
from tests.support import assistant, user
from trl_multiturn.evaluation import evaluate_policy
from trl_multiturn.rollout.guided.search_comparison import compare_search, samples_for
from trl_multiturn.rollout.search import value_guided_search
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import math_reward


def ended(prompt: int, number: int, state: int, tokens: int = 4, spent: int | None = None) -> Trajectory:
    """A trajectory that answers `number`; 1 is right. Its last state ends in the token `state`."""
    return Trajectory(
        prompt=[], completion=[assistant(boxed(number))], prompt_ids=[prompt], completion_ids=[state] * tokens,
        action_mask=[1] * tokens, stop_reason=StopReason.ANSWERED,
        verdict=Verdict.CORRECT if number == 1 else Verdict.INCORRECT,
        info={"prompt_index": prompt, **({} if spent is None else {"search": {"sampled_tokens": spent}})},
    )  # fmt: skip


def answer_of(trajectory: Trajectory) -> str:
    return trajectory.completion[-1]["content"]


def test_every_way_to_choose_is_estimated_and_paired_with_the_search():
    # Scores: the last token of the state, in tenths
    samples = [ended(0, 2, 3), ended(0, 2, 3), ended(0, 1, 9), ended(1, 1, 2), ended(1, 1, 2), ended(1, 2, 5)]
    found = [ended(0, 1, 9, spent=12), ended(1, 1, 9, spent=12)]
    greedy = [ended(0, 2, 0), ended(1, 1, 0)]
    comparison = compare_search(found, greedy, samples, lambda states: [s[-1] / 10 for s in states], answer_of)
    expected = {
        "search": 1.0, "greedy": 0.5, "one_sample": (1 / 3 + 2 / 3) / 2, "vote": 0.5, "any_of_n": 1.0,
        "best_of_n": 0.5,  # 0.9 for 1, then 0.5 for 2
        "weighted_vote": 0.5,  # 0.9 against 0.6, then 0.4 against 0.5
    }  # fmt: skip
    assert {name: e.value for name, e in comparison.estimates.items()} == pytest.approx(expected)
    vote = comparison.differences["vote"]  # 1 − 0, 1 − 1
    assert (vote.value, vote.standard_error) == (0.5, 0.5)
    assert (comparison.n, comparison.search_tokens, comparison.sample_tokens) == (3, 12, 12)
    assert comparison.metrics()["search/minus_vote"] == 0.5 and "weighted vote" in str(comparison)


def test_as_many_samples_are_taken_as_cost_what_the_search_did():
    samples = [ended(0, 1, 0, tokens=4), ended(0, 1, 0, tokens=6)]
    assert samples_for([ended(0, 1, 0, spent=23)], samples) == 5
    assert samples_for([ended(0, 1, 0, spent=1)], samples) == 1


def test_an_evaluation_with_samples_compares_the_search():
    rows = [{"prompt": [user("Question?")], "answer": "3"}] * 4
    turns = [boxed(number) for number in range(5)]
    table = Table({turn: number / 10 for number, turn in enumerate(turns)})
    decode = partial(value_guided_search, score=table, beam=1, candidates=6)
    result = evaluate_policy(
        rows, by_seed(turns), [Notebook()], math_reward, n=2, config=CONFIG, search=decode, progress=False
    )
    assert result.comparison.n == 6  # six turns drawn, of one token count
    assert result.comparison.estimates["search"] == result.greedy
    assert result.metrics()["search/tokens"] == result.comparison.sample_tokens
