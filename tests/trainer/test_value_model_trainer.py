"""A value model trained alone on judged trajectories."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.support import byte_tokenizer, save_tiny
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trainer import ValueModelConfig, train_value_model
from trl_multiturn.trainer.values.value_model_trainer import ValueModelTrainer, build_value_model
from trl_multiturn.trainer.values.value_rows import hold_out_prompts, prepared_rows, trajectory_rows
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict


GOOD, BAD = 70, 80


def trajectory(prompt: int, good: bool, verdict: Verdict | None = None, reward: float | None = None) -> Trajectory:
    """Two turns; a good one says `GOOD` in its last turn."""
    said = [90, 91, 92, GOOD if good else BAD, 93]
    return Trajectory(
        prompt=[{"role": "user", "content": "x"}],
        completion=[],
        prompt_ids=[65, 100 + prompt],
        completion_ids=said,
        action_mask=[1, 0, 0, 1, 1],
        stop_reason=StopReason.ANSWERED,
        reward=reward,
        verdict=verdict or (Verdict.CORRECT if good else Verdict.INCORRECT),
    )


def pool(prompts: int = 8) -> list[Trajectory]:
    return [trajectory(prompt, good) for prompt in range(prompts) for good in (True, False, True)]


@pytest.fixture
def policy(tmp_path):
    path = str(tmp_path / "policy")
    save_tiny(path, byte_tokenizer())
    return path


def config(folder, **settings) -> ValueModelConfig:
    defaults = {
        "value_model": "full", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 6,
        "value_lora_rank": 4,
    }  # fmt: skip
    return ValueModelConfig(str(folder), **{**defaults, **settings})


def test_one_call_learns_the_outcome_and_tells_it_on_other_prompts(policy, tmp_path):
    args = config(tmp_path / "out", num_train_epochs=8, held_out=0.25)
    value_model = train_value_model(policy, pool(), args)
    good, bad = value_model.score([[65, 107, 90, 91, 92, GOOD], [65, 107, 90, 91, 92, BAD]])
    assert good > 0.8 and bad < 0.2
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_auc_within_prompt"] == 1.0
    assert 0 <= results["eval_calibration_error"] <= 1


@pytest.mark.parametrize("kind", ["adapter", "head"])
def test_a_saved_value_model_scores_as_the_one_that_is_returned(kind, policy, tmp_path):
    trained = train_value_model(policy, pool(2), config(tmp_path / "out", value_model=kind, max_steps=2))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(policy)
    loaded = ValueModel.from_pretrained(tmp_path / "out" / "value_model", policy=base)
    states = [[65, 100, 90], [65, 101]]
    assert loaded.objective == "classification"
    assert loaded.score(states) == pytest.approx(trained.score(states), abs=1e-5)


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_the_loss_is_that_of_the_objective_and_packed_rows_give_it_too(objective, policy, tmp_path):
    losses = []
    for packed in (False, True):
        args = config(tmp_path / "out", value_objective=objective, packed=packed)
        rows = prepared_rows(pool(2), None, args, "train")
        trainer = ValueModelTrainer(build_value_model(policy, args), args, rows)
        torch.nn.init.normal_(trainer.value_model.head.weight, generator=torch.Generator().manual_seed(0))
        batch = trainer.data_collator(list(rows))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        if packed:
            assert trainer._packed_forwards[0].calls == {"packed": 1, "padded": 0}
    outputs = trainer.value_model(batch["input_ids"], batch["attention_mask"], raw=True)[:, [1, 4, 5]]  # chosen there
    targets = batch["reward"].unsqueeze(1).expand_as(outputs)
    if objective == "classification":
        expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    else:
        expected = (outputs - targets).square().mean()
    assert losses == pytest.approx([expected.item()] * 2, rel=1e-4)


def test_a_batch_computed_in_parts_moves_the_weights_alike(policy, tmp_path):
    weights = []
    for budget in (None, 20):
        args = config(tmp_path / "out", max_steps=1, held_out=0, optim="sgd", max_tokens_per_batch=budget, packed=True)
        trained = train_value_model(policy, pool(2), args)
        weights.append(torch.cat([p.flatten() for p in trained.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], atol=2e-6, rtol=1e-4)


def test_undecided_trajectories_are_no_failures():
    rows = trajectory_rows([trajectory(0, False, Verdict.UNDECIDED), trajectory(0, True)], True)
    assert rows["reward"][:] == [1.0]
    with pytest.raises(ValueError, match="None of 1 trajectories has a verdict"):
        trajectory_rows([trajectory(0, False, Verdict.UNDECIDED)], True)


def test_rewards_are_regressed_to_and_verdicts_are_classified():
    pair = [trajectory(0, True, reward=0.75), trajectory(0, False, reward=-0.5)]
    assert trajectory_rows(pair, False)["reward"][:] == [0.75, -0.5]
    assert trajectory_rows(pair, True)["reward"][:] == [1.0, 0.0]


def test_no_prompt_is_on_both_sides_of_the_held_out_share():
    rows = trajectory_rows(pool(8), True)
    train, held_out = hold_out_prompts(rows, 0.25, seed=0)
    sides = [{tuple(ids) for ids in side["prompt_ids"]} for side in (train, held_out)]
    assert [len(side) for side in sides] == [6, 2] and not sides[0] & sides[1]
    assert hold_out_prompts(rows.select([0]), 0.5, seed=0)[1] is None


def test_rows_of_messages_are_tokenized_as_oreo_does(policy):
    tokenizer = byte_tokenizer()
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
            "reward": r,
        }
        for r in (1.0, 0.0)
    ]
    args = SimpleNamespace(
        value_objective="classification", max_length=None, train_on_turns="all", dataset_num_proc=None,
        drop_reasoning=False, training_template=False,
    )  # fmt: skip
    prepared = prepared_rows(Dataset.from_list(rows), tokenizer, args, "train")
    assert prepared["reward"][:] == [1.0, 0.0] and all(any(mask) for mask in prepared["action_mask"])


def test_a_value_model_of_the_other_objective_is_refused(policy, tmp_path):
    args = config(tmp_path / "out", value_objective="regression")
    other = build_value_model(policy, config(tmp_path / "out"))
    with pytest.raises(ValueError, match="learned by classification"):
        train_value_model(other, pool(2), args)


def test_a_value_model_that_cannot_train_is_refused(policy, tmp_path):
    frozen = build_value_model(policy, config(tmp_path / "out")).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable"):
        train_value_model(frozen, pool(2), config(tmp_path / "out"))
