"""What the multi-turn trainers add to TRL's: a data path that knows which tokens the policy sampled.

Losses are TRL's own and untouched. They read `completion_mask`, and accept a mask with holes; so rows carry mask
columns, the collator copies them into that key, and everything the parent does with it (reference log-probabilities,
`ld_alpha`, weighting, entropy) follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import tqdm
from datasets import Dataset, IterableDataset, concatenate_datasets, is_caching_enabled
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader

from ... import _upstream
from ...data.row_checks import check_column, check_logp
from ...data.truncation import fit_rows
from ...data.turns import branches_column
from ...messages.wording import RenderingSwitches
from .image_rows import ImageRowsMixin


logger = get_logger(__name__)


class TokenRowsMixin(ImageRowsMixin):
    """Rows with ids and masks for a TRL preference trainer; mixed in before the trainer class.

    A trainer names the columns of its completions, its collator and its reference columns; the rest is common.
    """

    # Set by the trainer
    _sides: tuple[tuple[str, str], ...]
    _reference_columns: tuple[str, ...]
    _extra_signature_columns: tuple[str, ...]
    _upstream_collator: str
    _collator_class: type

    # Counts of the last training rows (`data/…`), until they are logged
    row_statistics: dict[str, float] | None = None

    # The parent's constructor computes reference log-probabilities, so the collator must be ours from its first
    # assignment. A property sees every assignment and leaves the parent's constructor as it is.
    @property
    def data_collator(self):
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator):
        if type(collator) is getattr(_upstream, self._upstream_collator):
            collator = self._collator_class(**vars(collator), vision=self.vision)
        elif not isinstance(collator, self._collator_class):
            logger.warning(
                f"You passed a `{type(collator).__name__}` as `data_collator`. Unless it copies the mask columns "
                f"({[mask for _, mask in self._sides]}) into `completion_mask`, tool results are trained on. Subclass "
                f"`{self._collator_class.__name__}` to be safe."
            )
        self._data_collator = collator

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        sides = (name for ids, mask in self._sides for name in (mask, branches_column(ids)))
        columns = [*self._signature_columns, *sides, *self._extra_signature_columns]
        self._signature_columns = list(dict.fromkeys(columns))

    # Rows

    def prepare_rows(self, dataset: Dataset, dataset_name: str = "train") -> Dataset:
        """Turns rows (text or token columns) into rows that this trainer's collator takes.

        Exactly what the constructor does with `train_dataset`; a callback that swaps the training data calls it on
        each new set of rows. Rows that carry ids and masks are used as they are.
        """
        return self._prepare_dataset(dataset, self.processing_class, self.args, dataset_name)

    @staticmethod
    def _needs_turns(args: Any) -> bool:
        """Whether masks tell the policy's tokens from others. Where every token trains, TRL tokenizes as it is."""
        return getattr(args, "mask_observations", True) or getattr(args, "train_on_turns", "all") != "all"

    def _rendering_options(self, args: Any) -> tuple[bool, RenderingSwitches]:
        """How messages become tokens: whether every token trains, and what the configuration says of rendering."""
        return not self._needs_turns(args), RenderingSwitches.of(args)

    def _fit(self, dataset: Dataset | IterableDataset, args: Any, dataset_name: str) -> Dataset | IterableDataset:
        """Chooses trained tokens, truncates and drops (see [`fit_rows`]); keeps and logs the counts."""
        dataset, statistics = fit_rows(
            dataset,
            self._sides,
            max_length=args.max_length,
            truncation_mode=getattr(args, "truncation_mode", "keep_start"),
            mask_observations=getattr(args, "mask_observations", True),
            train_on_turns=getattr(args, "train_on_turns", "all"),
            num_proc=args.dataset_num_proc,
            desc=f"Fitting {dataset_name} dataset to max_length",
        )
        self._check_given_reference(dataset, statistics, args, dataset_name)
        if dataset_name == "train" and statistics:
            self.row_statistics = statistics
        self._warn_about(statistics, args, dataset_name)
        return dataset

    def _check_given_reference(self, dataset: Any, statistics: dict[str, float], args: Any, dataset_name: str) -> None:
        """Sums of the user's reference are of whole completions, and are read only where they are asked for."""
        given = [column for column in self._reference_columns if column in (dataset.column_names or ())]
        cut = sum(statistics.get(f"data/rows_cut_{where}", 0) for where in ("at_segment", "at_turn", "inside_turn"))
        if given and not args.precompute_ref_log_probs:
            logger.warning(
                f"The {dataset_name} dataset has the columns {given}, which are not used: the reference scores each "
                "batch. Set `precompute_ref_log_probs=True` to use them."
            )
        elif given and cut:
            raise ValueError(
                f"`max_length={args.max_length}` cuts {cut} rows of the {dataset_name} dataset, but {given} are sums "
                "over whole completions, so they would not fit. Raise `max_length`, or remove the columns."
            )

    def _warn_about(self, statistics: dict[str, float], args: Any, dataset_name: str) -> None:
        if statistics.get("data/rows_dropped"):
            logger.warning(
                f"Dropped {statistics['data/rows_dropped']} of "
                f"{statistics['data/rows'] + statistics['data/rows_dropped']} rows of the {dataset_name} dataset: "
                f"{statistics['data/rows_dropped_untrained']} without a trained token within "
                f"`max_length={args.max_length}`, {statistics['data/rows_dropped_identical']} whose sides are "
                "identical there."
            )
        self._warn_about_segments(statistics, args, dataset_name)
        if args.max_length is not None and statistics.get("data/length_p95", 0) > args.max_length:
            logger.warning(
                f"The 95th percentile of lengths in the {dataset_name} dataset is "
                f"{statistics['data/length_p95']:.0f} tokens, above `max_length={args.max_length}`: "
                f"{statistics['data/rows_cut_at_turn']} rows were cut at the end of a turn and "
                f"{statistics['data/rows_cut_inside_turn']} inside one. Raise `max_length` to train on whole "
                "trajectories."
            )

    def _warn_about_segments(self, statistics: dict[str, float], args: Any, dataset_name: str) -> None:
        if statistics.get("data/rows_cut_at_segment"):
            logger.warning(
                f"{statistics['data/rows_cut_at_segment']} rows of the {dataset_name} dataset are longer than "
                f"`max_length={args.max_length}` and lost their first segments: what the policy sampled there does "
                "not train. Raise `max_length` to train on whole trajectories."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.row_statistics is not None and self.model.training:
            logs.update(self.row_statistics)
            self.row_statistics = None
        super().log(logs, start_time)

    # Reference log-probabilities

    def compute_reference_columns(
        self,
        dataset: Dataset,
        reference: Literal["policy", "reference"] = "policy",
        batch_size: int | None = None,
        desc: str = "Computing reference log-probabilities",
    ) -> Dataset:
        """Adds (or replaces) the columns of precomputed reference log-probabilities.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prepared rows (see `prepare_rows`), the same on every process.
            reference (`"policy"` or `"reference"`, *optional*, defaults to `"policy"`):
                `"policy"` takes the weights being trained as they are now, adapters on: rewards and margins of these
                rows restart at 0 (to rounding, where a batch pads a row to another length than here), and no second
                model is held. `"reference"` takes the trainer's own reference (its
                `ref_model`, the `ref` adapter, or the base model below a new adapter).
            batch_size (`int`, *optional*):
                Rows per forward pass and process. Defaults to `precompute_ref_batch_size`, or the training batch size.

        Returns:
            [`~datasets.Dataset`]: the rows with `ref_chosen_logps` and `ref_rejected_logps`, or `ref_logps` and
            `ref_KL_logps`. Complete on every process.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "Reference log-probabilities cannot be precomputed for an IterableDataset: they are columns of rows "
                "that exist. Use a map-style Dataset, or `precompute_ref_log_probs=False`."
            )
        stale = [column for column in self._reference_columns if column in dataset.column_names]
        dataset = dataset.remove_columns(stale)
        batch_size = batch_size or self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        loader = self.accelerator.prepare(loader)
        columns: list[list[torch.Tensor]] = []
        disable = bool(os.environ.get("TQDM_DISABLE", ""))
        with self._reference_forward(reference) as model:
            for batch in tqdm(iterable=loader, desc=desc, disable=disable):
                logps = [values for values in self.compute_ref_log_probs(model, batch) if values is not None]
                logps = self.accelerator.gather_for_metrics(tuple(logps))
                columns.append([values.float().cpu() for values in logps])
        values = [torch.cat(parts).tolist() for parts in zip(*columns, strict=True)]
        names = self._reference_columns[: len(values)]
        added = Dataset.from_dict(dict(zip(names, values, strict=True)))
        return concatenate_datasets([dataset, added], axis=1)

    @contextmanager
    def _reference_forward(self, reference: str) -> Iterator[torch.nn.Module]:
        """The model to score with, in evaluation mode. The parent's forward pass decides by `ref_model` whether to
        switch adapters, so the policy with its adapters on is scored by standing in for `ref_model`."""
        if reference not in ("policy", "reference"):
            raise ValueError(f"`reference` must be 'policy' or 'reference', got {reference!r}.")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        policy = self.model_wrapped if sharded else self.model
        model = policy if reference == "policy" or self.ref_model is None else self.ref_model
        held, was_training = self.ref_model, model.training
        model.eval()
        if reference == "policy":
            self.ref_model = model
        try:
            yield model
        finally:
            self.ref_model = held
            model.train(was_training)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if isinstance(dataset, Dataset) and self._brings_reference(dataset, name):
            return dataset
        # The parent writes a cache file that every process then opens. Rows in memory have no folder in common, and
        # each process would look into its own; computing without a file needs none.
        on_disk = isinstance(dataset, Dataset) and bool(dataset.cache_files) and is_caching_enabled()
        if isinstance(dataset, Dataset) and not on_disk and not self.is_deepspeed_enabled:
            desc = f"Computing reference log probs for {name} dataset"
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed: what comes next would start otherwise
                return self.compute_reference_columns(dataset, "reference", batch_size, desc)
        # The parent's cache key is the rows and the model. What else decides the values must be in it.
        model_hash = self._precompute_model_hash
        settings = (getattr(self, "ld_alpha", None), self.args.max_length, getattr(self.args, "truncation_mode", None))
        self._precompute_model_hash = Hasher.hash((model_hash, settings))
        try:
            with torch.random.fork_rng(devices=[]):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = model_hash

    def _brings_reference(self, dataset: Dataset, name: str) -> bool:
        """Whether the rows bring log-probabilities of the user's own reference, which are then used as they are."""
        wanted = [c for c in self._reference_columns if c != "ref_KL_logps" or getattr(self, "calculate_KL", False)]
        found = [column for column in wanted if column in dataset.column_names]
        if not found:
            return False
        if found != wanted:
            raise ValueError(
                f"The {name} dataset has the column {found}, but the reference needs {wanted}: with one of them alone "
                "the others would come from another reference. Give all of them, or none."
            )
        for column in found:
            check_column(dataset[column], check_logp)
        return True
