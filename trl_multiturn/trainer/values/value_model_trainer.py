"""A value model trained alone, on trajectories that any policy sampled and any verifier judged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback

from ...data.value_rows import DataCollatorForTrajectories
from ...losses import oreo_value_loss, outcome_classification_loss
from ...models.value_model import ValueModel
from ...models.value_quality import calibration_error, calibration_sums
from ...packing.decoder import PackedDecoder, without_adapters
from ...packing.eligibility import decoder_self_test, reason_against_packing
from ...packing.expanded import expand_calls
from ...packing.plan import PlanCache
from ...packing.sequences import check_branches_were_read
from ...trajectory import Trajectory
from ..packed import PackedTrainerMixin
from .value_based import VALUE_MODEL_FOLDER, prompts_of
from .value_metrics import FinalStates, final_values
from .value_model_config import ValueModelConfig
from .value_rows import hold_out_prompts, prepared_rows


logger = get_logger(__name__)


def train_value_model(
    model: str | Path | PreTrainedModel | PeftModel | ValueModel,
    trajectories: Dataset | Sequence[Trajectory],
    args: ValueModelConfig | None = None,
    eval_trajectories: Dataset | Sequence[Trajectory] | None = None,
    processing_class: Any = None,
    callbacks: list[TrainerCallback] | None = None,
) -> ValueModel:
    """
    Trains a value model alone on judged trajectories, and evaluates it on prompts that it has not seen.

    By classification, the default, it learns the chance that a trajectory ends well, at every token that the policy
    chose (VGS, https://huggingface.co/papers/2505.17373): the chance under the policy that sampled the trajectories.
    The policy itself is neither run nor moved, so that a pass costs a fraction of one of OREO's.

    The evaluation at the end is logged and written to `<output_dir>/eval_results.json`: `eval_loss`,
    `eval_auc_within_prompt` (how often a good trajectory's last state has a higher value than a bad one's of the same
    prompt) and `eval_calibration_error` (over all states). The value model is saved in `<output_dir>/value_model`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`ValueModel`]):
            The policy from whose weights the value model starts; or a value model (loaded with `is_trainable=True`)
            that learns on.
        trajectories (`Dataset` or `Sequence[Trajectory]`):
            Judged trajectories, whoever sampled them; or rows as [`OREOTrainer`] takes them.
        args ([`ValueModelConfig`], *optional*):
            How to train.
        eval_trajectories (`Dataset` or `Sequence[Trajectory]`, *optional*):
            To evaluate on; by default a share of the prompts, `args.held_out`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            For rows of messages; by default the tokenizer beside `model`, if that is a folder or a name.
        callbacks (`list[TrainerCallback]`, *optional*):
            The trainer's.

    Returns:
        [`ValueModel`], in evaluation mode; its `score` guides [`value_guided_search`].

    Example:

    ```python
    >>> trajectories = generate_trajectories(prompts, engine, tools, config, reward_funcs=math_reward)
    >>> args = ValueModelConfig("values", value_model="full", learning_rate=1e-5)
    >>> value_model = train_value_model("my-policy", trajectories, args)
    >>> found = value_guided_search(prompts, engine, tools, value_model.score)
    ```
    """
    args = ValueModelConfig("value_model") if args is None else args
    if processing_class is None and isinstance(model, (str, Path)):
        processing_class = AutoTokenizer.from_pretrained(model)
    rows = prepared_rows(trajectories, processing_class, args, "train")
    if eval_trajectories is not None:
        eval_rows: Dataset | None = prepared_rows(eval_trajectories, processing_class, args, "eval")
    else:
        rows, eval_rows = hold_out_prompts(rows, args.held_out, args.seed)
    trainer = ValueModelTrainer(
        build_value_model(model, args), args, rows, eval_rows, processing_class, callbacks=callbacks
    )
    trainer.train()
    trainer.save_model()
    if eval_rows is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    return trainer.value_model.eval()


def build_value_model(
    model: str | Path | PreTrainedModel | PeftModel | ValueModel, args: ValueModelConfig
) -> ValueModel:
    """
    The value model that `args` describe, from a policy; a value model is taken as it is.

    Raises:
        `ValueError`: if a value model learned by another objective, or none of its parameters can train.
    """
    if isinstance(model, ValueModel):
        if model.objective != args.value_objective:
            raise ValueError(
                f"The value model was learned by {model.objective}, but `value_objective={args.value_objective!r}`: "
                "its outputs would change their meaning. Set the same objective, or start from the policy."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "No parameter of the value model can train. Load it with `ValueModel.from_pretrained(folder, "
                "is_trainable=True)`."
            )
        return model
    base = None
    if isinstance(model, (str, Path)):  # nobody else holds these weights, so an adapter may share and freeze them
        base = model = AutoModelForCausalLM.from_pretrained(model)
        base.requires_grad_(False)
    rank = args.value_lora_rank
    value_model = ValueModel.from_policy(
        model, args.value_model, base, lora_rank=rank, lora_alpha=rank, objective=args.value_objective
    )
    return value_model.standing_on(model)


class ValueModelTrainer(PackedTrainerMixin, Trainer):
    """
    Trainer of a value model alone; [`train_value_model`] prepares its rows.

    Args:
        model ([`ValueModel`]): with a backbone that reads tokens.
        args ([`ValueModelConfig`]): how to train.
        train_dataset (`Dataset`), eval_dataset (`Dataset`, *optional*): prepared rows (see [`finish_rows`]).
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): saved beside the value model.
        **kwargs: for [`~transformers.Trainer`].
    """

    args: ValueModelConfig  # type: ignore[assignment]  # the packed path reads the fields of `PackedConfig` alone

    def __init__(
        self,
        model: ValueModel,
        args: ValueModelConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        # The collator reads columns that are no arguments of the model, and a value model has no such switch
        args.remove_unused_columns = False
        if args.gradient_checkpointing and model.backbone is not None:
            model.backbone.activation_checkpointing_enable(args.gradient_checkpointing_kwargs)
            args.gradient_checkpointing = False
        super().__init__(
            model,
            args,
            DataCollatorForTrajectories(pad_token_id=0),  # hidden by the attention mask
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._metrics: dict[str, defaultdict[str, list[float]]] = {"train": defaultdict(list)}
        self._final_states = FinalStates()
        self._calibration: list[Tensor] = []

    @property
    def value_model(self) -> ValueModel:
        """The value model, without what a distributed backend wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.install_packed_forwards()
        inputs = self.note_branches(inputs)
        outputs = model(inputs["input_ids"], inputs["attention_mask"], raw=True)[:, :-1]
        check_branches_were_read(inputs["input_ids"])
        mask = inputs["completion_mask"][:, 1:].bool()
        if self.value_model.objective == "classification":
            loss = outcome_classification_loss(outputs, inputs["reward"], mask)
        else:  # the policy is its own reference, and its log-ratios are 0
            loss = oreo_value_loss(outputs, torch.zeros_like(outputs), inputs["reward"], mask, beta=1.0)
        loss = loss * self._part_weight
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        values = outputs.sigmoid() if self.value_model.objective == "classification" else outputs
        mask = inputs["completion_mask"][:, 1:].bool()
        self._final_states.add(prompts_of(inputs), final_values(values, mask), inputs["label"])
        outcomes = inputs["reward"].unsqueeze(1).expand_as(values)
        self._calibration.append(calibration_sums(values[mask], outcomes[mask]).cpu())
        return loss.detach(), None, None

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        sums, self._calibration = torch.stack(gather_object(self._calibration)).sum(dim=0), []
        quality = {"calibration_error": calibration_error(sums)}
        quality |= {name.removeprefix("value/"): value for name, value in self._final_states.pop().items()}
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {**(output.metrics or {}), **{f"{prefix}_{name}": value for name, value in quality.items()}}
        return output._replace(metrics=metrics)

    def expand_models(self) -> None:
        backbone = self.value_model.backbone
        assert backbone is not None, "a value model without a backbone reads no tokens"
        expand_calls(without_adapters(backbone), scores=False)

    def install_packed_forwards(self) -> None:
        """Decide, once, whether batches are packed."""
        if getattr(self, "_packed_forwards", None) is not None:
            return
        self._packed_forwards = []
        packed, backbone = self.args.packed, self.value_model.backbone
        if packed is False:
            return
        assert backbone is not None, "a value model without a backbone reads no tokens"
        reason = self._reason_against_hooks() or reason_against_packing(backbone)
        if reason is None:
            decoder = PackedDecoder(backbone, packed, PlanCache())
            reason = decoder_self_test(decoder)
            if reason is None:
                self._packed_forwards = [decoder]
                return
            decoder.remove()
        if packed is True:
            raise ValueError(
                f"`packed=True`, but this run cannot be packed: {reason}. Remove the cause, or set `packed='auto'` to "
                "train padded where packing is not proven equal."
            )
        logger.warning(f"Batches stay padded: {reason}.")

    # Checkpoints hold the value model in its folder, as those of OREO do

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        self.value_model.save_pretrained(folder / VALUE_MODEL_FOLDER)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.value_model.load_weights(Path(resume_from_checkpoint, VALUE_MODEL_FOLDER))

    def _load_best_model(self) -> None:
        self.value_model.load_weights(Path(str(self.state.best_model_checkpoint), VALUE_MODEL_FOLDER))
