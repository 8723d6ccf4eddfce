"""Rows of a prompt together, and batches within a budget of tokens whose gradient is the whole batch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.packing.test_trainers import PackedDPOTrainer, build, policy, preference_rows, tokenizer  # noqa: F401
from trl_multiturn.packing.batching import PromptGroupedSampler, split_batch
from trl_multiturn.trainer import packed as trainer_mixin


def orders(sampler, epochs):
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_rows_of_a_prompt_stay_together_in_a_new_order_each_epoch():
    prompts = [[i % 5] for i in range(20)]  # five prompts of four rows
    sampler = PromptGroupedSampler(prompts, batch_size=4, seed=3)
    first, second, again = orders(sampler, (0, 1, 0))
    assert first == again != second
    assert len(sampler) == 20 and sorted(first) == list(range(20))
    for order in (first, second):
        assert all(len({prompts[i][0] for i in order[k : k + 4]}) == 1 for k in range(0, 20, 4))
    assert [prompts[i][0] for i in first] != [prompts[i][0] for i in second]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 6), st.integers(0, 3))
def test_every_row_once_and_groups_never_torn(prompts, batch_size, seed):
    order = list(PromptGroupedSampler([[p] for p in prompts], batch_size, seed))
    assert sorted(order) == list(range(len(prompts)))
    walked = [prompts[i] for i in order]
    assert sum(a != b for a, b in zip(walked, walked[1:], strict=False)) == max(len(set(prompts)) - 1, 0)


def pairs():
    """Three pairs, chosen sides first: prompts `1 1 1`, `2 2 2`, `1 1 1`."""
    ids = torch.tensor([[1, 1, 1, 5, 6, 0], [2, 2, 2, 5, 0, 0], [1, 1, 1, 7, 0, 0],
                        [1, 1, 1, 8, 0, 0], [2, 2, 2, 9, 9, 9], [1, 1, 1, 9, 0, 0]])  # fmt: skip
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "ref_chosen_logps": torch.tensor([10.0, 20.0, 30.0])}


def test_a_split_keeps_pairs_and_prompts_together_and_drops_unused_columns():
    parts = split_batch(pairs(), max_tokens=10, sides=2)
    assert [part["ref_chosen_logps"].tolist() for part in parts] == [[10.0], [30.0], [20.0]]
    # Prefixes of fewer than eight tokens are not shared, so the pairs of prompt 1 hold 5 + 4 + 4 + 4 tokens
    parts = split_batch(pairs(), max_tokens=17, sides=2)
    assert [part["ref_chosen_logps"].tolist() for part in parts] == [[10.0, 30.0], [20.0]]
    assert parts[0]["input_ids"].tolist() == [[1, 1, 1, 5, 6], [1, 1, 1, 7, 0], [1, 1, 1, 8, 0], [1, 1, 1, 9, 0]]
    assert parts[0]["attention_mask"].sum() == 17


def test_a_batch_that_fits_is_left_alone_and_more_parts_can_be_asked_for():
    batch = pairs()
    assert split_batch(batch, 1000, sides=2)[0] is batch
    assert len(split_batch(batch, 1000, sides=2, parts=3)) == 3
    assert len(split_batch(batch, 1000, sides=2, parts=9)) == 3
    # A process whose batch has more parts than another's has examples computes larger ones
    assert len(split_batch(batch, 10, sides=2)) > 2
    merged = split_batch(batch, 10, sides=2, parts=2)
    assert len(merged) == 2 and sum(len(part["input_ids"]) for part in merged) == len(batch["input_ids"])


def trained(kind, tokenizer, tmp_path, max_tokens, packed=True, **kw):  # noqa: F811
    """Two optimizer steps of plain gradient descent, each accumulated over two batches: trainer, losses, weights."""
    settings = dict(optim="sgd", learning_rate=0.05, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.0)
    trainer = build(kind, tokenizer, tmp_path, True, lr_scheduler_type="constant", **{**settings, **kw})
    trainer.args.max_tokens_per_batch, trainer.args.packed = max_tokens, packed
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_parts_have_the_gradient_of_the_whole(loss_type, tokenizer, tmp_path):  # noqa: F811
    start = dict(policy(tokenizer).named_parameters())
    whole, expected_losses, expected = trained("dpo", tokenizer, tmp_path, None, loss_type=[loss_type])
    parts, losses, weights = trained("dpo", tokenizer, tmp_path, 120, loss_type=[loss_type])
    calls = [trainer._packed_forwards[0].calls["packed"] for trainer in (whole, parts)]
    assert calls[0] == 4 < calls[1]
    assert losses == pytest.approx(expected_losses, abs=2e-4)
    moved = torch.stack([(expected[name] - start[name]).norm() for name in expected]).norm()
    apart = torch.stack([(expected[name] - weights[name]).norm() for name in expected]).norm()
    assert moved > 1e-3 and apart < 1e-3 * moved
    for ours, theirs in zip(parts.state.log_history[:2], whole.state.log_history[:2], strict=True):
        for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-3, rel=2e-3), name


def test_what_a_part_logs_weighs_as_many_rows_as_it_has():
    values = [9.0, 1.0, 5.0]
    trainer_mixin._join(values, 1, [0.75, 0.25])
    assert values == [9.0, 2.0]
    sometimes = [9.0, 1.0]  # only one of the parts had a row of this kind
    trainer_mixin._join(sometimes, 1, [0.75, 0.25])
    assert sometimes == [9.0, 1.0]


def test_where_nothing_is_packed_padding_counts():
    ids = torch.arange(6 * 30).view(6, 30)
    lengths = torch.tensor([30, 4, 29, 5, 3, 4])
    batch = {"input_ids": ids, "attention_mask": (torch.arange(30) < lengths[:, None]).long()}
    parts = split_batch(batch, 60, sides=1, packed=False)
    assert [part["input_ids"].shape for part in parts] == [(4, 5), (2, 30)]
    assert sorted(
        part["input_ids"][i, 0].item() // 30 for part in parts for i in range(len(part["input_ids"]))
    ) == list(range(6))
    # Packed, the same rows hold 75 tokens: two parts again, but by content
    assert all(int(part["attention_mask"].sum()) <= 60 for part in split_batch(batch, 60, sides=1))


def test_a_trainer_that_cannot_pack_counts_padding(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    cuts = []

    def recorded(batch, *args, **kwargs):
        cuts.append((kwargs["packed"], [part["input_ids"].numel() for part in split_batch(batch, *args, **kwargs)]))
        return split_batch(batch, *args, **kwargs)

    whole, expected_losses, expected = trained("dpo", tokenizer, tmp_path, None, packed=False)
    monkeypatch.setattr(trainer_mixin, "split_batch", recorded)
    parts, losses, weights = trained("dpo", tokenizer, tmp_path, 280, packed=False)
    assert len(cuts) == 4
    assert all(not packed and len(sizes) > 1 and max(sizes) <= 280 for packed, sizes in cuts)
    assert losses == pytest.approx(expected_losses, abs=2e-4)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("kind", "kw"), [("dpo", {"loss_type": ["sigmoid", "sft"]}), ("kto", {})])
def test_losses_that_are_no_mean_over_rows_are_refused(kind, kw, tokenizer, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="not a mean over rows"):
        trained(kind, tokenizer, tmp_path, 120, **kw)


def test_a_trainer_groups_its_batches_by_prompt(tokenizer, tmp_path):  # noqa: F811
    trainer = build("dpo", tokenizer, tmp_path, True)
    trainer.args.group_by_prompt = True
    prompts = [{tuple(row[:20].tolist()) for row in batch["input_ids"]} for batch in trainer.get_train_dataloader()]
    assert [len(group) for group in prompts] == [1, 1]
    kto = build("kto", tokenizer, tmp_path, True)
    kto.args.group_by_prompt = True
    with pytest.raises(ValueError, match="mismatched"):
        kto.get_train_dataloader()
