"""Reward models: which tokens are labelled, what the loss is, and that both kinds learn what they are asked."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForTokenClassification, Trainer, TrainingArguments

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn.models.reward_model import (
    DataCollatorForRewardModel,
    RewardModel,
    outcome_reward_rows,
    process_reward_rows,
    reward_model_from_policy,
    step_reward_loss,
)
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict


GOOD, BAD, END = 5, 6, 7  # a turn is one of the first two and the last


def trajectory(*turns, verdict=Verdict.UNDECIDED, values=None):
    """Prompt `1 2`; turns of two tokens with the observation `3` between them."""
    ids, mask = [], []
    for turn in turns:
        ids += ([3] if ids else []) + [turn, END]
        mask += ([0] if mask else []) + [1, 1]
    info = (
        {} if values is None else {"step_rewards": {"ends": [2 + 3 * i for i in range(len(turns))], "values": values}}
    )
    return Trajectory([], [], [1, 2], ids, mask, StopReason.ANSWERED, verdict=verdict, info=info)


def model():
    torch.manual_seed(0)
    return Qwen2ForTokenClassification(
        Qwen2Config(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_labels=1,
            classifier_dropout=0.0,
            initializer_range=0.2,
        )  # fmt: skip
    )


def test_a_step_is_labelled_at_its_last_token():
    rows = process_reward_rows([
        trajectory(GOOD, BAD, values=[0.75, 0.0]),
        trajectory(GOOD, values=[None]),
        trajectory(BAD, GOOD, values=[None, 1.0]),
    ])  # fmt: skip
    assert rows[:]["input_ids"] == [[1, 2, GOOD, END, 3, BAD, END], [1, 2, BAD, END, 3, GOOD, END]]
    assert rows[:]["labels"] == [[-100, -100, -100, 0.75, -100, -100, 0.0], [-100] * 6 + [1.0]]
    with pytest.raises(ValueError, match="Trajectory 0 has no"):
        process_reward_rows([trajectory(GOOD)])
    with pytest.raises(ValueError, match="none was decided"):
        process_reward_rows([trajectory(GOOD, values=[None])])


def test_an_outcome_is_labelled_at_the_last_token_and_the_undecided_are_left_out():
    rows = outcome_reward_rows([
        trajectory(GOOD, verdict=Verdict.CORRECT), trajectory(BAD), trajectory(BAD, BAD, verdict=Verdict.INCORRECT)
    ])  # fmt: skip
    assert rows[:]["labels"] == [[-100, -100, -100, 1.0], [-100] * 6 + [0.0]]


def test_the_loss_by_hand():
    # sigmoid(log 3) = 3/4; junk where nothing is labelled
    logits = torch.tensor([[math.nan, math.log(3.0)], [0.0, math.inf]]).unsqueeze(-1).requires_grad_()
    labels = torch.tensor([[-100.0, 0.5], [1.0, -100.0]])
    loss = step_reward_loss(SimpleNamespace(logits=logits), labels)
    first = -(0.5 * math.log(3 / 4) + 0.5 * math.log(1 / 4))
    assert loss.item() == pytest.approx((first + math.log(2)) / 2)
    loss.backward()
    # the gradient of a step is r_θ − r: 3/4 − 1/2 and 1/2 − 1, over two steps
    assert logits.grad.squeeze(-1).tolist() == [[0.0, pytest.approx(0.125)], [pytest.approx(-0.25), 0.0]]
    whole = step_reward_loss(SimpleNamespace(logits=logits), labels, num_items_in_batch=8)
    assert whole.item() == pytest.approx(loss.item() / 4)


def test_a_reward_model_starts_as_the_policy(tmp_path):
    policy = tiny_model(byte_tokenizer())
    policy.save_pretrained(tmp_path)
    classifier = reward_model_from_policy(tmp_path)
    assert classifier.config.num_labels == 1 and classifier.dropout.p == 0.0
    torch.testing.assert_close(classifier.model.state_dict(), policy.model.state_dict())
    classifier.save_pretrained(tmp_path / "saved")
    again = type(classifier).from_pretrained(tmp_path / "saved")
    assert RewardModel(again).score([[1, 2]]) == pytest.approx(RewardModel(classifier).score([[1, 2]]))


def trained(tmp_path, rows, steps=60, **kwargs):
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", **kwargs,
    )  # fmt: skip
    trainer = Trainer(
        model(), args, train_dataset=rows, data_collator=DataCollatorForRewardModel(pad_token_id=0),
        compute_loss_func=step_reward_loss,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_accumulated_batches_are_one_batch(tmp_path):
    rows = process_reward_rows([
        trajectory(GOOD, BAD, GOOD, values=[0.75, 0.5, 0.25]), trajectory(BAD, values=[0.0]),
        trajectory(GOOD, values=[1.0]), trajectory(BAD, GOOD, values=[0.5, 1.0]),
    ])  # fmt: skip
    whole = trained(tmp_path, rows, steps=2, per_device_train_batch_size=4)
    parts = trained(tmp_path, rows, steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert [log["loss"] for log in whole.state.log_history[:2]] == pytest.approx(
        [log["loss"] for log in parts.state.log_history[:2]], abs=1e-4
    )


def test_a_process_reward_model_learns_the_rewards_of_steps(tmp_path):
    # a step's reward is 0.75 while all was good, 0.25 from the first bad turn on
    turns = [(a, b, c) for a in (GOOD, BAD) for b in (GOOD, BAD) for c in (GOOD, BAD)]
    values = [[0.25 if BAD in each[: i + 1] else 0.75 for i in range(3)] for each in turns]
    rows = process_reward_rows([trajectory(*t, values=v) for t, v in zip(turns, values, strict=True)])
    reward_model = RewardModel(trained(tmp_path, rows, per_device_train_batch_size=8).model, batch_size=3)
    for each, expected in zip(turns, values, strict=True):
        found = reward_model.step_rewards(trajectory(*each))
        assert found == pytest.approx(expected, abs=0.1)
        assert reward_model.process_utility(trajectory(*each)) == min(found)


def test_an_outcome_reward_model_learns_the_verdict_and_reads_it_at_the_end(tmp_path):
    right = [trajectory(GOOD, GOOD, verdict=Verdict.CORRECT), trajectory(GOOD, verdict=Verdict.CORRECT)]
    wrong = [trajectory(GOOD, BAD, verdict=Verdict.INCORRECT), trajectory(BAD, verdict=Verdict.INCORRECT)]
    trainer = trained(tmp_path, outcome_reward_rows(right + wrong), per_device_train_batch_size=4)
    reward_model = RewardModel(trainer.model)
    utilities = reward_model.outcome_utilities(right + wrong)
    assert min(utilities[:2]) > 0.8 and max(utilities[2:]) < 0.2
    # rows of other lengths beside it change nothing, nor does the mode in which the model is left
    assert reward_model.score([t.prompt_ids + t.completion_ids for t in right]) == pytest.approx(
        utilities[:2], abs=1e-5
    )
    assert trainer.model.training


def test_what_gives_no_reward_is_refused():
    with pytest.raises(ValueError, match="2 labels per token"):
        RewardModel(Qwen2ForTokenClassification(Qwen2Config(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, num_labels=2,
        )))  # fmt: skip
    with pytest.raises(ValueError, match="no token"):
        RewardModel(model()).score([[]])
