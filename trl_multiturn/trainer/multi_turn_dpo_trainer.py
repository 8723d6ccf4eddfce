from __future__ import annotations

import functools
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from .. import _upstream
from ..data.collators import DataCollatorForMultiTurnPreference
from ..data.row_checks import check_column, check_margin, find_format, first_row
from ..data.tokenization import tokenize_preference_row
from ..data.truncation import PREFERENCE_SIDES
from ..formats import IMAGE_COLUMNS
from .loop.iterative import IterativeTrainerMixin
from .packed import PackedTrainerMixin
from .pair_batch import OwnPairLossMixin
from .policy import PolicyMixin
from .rows.token_rows import TokenRowsMixin


# Losses whose argument is beta times the difference of the two log-ratios, to which a margin can be added
_MARGIN_LOSS_TYPES = {"sigmoid", "hinge", "robust", "exo_pair", "discopop", "sft"}


class MultiTurnDPOTrainer(
    OwnPairLossMixin, PackedTrainerMixin, IterativeTrainerMixin, PolicyMixin, TokenRowsMixin, DPOTrainer
):
    """
    Trainer for multi-turn Direct Preference Optimization (M-DPO).

    The method of [Building Math Agents with Multi-Turn Iterative Preference
    Learning](https://huggingface.co/papers/2409.02392) (eq. 12, with winner and loser the right way round): DPO on
    trajectories, where only tokens that the policy sampled enter the log-probabilities.

    A drop-in for [`~trl.DPOTrainer`]: the same arguments in the same order, a plain [`~trl.DPOConfig`] accepted, every
    option of the parent works with the masks on. What differs is the data path. On one-turn rows without tools the
    loss is the parent's, except that the newline some templates print after the end-of-turn token is not trained (no
    policy samples it).

    `train_dataset` holds text rows (`prompt`, `chosen`, `rejected`, optionally `tools`, `chat_template_kwargs`; TRL's
    formats, chosen and rejected may hold many turns), or token rows (`prompt_ids`, `chosen_ids`,
    `chosen_action_mask`, `rejected_ids`, `rejected_action_mask`), which are used as they are. Either may hold a
    `margin`, which is added inside the sigmoid: `-log σ(β (Δchosen − Δrejected) + margin)`. Other columns are ignored.

    Rows are cut to `max_length` at the end of a turn where one fits, and dropped where no trained token is left or the
    two sides became identical; the counts are logged once as `data/…`.

    A loss of your own is a method of a subclass: `loss(batch)` gets a [`PairBatch`] and returns the mean over its
    pairs. Packing, references, metrics and iterations stay as they are.

    Example:

    ```python
    >>> from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer

    >>> trainer = MultiTurnDPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=MultiTurnDPOConfig(output_dir="m-dpo", beta=0.1),
    ...     train_dataset=trajectories,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "multi-turn"]
    _name = "Multi-Turn DPO"
    _paper = {
        "title": "Building Math Agents with Multi-Turn Iterative Preference Learning",
        "id": "2409.02392",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{xiong2025building,
                title        = {{Building Math Agents with Multi-Turn Iterative Preference Learning}},
                author       = {Wei Xiong and Chengshuai Shi and Jiaming Shen and Aviv Rosenberg and Zhen Qin and Daniele Calandriello and Misha Khalman and Rishabh Joshi and Bilal Piot and Mohammad Saleh and Chi Jin and Tong Zhang and Tianqi Liu},
                year         = 2025,
                booktitle    = {The Thirteenth International Conference on Learning Representations, {ICLR} 2025},
            }"""),  # noqa: E501
    }

    _sides = PREFERENCE_SIDES
    args: DPOConfig
    _reference_columns: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps")
    _extra_signature_columns: tuple[str, ...] = ("margin", *IMAGE_COLUMNS)
    _upstream_collator = "DataCollatorForPreference"
    _collator_class = DataCollatorForMultiTurnPreference

    if not TYPE_CHECKING:  # checkers read the parent's signature
        # Help and completion show the parent's arguments, which are passed on as they are
        @functools.wraps(DPOTrainer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):  # an IterableDataset takes neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
        first = first_row(dataset, dataset_name)
        images = self._find_images(first, processing_class, args, dataset_name)
        row_format = find_format(first, [("chosen", "rejected")], self._sides, dataset_name)
        if "margin" in first and isinstance(dataset, Dataset):
            check_column(dataset["margin"], check_margin)
        if row_format == "messages":
            options = self._rendering_options(args)
            arguments = tokenize_preference_row, processing_class, options, images, map_kwargs
            with _upstream.global_then_local_main_first():
                dataset = self._tokenize_rows(dataset, *arguments)
        elif images:
            dataset = self._read_images(dataset, processing_class, row_format == "tokens", map_kwargs)
        elif row_format != "tokens":
            # Plain text has no turns: the parent tokenizes, and every token counts
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            with _upstream.global_then_local_main_first():
                dataset = dataset.map(_add_full_masks, **map_kwargs)
        with _upstream.global_then_local_main_first():
            dataset = self._fit(dataset, args, dataset_name)
            return self._fit_images(dataset) if images else dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self.note_branches(inputs)
        if self.has_own_loss:
            self.install_packed_forwards()
            return self.own_loss(model, inputs, return_outputs)
        if "margin" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_margin_is_defined()
        inputs = dict(inputs)
        margin = inputs.pop("margin")
        # σ(β (Δc − Δr) + m) with Δ = logp − ref: the same as lifting the rejected side's reference by m / β. The
        # parent takes reference log-probabilities from the batch where they are precomputed.
        if not self.precompute_ref_logps:
            scorer = model if self.ref_model is None else self.ref_model  # a compiled model has no truth value
            ref_chosen, ref_rejected = self.compute_ref_log_probs(scorer, inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_chosen, ref_rejected
        inputs["ref_rejected_logps"] = inputs["ref_rejected_logps"] + margin / self.beta
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed
        self._take_margin_out_of_metrics(margin)
        return output

    def compute_ref_log_probs(self, model, inputs):
        # The parent passes what it does not know on to the model
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "margin"})

    def _check_margin_is_defined(self) -> None:
        unsupported = set(self.loss_types) - _MARGIN_LOSS_TYPES
        if unsupported or self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"The rows have a `margin`, which is added to beta times the difference of log-ratios, but "
                f"`loss_type={self.loss_types}` with `f_divergence_type={self.f_divergence_type!r}` has no such term. "
                f"Drop the column, or use `f_divergence_type='reverse_kl'` and losses among "
                f"{sorted(_MARGIN_LOSS_TYPES)}."
            )

    def _take_margin_out_of_metrics(self, margin: torch.Tensor) -> None:
        """Implicit rewards are the policy's; the margin moves the loss only (and `rewards/accuracies`, which counts
        the pairs whose argument of σ is positive)."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        mean = self.accelerator.gather(margin).mean().item()
        metrics["rewards/rejected"][-1] += mean
        metrics["rewards/margins"][-1] -= mean
        metrics["margin"].append(mean)


def _add_full_masks(example: dict[str, Any]) -> dict[str, list[int]]:
    return {f"{side}_action_mask": [1] * len(example[f"{side}_ids"]) for side in ("chosen", "rejected")}
