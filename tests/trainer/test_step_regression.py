"""Regression on step pairs, and turn rewards from preferences: on tiny models, against whole logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import byte_tokenizer, save_tiny, tiny_model
from trl_multiturn.losses import first_turn_log_ratios, step_regression_loss
from trl_multiturn.trainer import (
    DQOTrainer,
    MultiTurnDPOConfig,
    StepRegressionTrainer,
    implicit_turn_rewards,
)

from .helpers import batch_loss, dpo_config, log_ratio, logged, move, preference_dataset, token_logps
from .value_helpers import make_trainer, token_rows


REWARDS = {"chosen_reward": [1.0, 0.5, 0.0, 1.0], "rejected_reward": [0.0, 0.5, 0.0, 0.25]}


def step_trainer(folder, dataset=None, **settings):
    model = save_tiny(folder / "model", byte_tokenizer("qwen2_5"))
    args = dpo_config(folder / "out", MultiTurnDPOConfig, beta=0.5, per_device_train_batch_size=4, **settings)
    rows = preference_dataset(4, **REWARDS) if dataset is None else dataset
    trainer = StepRegressionTrainer(model, args=args, train_dataset=rows)
    move(trainer.model)
    return trainer


def test_loss_equals_the_equation_on_whole_logits(tmp_path):
    trainer = step_trainer(tmp_path)
    expected = []
    for row in trainer.train_dataset:
        scaled = [
            0.5 * log_ratio(trainer.model, trainer.ref_model, row["prompt_ids"], row[f"{side}_ids"], row[mask]).item()
            for side, mask in (("chosen", "chosen_action_mask"), ("rejected", "rejected_action_mask"))
        ]
        expected.append((scaled[0] - scaled[1] - (row["chosen_reward"] - row["rejected_reward"])) ** 2)
    assert batch_loss(trainer).item() == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_only_the_turn_at_which_the_sides_part_learns():
    logps = torch.tensor([[-1.0, -2.0, float("nan"), -3.0]], requires_grad=True)
    sums = first_turn_log_ratios(logps, torch.tensor([-4.0]), torch.tensor([[1, 1, 0, 1]]))
    assert sums.tolist() == [-2.0]
    (gradient,) = torch.autograd.grad(sums.sum(), logps)
    assert gradient.tolist() == [[1, 1, 0, 0]]


def test_loss_by_hand():
    """β (ℓ − ℓ') = 0.5 · 3 and 0.5 · 1, gaps 1 and 0."""
    loss = step_regression_loss(torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert loss.item() == pytest.approx((0.25 + 0.25) / 2)


def test_training_regresses_equal_pairs_too(tmp_path):
    trainer = step_trainer(tmp_path, max_steps=8)
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.6 * logged(trainer, "loss")[0]


def test_rows_without_returns_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"have no \['chosen_reward', 'rejected_reward'\]"):
        step_trainer(tmp_path, preference_dataset(4))
    with pytest.raises(ValueError, match="Row 1: the rewards are"):
        step_trainer(tmp_path, preference_dataset(4, **{**REWARDS, "chosen_reward": [1.0, None, 0.0, 0.0]}))


class TestTurnRewards:
    def test_a_turn_earns_its_log_ratio_and_dqo_reads_it(self, tmp_path):
        policy, reference = (tiny_model(byte_tokenizer(), seed=seed) for seed in (0, 1))
        rows = implicit_turn_rewards(token_rows(), policy, reference, beta=0.5, batch_size=3)
        for row in rows:
            columns = row["prompt_ids"], row["completion_ids"]
            first = row["action_mask"].index(0)
            for turn, span in enumerate((range(first), range(first + 2, len(row["action_mask"])))):
                mask = [int(t in span) for t in range(len(row["action_mask"]))]
                ratio = token_logps(policy, *columns, mask).sum() - token_logps(reference, *columns, mask).sum()
                assert row["turn_rewards"][turn] == pytest.approx(0.5 * ratio.item(), abs=1e-4)
        trainer = make_trainer(tmp_path, DQOTrainer, rows)
        paid = [sum(rewards) for rewards in trainer.train_dataset["token_rewards"]]
        expected = [row["reward"] + sum(row["turn_rewards"]) for row in rows]
        assert paid == pytest.approx(expected, abs=1e-5)

    def test_the_base_is_the_reference_of_an_adapter(self):
        policy = get_peft_model(tiny_model(byte_tokenizer()), LoraConfig(r=4, target_modules=["q_proj"]))
        rows = implicit_turn_rewards(token_rows(2), policy, beta=0.5)
        assert max(abs(x) for turns in rows["turn_rewards"] for x in turns) == 0
        move(policy)
        rows = implicit_turn_rewards(rows, policy, beta=0.5, weight=2.0)
        assert max(abs(x) for turns in rows["turn_rewards"] for x in turns) > 1e-4

    def test_what_is_missing_is_named(self):
        policy = tiny_model(byte_tokenizer())
        with pytest.raises(ValueError, match="no `reference`"):
            implicit_turn_rewards(token_rows(), policy, beta=0.5)
        with pytest.raises(ValueError, match=r"lack \['action_mask'\]"):
            implicit_turn_rewards(token_rows().remove_columns("action_mask"), policy, policy, beta=0.5)
