from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import KTOConfig

from ...data.turns import check_train_on_turns
from ..packed_config import PackedConfig
from ..rendering_config import RenderingConfig


@dataclass
class ValueBasedConfig(RenderingConfig, PackedConfig, KTOConfig):
    # docstyle-ignore
    """
    Parameters that [`OREOConfig`] and [`DQOConfig`] share: the value model beside the policy.

    For the other parameters see [`RenderingConfig`], [`PackedConfig`] and [`~trl.KTOConfig`]. Of these, `loss_type`,
    `desirable_weight` and `undesirable_weight` belong to KTO's own loss and have no effect.

    Parameters:
        > Parameters that control which tokens are trained

        train_on_turns (`str`, *optional*, defaults to `"all"`):
            Which of the policy's turns are actions: `"all"`, only the `"last"`, or each `"answer"` (the turns that
            call no tool). Turns that the rows flag (`"train": False` on a message, `turn_weights` 0) are none. What is
            no action is context, and what it earned is paid at the last action before it.

        > Parameters that control the value model

        value_model (`str`, *optional*, defaults to `"adapter"`):
            `"adapter"`: LoRA layers over a frozen base whose weights are shared with the LoRA policy's base, or with
            the reference model under full fine-tuning. `"full"`: a second model. `"head"`: a linear head on the
            policy's own hidden states, detached.
        value_learning_rate (`float`, *optional*):
            Learning rate of the value model. By default that of the policy for a full model, 1e-4 for an adapter
            (OREO's setting at 7B), 1e-3 for a head.
        value_lora_rank (`int`, *optional*, defaults to `64`):
            Rank of the value adapter; its alpha is the same number, so that its scale is 1.
        value_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start in which only the value model learns. Refused with DeepSpeed.
        value_max_grad_norm (`float`, *optional*):
            Largest gradient norm of the value model, which is clipped apart from the policy: its gradients are larger,
            and a common norm would stop the policy. Defaults to `max_grad_norm`. DeepSpeed clips both together, by
            `max_grad_norm`.
    """

    # Parameters whose default values are overridden from KTOConfig
    beta: float = field(
        default=0.03,
        metadata={"help": "Reward per nat of log-ratio to the reference. Higher values keep the policy closer to it."},
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Maximum length of the tokenized sequence. Longer rows are dropped: a trajectory that is cut has "
            "no outcome. If `None`, no row is."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Sampler to use for the training dataloader. Any will do: there are no KL rows that depend on "
            "their neighbours.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )
    loss_type: str = field(
        default="apo_zero_unpaired",
        metadata={
            "help": "Without effect: the trainer has its own loss. Kept at the KTO loss that needs no KL rows.",
            "choices": ["apo_zero_unpaired"],
        },
    )

    # Parameters that control which tokens are trained
    train_on_turns: str = field(
        default="all",
        metadata={
            "help": "Which of the policy's turns are trained: 'all', only the 'last' one, or each 'answer' (the "
            "turns that call no tool).",
            "choices": ["all", "last", "answer"],
        },
    )

    # Parameters that control the value model
    value_model: Literal["adapter", "full", "head"] = field(
        default="adapter",
        metadata={
            "help": "Where the value model's hidden states come from: LoRA layers over a shared frozen base "
            "('adapter'), a second model ('full'), or the policy itself ('head').",
            "choices": ["adapter", "full", "head"],
        },
    )
    value_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the value model. By default the policy's for a full model, 1e-4 for an adapter, "
            "1e-3 for a head."
        },
    )
    value_lora_rank: int = field(default=64, metadata={"help": "Rank and alpha of the value adapter."})
    value_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which only the value model learns."}
    )
    value_max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Largest gradient norm of the value model, clipped apart. Defaults to `max_grad_norm`."},
    )

    def __post_init__(self):
        check_train_on_turns(self.train_on_turns)
        if self.value_model not in ("adapter", "full", "head"):
            raise ValueError(f"`value_model` must be 'adapter', 'full' or 'head', got {self.value_model!r}.")
        if self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` selects a loss of KTO, but this trainer has its own. Leave it out."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` would move the reference during an epoch, and with it every value that was "
                "learned against it. Refresh the reference between iterations instead (`refresh_reference`)."
            )
        check_numbers(
            self,
            beta=(not self.beta > 0, "above 0: it is the reward per nat, without which the policy learns nothing"),
            value_learning_rate=(_negative(self.value_learning_rate), "at least 0"),
            value_lora_rank=(self.value_lora_rank < 1, "at least 1"),
            value_warmup_steps=(
                self.value_warmup_steps < 0 or self.value_warmup_steps % 1 != 0,
                "a whole number of optimizer steps, at least 0",
            ),
            value_max_grad_norm=(_negative(self.value_max_grad_norm), "at least 0"),
        )
        super().__post_init__()
        if self.value_learning_rate is None:
            rates = {"full": self.learning_rate, "adapter": 1e-4, "head": 1e-3}
            self.value_learning_rate = rates[self.value_model]
        if self.value_max_grad_norm is None:
            self.value_max_grad_norm = self.max_grad_norm


def check_numbers(config: Any, **checks: tuple[bool, str]) -> None:
    """Raises `ValueError` for the first field whose check is true or that is NaN; the text says what it must be."""
    for name, (wrong, must_be) in checks.items():
        value = getattr(config, name)
        if wrong or (value is not None and math.isnan(value)):
            raise ValueError(f"`{name}={value}` must be {must_be}.")


def _negative(number: float | None) -> bool:
    return number is not None and number < 0
