"""Every name of TRL that we use although its documentation does not promise it.

Nothing else in the package imports such a name from TRL, so this table is the whole of what an upstream release can
break; `tests/test_upstream.py` asserts what we rely on for each. Names load on first use: rendering a template needs
neither a trainer nor an engine.
"""

from __future__ import annotations

import importlib
from typing import Any


_HOME = {
    # chat templates
    "add_response_schema": "trl.chat_template_utils",
    "get_training_chat_template": "trl.chat_template_utils",
    "parse_response": "trl.chat_template_utils",
    "supports_tool_calling": "trl.chat_template_utils",
    "prepare_multimodal_messages": "trl.data_utils",
    # datasets
    "extract_prompt": "trl.data_utils",
    "is_conversational": "trl.data_utils",
    "unpair_preference_dataset": "trl.data_utils",
    # collators
    "DataCollatorForPreference": "trl.trainer.dpo_trainer",
    "DataCollatorForUnpairedPreference": "trl.trainer.kto_trainer",
    # models and processes
    "add_fused_lm_head": "trl.trainer.utils",
    "disable_dropout_in_model": "trl.trainer.utils",
    "disable_gradient_checkpointing": "trl.models.utils",
    "global_then_local_main_first": "trl.trainer.utils",
    "pad": "trl.trainer.utils",
    "prepare_deepspeed": "trl.models",
    "prepare_fsdp": "trl.models",
    "unwrap_model_for_generation": "trl.models",
    "use_adapter": "trl.trainer.utils",
    # generation
    "VLLMGeneration": "trl.generation.vllm_generation",
}

__all__ = [*sorted(_HOME), "response_templates", "training_template_pairs"]


def training_template_pairs() -> list[tuple[str, str]]:
    """The chat templates that TRL knows and the training template of each."""
    home = vars(importlib.import_module("trl.chat_template_utils"))
    suffix, training = "_chat_template", "_training_chat_template"
    names = [name.removesuffix(training) for name in home if name.endswith(training)]
    pairs = ((home.get(name + suffix), home[name + training]) for name in names)
    return [(own, other) for own, other in pairs if isinstance(own, str) and isinstance(other, str)]


def response_templates() -> dict[str, dict[str, Any]]:
    """The response templates that TRL knows, by family."""
    home = vars(importlib.import_module("trl.chat_template_utils"))
    return {
        name.removesuffix("_template"): value
        for name, value in home.items()
        if name.endswith("_template") and isinstance(value, dict) and "fields" in value
    }


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOME[name]), name)
    except AttributeError as error:
        raise ImportError(
            f"`{_HOME[name]}` no longer has `{name}`: the installed TRL differs from the versions this package was "
            "tested with. Install a tested TRL (see constraints.txt) or update trl_multiturn."
        ) from error
    globals()[name] = value
    return value
