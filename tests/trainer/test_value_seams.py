"""What the value-based trainers rely on upstream without a promise: a release that moves it fails here."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl import KTOTrainer

from .value_helpers import make_trainer


METHODS = {
    (KTOTrainer, "_precompute_ref_logps"): ["self", "dataset", "name", "batch_size"],
    (KTOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (KTOTrainer, "compute_loss"): ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    (Trainer, "_save"): ["self", "output_dir", "state_dict"],
    (Trainer, "_load_from_checkpoint"): ["self", "resume_from_checkpoint", "model"],
    (Trainer, "_load_best_model"): ["self"],
    (Trainer, "_clip_grad_norm"): ["self", "model"],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (Trainer, "create_optimizer"): ["self", "model"],
}


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_a_method_that_is_overridden_or_called(cls, name):
    assert list(inspect.signature(getattr(cls, name)).parameters) == METHODS[cls, name], (
        f"`{cls.__name__}.{name}` has other parameters: re-read it and the trainer's own version of it."
    )


def test_attributes_of_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path)
    for name in ("_tokenizer", "_metrics", "_total_train_tokens", "_tp_size", "aux_loss_enabled", "ref_model"):
        assert hasattr(trainer, name), f"`KTOTrainer` no longer sets `{name}`, which `ValueBasedTrainer` reads."
    assert trainer.loss_is_scaled_for_ga is False, "the trainer's losses are not divided for gradient accumulation"
    assert not trainer.calculate_KL, "KTO's mismatched rows would be prepared and batched for nothing"


def test_the_fused_head_returns_what_the_joint_forward_reads(tmp_path):
    trainer = make_trainer(tmp_path, packed=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    outputs = trainer.model(input_ids=batch["input_ids"], labels=batch["input_ids"], fused_lm_head=True)
    shape = (1, batch["input_ids"].size(1) - 1)
    assert outputs.log_probs.shape == outputs.entropy.shape == shape and outputs.aux_loss is None
