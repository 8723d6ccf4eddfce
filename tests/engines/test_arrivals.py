"""Ids outside the vocabulary and numbers that are no log-probabilities are refused where they arrive."""

from __future__ import annotations

import math

import pytest

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import RolloutConfig, ScriptedEngine, TransformersEngine, generate_trajectories
from trl_multiturn.engines.arrivals import refuse_damaged, vocabulary_of
from trl_multiturn.engines.engine import Generation
from trl_multiturn.errors import EngineError


TOKENIZER = byte_tokenizer("qwen2_5")
SIZE = len(TOKENIZER)


class Damaged(ScriptedEngine):
    """An engine whose answers are changed on the way."""

    answer: Generation

    async def generate(self, prompt_ids, sampling, *, session=None):
        return self.answer


@pytest.mark.parametrize(
    ("ids", "logps", "message"),
    [
        ([5, SIZE], [-1.0, -1.0], f"token id {SIZE} \\(token 1 of a turn\\), outside of the vocabulary of {SIZE}"),
        ([-1], [-1.0], "token id -1"),
        ([5], [math.nan], "log-probability nan"),
        ([5], [-math.inf], "log-probability -inf"),
        ([5], [0.5], "log-probability 0.5"),
        ([5, 6], [-1.0], "1 log-probabilities for 2 tokens"),
    ],
)
def test_what_cannot_have_been_sampled_ends_the_rollouts_and_names_the_engine(ids, logps, message):
    engine = Damaged(["unused"], TOKENIZER)
    engine.answer = Generation(ids, logps, "length")
    prompts = [{"prompt": [{"role": "user", "content": "1?"}]}]
    with pytest.raises(EngineError, match=f"`Damaged` returned .*{message}|`Damaged` returned the {message}"):
        generate_trajectories(prompts, engine, config=RolloutConfig(num_generations=1), progress=False)


def test_what_rounding_makes_of_certainty_passes():
    refuse_damaged(Generation([5], [1e-6], "length"), ScriptedEngine([], TOKENIZER), SIZE)


def test_a_model_may_have_more_tokens_than_its_tokenizer():
    engine = TransformersEngine(tiny_model(TOKENIZER, vocab_size=SIZE + 7), TOKENIZER)
    assert vocabulary_of(engine, SIZE) == SIZE + 7
    assert vocabulary_of(ScriptedEngine([], TOKENIZER), SIZE) == SIZE
