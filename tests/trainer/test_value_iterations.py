"""Trainers on outcomes in the online loop: a real interpreter, rows with behaviour log-probs."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from peft import LoraConfig

from tests.test_callbacks import make_run, tool, training_rows  # noqa: F401
from trl_multiturn import UnpairedConfig
from trl_multiturn.trainer import (
    DQOConfig,
    DQOTrainer,
    GroupRegressionConfig,
    GroupRegressionTrainer,
    OREOConfig,
    OREOTrainer,
)


pytestmark = pytest.mark.slow  # runs of two iterations each

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
# A scripted policy's words are too unlikely under the tiny model for importance weights: they would all be 0
METHODS = {
    "oreo": (OREOTrainer, OREOConfig),
    "dqo": (DQOTrainer, partial(DQOConfig, importance_weights=False)),
    "group": (GroupRegressionTrainer, GroupRegressionConfig),
}
CASES = [
    *itertools.product(["oreo", "dqo"], ["previous", "initial"], [None, LORA]),
    ("group", "previous", LORA),
    ("group", "initial", None),
]


def run(folder, tool, method, **kwargs):  # noqa: F811
    trainer_class, config = METHODS[method]
    pairing = None if method == "group" else UnpairedConfig(strategy="balanced")
    return make_run(folder, tool, trainer_class=trainer_class, config=config, pairing=pairing, **kwargs)


@pytest.mark.parametrize(("method", "reference", "peft_config"), CASES)
def test_two_iterations_end_to_end(tmp_path, tool, method, reference, peft_config):  # noqa: F811
    trainer, generator, _ = run(tmp_path, tool, method, reference=reference, peft_config=peft_config)
    trainer.train()
    first, second = generator.reports
    assert first.trajectories == 12 and first.correct == first.incorrect == 6
    assert trainer.state.global_step == second.last_step > first.last_step == second.first_step > 0
    rows = training_rows(generator, 0)
    assert sorted(set(rows["reward"][:])) == [0.0, 1.0]
    if method == "group":  # nothing is left out of a group
        assert len(rows) == 12 and first.unused == {}
    assert all(len(row["ref_logps"]) == len(row["behavior_logps"]) == len(row["completion_ids"]) for row in rows)

    # log-ratios in the first step of each iteration are those to that iteration's reference
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    sides = ("rewards/chosen", "rewards/rejected")
    first_reward, second_reward = (
        max(abs(steps[step].get(side, 0.0)) for side in sides) for step in (0, second.first_step)
    )
    assert first_reward < 1e-5
    assert (second_reward < 1e-5) == (reference == "previous")
    if method == "oreo":
        assert steps[0]["kl"] < 1e-6
        assert (steps[second.first_step]["kl"] < 1e-6) == (reference == "previous")


@pytest.mark.parametrize(("method", "peft_config"), [("oreo", None), ("oreo", LORA), ("group", LORA)])
def test_a_stopped_run_ends_where_an_undisturbed_one_does(tmp_path, tool, method, peft_config):  # noqa: F811
    """Stopped in the second iteration: policy, value model, optimizer and the KL's reference all come back."""

    class Stop(Exception):
        pass

    undisturbed, _, _ = run(tmp_path / "a", tool, method, peft_config=peft_config)
    undisturbed.train()

    trainer, _, _ = run(tmp_path / "b", tool, method, peft_config=peft_config)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    compute_loss = trainer.compute_loss

    def stopping(*args, **kwargs):
        if trainer.state.global_step == trainer.state.max_steps - 1:
            raise Stop
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = stopping
    with pytest.raises(Stop):
        trainer.train()
    resumed, _, _ = run(tmp_path / "b", tool, method, peft_config=peft_config)
    resumed.train(resume_from_checkpoint=True)
    expected = dict(undisturbed.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)
