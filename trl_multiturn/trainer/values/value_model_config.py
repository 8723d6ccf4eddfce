from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from ...data.turns import check_train_on_turns
from ..outcomes.outcome_config import check_numbers
from ..packed_config import PackedConfig
from ..rendering_config import RenderingConfig


_LEARNING_RATES = {"full": 1e-5, "adapter": 1e-4, "head": 1e-3}


@dataclass
class ValueModelConfig(RenderingConfig, PackedConfig, TrainingArguments):
    # docstyle-ignore
    """
    Configuration class for [`train_value_model`] and the [`ValueModelTrainer`].

    For the other parameters see [`RenderingConfig`], [`PackedConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        value_model (`str`, *optional*, defaults to `"adapter"`):
            Where the hidden states come from: LoRA layers over the policy's frozen weights (`"adapter"`), a second
            model (`"full"`), or the policy itself below a linear head (`"head"`).
        value_objective (`str`, *optional*, defaults to `"classification"`):
            `"classification"`: the cross-entropy of the outcome, 1 or 0, at every action token. `"regression"`: the
            squared distance to the reward there.
        value_lora_rank (`int`, *optional*, defaults to `64`):
            Rank and alpha of the adapter.
        learning_rate (`float`, *optional*):
            By default 1e-5 for a full model, 1e-4 for an adapter, 1e-3 for a head.
        max_length (`int`, *optional*, defaults to `2048`):
            Longer rows are dropped: a trajectory that is cut has no outcome. If `None`, no row is.
        train_on_turns (`str`, *optional*, defaults to `"all"`):
            As in [`OREOConfig`].
        held_out (`float`, *optional*, defaults to `0.1`):
            Share of the prompts on which the value model is evaluated and not trained, where no evaluation rows are
            given; 0 for none.
        dataset_num_proc (`int`, *optional*):
            Processes that prepare rows.
    """

    value_model: Literal["adapter", "full", "head"] = field(
        default="adapter",
        metadata={
            "help": "Where the hidden states come from: LoRA layers over the policy's frozen weights ('adapter'), a "
            "second model ('full'), or the policy itself below a linear head ('head').",
            "choices": ["adapter", "full", "head"],
        },
    )
    value_objective: Literal["regression", "classification"] = field(
        default="classification",
        metadata={
            "help": "The cross-entropy of the outcome, 1 or 0, at every action token ('classification'), or the "
            "squared distance to the reward there ('regression').",
            "choices": ["regression", "classification"],
        },
    )
    value_lora_rank: int = field(default=64, metadata={"help": "Rank and alpha of the adapter."})
    learning_rate: float | None = field(  # type: ignore[assignment]  # a number from `__post_init__` on
        default=None,
        metadata={"help": "By default 1e-5 for a full model, 1e-4 for an adapter, 1e-3 for a head."},
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Longer rows are dropped: a trajectory that is cut has no outcome."}
    )
    train_on_turns: str = field(
        default="all",
        metadata={
            "help": "Which of the policy's turns are actions: 'all', only the 'last' one, or each 'answer'.",
            "choices": ["all", "last", "answer"],
        },
    )
    held_out: float = field(
        default=0.1,
        metadata={"help": "Share of the prompts to evaluate on where no evaluation rows are given; 0 for none."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare rows."})

    def __post_init__(self):
        check_train_on_turns(self.train_on_turns)
        for name, known in (
            ("value_model", ("adapter", "full", "head")),
            ("value_objective", ("regression", "classification")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}."
                )
        check_numbers(
            self,
            held_out=(not 0 <= self.held_out < 1, "a share of the prompts, at least 0 and below 1"),
            value_lora_rank=(self.value_lora_rank < 1, "at least 1"),
        )
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.value_model]
        super().__post_init__()
