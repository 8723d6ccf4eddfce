"""Models that a shared cache suits, and those that it does not: samples are what the plain forward pass says."""

from __future__ import annotations

import asyncio

import pytest
import torch
import transformers
from transformers import GraniteConfig, GraniteForCausalLM

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers.compatibility import attention_windows
from trl_multiturn.engines.transformers.engine import EngineError, TransformersEngine


TOKENIZER = byte_tokenizer()
VOCAB, WINDOW = 48, 8
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)


def build(family, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # attention that matters: not every family takes `initializer_range`
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def sample(model, length=30):
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = TransformersEngine(model, TOKENIZER)
    generation = asyncio.run(engine.generate(prompt, SamplingParams(6, seed=0)))
    return prompt, generation


@torch.no_grad()
def plain_logps(model, prompt, generation):
    logits = model(torch.tensor([prompt + generation.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(generation.token_ids).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    ("family", "applied"),
    [("Granite", False), ("Glm4", False), ("Llama", False), ("Olmo2", False), ("Mistral", True), ("Phi3", True)],
)
def test_a_window_counts_where_the_models_own_code_applies_it(family, applied):
    model = build(family, sliding_window=WINDOW)
    assert attention_windows(model) == ([WINDOW if applied else None] * 2, None)
    prompt, generation = sample(model)
    torch.testing.assert_close(torch.tensor(generation.logps), plain_logps(model, prompt, generation))
    # The test can fail: beyond the window the one is not the other
    changed = [3 + (prompt[0] - 2) % (VOCAB - 3), *prompt[1:]]
    same = torch.allclose(
        plain_logps(model, changed, generation), plain_logps(model, prompt, generation), atol=1e-5, rtol=0
    )
    assert same == applied


class RemoteForCausalLM(GraniteForCausalLM):
    """A model whose code is its own: nobody knows whether it applies the window in its config."""


def test_a_window_that_may_or_may_not_be_applied_is_never_passed():
    model = RemoteForCausalLM(GraniteConfig(**SIZES, sliding_window=30)).eval()
    assert attention_windows(model) == ([30, 30], 30)
    prompt, generation = sample(model, length=20)  # with 6 sampled tokens, below the window
    torch.testing.assert_close(torch.tensor(generation.logps), plain_logps(model, prompt, generation))
    with pytest.raises(EngineError, match="`sliding_window=30` in the config of RemoteFor.*max_trajectory_tokens=30"):
        sample(model, length=27)


def test_a_class_derived_by_sharding_is_still_transformers_own():
    model = build("Granite", sliding_window=WINDOW)
    model.__class__ = type("FSDPGranite", (GraniteForCausalLM,), {"__module__": "torch.distributed.fsdp"})
    assert attention_windows(model) == ([None, None], None)


def test_models_that_take_no_shared_cache_are_refused_with_a_remedy():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(EngineError, match="BloomForCausalLM does not take a cache .*Use an engine .*`VLLMEngine`"):
        sample(transformers.BloomForCausalLM(config))


def test_a_conversation_longer_than_the_models_positions_says_so():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=40)
    with pytest.raises(EngineError, match="has 41 tokens, the model 40 positions: lower `max_trajectory_tokens`"):
        sample(transformers.GPT2LMHeadModel(config).eval(), length=38)


def test_models_that_do_not_decode_causally_are_refused():
    config = transformers.BertConfig(**SIZES, is_decoder=False)
    model = transformers.BertLMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(EngineError, match=r"BertLMHeadModel gives other logits .*% of their spread.*`VLLMEngine`"):
        sample(model)


def test_rounding_is_no_difference():
    prompt, generation = sample(tiny_model(TOKENIZER).to(torch.bfloat16).eval())
    assert len(generation.token_ids) == 6
