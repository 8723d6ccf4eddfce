from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..outcomes.outcome_config import OutcomeConfig, check_numbers


@dataclass
class ValueBasedConfig(OutcomeConfig):
    # docstyle-ignore
    """
    Parameters that [`OREOConfig`] and [`DQOConfig`] share: the value model beside the policy.

    For the other parameters see [`OutcomeConfig`] and [`~trl.KTOConfig`].

    Parameters:
        > Parameters that control the value model

        value_model (`str`, *optional*, defaults to `"adapter"`):
            `"adapter"`: LoRA layers over a frozen base whose weights are shared with the LoRA policy's base, or with
            the reference model under full fine-tuning. `"full"`: a second model. `"head"`: a linear head on the
            policy's own hidden states, detached.
        value_objective (`str`, *optional*, defaults to `"regression"`):
            How the value model learns. `"regression"`: towards the soft Bellman equation, as the papers do.
            `"classification"`: by the cross-entropy of the outcome at every action token, for rewards of 1 and 0
            without process rewards; the soft value `β log(1 − p + p e^(1/β))` that the policy loss needs is computed
            from it. `p` is the chance under the policy that sampled the rows, which should be the reference; the soft
            value is exact for tools whose answers are certain.
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

    # Parameters that control the value model
    value_model: Literal["adapter", "full", "head"] = field(
        default="adapter",
        metadata={
            "help": "Where the value model's hidden states come from: LoRA layers over a shared frozen base "
            "('adapter'), a second model ('full'), or the policy itself ('head').",
            "choices": ["adapter", "full", "head"],
        },
    )
    value_objective: Literal["regression", "classification"] = field(
        default="regression",
        metadata={
            "help": "How the value model learns: towards the soft Bellman equation ('regression'), or by the "
            "cross-entropy of the outcome, 1 or 0, at every action token ('classification').",
            "choices": ["regression", "classification"],
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
        if self.value_model not in ("adapter", "full", "head"):
            raise ValueError(f"`value_model` must be 'adapter', 'full' or 'head', got {self.value_model!r}.")
        if self.value_objective not in ("regression", "classification"):
            raise ValueError(
                f"`value_objective` must be 'regression' or 'classification', got {self.value_objective!r}."
            )
        check_numbers(
            self,
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


def _negative(number: float | None) -> bool:
    return number is not None and number < 0
