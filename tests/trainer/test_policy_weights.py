"""Snapshots of what trains: swapped in and out bit for bit, small for an adapter, refused for another model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn.trainer.loop.policy_weights import (
    load_policy_weights,
    policy_revision,
    policy_weights,
    save_policy_weights,
)


def model(seed=0, **kwargs):
    return tiny_model(byte_tokenizer(), seed=seed, **kwargs)


def test_weights_are_swapped_in_and_put_back(tmp_path):
    first, second = model(0), model(1)
    revisions = policy_revision(first), policy_revision(second)
    save_policy_weights(second, tmp_path / "second.safetensors")
    with policy_weights(first, tmp_path / "second.safetensors"):
        assert policy_revision(first) == revisions[1]
    assert policy_revision(first) == revisions[0]
    with pytest.raises(RuntimeError, match="inside"), policy_weights(first, tmp_path / "second.safetensors"):
        raise RuntimeError("inside")
    assert policy_revision(first) == revisions[0]  # also after an error


def test_tied_weights_are_written_once_and_load(tmp_path):
    first, second = (model(seed, tie_word_embeddings=True) for seed in (0, 1))
    save_policy_weights(first, tmp_path / "tied.safetensors")
    load_policy_weights(second, tmp_path / "tied.safetensors")
    assert policy_revision(second) == policy_revision(first)
    assert second.lm_head.weight is second.model.embed_tokens.weight


def test_an_adapters_snapshot_holds_the_adapter_alone(tmp_path):
    policy = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"]))
    save_policy_weights(policy, tmp_path / "lora.safetensors")
    adapter = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert (tmp_path / "lora.safetensors").stat().st_size < 4 * adapter + 4000
    before = policy_revision(policy)
    with torch.no_grad():
        next(p for p in policy.parameters() if p.requires_grad).add_(1)
    assert policy_revision(policy) != before
    load_policy_weights(policy, tmp_path / "lora.safetensors")
    assert policy_revision(policy) == before


def test_another_models_snapshot_is_refused(tmp_path):
    save_policy_weights(model(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="snapshot of another model"):
        load_policy_weights(model(num_hidden_layers=1), tmp_path / "weights.safetensors")


def test_a_frozen_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trainable parameter"):
        save_policy_weights(model().requires_grad_(False), tmp_path / "weights.safetensors")


def test_revision_does_not_depend_on_dtype_of_other_runs():
    assert policy_revision(model(0)) == policy_revision(model(0)) != policy_revision(model(0).bfloat16())
