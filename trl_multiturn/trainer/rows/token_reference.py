"""
The reference of a trainer whose loss needs it token by token: its log-probabilities, and its whole distributions.

Three ways to have one, as in TRL: a second model, the policy with its adapter switched to a frozen copy (`ref`) or
off, or columns of the rows. A column `ref_logps` holds one list per row, aligned with `completion_ids`, 0 outside the
mask.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model, tqdm
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ... import _upstream
from ...data.columns import list_lengths, with_list_column
from ...distributed.sharding import copy_parameters, whole_parameters, write_parameters
from ...losses import LMHead
from ...models.value_model import decoder
from ...packing.decoder import capture_hidden_states
from ..policy import frozen_copy
from ..values.joint_forward import lm_head
from .token_rows import TokenRowsMixin


logger = get_logger(__name__)

REFERENCE_MODEL_FOLDER = "reference_model"


class TokenReferenceMixin(TokenRowsMixin):
    """One reference log-probability per token, where those of `TokenRowsMixin` are one number per row."""

    _row_source: Any  # of `IterativeTrainerMixin`
    note_branches: Callable[[dict[str, Any]], dict[str, Any]]  # of `PackedTrainerMixin`

    # Whether the reference model differs from the one that a constructor would load
    _reference_moved = False

    @property
    def _needs_reference_distributions(self) -> bool:
        """Whether log-probabilities of the sampled tokens are not enough."""
        return False

    def _reference(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, LMHead | None]:
        """
        Reference log-probabilities `(B, L−1)`, and where distributions are needed hidden states `(B, L, H)` and head.

        Log-probabilities that come with the rows are used as they are.
        """
        from_rows = batch["ref_logps"][:, 1:] if "ref_logps" in batch else None
        if from_rows is not None and not self._needs_reference_distributions:
            return from_rows, None, None
        logps, hidden, head = self._score_by_reference(self.model if self.ref_model is None else self.ref_model, batch)
        if from_rows is not None:
            logps = from_rows
        return (logps, hidden, head) if self._needs_reference_distributions else (logps, None, None)

    @torch.no_grad()
    def _score_by_reference(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, LMHead]:
        batch = self.note_branches(batch)
        adapter = contextlib.nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and is_peft_model(policy):
            adapter = _upstream.use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        scorer = self.accelerator.unwrap_model(model)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with (
            _upstream.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
            capture_hidden_states(decoder(scorer)) as captured,
        ):
            log_probs = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                fused_lm_head=True,
                **self._image_inputs(batch),
            ).log_probs
            head = lm_head(scorer)  # in here: a head that the adapter trains (`modules_to_save`) is switched with it
        length = labels.size(1)  # prompt-learning adapters prepend positions
        return log_probs[:, -(length - 1) :], captured[0][:, -length:], head

    # Columns

    def compute_reference_columns(
        self,
        dataset: Dataset,
        reference: Literal["policy", "reference"] = "policy",
        batch_size: int | None = None,
        desc: str = "Computing reference log-probabilities",
    ) -> Dataset:
        """
        Adds (or replaces) the column `ref_logps`: one list per row, aligned with `completion_ids`, 0 outside the mask.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prepared rows (see `prepare_rows`), the same on every process.
            reference (`"policy"` or `"reference"`, *optional*, defaults to `"policy"`):
                `"policy"` makes the weights being trained, as they are now, the reference: log-ratios of these rows
                restart at 0, and where the loss needs the reference's whole distributions, `refresh_reference` is
                called so that both agree. `"reference"` takes the trainer's present reference.
            batch_size (`int`, *optional*):
                Rows per forward pass and process. Defaults to `precompute_ref_batch_size`, or the training batch size.

        Returns:
            [`~datasets.Dataset`]: the rows with `ref_logps`, complete on every process. Where the rows are files, the
            column is one beside them, and memory holds a few rows of it.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "Reference log-probabilities cannot be precomputed for an IterableDataset: they are columns of rows "
                "that exist. Use a map-style Dataset, or `precompute_ref_log_probs=False`."
            )
        if "ref_logps" in dataset.column_names:
            dataset = dataset.remove_columns("ref_logps")
        if reference == "policy" and self._needs_reference_distributions:
            self.refresh_reference()
        batch_size = batch_size or self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        loader = self.accelerator.prepare(loader)
        with self._reference_forward(reference) as model:
            return with_list_column(dataset, "ref_logps", self._reference_rows(model, dataset, loader, desc))

    def _reference_rows(self, model: nn.Module, dataset: Dataset, loader: DataLoader, desc: str) -> Iterator[Any]:
        """`ref_logps` of one row after another, as arrays."""
        # Column t scores token t + 1, so the completion's first token is scored by column len(prompt) - 1
        starts = list_lengths(dataset, "prompt_ids") - 1
        spans = zip(starts, starts + list_lengths(dataset, "completion_ids"), strict=True)
        for batch in tqdm(iterable=loader, desc=desc, disable=bool(os.environ.get("TQDM_DISABLE", ""))):
            logps, _, _ = self._score_by_reference(model, batch)
            logps = self.accelerator.pad_across_processes(logps.float(), dim=1)
            logps = self.accelerator.gather_for_metrics(logps).cpu().numpy()
            for row, (start, end) in zip(logps, itertools.islice(spans, len(logps)), strict=True):
                yield row[start:end]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if isinstance(dataset, Dataset) and "ref_logps" in dataset.column_names:
            return dataset  # rows that bring their reference
        desc = f"Computing reference log probs for {name} dataset"
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed: what comes next would start otherwise
            return self.compute_reference_columns(dataset, "reference", batch_size, desc)

    # The reference itself

    def refresh_reference(self) -> None:
        """
        Makes the policy, as it is now, the reference; log-ratios and KL restart at 0.

        Copies the weights into the reference model, or the trained adapter into the frozen adapter `ref`. Columns
        `ref_logps` of rows are left alone: recompute them with `compute_reference_columns`. Where the trainer holds no
        reference (all rows bring their own), nothing is done.

        Raises:
            `ValueError`: where DeepSpeed or FSDP1 manages the weights, or FSDP those of a LoRA policy.
        """
        policy = self.accelerator.unwrap_model(self.model)
        fsdp2 = self.is_fsdp_enabled and self.accelerator.is_fsdp2
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and (not fsdp2 or is_peft_model(policy))):
            raise ValueError(
                "The weights are sharded, so the reference cannot be refreshed in place: that works with FSDP2 and "
                "full fine-tuning only. Set `kl_coef=0`, which needs no reference but columns of the rows, or train "
                "with DDP."
            )
        if self.ref_model is not None and fsdp2:
            copy_parameters(policy, self.ref_model)
            self._reference_moved = True
        elif self.ref_model is not None:
            self._replace_reference(policy.state_dict())
        elif is_peft_model(policy):
            if "ref" not in policy.peft_config:
                policy.add_adapter("ref", policy.peft_config["default"])
            with torch.no_grad():
                for name, parameter in policy.named_parameters():
                    if ".default." in name:
                        target = policy.get_parameter(name.replace(".default.", ".ref."))
                        target.copy_(parameter)
                        target.requires_grad_(False)

    def _replace_reference(self, weights: dict[str, Tensor]) -> None:
        """Gives the reference model new parameters: the old ones may be the base of the value model, which stays."""
        for module_name, module in self.accelerator.unwrap_model(self.ref_model).named_modules():
            prefix = f"{module_name}." if module_name else ""
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    copied = weights[f"{prefix}{name}"].detach().to(parameter).clone()
                    setattr(module, name, nn.Parameter(copied, requires_grad=False))
        self._reference_moved = True

    def _hold_reference_model(self) -> None:
        """Keeps a frozen copy of the policy where distributions are needed and nothing else can give them."""
        if self.ref_model is not None or is_peft_model(self.model):
            return
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "Precomputed reference log-probabilities (also those of a `ToolRolloutGenerator`) leave no reference "
                "model, but the KL term needs the reference's whole distributions. Set `kl_coef=0`, use FSDP2, or, "
                "with fixed rows, `precompute_ref_log_probs=False`."
            )
        if self._row_source is None:
            logger.warning(
                "`precompute_ref_log_probs=True` saves no memory here: the KL term needs the reference's whole "
                "distributions, so a reference model is kept. Set `kl_coef=0` to do without."
            )
        reference: Any = frozen_copy(self.model)
        _upstream.add_fused_lm_head(reference)
        if self.is_fsdp_enabled:
            self.ref_model = _upstream.prepare_fsdp(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference.eval(), evaluation_mode=True)

    # Checkpoints: a reference that was refreshed is part of the training state (PEFT saves the adapter `ref` itself)

    def _save_checkpoint(self, model, trial) -> None:
        # Before the rest: a checkpoint counts as complete once its state, the parent's last file, is there
        if self._reference_moved and self.ref_model is not None:
            reference, weights = self.accelerator.unwrap_model(self.ref_model), None
            if self.is_fsdp_enabled:  # all processes gather
                names = {name for name, _ in reference.named_parameters()}
                weights = {name: whole.cpu() for name, whole in whole_parameters(reference, names)}
            if self.args.should_save:
                checkpoint = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
                reference.save_pretrained(checkpoint / REFERENCE_MODEL_FOLDER, state_dict=weights)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint, REFERENCE_MODEL_FOLDER)
        if self.ref_model is not None and folder.exists():
            reference = self.accelerator.unwrap_model(self.ref_model)
            saved = type(reference).from_pretrained(folder, dtype=reference.dtype).state_dict()
            if self.is_fsdp_enabled:
                write_parameters(reference, set(saved), saved.__getitem__)
                self._reference_moved = True
            else:
                self._replace_reference(saved)
