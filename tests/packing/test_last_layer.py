"""The last feed-forward block: what it computes, and for whom it computes everything."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from tests.packing.families import branching_batch, tiny
from tests.packing.test_forward import assert_same, run
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.decoder import capture_hidden_states
from trl_multiturn.packing.forward import PackedForward
from trl_multiturn.packing.last_layer import LastFeedForward


def seated(family="llama", **overrides):
    """A model on the packed path, its batch, and what each feed-forward block was given since."""
    model = tiny(family, **overrides)
    add_fused_lm_head(model)
    forward = PackedForward(model, pack=True).install()
    lengths = [[] for _ in model.base_model.layers]
    for layer, seen in zip(model.base_model.layers, lengths, strict=True):
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
    return model, forward, branching_batch(), lengths


def counts(forward, batch):
    """Tokens of the row, and how many of them predict a scored token."""
    row = forward.plan({**batch, "fused_lm_head": True}).row
    read = set()
    for labels, cells in zip(batch["labels"], row.cells, strict=True):
        read |= {cells[t - 1].item() for t in range(1, len(labels)) if labels[t] != -100}
    return len(row), len(read)


def test_the_last_block_runs_on_what_is_read():
    model, forward, batch, lengths = seated()
    tokens, read = counts(forward, batch)
    assert 0 < read < tokens
    model(**batch, fused_lm_head=True, use_cache=False)
    assert lengths == [[tokens]] * 3 + [[read]]


def test_what_nobody_reads_gets_nothing_and_what_is_read_gets_the_same():
    model, forward, batch, _ = seated()
    states = []
    model.base_model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output[0].detach()))
    model(**batch, fused_lm_head=True, use_cache=False)
    forward._last.remove()
    model(**batch, fused_lm_head=True, use_cache=False)
    read = forward.last_plan.read
    torch.testing.assert_close(states[0][read], states[1][read])
    others = torch.ones(len(states[0]), dtype=torch.bool).index_fill(0, read, False)
    assert (states[0][others] - states[1][others]).abs().min(dim=0).values.max() > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_states_again(reentrant):
    model, forward, batch, lengths = seated()
    tokens, read = counts(forward, batch)
    stock = run(model, batch)
    assert lengths == [[tokens]] * 3 + [[read]]
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = run(model, batch)
    assert lengths == [[tokens] * 3] * 3 + [[read] * 3]  # the first run, and forward and backward of the second
    assert_same(checkpointed, stock)


def test_whoever_captures_the_states_gets_them_whole():
    model, forward, batch, lengths = seated()
    tokens, read = counts(forward, batch)
    with capture_hidden_states(model.base_model):
        model(**batch, fused_lm_head=True, use_cache=False)
    model(**batch, fused_lm_head=True, use_cache=False)
    assert lengths[-1] == [tokens, read]


def test_other_calls_see_no_difference():
    model, forward, batch, lengths = seated()
    model(**batch, fused_lm_head=True, use_cache=False)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    forward.stop_packing()
    model(**batch, fused_lm_head=True, use_cache=False)
    assert lengths[-1][1:] == [batch["input_ids"].shape[1]] * 2
    assert not any(m._forward_pre_hooks for m in (model.base_model.layers[-1].self_attn,))


def test_a_call_that_fails_in_between_leaves_nothing_behind():
    model, forward, batch, lengths = seated()
    block = model.base_model.layers[-1].mlp

    def fails(module, args):
        raise RuntimeError("out of memory")

    handle = block.down_proj.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch, fused_lm_head=True, use_cache=False)
    handle.remove()
    model(input_ids=batch["input_ids"])
    assert lengths[-1][-1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_count_every_token(family):
    assert not LastFeedForward(tiny(family).base_model).acts


def test_an_adapter_on_the_block_changes_nothing():
    model = tiny("llama")
    add_fused_lm_head(model)
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, settings)
    batch = branching_batch()
    stock = run(model, batch)
    forward = PackedForward(model, pack=True).install()
    assert forward._last.acts
    assert_same(run(model, batch), stock)


def test_the_hooks_of_an_earlier_trainer_stand_aside():
    """As where one trainer had the model without an adapter, and the next one gives it one."""
    model, first, batch, _ = seated()
    _, read = counts(first, batch)
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    first.enabled = False
    stock = run(adapted, batch)
    first.enabled = True
    PackedForward(adapted, pack=True).install()
    lengths = []
    model.base_model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert_same(run(adapted, batch), stock)
    assert lengths == [read]
