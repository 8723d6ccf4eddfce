"""What must hold of the policy that a trainer is given, and which reference belongs to it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .host import TrainerHost, constructor_arguments


logger = get_logger(__name__)


class PolicyMixin(TrainerHost):
    """Mixed in before a TRL trainer: a policy that cannot learn is refused, and an instance is its own reference."""

    if not TYPE_CHECKING:  # checkers read the TRL trainer's signature

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = constructor_arguments(self, args, kwargs)
            model = given.get("model")
            if isinstance(model, (PreTrainedModel, PeftModel)):
                if given.get("peft_config") is None:
                    refuse_frozen_policy(model)
                _refuse_tied_trainable_tokens(model, given.get("peft_config"))
            _tell_ignored_arguments(given.get("args"))
            if _loads_reference_from_disk(given):
                given["ref_model"] = frozen_copy(given["model"])
            super().__init__(**given)
            refuse_frozen_policy(self.model)


def refuse_frozen_policy(model: nn.Module) -> None:
    """
    Raises `ValueError` for a policy without a trainable weight.

    Its steps would log a loss, and with a value model also a gradient norm, and move nothing.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    cause = (
        "Its adapter was loaded for inference: load it with `PeftModel.from_pretrained(…, is_trainable=True)`, or "
        "pass a `peft_config` with the base model to train a new one"
        if is_peft_model(model)
        else "Call `model.requires_grad_(True)` (merging an adapter leaves weights frozen), or pass a `peft_config`"
    )
    raise ValueError(
        f"The policy (`{type(model).__name__}`) has no trainable weight, so no step would change it. {cause}."
    )


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, weights and all, without gradients: a reference for the policy that it becomes."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)  # that of an earlier trainer falls back on the policy's own
    return copied.requires_grad_(False)


def _loads_reference_from_disk(arguments: dict[str, Any]) -> bool:
    """Whether the parent would read the reference of a policy instance from the folder that its config names.

    The instance may hold other weights than that folder: a merged adapter, a few steps of training, a new token.
    """
    model, args = arguments.get("model"), arguments.get("args")
    if not isinstance(model, nn.Module) or is_peft_model(model) or arguments.get("peft_config") is not None:
        return False
    if arguments.get("ref_model") is not None or getattr(args, "precompute_ref_log_probs", False):
        return False
    if is_deepspeed_zero3_enabled():
        logger.warning(
            "The policy was passed as an instance under ZeRO-3, whose weights are in shards, so the reference is read "
            f"from {getattr(model.config, '_name_or_path', '')!r}. If the instance holds other weights, pass "
            "`ref_model`."
        )
        return False
    return True


def _refuse_tied_trainable_tokens(model: PreTrainedModel | PeftModel, peft_config: Any) -> None:
    configs = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    if not any(getattr(config, "trainable_token_indices", None) for config in configs):
        return
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise ValueError(
            "`trainable_token_indices` is set, and the model ties its output layer to its embeddings: the output "
            "layer then has no weight of its own from which log-probabilities could be computed in parts. Train the "
            "embeddings whole (`modules_to_save=['embed_tokens']`), or untie them (`tie_word_embeddings=False`)."
        )


def _tell_ignored_arguments(args: Any) -> None:
    smoothing = getattr(args, "label_smoothing_factor", 0.0)
    if smoothing:
        logger.warning(
            f"`label_smoothing_factor={smoothing}` smooths the labels of a cross-entropy, which these losses do not "
            "have: it has no effect. `label_smoothing` of `DPOConfig` smooths preferences."
        )
