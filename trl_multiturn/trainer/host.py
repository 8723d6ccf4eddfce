"""The TRL trainer that the mixins of this package are mixed into: what they read of it, and what it was given."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections import defaultdict

    import torch
    from datasets import Dataset, IterableDataset
    from torch import Tensor, nn
    from transformers import Trainer
    from trl import DPOConfig, KTOConfig

    class TrainerHost(Trainer):
        """What `DPOTrainer` and `KTOTrainer` have in common."""

        args: DPOConfig | KTOConfig
        model: Any
        ref_model: Any
        optimizer: Any
        lr_scheduler: Any
        train_dataset: Any
        processing_class: Any
        beta: float
        aux_loss_enabled: bool
        precompute_ref_logps: bool
        _is_vlm: bool
        _is_vision_dataset: bool
        _metrics: dict[str, defaultdict[str, list[float]]]
        _precompute_model_hash: str | None
        _signature_columns: Any
        _tokenizer: Any
        _total_train_tokens: int
        _tp_size: int

        def _prepare_dataset(
            self, dataset: Dataset | IterableDataset, processing_class: Any, args: Any, dataset_name: str
        ) -> Dataset | IterableDataset: ...

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any: ...

        def compute_ref_log_probs(
            self, model: nn.Module, inputs: dict[str, torch.Tensor | Any]
        ) -> tuple[Tensor, Tensor | None]: ...

else:
    TrainerHost = object


def trl_class(cls: type) -> type:
    """The TRL trainer below a class of this package."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("trl."))


def constructor_arguments(trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a TRL trainer's constructor was given, by name. Raises `TypeError` as the call itself would."""
    arguments = inspect.signature(trl_class(type(trainer))).bind(*args, **kwargs).arguments
    return dict(arguments)
