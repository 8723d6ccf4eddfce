from __future__ import annotations

import inspect
import math

import pytest
import torch
from trl import KTOConfig, KTOTrainer

from trl_multiturn.trainer import DQOConfig, DQOTrainer

from ..losses import reference
from .value_helpers import BETA, make_trainer, metrics_of, plain_forward, token_rows, whole_batch


TURN_REWARDS = [[0.5, 0.0], [0.25, -0.25], [0.0, 0.0], [1.0, 0.5]]
SETTINGS = {"cls": DQOTrainer, "value_model": "full"}


def actions_of(row, forward, horizon: str):
    """Values, log-ratios and rewards of the row's actions, a turn or the response summed up where asked for."""
    lr = [(a - b).item() for a, b in zip(forward["logps"], forward["ref_logps"], strict=True)]
    values, turns = [v.item() for v in forward["values"]], forward["turns"]
    rewards = [0.0] * len(lr)
    for turn, reward in enumerate(row.get("turn_rewards") or [], start=1):
        rewards[max(t for t in range(len(lr)) if turns[t] == turn)] += reward
    rewards[-1] += row["reward"]
    if horizon == "token":
        return values, lr, rewards
    groups = [[t for t in range(len(lr)) if horizon == "response" or turns[t] == k] for k in sorted(set(turns))]
    groups = groups[:1] if horizon == "response" else groups
    sums = [[sum(x[t] for t in group) for group in groups] for x in (lr, rewards)]
    return [values[group[0]] for group in groups], *sums


def reference_losses(trainer, horizon, lam, weighted) -> tuple[float, float]:
    totals = [0.0, 0.0]
    for row in trainer.train_dataset:
        forward = plain_forward(trainer, row)
        weight = 1.0
        if weighted:
            mu = [x.item() for x in forward["ref_logps"]]
            if "behavior_logps" in row:
                mu = [x for x, action in zip(row["behavior_logps"], row["action_mask"], strict=True) if action]
            weight = math.exp(min(1.0, sum(x.item() for x in forward["logps"]) - sum(mu)))
        value_loss, _, policy_loss, _ = reference.dqo(*actions_of(row, forward, horizon), BETA, lam, weight)
        totals[0] += value_loss
        totals[1] += policy_loss
    return tuple(total / len(trainer.train_dataset) for total in totals)


@pytest.mark.parametrize("horizon", ["token", "turn", "response"])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_loss_equals_the_equations_on_whole_logits(tmp_path, horizon, lam):
    rows = token_rows(turn_rewards=TURN_REWARDS)
    trainer = make_trainer(tmp_path, dataset=rows, horizon=horizon, lam=lam, importance_weights=False, **SETTINGS)
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    value_loss, policy_loss = reference_losses(trainer, horizon, lam, weighted=False)
    assert min(value_loss, policy_loss) > 1e-3
    assert loss.item() == pytest.approx(value_loss + policy_loss, rel=1e-4)
    assert "importance/weight" not in metrics_of(trainer)


def test_weights_are_relative_to_the_policy_that_sampled_the_rows(tmp_path):
    generator = torch.Generator().manual_seed(5)
    behavior = []
    for ids in token_rows()["completion_ids"]:
        behavior.append((-5.2 + 0.3 * torch.randn(len(ids), generator=generator)).tolist())
    trainer = make_trainer(tmp_path, dataset=token_rows(behavior_logps=behavior), **SETTINGS)
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    value_loss, policy_loss = reference_losses(trainer, "token", 1.0, weighted=True)
    assert loss.item() == pytest.approx(value_loss + policy_loss, rel=1e-4)
    unweighted = sum(reference_losses(trainer, "token", 1.0, weighted=False))
    assert abs(unweighted - loss.item()) > 1e-2 * unweighted
    metrics = metrics_of(trainer)
    assert 0 < metrics["importance/weight"] < math.e and metrics["importance/capped"] < 1


def test_without_behaviour_the_reference_stands_in_and_the_log_says_so(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **SETTINGS)
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    value_loss, policy_loss = reference_losses(trainer, "token", 1.0, weighted=True)
    assert loss.item() == pytest.approx(value_loss + policy_loss, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_training(tmp_path, lora):
    settings = {"learning_rate": 1e-3, "value_learning_rate": 1e-3, "max_steps": 12, "beta": 0.05}
    settings |= {"per_device_train_batch_size": 4, "eval_dataset": token_rows(2)}
    trainer = make_trainer(tmp_path, cls=DQOTrainer, lora=lora, **settings)
    torch.nn.init.zeros_(trainer.value_model.head.weight)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss/value" in entry]
    # the losses themselves may grow: the weights of the better trajectories do
    assert logs[-1]["value/residual"] < 0.95 * logs[0]["value/residual"]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"]
    assert logs[-1]["importance/weight"] > logs[0]["importance/weight"]
    assert trainer.evaluate()["eval_loss"] > 0


def test_half_of_a_turn_reward_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Row 1: `turn_rewards` has 1 entries"):
        make_trainer(tmp_path, cls=DQOTrainer, dataset=token_rows(turn_rewards=[[0.0, 1.0], [1.0], None, None]))


def test_rows_without_process_rewards_may_stand_beside_others(tmp_path):
    rows = token_rows(turn_rewards=[[0.5, 0.25], None, None, None])
    trainer = make_trainer(tmp_path, cls=DQOTrainer, dataset=rows)
    assert trainer.train_dataset["token_rewards"][0] == [0, 0, 0.5, 0, 0, 0, 0, 0, 1.25]
    assert sum(trainer.train_dataset["token_rewards"][2]) == 0.25


class TestFace:
    def test_the_constructor_is_the_parents(self):
        assert list(inspect.signature(DQOTrainer).parameters) == list(inspect.signature(KTOTrainer).parameters)
        assert issubclass(DQOTrainer, KTOTrainer) and issubclass(DQOConfig, KTOConfig)

    def test_defaults_are_the_papers(self, tmp_path):
        config = DQOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        assert (config.beta, config.lam, config.learning_rate) == (0.03, 1.0, 5e-7)
        assert config.importance_weights and config.importance_log_cap == 1.0 and config.horizon == "token"

    @pytest.mark.parametrize("kwargs", [{"lam": 1.5}, {"horizon": "step"}, {"value_model": "none"}])
    def test_wrong_settings_are_refused(self, tmp_path, kwargs):
        with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`"):
            DQOConfig(output_dir=str(tmp_path), bf16=False, **kwargs)


def test_process_rewards_are_paid_at_their_tokens(tmp_path):
    rows = token_rows(turn_rewards=TURN_REWARDS)
    aligned = []
    for row in rows:  # the same rewards, token by token: 9.0 lies on what the policy only read
        mask = row["action_mask"]
        ends = [t for t, m in enumerate(mask) if m and not (mask[t + 1 : t + 2] or [0])[0]]
        paid = dict(zip(ends, row["turn_rewards"], strict=True))
        aligned.append([paid.get(t, 0.0) if m else 9.0 for t, m in enumerate(mask)])
    losses = []
    for dataset in (rows, token_rows(process_rewards=aligned), token_rows()):
        trainer = make_trainer(tmp_path, dataset=dataset, importance_weights=False, **SETTINGS)
        losses.append(trainer.compute_loss(trainer.model, whole_batch(trainer)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and abs(losses[2] - losses[0]) > 1e-2
    with pytest.raises(ValueError, match="Row 0: `process_rewards` has 1 entries"):
        make_trainer(tmp_path, cls=DQOTrainer, dataset=token_rows(process_rewards=[[0.0]] * 4))
