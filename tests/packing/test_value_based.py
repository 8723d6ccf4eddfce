"""OREO and DQO on the packed row: policy, reference and value model together, equal to the padded batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset

from tests.trainer.value_helpers import make_trainer, whole_batch
from trl_multiturn.trainer import DQOTrainer, OREOTrainer


def branching_rows() -> Dataset:
    """Six trajectories of two prompts; within a prompt they go one turn together, or two."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(60, 120, (n,), generator=generator).tolist()

    rows = []
    for _ in range(2):
        prompt, first_turn, result, second_turn = tokens(11), tokens(9), tokens(6), tokens(8)
        stems = [(first_turn + result, [1] * 9 + [0] * 6), ([], [])]
        stems.append((first_turn + result + second_turn, [1] * 9 + [0] * 6 + [1] * 8))
        for (stem, mask), n in zip(stems, (7, 12, 5), strict=True):
            reward = float(torch.rand((), generator=generator))
            rows.append({"prompt_ids": prompt, "completion_ids": stem + tokens(n), "action_mask": mask + [1] * n,
                         "reward": reward})  # fmt: skip
    return Dataset.from_list(rows)


def one_step(trainer):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, whole_batch(trainer))
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, trainer._outcome_metrics.pop("train")


SETTINGS = {OREOTrainer: dict(kl_coef=0.3), DQOTrainer: dict(lam=0.9)}
CASES = list(itertools.product(SETTINGS, ["adapter", "full", "head"], [False, True], [False, True]))
QUICK = [(OREOTrainer, "adapter", False, False), (DQOTrainer, "full", True, False), (OREOTrainer, "head", False, True)]


@pytest.mark.parametrize(
    ("cls", "value_model", "lora", "checkpointing"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_step(cls, value_model, lora, checkpointing, tmp_path):
    steps = []
    for packed in (True, False):
        trainer = make_trainer(
            tmp_path, cls, branching_rows(), lora, value_model=value_model, packed=packed,
            gradient_checkpointing=checkpointing, **SETTINGS[cls],
        )  # fmt: skip
        steps.append(one_step(trainer))
        if packed:
            # The policy (and below LoRA its reference), the reference model, the value model's own backbone
            assert len(trainer._packed_forwards) == 1 + (not lora) + (value_model != "head")
            for seat in trainer._packed_forwards:
                assert seat.calls["packed"] >= 1 and seat.calls["padded"] == 0
    (loss, gradients, metrics), (expected_loss, expected, expected_metrics) = steps
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys() and any("value_model" in name for name in gradients)
    for part in ("value_model", ""):
        names = [name for name in expected if name.startswith("value_model") == bool(part)]
        norm = torch.stack([expected[name].norm() for name in names]).norm()
        assert norm > 1e-4
        for name in names:
            assert (gradients[name] - expected[name]).norm() < 1e-4 * norm, name
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_parts_of_a_batch_have_its_gradient(tmp_path):
    weights = []
    for budget in (None, 60):
        trainer = make_trainer(
            tmp_path, OREOTrainer, branching_rows(), value_model="full", packed=True, max_tokens_per_batch=budget,
            per_device_train_batch_size=6, max_steps=1, optim="sgd", max_grad_norm=0.0, value_max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        calls = trainer._packed_forwards[0].calls["packed"]
        assert calls == 1 if budget is None else calls > 1
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("value_model", ["adapter", "full", "head"])
def test_autocast_ends_with_the_step(value_model, tmp_path):
    """Two trained steps in bfloat16 leave the process in float32, and are as close to float32 as padded ones."""
    losses = {}
    for packed, bf16 in ((False, False), (False, True), (True, True)):
        trainer = make_trainer(
            tmp_path, OREOTrainer, branching_rows(), value_model=value_model, packed=packed, bf16=bf16, max_steps=2
        )
        trainer.train()
        assert not torch.is_autocast_enabled("cpu")
        losses[packed, bf16] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[False, True] != losses[False, False]
    assert losses[True, True] == pytest.approx(losses[False, True], rel=0.05)
