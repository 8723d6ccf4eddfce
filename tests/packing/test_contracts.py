"""What the packed path relies on in transformers and TRL, one promise per test; a failure names what to re-check."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tests.packing.families import FAMILIES, branching_batch, tiny
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.attention import EAGER, SDPA, register


def test_attention_functions_and_masks_can_be_registered_by_name():
    register()
    for name in (SDPA, EAGER):
        assert name in AttentionInterface() and name in AttentionMaskInterface()


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_a_four_dimensional_mask_is_passed_through_untouched(create):
    mask = torch.full((1, 1, 1, 1), torch.nan)
    model = tiny("mistral")
    result = create(model.config, torch.zeros(1, 5, 32), mask, past_key_values=None)
    assert result is mask, "`poison_mask` relies on 4-D masks being returned as they are"


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_keyword_arguments_reach_every_attention_call(family):
    model, seen = tiny(family), []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs.get("packed_row"))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("packing_spy", spy)
    model.set_attn_implementation("packing_spy")
    marker = object()
    model.base_model(input_ids=torch.ones(1, 3, dtype=torch.long), packed_row=marker, use_cache=False)
    assert seen == [marker] * model.config.num_hidden_layers


def test_the_fused_head_calls_the_backbone_as_a_module_and_scores_what_it_returns():
    model = tiny("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batch = branching_batch()
    stock = model(**batch, fused_lm_head=True).log_probs
    place = (batch["labels"][:, 1:] != -100).nonzero()[0]

    def keep_one(module, args, output):
        output.last_hidden_state = output.last_hidden_state[place[0], place[1]][None, None]

    handle = model.base_model.register_forward_hook(keep_one)
    target = batch["input_ids"][place[0], place[1] + 1][None, None]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    one = model(**inputs, shift_labels=target, fused_lm_head=True)
    handle.remove()
    torch.testing.assert_close(one.log_probs[0, 0], stock[place[0], place[1]])


def test_the_fused_head_takes_no_position_at_all():
    model = tiny("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    handle = model.base_model.register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output.last_hidden_state[:, :0])
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    output = model(input_ids=ids, shift_labels=torch.empty(1, 0, dtype=torch.long), fused_lm_head=True)
    handle.remove()
    assert output.log_probs.shape == output.entropy.shape == (1, 0)
