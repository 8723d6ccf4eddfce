"""The packed path in a trainer: decided once, at the first loss, for the policy and for its reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from ..packing.batching import PromptGroupedSampler, split_batch
from ..packing.decoder import PackedDecoder, without_adapters
from ..packing.eligibility import reason_against_hooks, reason_against_packing, self_test, try_fused_layers
from ..packing.expanded import expand_calls
from ..packing.forward import PackedForward
from ..packing.plan import PlanCache
from ..packing.sequences import check_branches_were_read, note_branches
from .host import TrainerHost


logger = get_logger(__name__)


class PackedTrainerMixin(TrainerHost):
    """
    Runs a TRL trainer's models on packed rows; to be listed before the TRL trainer among a class's bases.

    `args.packed` decides: `"auto"` (also where the config has no such field) packs the batches for which it pays on
    models that passed the self-test, and falls back with one logged reason elsewhere; `True` packs every batch and
    raises `ValueError` where that is impossible; `False` leaves the trainer as it is.

    The trainer's losses, metrics and data path are not touched: see [`PackedForward`] for where it sits.

    Two further fields concern batches, packed or not. `args.group_by_prompt` keeps a prompt's rows together within the
    shuffled order, so that there is something to share. `args.max_tokens_per_batch` bounds the tokens that one forward
    pass of training reads (unique ones where batches may be packed, padded ones elsewhere): a larger batch is computed
    in parts, with the gradient of the whole. Means over rows are logged as the whole batch's; means over tokens
    or over some of the rows (KTO's `rewards/chosen`) count each part by its rows.
    """

    # Weight of the part of a batch that is being computed: its share of the batch's rows
    _part_weight = 1.0

    _path_is_logged = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.install_packed_forwards()
        inputs = self.note_branches(inputs)
        output: Any = super().compute_loss(model, inputs, *args, **kwargs)
        check_branches_were_read(inputs["input_ids"])
        if not self._path_is_logged:
            self._path_is_logged = True
            plan = next((forward.last_plan for forward in self._causal_forwards()), None)
            logger.info(f"First batch: {'computed as TRL does' if plan is None else plan}.")
        return output if self._part_weight == 1.0 else output * self._part_weight

    def compute_ref_log_probs(self, model, inputs):
        # Precomputation asks for these inside the parent's constructor
        self.install_packed_forwards()
        return super().compute_ref_log_probs(model, self.note_branches(inputs))

    def note_branches(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without `token_parents`, which says where its rows branch: that is noted for the models instead."""
        noted = [prefix for prefix in ("", "KL_") if f"{prefix}token_parents" in inputs]
        if not noted:
            return inputs
        inputs = dict(inputs)
        for prefix in noted:
            parents = inputs.pop(f"{prefix}token_parents")
            note_branches(inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"], parents)
        self.expand_models()
        return inputs

    def expand_models(self) -> None:
        """Let the models read batches that branch where the packed path does not."""
        for model, _ in self._packable_models():
            expand_calls(model)
        value_model = getattr(self.accelerator.unwrap_model(self.model), "value_model", None)
        backbone = getattr(value_model, "backbone", None)
        if backbone is not None:
            expand_calls(without_adapters(backbone), scores=False)

    def training_step(self, model, inputs, *args, **kwargs):
        budget = getattr(self.args, "max_tokens_per_batch", None)
        if budget is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self._check_loss_is_a_mean_over_rows()
        sides = 1 if "label" in inputs else 2
        self.install_packed_forwards()
        packed = any(forward.packs for forward in self._packed_forwards)
        parts = split_batch(inputs, budget, sides, packed=packed)
        if self.accelerator.num_processes > 1:
            # Every process must take part in every gradient reduction, also one with fewer examples than the others
            # have parts: then the others' parts exceed the budget
            counts = torch.tensor([[len(parts), len(inputs["input_ids"]) // sides]], device=self.accelerator.device)
            counts = self.accelerator.gather(counts)
            number = min(int(counts[:, 0].max()), int(counts[:, 1].min()))
            parts = split_batch(inputs, budget, sides, number, packed)
        weights = [len(part["input_ids"]) / len(inputs["input_ids"]) for part in parts]
        logged = {name: len(values) for name, values in self._metrics["train"].items()}
        losses = []
        try:
            for part, self._part_weight in zip(parts, weights, strict=True):
                losses.append(super().training_step(model, part, *args, **kwargs))
        finally:
            self._part_weight = 1.0
        for name, values in self._metrics["train"].items():
            _join(values, logged.get(name, 0), weights)
        return torch.stack(losses).sum()

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not getattr(self.args, "group_by_prompt", False) or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        if getattr(self, "calculate_KL", False):
            raise ValueError(
                "`group_by_prompt=True` would tear rows from the mismatched completions that were prepared for their "
                "neighbours. Order the rows by prompt yourself, or use `loss_type='apo_zero_unpaired'`."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptGroupedSampler(self._prompt_keys(dataset), self.args.per_device_train_batch_size, seed)

    def _prompt_keys(self, dataset: Any) -> Any:
        """What rows of one prompt have in common, one sequence of integers a row."""
        return dataset["prompt_ids"][:]

    def _check_loss_is_a_mean_over_rows(self) -> None:
        whole_batch = sorted({"sft", "aot", "aot_unpaired"} & set(getattr(self, "loss_types", ())))
        if getattr(self, "calculate_KL", False):
            whole_batch.append("kto")
        if getattr(self, "aux_loss_enabled", False):
            whole_batch.append("the router's auxiliary loss")
        if whole_batch:
            raise ValueError(
                f"`max_tokens_per_batch` computes a batch in parts, but {', '.join(whole_batch)} is not a mean over "
                "rows, so its gradient would not be the batch's. Lower `per_device_train_batch_size` instead."
            )

    def install_packed_forwards(self) -> None:
        """Decide, once, how this trainer's models run; a trainer with its own loss calls it before the first pass."""
        if getattr(self, "_packed_forwards", None) is not None:
            return
        self._packed_forwards: list[PackedForward | PackedDecoder] = []
        packed = getattr(self.args, "packed", "auto")
        if packed is False:
            return
        models, plans = self._packable_models(), PlanCache()
        reason = self._reason_against_hooks() or _first(reason_against_hooks(model) for model, _ in models)
        if reason is None:
            reason = self._reason_against_rows() or _first(reason_against_packing(model) for model, _ in models)
            pack = False if reason else packed
            slices = getattr(self.args, "max_tokens_per_slice", None)
            fuse = getattr(self.args, "fused_layers", None)
            self._packed_forwards = [
                PackedForward(m, fields, pack, plans, slices, fuse).install() for m, fields in models
            ]
            if reason is None:
                with self.accelerator.autocast():  # references are computed before the first loss, outside it
                    for forward in self._causal_forwards():
                        try_fused_layers(forward)
                reason = _first(self_test(forward) for forward in self._causal_forwards())
        if reason is None:
            self._pack_value_model(packed, plans)
            logger.info("Trajectories are packed with shared prefixes where their shapes say that it pays.")
            for reason in {forward.reason_against_fusing for forward in self._causal_forwards()} - {None}:
                logger.warning(f"Decoder layers run operator by operator, as they came: {reason}.")
            return
        for forward in self._causal_forwards():
            forward.stop_packing()
        if packed is True:
            raise ValueError(
                f"`packed=True`, but this run cannot be packed: {reason}. Remove the cause, or set `packed='auto'` to "
                "train padded where packing is not proven equal."
            )
        scored = ", the LM head on trained tokens only" if self._packed_forwards else ""
        logger.warning(f"Batches stay padded{scored}: {reason}.")

    def _causal_forwards(self) -> list[PackedForward]:
        return [forward for forward in self._packed_forwards if isinstance(forward, PackedForward)]

    def _pack_value_model(self, packed: bool | str, plans: PlanCache) -> None:
        """A value model with a backbone of its own has the policy's architecture, which passed the self-test."""
        value_model = getattr(self.accelerator.unwrap_model(self.model), "value_model", None)
        backbone = getattr(value_model, "backbone", None)
        if backbone is not None:
            self._packed_forwards.append(PackedDecoder(backbone, packed, plans))

    def _packable_models(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        fields: tuple[str, ...] = ("entropy", "mean_logits", "is_top1")
        if getattr(self, "use_weighting", False):
            fields += ("log_sum_sq_probs",)
        policy = self.accelerator.unwrap_model(self.model)
        models: list[tuple[nn.Module, tuple[str, ...]]] = [(policy, fields)]
        if getattr(self, "ref_model", None) is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            if reference is not policy:  # which stands in for it while reference columns are computed
                models.append((reference, ()))
        return models

    def _reason_against_hooks(self) -> str | None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "not proven equal with sharded parameters (FSDP, DeepSpeed)"
        if getattr(self.accelerator, "parallelism_config", None) is not None:
            return "not proven equal with tensor, context or sequence parallelism"
        if self.args.torch_compile:
            return "compiled models would be compiled again for every row length"
        if getattr(self, "_is_vlm", False):
            return "the processing class is multimodal"
        return None

    def _reason_against_rows(self) -> str | None:
        if self.args.neftune_noise_alpha is not None:
            # The noise is scaled by the length of what is embedded, and a shared token would get one draw for all
            return "`neftune_noise_alpha` is set, and its noise depends on the length of the row that is embedded"
        return None


def _join(values: list[float], start: int, weights: list[float]) -> None:
    """Replace what the parts of a batch logged by the mean over its rows, where each part logged something."""
    if len(values) - start == len(weights):
        values[start:] = [sum(weight * value for weight, value in zip(weights, values[start:], strict=True))]


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
