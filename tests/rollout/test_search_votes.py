"""Votes among a search's candidates, blocks of tokens and budgets in sampled tokens, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rollout.notebook import TOKENIZER, Notebook, boxed, code
from tests.rollout.test_search import CONFIG, ROWS, TRAP, TRAP_SCORES, Table, answer, by_seed, search
from trl_multiturn.rollout import generate_trajectories


# The first two say 1, with low scores; the third says 2
ONE_AGAIN = boxed(1) + " "
VOTERS = {"": [boxed(1), ONE_AGAIN, boxed(2)]}
SCORES = {boxed(1): 0.4, ONE_AGAIN: 0.3, boxed(2): 0.5}


@pytest.mark.parametrize(("vote", "elected"), [("none", 2), ("plain", 1), ("weighted", 1)])
def test_answers_vote_by_number_or_by_the_sum_of_their_scores(vote, elected):
    (found,), _ = search(VOTERS, Table(SCORES), beam=3, vote=vote)
    assert answer(found) == boxed(elected)
    assert found.info["search"]["score"] == {1: 0.4, 2: 0.5}[elected]  # of an answer, the best candidate


def test_a_weighted_vote_may_go_against_the_number():
    (found,), _ = search(VOTERS, Table({**SCORES, boxed(2): 0.8}), beam=3, vote="weighted")
    assert answer(found) == boxed(2)


def test_an_answer_drawn_twice_has_two_votes():
    tree = {"": [boxed(1), boxed(1), boxed(2)]}
    (found,), _ = search(tree, Table(SCORES), beam=3, vote="weighted")
    assert answer(found) == boxed(1) and found.info["search"]["duplicates"] == 1  # 2 * 0.4 against 0.5


@pytest.mark.parametrize("vote", ["plain", "weighted"])
def test_what_the_policy_seldom_begins_has_few_votes_however_often_it_then_repeats_itself(vote):
    left, right = code("print('left')"), code("print('right')")
    tree = {"": [left, left, right], "output\nleft": [boxed(1)], "output\nright": [boxed(2)]}
    scores = Table({"output\nleft": 0.5, "output\nright": 0.6, boxed(1): 0.4, boxed(2): 0.5})
    (found,), _ = search(tree, scores, beam=3, finished="pool", vote=vote)
    assert answer(found) == boxed(1)  # 2/3 * 3/3 draws against 1/3 * 3/3, and times the scores 0.27 against 0.17


def test_all_sampled_tokens_are_counted_dropped_ones_too():
    (found,), engine = search(TRAP, Table(TRAP_SCORES), beam=2)
    assert found.info["search"]["sampled_tokens"] == sum(len(call.generation.token_ids) for call in engine.calls)
    assert found.info["search"]["searches"] == 1


def test_a_budget_is_spent_on_further_searches_with_other_draws():
    turns = [boxed(number) for number in range(10)]
    scores = Table({turn: number / 10 for number, turn in enumerate(turns)})
    engine = by_seed(turns)
    one = len(TOKENIZER(boxed(0) + "<|im_end|>").input_ids)
    (found,), _ = search({}, scores, engine=engine, beam=1, candidates=2, max_sampled_tokens=9 * one)
    drawn = [call.generation.token_ids for call in engine.calls]
    # two draws a search: four fit, a fifth would be the tenth draw
    assert found.info["search"]["searches"] == 4 and found.info["search"]["sampled_tokens"] == 8 * one
    assert len({tuple(ids) for ids in drawn}) > 2
    best = max(TOKENIZER.decode(ids, skip_special_tokens=True) for ids in drawn)
    assert answer(found) == best


def test_the_first_search_is_finished_whatever_the_budget():
    (found,), _ = search(TRAP, Table(TRAP_SCORES), beam=2, max_sampled_tokens=1)
    assert answer(found) == boxed(2) and found.info["search"]["searches"] == 1


def test_a_block_of_tokens_is_a_step_and_turns_stay_whole():
    (plain,) = generate_trajectories(ROWS, by_block(), [Notebook()], CONFIG, progress=False)
    engine = by_block()
    (found,), _ = search({}, lambda states: [0.0] * len(states), engine=engine, beam=1, candidates=1, step=4)
    assert found.completion_ids == plain.completion_ids and found.stop_reason is plain.stop_reason
    assert max(len(call.generation.token_ids) for call in engine.calls) <= 4 and len(engine.calls) > 2


def test_a_turn_that_runs_out_of_tokens_at_the_end_of_a_block_is_cut():
    config = replace(CONFIG, max_turn_tokens=8)
    (found,), _ = search({}, lambda states: [0.0] * len(states), engine=by_block(), config=config, beam=1, step=4)
    assert found.stop_reason.value == "max_tokens" and len(found.completion_ids) == 8


def by_block():
    """A policy that goes on with one sentence wherever it was stopped."""
    from trl_multiturn.rollout import ScriptedEngine

    said = "The answer is surely " + boxed(2)

    def script(prompt_text, sampling, session):
        begun = prompt_text.rpartition("assistant\n")[2]
        return said[len(begun) :]

    return ScriptedEngine(script, TOKENIZER, logp=-0.5)


def test_the_other_candidates_that_ended_are_kept_where_asked():
    (found,), _ = search(TRAP, Table(TRAP_SCORES), beam=2, keep_candidates=True)
    others = found.info["search"]["candidates"]
    assert [(other["completion"][-1]["content"], other["score"]) for other in others] == [
        (boxed(1), 0.2), (boxed(3), 0.1), (boxed(4), 0.3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"vote": "loud"}, "vote='loud'"), ({"step": 0}, "step=0"), ({"max_sampled_tokens": 0}, "max_sampled_tokens=0")],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        search(TRAP, Table(TRAP_SCORES), **arguments)
