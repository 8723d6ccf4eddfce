"""Decoding steps may multiply with transposed copies of weights: the same tokens, and no copy outlives its weight."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.engines.test_transformers_engine import TOKENIZER, prompt, run, score
from tests.support import tiny_model
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.engines.transformers.step_weights import MAX_ROWS, StepWeights


REQUESTS = [(prompt(n, seed=n), SamplingParams(9, temperature=0)) for n in (4, 11, 17)]


def with_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))


MODELS = {
    "tied": lambda: tiny_model(TOKENIZER, tie_word_embeddings=True),
    "a head of its own": lambda: tiny_model(TOKENIZER, tie_word_embeddings=False),
    "LoRA": lambda: with_adapter(tiny_model(TOKENIZER)),
}


def linear_bytes(model) -> int:
    return sum(module.weight.nbytes for module in model.modules() if type(module) is torch.nn.Linear)


@pytest.mark.parametrize("name", MODELS)
def test_copies_change_no_token(name):
    model = MODELS[name]().eval()
    without = TransformersEngine(model, TOKENIZER, step_weights_limit_mb=0)
    copying = TransformersEngine(model, TOKENIZER)
    expected, found = run(without, *REQUESTS), run(copying, *REQUESTS, session="kept")
    assert (without.stats["step_weights_bytes"], copying.stats["step_weights_bytes"]) == (0, linear_bytes(model))
    assert [generation.token_ids for generation in found] == [generation.token_ids for generation in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_the_models_own_weights_are_back_after_a_step():
    model = tiny_model(TOKENIZER, tie_word_embeddings=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    run(TransformersEngine(model, TOKENIZER), *REQUESTS)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items()) and len(after) == len(before)
    assert all(parameter.is_contiguous() for parameter in after.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_steps_of_two_engines_on_their_threads_leave_the_model_its_own_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    weight, first_is_over, second_is_in = model[0].weight, threading.Event(), threading.Event()
    one, other = (StepWeights(model, 2**20, max_rows=1) for _ in range(2))
    other.call(input=torch.ones(1, 2))
    second = threading.Thread(target=lambda: other.call(input=torch.ones(1, 2)))

    def in_a_step(*_):
        if threading.current_thread() is second:
            second_is_in.set()
            first_is_over.wait(timeout=20)
        else:
            second.start()
            second_is_in.wait(timeout=0.1)

    model.register_forward_pre_hook(in_a_step)
    one.call(input=torch.ones(1, 2))
    first_is_over.set()
    second.join()
    assert model[0].weight is weight and second_is_in.is_set()


@pytest.mark.parametrize("kept", ["nothing", "a session"])
def test_after_a_training_step_the_new_weights_are_sampled(kept):
    model = tiny_model(TOKENIZER)
    engine = TransformersEngine(model, TOKENIZER)
    (old,) = run(engine, REQUESTS[1], session=None if kept == "nothing" else "a")
    if kept == "a session":
        assert engine.stats["step_weights_bytes"]
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    model(torch.tensor([prompt(20)]), labels=torch.tensor([prompt(20)])).loss.backward()
    optimizer.step()
    if kept == "a session":
        engine.refresh()
    assert engine.stats["step_weights_bytes"] == 0
    (new,) = run(engine, REQUESTS[1])
    assert new.token_ids != old.token_ids
    logps, modes = score(model.eval(), REQUESTS[1][0], new.token_ids)
    assert new.token_ids == modes
    assert new.logps == pytest.approx(logps.tolist(), abs=1e-5)


def test_the_last_release_frees_the_copies():
    engine = TransformersEngine(tiny_model(TOKENIZER), TOKENIZER)
    run(engine, REQUESTS[0], session="a")
    assert engine.stats["step_weights_bytes"]
    engine.release("a")
    assert engine.stats["step_weights_bytes"] == 0


def test_an_engine_over_a_copy_has_all_settings():
    settings = {"cache_memory_limit_mb": 7, "max_prefill_tokens": 96, "seed": 3, "step_weights_limit_mb": 0}
    engine = TransformersEngine(tiny_model(TOKENIZER), TOKENIZER, max_batch_size=5, **settings)
    other = engine.over(tiny_model(TOKENIZER))
    run(other, REQUESTS[0], session="a")
    assert other.stats["step_weights_bytes"] == 0
    assert (other.max_batch_size, other._settings) == (5, settings)
    # what a copy brings along itself, and the batch size above
    assert {*inspect.signature(TransformersEngine).parameters} == {*settings} | {
        "model", "processing_class", "device", "max_batch_size"
    }  # fmt: skip


def test_layers_that_do_not_fit_keep_their_own_weights():
    model = tiny_model(TOKENIZER).eval()
    weights = StepWeights(model, limit_bytes=linear_bytes(model) - 1, max_rows=16)
    ids = torch.tensor([prompt(16)])
    with torch.no_grad():
        torch.testing.assert_close(weights.call(input_ids=ids).logits, model(input_ids=ids).logits)
    assert 0 < weights.nbytes < linear_bytes(model)


@pytest.mark.parametrize("change", ["bfloat16", "many rows", "another layer"])
def test_what_is_not_known_to_be_alike_is_not_copied(change):
    class OwnLinear(torch.nn.Linear):
        """A layer that may read its weight as it likes."""

    model = tiny_model(TOKENIZER).eval()
    if change == "bfloat16":
        model.to(torch.bfloat16)
    if change == "another layer":
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = OwnLinear
    weights = StepWeights(model, 2**30, max_rows=MAX_ROWS + (change == "many rows"))
    with torch.no_grad():
        weights.call(input_ids=torch.tensor([prompt(16)]))
    assert weights.nbytes == 0
