"""The packed forward against TRL's own fused forward on the padded batch: each field, gradient and family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from tests.packing.families import FAMILIES, branching_batch, tiny
from trl_multiturn._upstream import add_fused_lm_head
from trl_multiturn.packing.decoder import PackedDecoder, capture_hidden_states
from trl_multiturn.packing.forward import PackedForward, packed_forward_of
from trl_multiturn.packing.plan import PlanCache, choose_row, chunk_overhead
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


def seated(family="llama", **kwargs):
    model = tiny(family)
    add_fused_lm_head(model, outputs=("log_probs", *FIELDS))
    return model, PackedForward(model, fields=FIELDS, **kwargs).install()


def test_a_batch_that_is_not_ours_goes_by_unchanged():
    model, forward = seated(pack=True)
    batch = branching_batch()
    left_padded = {name: x.flip(1) for name, x in batch.items()}
    other_targets = {**batch, "labels": batch["labels"].where(batch["labels"] == -100, 5)}
    for case in (left_padded, other_targets):
        ours = model(**case, fused_lm_head=True)
        forward.enabled = False
        stock = model(**case, fused_lm_head=True)
        forward.enabled = True
        torch.testing.assert_close(ours.log_probs, stock.log_probs, atol=2e-5, rtol=1e-4)
    assert forward.calls["packed"] == 0


def test_a_batch_without_any_target_is_a_differentiable_zero():
    for pack in (True, False):
        model, _ = seated(pack=pack)
        batch = branching_batch()
        output = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}, fused_lm_head=True)
        output.log_probs.sum().backward()
        assert output.log_probs.shape == batch["labels"][:, 1:].shape and not output.log_probs.any()


def test_auto_packs_what_pays_and_leaves_what_does_not():
    rows = torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    # Nothing padded, nothing shared: three chunks would cost more than the batch they replace
    assert choose_row(short["input_ids"], short["attention_mask"], "auto", overhead=2) is None
    assert choose_row(short["input_ids"], short["attention_mask"], True, overhead=2) is not None
    shared = rows.clone()
    shared[1:, :16] = shared[0, :16]
    assert len(choose_row(shared, None, "auto", overhead=2)) == 24 + 8 + 8
    # A chunk costs more tokens in a narrow layer than in a wide one, and nothing in a variable-length kernel
    overheads = [chunk_overhead(width, torch.device("cpu"), torch.float32) for width in (64, 512, 4096)]
    assert overheads[0] > overheads[1] >= overheads[2] == 1
    assert chunk_overhead(64, torch.device("cuda"), torch.bfloat16) == 0
    assert chunk_overhead(64, torch.device("cuda"), torch.float32) == overheads[0]


def test_a_second_seat_takes_the_place_of_the_first():
    model, first = seated(pack=True)
    second = PackedForward(model, pack=True).install()
    model(**branching_batch(), fused_lm_head=True)
    assert (first.calls["packed"], second.calls["packed"]) == (0, 1)
    assert packed_forward_of(model) is second
    second.remove()
    assert packed_forward_of(model) is None
    assert model.config._attn_implementation == "sdpa"


def test_a_batch_is_packed_once_for_all_models():
    batch = branching_batch()
    plans = PlanCache()
    models = [seated(family, pack=True, plans=plans) for family in ("llama", "qwen2")]
    decoder = tiny("llama").model
    seat = PackedDecoder(decoder, True, plans)
    rows = [forward.plan({**batch, "fused_lm_head": True}).row for _, forward in models]
    rows.append(plans.row(batch["input_ids"], batch["attention_mask"], True, 0))
    assert rows[0] is rows[1] is rows[2]
    seat.remove()


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mixtral"])
def test_a_decoder_returns_the_states_of_the_padded_batch(family):
    batch = branching_batch()
    call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    real = batch["attention_mask"].bool()
    results = []
    for packed in (False, True):
        decoder = tiny(family).base_model
        seat = PackedDecoder(decoder, True, PlanCache()) if packed else None
        states = decoder(**call).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        (states * weights)[real].sum().backward()
        results.append((states[real].detach(), [p.grad for p in decoder.parameters() if p.grad is not None]))
        if packed:
            assert seat.calls == {"packed": 1, "padded": 0}
            decoder(input_ids=batch["input_ids"][:, :5], use_cache=True)  # generation is not ours
            assert seat.calls == {"packed": 1, "padded": 0}
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert (ours - theirs).norm() < 1e-4 * (theirs.norm() + 1e-3)


def test_hidden_states_can_be_captured_on_either_path():
    batch = branching_batch()
    captured = []
    for pack in (True, False):
        model, forward = seated(pack=pack)
        with torch.no_grad(), capture_hidden_states(model.base_model) as states:
            model(**batch, fused_lm_head=True)
        captured.append(states[0][batch["attention_mask"].bool()])
        assert forward.calls["packed"] == int(pack)
    torch.testing.assert_close(*captured, atol=2e-5, rtol=1e-4)


def test_a_plan_says_what_is_computed():
    batch = branching_batch()
    call = {**batch, "fused_lm_head": True}
    # Unique: prompt 11, its turn 9, ends of 12 + 5 + 20 and 17; the other prompt 14, ends of 10 + 21; and the lone 8
    text = "9 sequences, 360 tokens padded, 237 without padding, 127 unique: packed"
    assert str(seated(pack=True)[1].plan(call)) == text
    trained = (batch["labels"] != -100).sum()
    assert str(seated(pack=False)[1].plan(call)).endswith(
        f"stays padded, the LM head on {trained} trained tokens only"
    )


@pytest.mark.parametrize("active", [True, False])
def test_a_head_that_the_adapter_trains_is_scored_here(active):
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny("llama"), settings)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", *FIELDS))
    with torch.no_grad():  # the copy moves away from the head that it was copied from
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    if not active:
        model.base_model.disable_adapter_layers()
    batch = branching_batch()
    stock = model(**batch, fused_lm_head=True)
    forward = PackedForward(model, fields=FIELDS, pack=False).install()
    ours = model(**batch, fused_lm_head=True)
    assert forward.calls == {"packed": 0, "padded": 1}  # TRL's head is left out
    torch.testing.assert_close(ours.log_probs, stock.log_probs, atol=2e-5, rtol=1e-4)
    if active:
        ours.log_probs.sum().backward()
        assert model.get_base_model().lm_head.modules_to_save["default"].weight.grad.abs().sum() > 0
