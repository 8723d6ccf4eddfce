"""A search's winners and losers as rows."""

from __future__ import annotations

import json

import pytest

from tests.rollout.notebook import TOKENIZER, boxed
from tests.rollout.test_search import ROWS, TRAP, TRAP_SCORES, Table, search
from trl_multiturn.online.distillation import distilled_rows
from trl_multiturn.rows import PairingConfig
from trl_multiturn.verify import math_reward


def found(keep: bool = True):
    return search(TRAP, Table(TRAP_SCORES), beam=2, keep_candidates=keep)[0]


def said(ids) -> str:
    """The last box."""
    return TOKENIZER.decode(ids).rpartition("assistant\n")[2].removesuffix("<|im_end|>")


@pytest.mark.parametrize("reward_funcs", [math_reward, None])
def test_the_answer_that_was_found_is_preferred_to_those_passed_over(reward_funcs):
    # The search finds 2, which is right, and passes over 1, 3 and 4
    rows = distilled_rows(found(), ROWS, reward_funcs, config=PairingConfig(max_pairs_per_prompt=3, filters=[]))
    assert [said(row["chosen_ids"]) for row in rows] == [boxed(2)]
    assert said(rows[0]["rejected_ids"]) in {boxed(1), boxed(3), boxed(4)}


def test_a_search_that_was_wrong_is_the_loser_where_rewards_decide():
    rows = distilled_rows(found(), [{**ROWS[0], "answer": "4"}], math_reward, config=PairingConfig(filters=[]))
    assert said(rows[0]["chosen_ids"]) == boxed(4)


def test_unpaired_rows_bring_rewards_and_the_score_of_each_candidate():
    rows = distilled_rows(found(), ROWS, math_reward, row_format="unpaired")
    rewards = {said(row["completion_ids"]): row["reward"] for row in rows}
    assert rewards == {boxed(2): 1.0, boxed(1): 0.0, boxed(3): 0.0, boxed(4): 0.0}
    scores = {said(row["completion_ids"]): json.loads(row["info"])["search"]["score"] for row in rows}
    assert scores == {boxed(number): TRAP_SCORES[boxed(number)] for number in (1, 2, 3, 4)}


def test_a_search_that_kept_no_candidates_is_refused():
    with pytest.raises(ValueError, match="keep_candidates=True"):
        distilled_rows(found(keep=False), ROWS)
