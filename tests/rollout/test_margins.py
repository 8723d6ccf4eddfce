"""Term C for recorded trajectories: which states are compared, against which repetitions, and what that gives."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.support import byte_tokenizer, user
from trl_multiturn.rollout import RolloutConfig, ScriptedEngine, generate_trajectories
from trl_multiturn.rollout.margins import observation_margins
from trl_multiturn.tools import ToolResult, current_rollout


TOKENIZER = byte_tokenizer("qwen2_5")
FLIP = "Flip.\n```python\nflip()\n```"
AGAIN = "Again.\n```python\nflip()\n```"
ANSWER = "It is \\boxed{1}."
CONFIG = RolloutConfig(dialect="fenced", num_generations=1)


class Coin:
    """A session tool; `sides(draw, number)` says how the coin falls at the session's `number`-th flip."""

    name = "python"
    version = "coin-1"
    schema = {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Flips a coin.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "Code."}},
                "required": ["code"],
            },
        },
    }

    def __init__(self, sides):
        self.sides = sides
        self.open_sessions = 0
        self.seeds = set()

    def open(self):
        self.open_sessions += 1
        return Session(self)


class Session:
    def __init__(self, coin):
        self.coin, self.number = coin, 0

    def run(self, code):
        self.number += 1
        self.coin.seeds.add(current_rollout().seed)
        return ToolResult(self.coin.sides(current_rollout().sample_index, self.number))

    def close(self):
        self.coin.open_sessions -= 1


class Heads:
    """Values a state by what the latest flip showed: heads 1, tails 0."""

    def __init__(self):
        self.scored = []

    def score(self, sequences):
        texts = [TOKENIZER.decode(ids) for ids in sequences]
        self.scored += texts
        return [float(text.rfind("heads") > text.rfind("tails")) for text in texts]


def trajectory(script, sides):
    engine = ScriptedEngine(script, TOKENIZER)
    prompts = Dataset.from_list([{"prompt": [user("Flip a coin.")]}])
    (rollout,) = generate_trajectories(
        prompts, engine, [Coin(lambda draw, number: sides[number - 1])], CONFIG, progress=False
    )
    return rollout


def pair(chosen, rejected):
    row = {"prompt_ids": chosen.prompt_ids}
    for side, rollout in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"{side}_ids": rollout.completion_ids, f"{side}_action_mask": rollout.action_mask}
    return row


def margins(rows, coin, scorer=None, k=4):
    dataset = Dataset.from_list(rows)
    scorer = scorer or Heads()
    return observation_margins(dataset, scorer, [coin], k, processing_class=TOKENIZER, config=CONFIG)


def test_by_hand():
    """Three of four repetitions show heads: C = 1 - 3/4 after heads, 0 - 3/4 after tails."""
    chosen, rejected = trajectory([FLIP, ANSWER], ["heads"]), trajectory([FLIP, ANSWER], ["tails"])
    coin = Coin(lambda draw, number: "tails" if draw == 0 else "heads")
    rows = margins([pair(chosen, rejected), pair(rejected, chosen)], coin)
    assert rows["margin"] == pytest.approx([0.25 - -0.75, -0.75 - 0.25])
    assert coin.open_sessions == 0
    assert len(coin.seeds) == 2 * 4  # one seed per trajectory and repetition; the trajectories are repeated once


def test_unpaired_rows_get_their_own_surprise():
    """The sides of the pair above, one row each."""
    rows = [
        {
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": rollout.completion_ids,
            "action_mask": rollout.action_mask,
        }
        for rollout in (trajectory([FLIP, ANSWER], [side]) for side in ("heads", "tails"))
    ]
    coin = Coin(lambda draw, number: "tails" if draw == 0 else "heads")
    assert margins(rows, coin)["margin"] == pytest.approx([0.25, -0.75])


def test_each_call_counts_and_sees_the_recorded_history():
    """Second flips: recorded tails, repetitions heads, heads, tails, tails: C = 0 - 1/2, on top of the first's 0."""
    flips = [["heads", "heads"], ["heads", "heads"], ["heads", "tails"], ["heads", "tails"]]
    chosen = trajectory([FLIP, AGAIN, ANSWER], ["heads", "tails"])
    rejected = trajectory([ANSWER], [])
    scorer = Heads()
    rows = margins([pair(chosen, rejected)], Coin(lambda draw, number: flips[draw][number - 1]), scorer)
    assert rows["margin"] == pytest.approx([-0.5])
    assert len(scorer.scored) == 2  # two distinct states, after the second flip
    for text in scorer.scored:
        assert text.count("Again.") == 1 and text.endswith("<|im_start|>assistant\n")


def test_certain_tools_give_exactly_zero_and_no_value_is_asked_for():
    chosen, rejected = trajectory([FLIP, AGAIN, ANSWER], ["heads", "heads"]), trajectory([FLIP, ANSWER], ["heads"])
    scorer = Heads()
    rows = margins([pair(chosen, rejected)], Coin(lambda draw, number: "heads"), scorer)
    assert rows["margin"] == [0.0] and scorer.scored == []


def test_a_margin_column_is_replaced():
    chosen, rejected = trajectory([FLIP, ANSWER], ["heads"]), trajectory([ANSWER], [])
    row = pair(chosen, rejected) | {"margin": 9.0}
    assert margins([row], Coin(lambda draw, number: "heads"))["margin"] == [0.0]


def test_wrong_arguments_are_refused():
    rollout = trajectory([ANSWER], [])
    with pytest.raises(ValueError, match="at least 1"):
        margins([pair(rollout, rollout)], Coin(lambda draw, number: "heads"), k=0)
    with pytest.raises(ValueError, match="lack \\['chosen_action_mask'\\]"):
        row = pair(rollout, rollout)
        del row["chosen_action_mask"]
        margins([row], Coin(lambda draw, number: "heads"))
