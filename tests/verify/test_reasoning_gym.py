"""reasoning-gym's puzzles: prompts and reward, and a scorer that raises."""

from __future__ import annotations

import json

import pytest

from tests.support import needs
from trl_multiturn.verify import ReasoningGymReward, reasoning_gym_prompts, reasoning_gym_reward
from trl_multiturn.verify.reasoning_gym import puzzle_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So \\boxed{ 12 }.", "12"),
        ("<answer>3</answer> no, <answer>\n4 </answer>", "4"),
        ("\\boxed{} <answer>4</answer>", "4"),
        ("12", None),
    ],
)
def test_the_final_answer_is_boxed_or_tagged(text, answer):
    assert puzzle_answer(text) == answer
    turns = [{"role": "assistant", "content": "\\boxed{1}"}, {"role": "user", "content": "Again."}]
    assert puzzle_answer([*turns, {"role": "assistant", "content": text}]) == answer


@pytest.mark.environments
def test_puzzles_come_with_their_reward():
    needs("reasoning_gym")
    rows = reasoning_gym_prompts("leg_counting", size=3, seed=5)
    assert rows.to_list() == reasoning_gym_prompts("leg_counting", size=3, seed=5).to_list()
    answers = [f"\\boxed{{{answer}}}" for answer in rows["answer"]]
    assert reasoning_gym_reward(answers, puzzle=rows["puzzle"]) == [1.0] * 3
    assert reasoning_gym_reward(["\\boxed{-1}", "no idea"], puzzle=rows["puzzle"][:2]) == [0.0, 0.0]


@pytest.mark.environments
def test_a_part_of_the_score_may_count_as_nothing():
    reasoning_gym = needs("reasoning_gym")
    rows = reasoning_gym_prompts("number_sorting", size=1)
    place = json.loads(rows[0]["puzzle"])
    puzzles = reasoning_gym.create_dataset(place[0], **json.loads(place[1]))
    score = puzzles.score_answer("[1]", puzzles[0])
    assert reasoning_gym_reward(["\\boxed{[1]}"], puzzle=rows["puzzle"]) == [score]
    assert ReasoningGymReward(full_score_only=True)(["\\boxed{[1]}"], puzzle=rows["puzzle"]) == [0.0]


@pytest.mark.environments
def test_a_scorer_that_raises_decides_nothing(monkeypatch):
    needs("reasoning_gym")
    from reasoning_gym.arithmetic.leg_counting import LegCountingDataset

    rows = reasoning_gym_prompts("leg_counting", size=1)
    monkeypatch.setattr(LegCountingDataset, "score_answer", lambda self, answer, entry: float(answer))
    assert reasoning_gym_reward(["\\boxed{many}"], puzzle=rows["puzzle"]) == [None]


@pytest.mark.environments
def test_what_there_is_not_is_refused():
    needs("reasoning_gym")
    with pytest.raises(ValueError, match="no dataset 'legs'.*leg_counting"):
        reasoning_gym_prompts("legs")
    with pytest.raises(ValueError, match="no JSON value"):
        reasoning_gym_prompts("leg_counting", min_animals={1})
