"""
What OREO and DQO share: a value model that is trained beside the policy, in one step of one optimizer.

The value model hangs on the policy (see `joint_forward`), so that one wrapped forward pass gives log-probabilities,
values and KL. A value loss moves the value model only and a policy loss the policy only; their sum is therefore the
same as a critic step and a policy step with the values from before it. Parameter groups hold the two learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from ...distributed.sharding import plain_name, weights_of, whole_parameters, write_parameters
from ...losses import outcome_classification_loss, soft_value
from ...models.value_model import ValueModel
from ..outcomes.outcome_based import OutcomeBasedTrainer
from .joint_forward import attach_value_model
from .trajectory_batch import TrajectoryBatch
from .value_config import ValueBasedConfig
from .value_metrics import ValueMetrics


logger = get_logger(__name__)

VALUE_MODEL_FOLDER = "value_model"


class ValueBasedTrainer(OutcomeBasedTrainer):
    """
    Base of [`OREOTrainer`] and [`DQOTrainer`]; a subclass gives `losses`.

    Rows and constructor are those of [`~trl.KTOTrainer`]. Instead of, or besides, its `label` a row may have a
    `reward`.
    """

    args: ValueBasedConfig
    _config_class: type[ValueBasedConfig]
    _batch_class = TrajectoryBatch

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: ValueBasedConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[None, None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if tuple(optimizers) != (None, None):
            raise ValueError(
                "`optimizers` was given, but the value model, which it would have to train with its own learning "
                "rate, is built with the trainer. Choose by `args.optim` and `args.lr_scheduler_type`, or override "
                "`create_optimizer`."
            )
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self._needs_reference_distributions:
            self._hold_reference_model()
        self._build_value_model()

    def _build_value_model(self) -> None:
        args = self.args
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP in its first version flattens the parameters of policy and value model together, so neither "
                "their gradients can be clipped apart nor the value model saved. Use FSDP2: "
                "`fsdp_config={'version': 2}`, or `fsdp_version: 2` in accelerate's configuration."
            )
        if args.value_model == "adapter" and sharded:
            raise ValueError(
                "`value_model='adapter'` shares weights between two module trees, which FSDP and DeepSpeed would "
                "shard apart. Use `value_model='full'` or `'head'`, or train with DDP."
            )
        if args.value_warmup_steps and self.is_deepspeed_enabled:
            raise ValueError(
                f"`value_warmup_steps={args.value_warmup_steps}` takes the policy's gradients away before a step, but "
                "DeepSpeed steps on gradients of its own, so the policy would train all the same. Set it to 0, or "
                "train with DDP or FSDP2."
            )
        base = None
        if self.ref_model is not None and not is_peft_model(self.model):
            base = self.accelerator.unwrap_model(self.ref_model)
        elif args.value_model == "adapter" and not is_peft_model(self.model):
            logger.warning(
                "No reference model is in memory whose weights the value adapter could share, so it gets a frozen "
                "copy of the policy's. Use a LoRA policy or `value_model='head'` to hold one backbone only."
            )
        value_model = ValueModel.from_policy(
            self.model,
            args.value_model,
            base,
            lora_rank=args.value_lora_rank,
            lora_alpha=args.value_lora_rank,
            objective=args.value_objective,
        )
        if value_model.backbone is not None and args.gradient_checkpointing:
            value_model.backbone.activation_checkpointing_enable(args.gradient_checkpointing_kwargs)
        attach_value_model(self.model, value_model)
        if args.value_warmup_steps:
            self.add_callback(_ValueWarmup(self, args.value_warmup_steps))

    @property
    def value_model(self) -> ValueModel:
        """The value model, which is part of the policy's module."""
        return self.accelerator.unwrap_model(self.model).value_model

    def _make_metrics(self) -> ValueMetrics:
        return ValueMetrics(self.accelerator, self.beta)

    @staticmethod
    def _binary_outcomes(args: Any) -> bool:
        return args.value_objective == "classification"

    # Loss

    def losses(self, batch: TrajectoryBatch) -> tuple[Tensor, Tensor, dict[str, float | Tensor]]:
        """
        `(value loss, policy loss, further metrics)` of a batch; metrics are means over this process's rows.

        With `value_objective="classification"` the cross-entropy of the outcome takes the value loss's place.
        """
        raise TypeError(f"`{type(self).__name__}` must define `losses`.")

    def loss(self, batch: TrajectoryBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        value_loss, policy_loss, metrics = self.losses(batch)
        if batch.value_logits is not None:
            value_loss = outcome_classification_loss(batch.value_logits, batch.rewards, batch.action_mask)
        return policy_loss + value_loss, metrics | {"loss/value": value_loss, "loss/policy": policy_loss}

    def _score(self, model, inputs, ref_hidden, ref_head):
        distributions: dict[str, Any] = {}
        if ref_hidden is not None:
            distributions = {
                "ref_hidden": ref_hidden,
                "ref_head": ref_head,
                "kl_chunk_size": getattr(self.args, "kl_chunk_size", 1024),
            }
        return model(**self._model_inputs(inputs), values=True, **distributions)

    def _batch_tensors(self, inputs, outputs):
        values, logits = outputs.state_values, None
        if self.args.value_objective == "classification":
            values, logits = soft_value(values, self.beta), values
        prompts = [] if self.model.training else prompts_of(inputs)
        own = {"values": values, "value_logits": logits, "kl": outputs.kl, "prompts": prompts}
        return super()._batch_tensors(inputs, outputs) | own

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if optimizer.state:
            return optimizer
        value_parameters = {id(p) for p in self._value_parameters(model)}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in value_parameters]
            group["params"] = [p for p in group["params"] if id(p) not in value_parameters]
            if mine:
                own = {k: v for k, v in group.items() if k != "params"}
                optimizer.add_param_group({**own, "params": mine, "lr": self.args.value_learning_rate})
        return optimizer

    def _value_parameters(self, model: nn.Module | None = None) -> list[nn.Parameter]:
        policy: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        return [p for p in policy.value_model.parameters() if p.requires_grad]

    def _clip_grad_norm(self, model):
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        value_parameters = self._value_parameters()
        ids = {id(p) for p in value_parameters}
        policy_parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        value_norm = self.accelerator.clip_grad_norm_(value_parameters, self.args.value_max_grad_norm)
        self._metrics["train"]["value/grad_norm"].append(float(value_norm))
        return self.accelerator.clip_grad_norm_(policy_parameters, self.args.max_grad_norm)

    # Checkpoints: the policy's stay plain, the value model lies beside them

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        prefix = "value_model."
        values = self._gathered_value_model()
        if state_dict is not None:
            if values is None:
                values = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)} or None
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
        super()._save(folder, state_dict=state_dict)
        if self.args.should_save:
            self.value_model.save_pretrained(Path(folder, VALUE_MODEL_FOLDER), values)

    def _save_checkpoint(self, model, trial) -> None:
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            values = self._gathered_value_model()  # the parent writes shards of the policy, and calls no `_save`
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}", VALUE_MODEL_FOLDER)
                self.value_model.save_pretrained(folder, values)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_value_model(Path(resume_from_checkpoint, VALUE_MODEL_FOLDER))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.is_deepspeed_enabled:  # whose optimizer holds the weights of the whole module
            self._load_value_model(Path(str(self.state.best_model_checkpoint), VALUE_MODEL_FOLDER))

    def _load_value_model(self, folder: Path) -> None:
        if not self.is_fsdp_enabled:
            self.value_model.load_weights(folder)
            return
        weights = {f"value_model.{name}": tensor for name, tensor in ValueModel.saved_weights(folder).items()}
        write_parameters(weights_of(self), set(weights), weights.__getitem__)

    def _gathered_value_model(self) -> dict[str, Tensor] | None:
        """The value model's whole weights in host memory, which all processes gather together; `None` where they are
        whole anyway."""
        if not self.is_fsdp_enabled:
            return None
        names = {f"value_model.{plain_name(name)}" for name, _ in self.value_model.named_parameters()}
        whole = whole_parameters(weights_of(self), names)
        return {name.removeprefix("value_model."): tensor.cpu() for name, tensor in whole}


class _ValueWarmup(TrainerCallback):
    """
    Lets only the value model learn at first.

    Gradients of the policy are removed rather than its loss: without a gradient an optimizer neither decays a weight
    nor starts counting the steps of its moments.
    """

    def __init__(self, trainer: ValueBasedTrainer, steps: int):
        self.trainer = trainer
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            return
        ids = {id(p) for p in self.trainer._value_parameters()}
        for parameter in self.trainer.model.parameters():
            if id(parameter) not in ids:
                parameter.grad = None


def prompts_of(inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The token ids before each row's first action, for telling rows of one prompt."""
    starts = inputs["completion_mask"].argmax(dim=1).tolist()
    return [tuple(ids[:start]) for ids, start in zip(inputs["input_ids"].tolist(), starts, strict=True)]
