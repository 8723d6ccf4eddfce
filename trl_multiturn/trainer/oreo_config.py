from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .values.value_config import ValueBasedConfig, check_numbers


_KL_COEF = {"token": 0.01, "step": 0.1, "response": 0.3}


@dataclass
class OREOConfig(ValueBasedConfig):
    # docstyle-ignore
    """
    Configuration class for the [`OREOTrainer`].

    Defaults are those of the [OREO](https://huggingface.co/papers/2412.16145) paper (appendix A). For the value model
    see [`ValueBasedConfig`], for all other parameters [`~trl.KTOConfig`].

    Parameters:
        > Parameters that control the loss

        level (`str`, *optional*, defaults to `"token"`):
            What one action of the policy loss is: a token (eq. 9), a reasoning step, or the whole response (eq. 10).
            With tools, users or environments whose answers are not certain, choose `"token"` or `"step"`: one
            residual per response takes their luck for the policy's merit and converges to another policy (see
            [`OREOTrainer`]).
        step_delimiter (`str`, *optional*, defaults to `"turn"`):
            Where a step ends, for `level="step"`: at the end of each assistant turn, also at each `"line"` break, or
            also at each period (`"sentence"`).
        kl_coef (`float`, *optional*):
            α, weight of the exact KL to the reference over the whole vocabulary. Defaults to the paper's 0.01 at the
            token level, 0.1 at the step level, 0.3 at the response level. With 0 no KL is computed.
        kl_chunk_size (`int`, *optional*, defaults to `1024`):
            States whose distributions over the vocabulary exist at once while the KL is computed.
    """

    # Parameters whose default values are overridden
    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate of the policy."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Number of steps, or share of all steps if below 1, of linear warm-up."}
    )

    # Parameters that control the loss
    level: Literal["token", "step", "response"] = field(
        default="token",
        metadata={
            "help": "What one action of the policy loss is. With tools whose answers are not certain, 'response' is "
            "biased; choose 'token' or 'step' there.",
            "choices": ["token", "step", "response"],
        },
    )
    step_delimiter: Literal["turn", "line", "sentence"] = field(
        default="turn",
        metadata={
            "help": "Where a step ends, for `level='step'`: at turns, also at line breaks, or also at periods.",
            "choices": ["turn", "line", "sentence"],
        },
    )
    kl_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the exact KL to the reference. By default 0.01, 0.1 or 0.3 at the token, step or "
            "response level. With 0 no KL is computed."
        },
    )
    kl_chunk_size: int = field(
        default=1024,
        metadata={"help": "States whose distributions over the vocabulary exist at once while the KL is computed."},
    )

    def __post_init__(self):
        if self.level not in _KL_COEF:
            raise ValueError(f"`level` must be 'token', 'step' or 'response', got {self.level!r}.")
        if self.step_delimiter not in ("turn", "line", "sentence"):
            raise ValueError(f"`step_delimiter` must be 'turn', 'line' or 'sentence', got {self.step_delimiter!r}.")
        if self.kl_coef is None:
            self.kl_coef = _KL_COEF[self.level]
        check_numbers(
            self,
            kl_coef=(self.kl_coef < 0, "at least 0: a negative weight would drive the policy away from its reference"),
            kl_chunk_size=(self.kl_chunk_size < 1, "at least 1"),
        )
        super().__post_init__()
