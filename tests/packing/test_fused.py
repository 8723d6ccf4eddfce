"""Decoder layers from few operators: what they compute, for whom, and what takes them off."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from tests.packing.families import branching_batch, tiny
from tests.packing.test_forward import assert_same, run
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.eligibility import self_test, try_fused_layers
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.packing.fused import FusedLayer, operators


FUSED = ("llama", "llama_tied", "qwen2", "qwen2_mixed_windows", "qwen3", "mistral")


def fused(family="qwen2", **overrides):
    model = tiny(family, **overrides)
    add_fused_lm_head(model)
    return model, PackedForward(model, pack=True, fuse=True).install()


@pytest.fixture
def calls(monkeypatch):
    """How often a layer ran fused."""
    seen, inner = [], FusedLayer._run
    monkeypatch.setattr(FusedLayer, "_run", lambda self, *args: seen.append(self) or inner(self, *args))
    return seen


@pytest.mark.parametrize("family", FUSED)
def test_scores_and_gradients_equal_the_padded_batch(family, calls):
    model = tiny(family)
    add_fused_lm_head(model)
    stock = run(model, branching_batch())
    PackedForward(model, pack=True, fuse=True).install()
    assert_same(run(model, branching_batch()), stock)
    assert len(calls) == 4


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_autocast_rounds_as_the_layers_do_by_themselves(family, calls):
    exact = run(tiny_with_head(family), branching_batch())
    errors = {}
    for fuse in (False, True):
        model = tiny_with_head(family)
        PackedForward(model, pack=True, fuse=fuse).install()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run(model, branching_batch())
        errors[fuse] = sum((rounded[1][name] - grad).square().sum() for name, grad in exact[1].items()).sqrt()
    assert len(calls) == 4
    assert errors[True] < 1.5 * errors[False]


def tiny_with_head(family):
    model = tiny(family)
    add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_fused_layers_again(reentrant, calls):
    model, _ = fused()
    expected = run(model, branching_batch())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, branching_batch()), expected)
    assert len(calls) == 4 + 2 * 4


def test_frozen_parts_get_no_gradient_and_the_others_the_same():
    model, forward = fused()
    _, expected = run(model, branching_batch())
    frozen = [name for name, _ in model.named_parameters() if "layers.1." in name or "k_proj" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    _, gradients = run(model, branching_batch())
    assert gradients.keys() == expected.keys() - set(frozen)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_calls_without_a_row_run_as_they_came(calls):
    model, forward = fused()
    ids = branching_batch()["input_ids"][:1, :5]
    with forward.as_it_came():
        expected = tiny("qwen2")(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert not calls


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "mixtral"])
def test_layers_of_another_kind_stay_as_they_are(family):
    assert fused(family)[1].fused == []


def test_layers_with_adapters_stay_as_they_are():
    model = tiny_with_head("qwen2")
    model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules="all-linear"))
    assert PackedForward(model, pack=True, fuse=True).install().fused == []


def test_a_hook_on_a_part_is_called(calls):
    model, _ = fused()
    seen = []
    model.base_model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    run(model, branching_batch())
    assert (len(seen), len(calls)) == (1, 3)


def test_layers_that_compute_something_else_are_taken_off():
    model, forward = fused()
    try_fused_layers(forward)
    assert self_test(forward) is None
    assert len(forward.fused) == 4

    forward.fused[2].groups[2].reverse()  # ups for gates; the trial tries the first layer only
    try_fused_layers(forward)
    assert len(forward.fused) == 4
    assert self_test(forward) is None
    assert forward.fused == []
    assert all("forward" not in layer.__dict__ for layer in model.base_model.layers)
    assert "self-test" in forward.reason_against_fusing


def test_the_trial_also_compares_gradients(monkeypatch):
    product = operators._product
    monkeypatch.setattr(operators, "_product", lambda a, b, dtype: 1.1 * product(a, b, dtype))
    _, forward = fused()
    try_fused_layers(forward)
    assert forward.fused == []
    assert "gradients differ" in forward.reason_against_fusing


def test_a_copy_of_the_model_runs_its_own_layers(calls):
    model, _ = fused()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.layers[0].mlp.up_proj.weight.zero_()
    assert twin.base_model.layers[0].forward.__self__.layer is twin.base_model.layers[0]
    assert_same(run(model, branching_batch()), run(tiny_with_head("qwen2"), branching_batch()))
