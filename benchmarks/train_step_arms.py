"""What `train_step.py` compares: TRL's trainers as they come and tuned, ours, and one step of each."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from train_step_rows import VOCAB, Setting, any_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trl_multiturn.trainer import (
    DQOConfig,
    DQOTrainer,
    GroupRegressionConfig,
    GroupRegressionTrainer,
    OREOConfig,
    OREOTrainer,
)
from trl_multiturn.trainer.packed import PackedTrainerMixin


class PackedDPOTrainer(PackedTrainerMixin, DPOTrainer):
    pass


class PackedKTOTrainer(PackedTrainerMixin, KTOTrainer):
    pass


# Trained on trajectories with a reward, by trainers that TRL does not have
ON_OUTCOMES: dict[str, tuple[type, type]] = {
    "oreo": (OREOConfig, OREOTrainer),
    "dqo": (DQOConfig, DQOTrainer),
    "group": (GroupRegressionConfig, GroupRegressionTrainer),
}


def make_trainer(setting: Setting, packed: bool, precomputed: bool) -> DPOTrainer | KTOTrainer:
    """A trainer of TRL, or the same class on the packed path, with its own copy of the same weights."""
    policy, reference = make_models(setting, precomputed)
    common = dict(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=setting.device == "cpu", bf16=setting.bf16,
        disable_tqdm=True, gradient_checkpointing=setting.checkpointing, max_length=None,
        per_device_train_batch_size=2,
    )  # fmt: skip
    if setting.kind in ON_OUTCOMES:
        config, trainer_class = ON_OUTCOMES[setting.kind]
        values = {} if setting.kind == "group" else {"value_model": setting.value}
        args = config(**common, packed=packed, **values)
        rows = [{"prompt_ids": [3, 4], "completion_ids": [5, 6], "action_mask": [1, 1], "reward": 1.0}] * 2
    else:
        base, config = (DPOTrainer, DPOConfig) if setting.kind == "dpo" else (KTOTrainer, KTOConfig)
        trainer_class = {DPOTrainer: PackedDPOTrainer, KTOTrainer: PackedKTOTrainer}[base] if packed else base
        args = config(**common, precompute_ref_log_probs=precomputed)
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        if setting.kind == "kto":
            rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    # The rows are not used: they let the constructor do its work, and batches come from the benchmark
    trainer = trainer_class(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=any_tokenizer(),
        peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, target_modules="all-linear")
        if setting.lora
        else None,
    )
    if setting.checkpointing:
        trainer.model.gradient_checkpointing_enable()
    _move(trainer.model)
    # As `train()` does, for autocast; in place
    trainer.accelerator.prepare_model(trainer.model)
    return trainer


def make_models(setting: Setting, precomputed: bool) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    torch.manual_seed(0)
    if setting.checkpoint:
        names = ["policy"] if precomputed or setting.lora else ["policy", "reference"]
        models = [AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype=setting.weights) for _ in names]
        return models[0].to(setting.device), models[1].to(setting.device) if len(models) > 1 else None
    settings = dict(
        num_hidden_layers=8, hidden_size=512, intermediate_size=1536, vocab_size=VOCAB, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=16_384, pad_token_id=0,
    )  # fmt: skip
    config = Qwen2Config(**settings | setting.body, dtype=setting.weights)
    with torch.device(setting.device):
        policy, reference = Qwen2ForCausalLM._from_config(config), None
        if not precomputed and not setting.lora:
            reference = Qwen2ForCausalLM._from_config(config)
            reference.load_state_dict(policy.state_dict())
    return policy, reference


def _move(model: torch.nn.Module) -> None:
    """A policy that differs from its reference, so that losses and gradients are not those of the first step."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_(5e-4 * noise)


@dataclass
class Step:
    loss: float
    gradient_norm: float
    seconds: float
    allocated: float  # gigabytes of the GPU's memory


def run_step(trainer: DPOTrainer | KTOTrainer, batch: dict[str, torch.Tensor]) -> Step:
    """Forward and backward of one batch, without the optimizer."""
    trainer.model.train()
    for parameter in trainer.model.parameters():
        parameter.grad = None
    gc.collect()
    on_gpu, held = batch["input_ids"].is_cuda, 0
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = clock()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - start
    if not all(forward.packs for forward in getattr(trainer, "_packed_forwards", ())):
        raise SystemExit("The packed arm fell back to padded batches (its log says why). Nothing is reported.")
    allocated = (torch.cuda.max_memory_allocated() - held) / 2**30 if on_gpu else 0.0
    gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    for parameter in trainer.model.parameters():
        parameter.grad = None
    return Step(loss.item(), torch.stack(gradients).norm().item(), seconds, allocated)


def add_reference(setting: Setting, batch: dict[str, torch.Tensor], trainer: Any) -> dict[str, torch.Tensor]:
    """The batch with reference log-probabilities, as precomputation leaves them in the dataset."""
    first, second = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    names = ("ref_chosen_logps", "ref_rejected_logps") if setting.kind == "dpo" else ("ref_logps", "ref_KL_logps")
    return batch | {name: x for name, x in zip(names, (first, second), strict=True) if x is not None}


@dataclass
class Arm:
    """One of the compared computations."""

    trainer: Any
    precomputed: bool

    def step(self, batch: dict[str, torch.Tensor]) -> Step:
        """Forward and backward of a batch, whose reference columns are left to those who take them."""
        return run_step(self.trainer, batch if self.precomputed else without_reference(batch))


def arms_of(setting: Setting) -> dict[str, Arm]:
    """The compared computations, the baseline first."""
    if setting.kind in ON_OUTCOMES:
        return {
            name: Arm(make_trainer(setting, packed=name == "packed", precomputed=False), True)
            for name in ("padded", "packed")
        }
    return {
        "TRL": Arm(make_trainer(setting, packed=False, precomputed=False), False),
        "TRL, precomputed": Arm(make_trainer(setting, packed=False, precomputed=True), True),
        "packed": Arm(make_trainer(setting, packed=True, precomputed=not setting.online), not setting.online),
    }


def without_reference(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if not name.startswith("ref_")}
