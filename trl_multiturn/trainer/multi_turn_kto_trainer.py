from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import KTOConfig, KTOTrainer

from .. import _upstream
from ..data.collators import DataCollatorForMultiTurnUnpairedPreference
from ..data.row_checks import check_column, check_label, find_format, first_row
from ..data.tokenization import tokenize_unpaired_row
from ..data.truncation import UNPAIRED_SIDES
from ..data.unpaired import add_mismatched_completions, tokenize_interleaved, unpair_interleaved
from ..formats import IMAGE_COLUMNS, columns_read
from .loop.iterative import IterativeTrainerMixin
from .multi_turn_dpo_trainer import MultiTurnDPOTrainer
from .packed import PackedTrainerMixin
from .policy import PolicyMixin
from .rows.image_rows import ModelWithImages
from .rows.token_rows import TokenRowsMixin


logger = get_logger(__name__)


class MultiTurnKTOTrainer(PackedTrainerMixin, IterativeTrainerMixin, PolicyMixin, TokenRowsMixin, KTOTrainer):
    """
    Trainer for multi-turn Kahneman-Tversky Optimization (M-KTO).

    The method of [Building Math Agents with Multi-Turn Iterative Preference
    Learning](https://huggingface.co/papers/2409.02392) (eq. 13, with the temperature applied once): KTO on
    trajectories, where only tokens that the policy sampled enter the log-probabilities, those of the mismatched
    completions of the KL term included.

    A drop-in for [`~trl.KTOTrainer`]: the same arguments in the same order, a plain [`~trl.KTOConfig`] accepted, every
    option of the parent works with the masks on.

    `train_dataset` holds text rows (`prompt`, `completion`, `label`, optionally `tools`, `chat_template_kwargs`), or
    token rows (`prompt_ids`, `completion_ids`, `action_mask`, `label`), which are used as they are. Preference rows
    (`prompt`, `chosen`, `rejected`) are taken apart with alternating labels. Other columns are ignored.

    Rows are cut to `max_length` at the end of a turn where one fits, and dropped where no trained token is left; the
    counts are logged once as `data/…`.
    """

    _tag_names = ["trl", "kto", "multi-turn"]
    _name = "Multi-Turn KTO"
    _paper = MultiTurnDPOTrainer._paper

    _sides = UNPAIRED_SIDES
    _text_formats: list[tuple[str, ...]] = [("chosen", "rejected"), ("prompt", "completion", "label")]
    args: KTOConfig
    _reference_columns: tuple[str, ...] = ("ref_logps", "ref_KL_logps")
    _extra_signature_columns: tuple[str, ...] = (
        "KL_action_mask",
        "KL_branches",
        "KL_completion_images",
        "KL_completion_image_tokens",
        *IMAGE_COLUMNS,
    )
    _upstream_collator = "DataCollatorForUnpairedPreference"
    _collator_class = DataCollatorForMultiTurnUnpairedPreference

    # What the collator made of the images of a batch's mismatched completions
    _mismatched_images: dict[str, Any] = {}

    if not TYPE_CHECKING:  # checkers read the parent's signature
        # Help and completion show the parent's arguments, which are passed on as they are
        @functools.wraps(KTOTrainer.__init__)
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: KTOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        first = first_row(dataset, dataset_name)
        images = self._find_images(first, processing_class, args, dataset_name)
        dataset = self._read_rows(dataset, first, processing_class, args, images, dataset_name)
        with _upstream.global_then_local_main_first():
            dataset = self._fit(dataset, args, dataset_name)
            dataset = self._fit_images(dataset) if images else dataset
            if self.calculate_KL:
                dataset = add_mismatched_completions(dataset, args.per_device_train_batch_size)
        return dataset

    def _read_rows(
        self,
        dataset: Dataset | IterableDataset,
        first: dict[str, Any],
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: KTOConfig,
        images: bool,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Token rows, of whatever the rows are."""
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):  # an IterableDataset takes neither
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} dataset"}
        row_format = find_format(first, self._text_formats, self._sides, dataset_name)
        if row_format == "tokens" and "label" not in first:
            raise ValueError(
                f"The token rows of the {dataset_name} dataset have no `label`, so nothing says which completions are "
                "good. Add the column, with True or False in each row."
            )
        if row_format == "text" and not images:
            return self._tokenize_text(dataset, first, processing_class, args, dataset_name, map_kwargs)
        if row_format == "messages":
            with _upstream.global_then_local_main_first():
                dataset = self._tokenize_messages(dataset, first, processing_class, args, images, map_kwargs)
        elif images:
            dataset = self._read_images(dataset, processing_class, row_format == "tokens", map_kwargs)
        if dataset_name == "train" and isinstance(dataset, Dataset):
            self._warn_about_balance(dataset)  # as the parent does
        return dataset

    def _tokenize_text(
        self,
        dataset: Dataset | IterableDataset,
        first: dict[str, Any],
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: KTOConfig,
        dataset_name: str,
        map_kwargs: dict[str, Any],
    ) -> Dataset | IterableDataset:
        """Plain text has no turns: the parent tokenizes, and every token counts."""
        if {"chosen", "rejected"} <= first.keys():
            with _upstream.global_then_local_main_first():
                if "prompt" not in first:
                    dataset = dataset.map(_upstream.extract_prompt, **map_kwargs)
                dataset = unpair_interleaved(dataset, **map_kwargs)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with _upstream.global_then_local_main_first():
            return dataset.map(_add_full_mask, **map_kwargs)

    def _tokenize_messages(
        self,
        dataset: Dataset | IterableDataset,
        first: dict[str, Any],
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: KTOConfig,
        images: bool,
        map_kwargs: dict[str, Any],
    ) -> Dataset | IterableDataset:
        options = self._rendering_options(args)
        if columns_read(first) >= {"chosen", "rejected"}:
            if not images:
                return tokenize_interleaved(dataset, processing_class, *options, **map_kwargs)
            raise ValueError(
                "Pairs with images are not taken apart here, which would copy every image. Unpair your dataset first "
                "(`unpair_preference_dataset`), so that each row has a `completion`, a `label` and its own images."
            )
        return self._tokenize_rows(dataset, tokenize_unpaired_row, processing_class, options, images, map_kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.vision is not None:
            # The parent passes what it does not know on to the model
            self._mismatched_images = self.vision.select(inputs, "KL_")
            known = ("KL_token_type_ids", "KL_mm_token_type_ids")
            unknown = {f"KL_{name}" for name in self._mismatched_images}.difference(known)
            inputs = {name: value for name, value in inputs.items() if name not in unknown}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_kl_logps(self, model, batch):
        return super()._compute_kl_logps(model, {**batch, **self._mismatched_images})

    def compute_ref_log_probs(self, model, inputs):
        if self.vision is not None:
            model = ModelWithImages(model, inputs, self.vision)  # the parent passes ids and masks alone
        return super().compute_ref_log_probs(model, inputs)

    def _warn_about_balance(self, dataset: Dataset) -> None:
        labels = dataset["label"][:]
        check_column(labels, check_label)
        desirable = sum(labels)
        undesirable = len(labels) - desirable
        if not desirable or not undesirable:
            return
        ratio = self.desirable_weight * desirable / (self.undesirable_weight * undesirable)
        # The range that eq. 8 of the KTO paper (https://huggingface.co/papers/2402.01306) recommends, either way round
        if not (1 <= ratio <= 4 / 3 or 3 / 4 <= ratio <= 1):
            logger.warning(
                f"{desirable} desirable and {undesirable} undesirable rows with weights {self.desirable_weight} and "
                f"{self.undesirable_weight}: one side outweighs the other {max(ratio, 1 / ratio):.2f} times, and the "
                "KTO paper recommends 1 to 1.33. Set `desirable_weight` to about "
                f"{self.undesirable_weight * undesirable / desirable:.2f}, or balance the rows."
            )


def _add_full_mask(example: dict[str, Any]) -> dict[str, list[int]]:
    return {"action_mask": [1] * len(example["completion_ids"])}
