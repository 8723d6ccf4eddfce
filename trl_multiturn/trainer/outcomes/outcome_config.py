from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import KTOConfig

from ...data.turns import check_train_on_turns
from ..packed_config import PackedConfig
from ..rendering_config import RenderingConfig


@dataclass
class OutcomeConfig(RenderingConfig, PackedConfig, KTOConfig):
    # docstyle-ignore
    """
    Parameters that trainers on trajectories with an outcome share.

    For the other parameters see [`RenderingConfig`], [`PackedConfig`] and [`~trl.KTOConfig`]. Of these, `loss_type`,
    `desirable_weight` and `undesirable_weight` belong to KTO's own loss and have no effect.

    Parameters:
        > Parameters that control which tokens are trained

        train_on_turns (`str`, *optional*, defaults to `"all"`):
            Which of the policy's turns are actions: `"all"`, only the `"last"`, or each `"answer"` (the turns that
            call no tool). Turns that the rows flag (`"train": False` on a message, `turn_weights` 0) are none. What is
            no action is context, and what it earned is paid at the last action before it.
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

    def __post_init__(self):
        check_train_on_turns(self.train_on_turns)
        if self.loss_type != "apo_zero_unpaired":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` selects a loss of KTO, but this trainer has its own. Leave it out."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` would move the reference during an epoch, and with it what was "
                "learned against it. Refresh the reference between iterations instead (`refresh_reference`)."
            )
        check_numbers(
            self,
            beta=(not self.beta > 0, "above 0: it is the reward per nat, without which the policy learns nothing"),
        )
        super().__post_init__()


def check_numbers(config: Any, **checks: tuple[bool, str]) -> None:
    """Raises `ValueError` for the first field whose check is true or that is NaN; the text says what it must be."""
    for name, (wrong, must_be) in checks.items():
        value = getattr(config, name)
        if wrong or (value is not None and math.isnan(value)):
            raise ValueError(f"`{name}={value}` must be {must_be}.")
