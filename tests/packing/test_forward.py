"""The packed forward against TRL's own fused forward on the padded batch: each field, gradient and family."""

from __future__ import annotations

import pytest
import torch

from tests.packing.families import FAMILIES, branching_batch, tiny
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.packing.scored_head import FIELDS


def weights_of(batch):
    """Any function of the scores whose gradient differs between sequences, tokens, and shared tokens."""
    return torch.randn(batch["input_ids"][:, 1:].shape, generator=torch.Generator().manual_seed(5))


def run(model, batch, **kwargs):
    model.zero_grad()
    output = model(**batch, fused_lm_head=True, use_cache=False, **kwargs)
    loss = (output.log_probs * weights_of(batch)).sum()
    if output.aux_loss is not None:
        loss = loss + output.aux_loss
    loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, stock, atol=2e-5):
    assert type(ours[0]) is type(stock[0])
    assert set(ours[0].keys()) == set(stock[0].keys())
    for name, expected in stock[0].items():
        torch.testing.assert_close(ours[0][name], expected, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert ours[1].keys() == stock[1].keys()
    for name, expected in stock[1].items():
        scale = expected.abs().max().item() + 1e-6
        torch.testing.assert_close(
            ours[1][name] / scale, expected / scale, atol=3e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_equal_the_padded_batch(family):
    model = tiny(family)
    add_fused_lm_head(model, outputs=("log_probs", *FIELDS))
    batch = branching_batch()
    stock = run(model, batch)
    forward = PackedForward(model, fields=FIELDS, pack=True).install()
    ours = run(model, batch)
    assert forward.calls == {"packed": 1, "padded": 0}
    assert_same(ours, stock)
    assert len(forward.plan({**batch, "fused_lm_head": True}).row) < batch["attention_mask"].sum()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_router_loss_counts_shared_tokens_once_per_sequence(family):
    model = tiny(family)
    add_fused_lm_head(model)
    batch = branching_batch()
    stock = run(model, batch, output_router_logits=True)
    forward = PackedForward(model, pack=True).install()
    ours = run(model, batch, output_router_logits=True)
    assert forward.calls["packed"] == 1
    assert ours[0].aux_loss is not None
    assert_same(ours, stock)
