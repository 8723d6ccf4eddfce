"""What an engine has to say about itself, and what is refused by name before anything is sampled."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.support import byte_tokenizer, tiny_model, user
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    ToolRolloutGenerator,
    TransformersEngine,
    generate_trajectories,
)
from trl_multiturn.engines.engine import Forks, Generation, Sleeps, check_engine, is_engine_factory
from trl_multiturn.engines.vllm.engine import VLLMEngine
from trl_multiturn.engines.vllm.server import VLLMServerEngine


TOKENIZER = byte_tokenizer("qwen2_5")
PROMPTS = Dataset.from_list([{"prompt": [user("Talk.")], "answer": "1"}])


class SilentEngine:
    """An engine as its methods alone describe it: it does not say whose weights it samples with."""

    processing_class = TOKENIZER

    async def generate(self, prompt_ids, sampling, *, session=None):
        return Generation([TOKENIZER.eos_token_id], [0.0], "stop")

    def release(self, session):
        pass

    def refresh(self, model_path=None):
        pass

    def describe(self):
        return {"engine": "silent"}


WRONG = [
    (SilentEngine(), r"engine SilentEngine has `weights=None`.*`weights = \"own\"` if it loads checkpoints"),
    (object(), "`engine` is a object, which lacks `generate`, `release`, `refresh`, `describe`"),
    (3, "`engine` is a int, which lacks `generate`"),
]


def no_reward(completions, **columns):
    return [None] * len(completions)


@pytest.mark.parametrize(("engine", "message"), WRONG)
def test_what_is_no_engine_is_refused_before_the_first_rollout(engine, message):
    with pytest.raises(TypeError, match=message):
        generate_trajectories(PROMPTS, engine, progress=False)
    with pytest.raises(TypeError, match=message):
        ToolRolloutGenerator(PROMPTS, reward_funcs=no_reward, engine=engine)


def test_the_class_of_an_engine_builds_one():
    assert is_engine_factory(TransformersEngine) and not is_engine_factory(SilentEngine())
    with pytest.raises(TypeError, match="`engine` is the class SilentEngine, not an object of it"):
        check_engine(SilentEngine)


def trained_with(tmp_path, model, engine):
    generator = ToolRolloutGenerator(PROMPTS, reward_funcs=no_reward, engine=engine)
    args = MultiTurnDPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    return MultiTurnDPOTrainer(model=model, args=args, processing_class=TOKENIZER, callbacks=[generator])


def test_a_factory_that_builds_no_engine_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="engine SilentEngine has `weights=None`"):
        trained_with(tmp_path, tiny_model(TOKENIZER), lambda model, processing_class: SilentEngine())


def test_an_engine_on_another_model_than_the_one_in_training_is_refused(tmp_path):
    other = TransformersEngine(tiny_model(TOKENIZER, seed=1), TOKENIZER)
    with pytest.raises(ValueError, match="TransformersEngine samples with another model than the one that is being"):
        trained_with(tmp_path, tiny_model(TOKENIZER), other)


def test_an_adapter_put_on_the_engines_model_later_is_sampled_with():
    model = tiny_model(TOKENIZER)
    engine = TransformersEngine(model, TOKENIZER)
    assert engine.shares_weights_with(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert check_engine(engine, model) is engine


@pytest.mark.parametrize(
    ("engine", "weights", "forks", "sleeps"),
    [
        (TransformersEngine, "shared", True, False),
        (VLLMEngine, "own", False, True),
        (VLLMServerEngine, "own", False, False),
    ],
)
def test_the_engines_of_this_package_say_what_they_can_do(engine, weights, forks, sleeps):
    assert engine.weights == weights
    assert (issubclass(engine, Forks), isinstance(engine, Sleeps)) == (forks, sleeps)
