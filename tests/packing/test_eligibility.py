"""Which models are packed: the self-test passes on every proven family and catches what it is there to catch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DogeConfig,
    DogeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.packing.families import FAMILIES, tiny
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.eligibility import reason_against_hooks, reason_against_packing, self_test
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.precision import matmul_uses_tf32


def seated(model):
    add_fused_lm_head(model)
    return PackedForward(model, pack=True).install()


@pytest.mark.parametrize("family", FAMILIES)
def test_proven_families_pass(family):
    model = tiny(family).train()
    assert reason_against_hooks(model) is None
    assert reason_against_packing(model) is None
    assert self_test(seated(model)) is None
    assert model.training and all(module.training for module in model.modules())


def test_the_self_test_sees_a_layer_that_attends_across_trajectories():
    model = tiny("llama")
    forward = seated(model)
    # A layer that kept another config, and with it another attention function
    layer = model.model.layers[1].self_attn
    layer.config = type(layer.config)(**layer.config.to_dict())
    layer.config._attn_implementation = "sdpa"
    assert "nan" in self_test(forward)


def test_the_self_test_sees_a_window_that_the_attention_is_not_told_about():
    model = tiny("mistral", sliding_window=64)
    forward = seated(model)
    original = model.model.layers[2].self_attn.config
    model.model.layers[2].self_attn.config = type(original)(**{**original.to_dict(), "sliding_window": None})
    model.model.layers[2].self_attn.config._attn_implementation = original._attn_implementation
    assert "windows" in self_test(forward)


def test_the_self_test_sees_wrong_positions():
    model = tiny("llama")
    forward = seated(model)
    rotary = model.model.rotary_emb
    inner = rotary.forward
    rotary.forward = lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None])
    assert "differ" in self_test(forward)


def test_a_model_that_fails_in_its_own_way_is_not_packed():
    model = tiny("llama")
    forward = seated(model)
    inner = model.model.forward

    def reads_the_shape_of_its_mask(*args, attention_mask=None, **kwargs):
        return inner(*args, attention_mask={2: attention_mask}[attention_mask.dim()], **kwargs)

    model.model.forward = reads_the_shape_of_its_mask
    assert "KeyError" in self_test(forward)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [({"attention_dropout": 0.1}, "attention_dropout"), ({"layer_types": ["linear_attention"] * 4}, "branch")],
)
def test_configs_that_cannot_branch_are_refused(overrides, word):
    model = tiny("llama")
    for name, value in overrides.items():
        setattr(model.config, name, value)
    assert word in reason_against_packing(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_self_test_allows_what_the_precision_rounds(autocast):
    """Weights in float32 under autocast compute in bfloat16, and real models then differ by hundredths of a nat."""
    model = tiny("llama")
    add_fused_lm_head(model)
    forward = PackedForward(model, pack=True).install()
    calls = []

    def blurred(module, args, output):
        calls.append(None)
        output.log_probs = output.log_probs + 0.03 * (len(calls) % 2)
        return output

    model.register_forward_hook(blurred)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reason = self_test(forward)
    assert len(calls) == 2
    assert reason is None if autocast else "differ" in reason


def test_dropout_is_refused_until_it_is_off():
    model = get_peft_model(tiny("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, lora_dropout=0.1))
    assert "dropout" in reason_against_packing(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    assert reason_against_packing(model) is None


def test_prompt_learning_is_refused():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    assert "virtual tokens" in reason_against_hooks(get_peft_model(tiny("llama"), config))


def test_alibi_is_refused_because_it_is_no_attention_function():
    model = MptForCausalLM(MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64))
    assert "AttentionInterface" in reason_against_packing(model)


def test_an_architecture_not_listed_anywhere_is_packed_if_it_passes():
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    assert reason_against_packing(model) is None
    assert self_test(seated(model)) is None


def test_the_self_test_compares_with_the_attention_the_model_came_with():
    def louder(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=2 * scaling)

    AttentionInterface.register("louder", louder)
    AttentionMaskInterface.register("louder", sdpa_mask)
    model = tiny("llama")
    model.set_attn_implementation("louder")
    assert "louder" in reason_against_packing(model)  # unknown by name; were it not, the numbers would tell
    forward = seated(model)
    assert "differ" in self_test(forward)
    forward.stop_packing()
    assert model.config._attn_implementation == "louder"


def test_attention_sinks_are_seen():
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    assert "s_aux" in self_test(seated(model))


def test_a_mask_that_the_layers_make_themselves_is_seen():
    """Doge learns a bias of each key and hands it over in the mask; at first it is the same for all: scores agree."""
    config = DogeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    assert "mask" in self_test(seated(DogeForCausalLM(config)))


def test_what_matrix_products_are_rounded_to_is_known_however_it_was_set():
    from transformers.utils.import_utils import enable_tf32

    assert not matmul_uses_tf32()
    try:
        enable_tf32(True)
        assert matmul_uses_tf32()
        assert self_test(seated(tiny("llama"))) is None
        enable_tf32(False)
        assert not matmul_uses_tf32()
    finally:
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "none"
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert matmul_uses_tf32()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert not matmul_uses_tf32()
