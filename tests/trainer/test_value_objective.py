"""OREO and DQO with a value that is learned by classification."""

from __future__ import annotations

import math

import pytest
import torch

from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trainer import DQOConfig, DQOTrainer, OREOTrainer

from .value_helpers import BETA, make_trainer, metrics_of, plain_forward, token_rows, whole_batch


def binary_rows(n: int = 4, **columns):
    return token_rows(n, **columns).remove_columns("reward").add_column("reward", [1.0, 0.0, 0.0, 1.0][:n])


def classifying(folder, cls=OREOTrainer, **settings):
    settings = {"value_objective": "classification", "value_model": "full", **settings}
    return make_trainer(folder, cls, settings.pop("dataset", binary_rows()), **settings)


def mean(values):
    return sum(values) / len(values)


def test_oreo_steps_on_the_cross_entropy_and_on_soft_values(tmp_path):
    trainer = classifying(tmp_path, kl_coef=0.0, packed=False)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, whole_batch(trainer))
    logged = metrics_of(trainer)
    trainer.value_model.objective = "regression"  # so that its own call gives log-odds
    value_losses, policy_losses = [], []
    for row in trainer.train_dataset:
        plain = plain_forward(trainer, row)
        ratios = [(a - b).item() for a, b in zip(plain["logps"], plain["ref_logps"], strict=True)]
        chances = [z.sigmoid().item() for z in plain["values"]]
        value_losses.append(mean([-math.log(p if row["reward"] else 1 - p) for p in chances]))
        soft = [BETA * math.log(1 - p + p * math.exp(1 / BETA)) for p in chances]
        togo = [sum(ratios[t:]) for t in range(len(ratios))]
        squares = [(v - row["reward"] + BETA * g) ** 2 for v, g in zip(soft, togo, strict=True)]
        policy_losses.append(mean(squares))
    assert logged["loss/value"] == pytest.approx(mean(value_losses), rel=1e-4)
    assert logged["loss/policy"] == pytest.approx(mean(policy_losses), rel=1e-4)


@pytest.mark.parametrize("cls", [OREOTrainer, DQOTrainer])
def test_the_cross_entropy_alone_moves_the_value_model(cls, tmp_path):
    trainer = classifying(tmp_path, cls)
    trainer.model.train()
    trainer.compute_loss(trainer.model, whole_batch(trainer)).backward()
    gradient = trainer.value_model.head.weight.grad
    batch = whole_batch(trainer)
    logits = trainer.value_model(batch["input_ids"], batch["attention_mask"], raw=True)[:, :-1]
    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["reward"].unsqueeze(1).expand_as(logits)
    entropies = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = (torch.where(mask, entropies, 0.0).sum(dim=1) / mask.sum(dim=1)).mean()
    expected = torch.autograd.grad(loss, trainer.value_model.head.weight)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_a_saved_value_model_knows_that_it_gives_chances(tmp_path):
    trainer = classifying(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    (score,) = loaded.score([[65, 66, 67]])
    logit = trainer.value_model(torch.tensor([[65, 66, 67]]), raw=True)[0, -1]
    assert loaded.objective == "classification"
    assert score == pytest.approx(logit.sigmoid().item(), abs=1e-5)


def test_weights_learned_by_one_objective_are_not_read_into_the_other(tmp_path):
    classifying(tmp_path).save_model(str(tmp_path / "saved"))
    regressing = make_trainer(tmp_path / "other", value_model="full")
    with pytest.raises(ValueError, match="learned by classification"):
        regressing.value_model.load_weights(tmp_path / "saved" / "value_model")


def test_an_evaluation_logs_the_auc_within_a_prompt_and_the_calibration_error(tmp_path):
    rows = binary_rows()
    same_prompt = rows.remove_columns("prompt_ids").add_column("prompt_ids", [[65, 66]] * 4)
    trainer = classifying(tmp_path, eval_dataset=same_prompt, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    scores = trainer.value_model.score(
        [row["prompt_ids"] + row["completion_ids"][:-1] for row in trainer.eval_dataset]
    )
    wins = [scores[good] > scores[bad] for good in (0, 3) for bad in (1, 2)]
    assert metrics["eval_value/auc_within_prompt"] == pytest.approx(mean(wins))
    assert 0 <= metrics["eval_value/calibration_error"] <= 1


def test_rewards_must_be_one_or_zero(tmp_path):
    with pytest.raises(ValueError, match="reward is 0.25"):
        classifying(tmp_path, dataset=token_rows())


def test_process_rewards_are_refused_where_they_would_be_paid(tmp_path):
    with pytest.raises(ValueError, match="turn_rewards"):
        classifying(tmp_path, DQOTrainer, dataset=binary_rows(turn_rewards=[[0.5, 0.0]] * 4))


def test_an_unknown_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="value_objective"):
        DQOConfig(str(tmp_path), value_objective="ranking", bf16=False)
