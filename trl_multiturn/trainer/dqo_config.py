from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .values.value_config import ValueBasedConfig, check_numbers


@dataclass
class DQOConfig(ValueBasedConfig):
    # docstyle-ignore
    """
    Configuration class for the [`DQOTrainer`].

    Defaults are those of the [DQO](https://huggingface.co/papers/2410.09302) paper. For the value model's parameters
    see [`ValueBasedConfig`], for all others [`~trl.KTOConfig`].

    Parameters:
        > Parameters that control the loss

        lam (`float`, *optional*, defaults to `1.0`):
            λ of the returns. 1 regresses to what happened, 0 to the value of the next state; the paper finds 0.95 much
            worse than 1.
        importance_weights (`bool`, *optional*, defaults to `True`):
            Whether a trajectory weighs as much as the present policy would sample it rather than the one that did
            (eq. 3.14). Rows carry `behavior_logps`; without them the reference stands in for the sampling policy.
        importance_log_cap (`float`, *optional*, defaults to `1.0`):
            Largest logarithm of a weight, in nats.
        horizon (`str`, *optional*, defaults to `"token"`):
            What one action is: a `"token"`, a `"turn"`, or the whole `"response"`, which is DRO. With tools, users or
            environments whose answers are not certain, choose `"token"` or `"turn"`: one residual per response takes
            their luck for the policy's merit and converges to another policy (see [`DQOTrainer`]).
    """

    # Parameters whose default values are overridden
    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate of the policy."})

    # Parameters that control the loss
    lam: float = field(
        default=1.0,
        metadata={"help": "λ of the returns: 1 regresses to what happened, 0 to the value of the next state."},
    )
    importance_weights: bool = field(
        default=True,
        metadata={
            "help": "Whether a trajectory weighs as much as the present policy would sample it rather than the one "
            "that did."
        },
    )
    importance_log_cap: float = field(
        default=1.0, metadata={"help": "Largest logarithm of an importance weight, in nats."}
    )
    horizon: Literal["token", "turn", "response"] = field(
        default="token",
        metadata={
            "help": "What one action is: a token, a turn, or the whole response (DRO). With tools whose answers are "
            "not certain, 'response' is biased; choose 'token' or 'turn' there.",
            "choices": ["token", "turn", "response"],
        },
    )

    def __post_init__(self):
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"`lam` must lie in [0, 1], got {self.lam}.")
        if self.horizon not in ("token", "turn", "response"):
            raise ValueError(f"`horizon` must be 'token', 'turn' or 'response', got {self.horizon!r}.")
        check_numbers(self, importance_log_cap=(False, "a number of nats; infinity caps nothing"))
        super().__post_init__()
