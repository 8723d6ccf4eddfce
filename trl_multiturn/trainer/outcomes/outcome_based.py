"""
Trainers that learn from trajectories with an outcome: the rows, one wrapped forward pass, and a loss of their own.

OREO and DQO (see `values`) add a value model; group regression compares the trajectories of a prompt instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from ...data.row_checks import find_format, first_row
from ...data.value_rows import ALIGNED_COLUMNS, DataCollatorForTrajectories, finish_rows, outcome
from ...formats import IMAGE_COLUMNS, columns_read
from ...losses import LMHead
from ...packing.sequences import check_branches_were_read
from ..multi_turn_kto_trainer import MultiTurnKTOTrainer
from ..rows.token_reference import TokenReferenceMixin
from .outcome_batch import OutcomeBatch
from .outcome_config import OutcomeConfig
from .outcome_metrics import OutcomeMetrics


logger = get_logger(__name__)


class OutcomeBasedTrainer(TokenReferenceMixin, MultiTurnKTOTrainer):
    """
    Base of [`OREOTrainer`], [`DQOTrainer`] and [`GroupRegressionTrainer`]; a subclass gives `loss`.

    Rows and constructor are those of [`~trl.KTOTrainer`]. Instead of, or besides, its `label` a row may have a
    `reward`.
    """

    args: OutcomeConfig
    _config_class: type[OutcomeConfig]
    _batch_class: ClassVar[type[OutcomeBatch]] = OutcomeBatch

    # What a `ToolRolloutGenerator` draws from a prompt's trajectories where the user does not say
    default_sampling: ClassVar[dict[str, Any]] = {}

    _reference_columns = ("ref_logps",)
    _text_formats = [
        ("prompt", "completion", "reward"),
        ("prompt", "completion", "label"),
        ("chosen", "rejected"),
    ]
    _extra_signature_columns = ("reward", "length", *ALIGNED_COLUMNS, *IMAGE_COLUMNS)
    _collator_class = DataCollatorForTrajectories

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: OutcomeConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = self._config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self._config_class):
            raise TypeError(
                f"`args` is a `{type(args).__name__}`, which lacks fields of this trainer. Pass a "
                f"`{self._config_class.__name__}`; it takes every field of `KTOConfig`."
            )
        if compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` needs logits, which this trainer never builds. Leave it out: evaluation reports "
                "the losses, and `evaluate_policy` measures answers."
            )
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=None,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._outcome_metrics = self._make_metrics()

    def _make_metrics(self) -> OutcomeMetrics:
        return OutcomeMetrics(self.accelerator, self.beta)

    # Rows

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first = first_row(dataset, dataset_name)
        _refuse_half_token_rows(first, dataset_name)
        find_format(first, self._text_formats, self._sides, dataset_name)
        if "label" not in first and not columns_read(first) >= {"chosen", "rejected"}:
            map_kwargs = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            dataset = dataset.map(_add_label, with_indices=True, **map_kwargs)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _fit(self, dataset: Dataset | IterableDataset, args: Any, dataset_name: str) -> Dataset | IterableDataset:
        dataset, statistics = finish_rows(
            dataset,
            self._tokenizer,
            max_length=args.max_length,
            step_delimiter=self._step_delimiter(args),
            train_on_turns=args.train_on_turns,
            binary_outcomes=self._binary_outcomes(args),
            num_proc=args.dataset_num_proc,
            desc=f"Reading rewards of {dataset_name} dataset",
        )
        if dataset_name == "train" and statistics:
            self.row_statistics = statistics
        self._warn_about_segments(statistics, args, dataset_name)
        dropped = statistics.get("data/rows_dropped_too_long", 0), statistics.get("data/rows_dropped_untrained", 0)
        if any(dropped):
            logger.warning(
                f"Dropped {sum(dropped)} of {statistics['data/rows'] + sum(dropped)} rows of the {dataset_name} "
                f"dataset: {dropped[0]} longer than `max_length={args.max_length}` (a trajectory that is cut has no "
                f"outcome), {dropped[1]} without a token sampled by the policy."
            )
        return dataset

    @staticmethod
    def _step_delimiter(args: Any) -> Literal["turn", "line", "sentence"] | None:
        return None

    @staticmethod
    def _binary_outcomes(args: Any) -> bool:
        """Whether rewards must be 1 or 0."""
        return False

    def _warn_about_balance(self, dataset: Dataset) -> None:
        pass  # that is KTO's: these losses do not weigh labels

    # Loss

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float | Tensor]]:
        """`(loss, further metrics)` of an [`OutcomeBatch`]; both are means over this process's rows."""
        raise TypeError(f"`{type(self).__name__}` must define `loss`.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.install_packed_forwards()
        inputs = self.note_branches(inputs)
        ref_logps, ref_hidden, ref_head = self._reference(inputs)
        outputs = self._score(model, inputs, ref_hidden, ref_head)
        check_branches_were_read(inputs["input_ids"])
        batch = self._batch_class(**self._batch_tensors(inputs, outputs), ref_logps=ref_logps)
        loss, metrics = self.loss(batch)
        loss = loss * self._part_weight
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * self._part_weight
            metrics["aux_loss"] = outputs.aux_loss
        mode = "train" if self.model.training else "eval"
        self._outcome_metrics.add(mode, batch, outputs.entropy[:, -batch.logps.size(1) :], metrics)
        if mode == "train":
            tokens = self.accelerator.reduce(inputs["attention_mask"].sum(), "sum").item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def _score(
        self, model: Module, inputs: dict[str, Tensor], ref_hidden: Tensor | None, ref_head: LMHead | None
    ) -> Any:
        """The policy's outputs, with `log_probs` and `entropy` of the completions' tokens."""
        return model(**self._model_inputs(inputs), fused_lm_head=True)

    def _model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        router: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "labels": inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
            "use_cache": False,
            **self._image_inputs(inputs),
            **router,
        }

    def _batch_tensors(self, inputs: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
        """What the batch holds beside the reference's log-probabilities."""
        aligned = {name: inputs[name][:, 1:] for name in ALIGNED_COLUMNS if name in inputs and name != "ref_logps"}
        mask = inputs["completion_mask"][:, 1:].bool()
        return {
            "logps": outputs.log_probs[:, -mask.size(1) :],  # prompt-learning adapters prepend positions
            "action_mask": mask,
            "rewards": inputs["reward"],
            "labels": inputs["label"].bool(),
            **aligned,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._outcome_metrics.pop(mode).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)


def _refuse_half_token_rows(first: dict[str, Any], dataset_name: str) -> None:
    missing = [name for name in ("prompt_ids", "completion_ids", "action_mask") if name not in first]
    if "completion_ids" in first and missing and not {"completion", "chosen"} & first.keys():
        raise ValueError(
            f"The rows of the {dataset_name} dataset have `completion_ids` but no {missing}, so it is unknown which "
            "tokens the policy sampled. Add the columns, or pass text rows (`prompt`, `completion`)."
        )


def _add_label(example: dict[str, Any], index: int) -> dict[str, bool]:
    return {"label": outcome(example, index) > 0}
