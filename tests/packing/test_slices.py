"""A row in slices: the scores and gradients of the whole row, whatever the slices and their paths."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from tests.packing.families import FAMILIES, branching_batch, tiny
from tests.packing.test_forward import assert_same, run
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.packing.row import pack_rows
from trl_multiturn.packing.scored_head import FIELDS
from trl_multiturn.packing.slices import cut, slice_tokens


def seated(model, **kwargs):
    """The model's own fused head, and a row of it packed in slices."""
    add_fused_lm_head(model, outputs=("log_probs", *FIELDS))
    return PackedForward(model, fields=FIELDS, pack=True, **kwargs).install()


def test_slices_tile_the_row_and_know_their_paths():
    #                   a b c d e | x y | z
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 9, 9, 0], [1, 2, 3, 9, 8, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    row = pack_rows(ids, mask, min_shared=1)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 8, 7, 9]]
    assert [tuple(span) for span in cut(row, 2)] == [
        (0, 2, ()),
        (2, 4, ((0, 2),)),
        (4, 5, ((0, 2), (1, 2))),
        (5, 7, ((0, 2), (1, 1))),
        (7, 8, ((0, 2), (1, 1), (3, 2))),
        (8, 9, ((0, 2), (1, 1), (3, 1))),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_the_padded_batch(family, monkeypatch):
    monkeypatch.setattr("trl_multiturn.packing.path_attention.LEAST_NEW_TOKENS", 1)
    model = tiny(family)
    add_fused_lm_head(model, outputs=("log_probs", *FIELDS))
    batch = branching_batch()
    stock = run(model, batch)
    forward = seated(model, slices=7)
    ours = run(model, batch)
    assert forward.calls == {"packed": 1, "padded": 0} and forward._slice_tokens == 7
    assert_same(ours, stock)


@pytest.mark.parametrize("trained", ["adapters", "adapters and head"])
def test_adapters_get_the_gradient_of_the_whole_row(trained):
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    if trained == "adapters and head":
        config.modules_to_save = ["lm_head"]
    results = []
    for slices in (0, 5):
        base = tiny("qwen2")
        add_fused_lm_head(base, outputs=("log_probs", *FIELDS))
        model = get_peft_model(base, config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        PackedForward(model, fields=FIELDS, pack=True, slices=slices).install()
        results.append(run(model, branching_batch()))
    assert_same(results[1], results[0])


def test_gradients_add_up_over_batches():
    model = tiny("llama")
    seated(model, slices=6)
    gradients = []
    for times in (1, 2):
        model.zero_grad()
        for _ in range(times):
            model(**branching_batch(), fused_lm_head=True, use_cache=False).log_probs.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_the_backward_pass_sees_the_autocast_of_the_forward_pass():
    gradients = []
    for slices in (0, 6):
        model = tiny("llama")
        seated(model, slices=slices)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(**branching_batch(), fused_lm_head=True, use_cache=False).log_probs
        scores.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    scale = gradients[0].abs().max()
    torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, atol=0.03, rtol=0)


def test_without_gradients_the_scores_are_the_same():
    model = tiny("qwen2")
    forward = seated(model, slices=6)
    with torch.no_grad():
        cut_up = model(**branching_batch(), fused_lm_head=True).log_probs
        forward._slices = 0
        whole = model(**branching_batch(), fused_lm_head=True).log_probs
    torch.testing.assert_close(cut_up, whole, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_is_refused():
    model = tiny("llama")
    seated(model, slices=6)
    scores = model(**branching_batch(), fused_lm_head=True, use_cache=False).log_probs.sum()
    scores.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        scores.backward()


def test_long_rows_are_cut_where_gradient_checkpointing_is_on(monkeypatch):
    monkeypatch.setattr("trl_multiturn.packing.slices.LEAST_TOKENS", 4)
    model = tiny("llama")
    forward = seated(model)
    run(model, branching_batch())
    assert forward._slice_tokens == 0
    model.train()
    model.gradient_checkpointing_enable()
    run(model, branching_batch())
    assert forward._slice_tokens == slice_tokens(len(forward.last_plan.row), model.config.num_hidden_layers) > 0
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
