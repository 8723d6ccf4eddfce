"""Rows with images in a trainer: prepared like others, with a processor instead of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from ... import _upstream
from ...data.images.fitting import drop_cut_images
from ...data.images.rows import read_token_rows, tokenize_image_rows, tokenize_numbered_text
from ...data.tokenization import Tokenize, row_tokenization_kwargs, tokenize_numbered_row
from ...data.turns import branches_column
from ...formats import has_images
from ...images.vision import Vision, vision_of
from ...messages.wording import RenderingSwitches
from ..host import TrainerHost


class ImageRowsMixin(TrainerHost):
    """Prepares rows of messages, with or without images, for a TRL preference trainer.

    TRL reads rows with images while a batch is collated, where nobody could tell which tokens are the policy's. Here
    they are token rows like others by then, and the collator adds what the processor makes of the images.
    """

    _sides: tuple[tuple[str, str], ...]

    # Of the processor, once rows with images have been seen
    vision: Vision | None = None

    # The parent's constructor asks whether to leave the preparation of rows to a collator of its own
    @property
    def _is_vision_dataset(self) -> bool:
        return False

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, found: bool) -> None:
        pass

    def _find_images(self, first: dict[str, Any], processing_class: Any, args: Any, dataset_name: str) -> bool:
        """Whether the rows of a dataset hold images, which this trainer can then read.

        Raises:
            `ValueError`: if it cannot.
        """
        if not has_images(first):
            return False
        if not isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"The {dataset_name} dataset appears to be vision-related (it has image columns or image parts), but "
                f"the model does not seem to be a vision-language model: a `{type(processing_class).__name__}` reads "
                "text alone. Pass such a model with its processor, or remove the images."
            )
        if getattr(args, "truncation_mode", "keep_start") == "keep_end" and args.max_length is not None:
            raise ValueError(
                "truncation_mode='keep_end' is not supported for vision-language models: it cuts the prompt, and the "
                "tokens of its images with it. Use `truncation_mode='keep_start'`, or `max_length=None`."
            )
        if args.precompute_ref_log_probs and not self._is_constructed:
            raise ValueError(
                "`precompute_ref_log_probs=True` is not supported for vision datasets, as in TRL, whose cache knows "
                "nothing of pixels. Set it to False; `compute_reference_columns` works on prepared rows."
            )
        if getattr(args, "max_tokens_per_batch", None) is not None:
            raise ValueError(
                "`max_tokens_per_batch` computes a batch in parts, but the pixels of its rows stand in one tensor. "
                "Lower `per_device_train_batch_size` instead."
            )
        self.vision = self.vision or vision_of(processing_class)
        if self._is_constructed and hasattr(self.data_collator, "vision"):
            self.data_collator.vision = self.vision
        return True

    def _image_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model takes of images."""
        return {} if self.vision is None else self.vision.select(batch)

    @property
    def _is_constructed(self) -> bool:
        return hasattr(self, "accelerator")

    def _tokenize_rows(
        self,
        dataset: Dataset | IterableDataset,
        tokenize: Tokenize,
        processing_class: Any,
        options: tuple[bool, RenderingSwitches],
        images: bool,
        map_kwargs: dict[str, Any],
    ) -> Dataset | IterableDataset:
        """Rows of messages as token rows; `options` are those of [`row_tokenization_kwargs`]."""
        if images:
            return tokenize_image_rows(dataset, processing_class, tokenize, self._sides, *options, **map_kwargs)
        fn_kwargs = row_tokenization_kwargs(dataset, processing_class, tokenize, *options)
        return dataset.map(tokenize_numbered_row, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def _read_images(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        token_rows: bool,
        map_kwargs: dict[str, Any],
    ) -> Dataset | IterableDataset:
        """Token rows, or rows of text, that hold images."""
        with _upstream.global_then_local_main_first():
            if token_rows:
                return read_token_rows(dataset, processing_class, self._sides, **map_kwargs)
            fn_kwargs = {"sides": self._sides, "processing_class": processing_class}
            return dataset.map(tokenize_numbered_text, with_indices=True, fn_kwargs=fn_kwargs, **map_kwargs)

    def _fit_images(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Rows that fit `max_length`, with the images that are left of them.

        Raises:
            `ValueError`: if a trajectory is more than one token sequence.
        """
        assert self.vision is not None
        present = dataset.column_names or next(iter(dataset))
        if any(branches_column(ids) in present for ids, _ in self._sides):
            raise ValueError(
                "Some trajectories are more than one token sequence (`branches`), whose images cannot be told apart "
                "in one row. Write a row for each sequence, or drop the images."
            )
        sides = [(ids, mask) for ids, mask in self._sides if _has_own_images(dataset, ids)]
        return drop_cut_images(dataset, sides, self.vision) if sides else dataset


def _has_own_images(dataset: Dataset | IterableDataset, ids_column: str) -> bool:
    return f"{ids_column.removesuffix('_ids')}_images" in (dataset.column_names or next(iter(dataset)))


class ModelWithImages:
    """A model whose calls, made for text alone, get the images of a batch; KTO's mismatched sequences have their own.

    Args:
        model (`Callable`): called with keyword arguments.
        batch (`Mapping[str, Any]`): what the collator made.
        vision ([`Vision`]): knows which of that is an image's.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any], vision: Vision):
        self._model, self._batch, self._vision = model, batch, vision

    def __call__(self, **kwargs: Any) -> Any:
        images = self._vision.select(self._batch)
        if kwargs["input_ids"] is self._batch.get("KL_input_ids"):
            images |= self._vision.select(self._batch, "KL_")
        return self._model(**kwargs, **images)
