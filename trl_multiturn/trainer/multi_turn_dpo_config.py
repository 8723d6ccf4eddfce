from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from ..data.turns import check_train_on_turns
from .packed_config import PackedConfig
from .rendering_config import RenderingConfig


@dataclass
class MultiTurnDPOConfig(RenderingConfig, PackedConfig, DPOConfig):
    # docstyle-ignore
    """
    Configuration class for the [`MultiTurnDPOTrainer`].

    This class includes only the parameters that are specific to multi-turn DPO. How batches are computed (`packed`,
    `group_by_prompt`, `max_tokens_per_batch`) is described in [`PackedConfig`], how messages are rendered
    (`tool_dialect`, `write_reasoning`, `drop_reasoning`, `training_template`) in [`RenderingConfig`]; for all other
    parameters please refer to the [`~trl.DPOConfig`] documentation. A plain [`~trl.DPOConfig`] works too; the fields
    below then have their defaults.

    Parameters:
        > Parameters that control which tokens are trained

        mask_observations (`bool`, *optional*, defaults to `True`):
            Whether the loss leaves out everything that the policy did not sample: tool results, user turns, role
            headers. `False` trains on every token after the prompt, which is single-turn DPO on the whole trajectory,
            the baseline of the [M-DPO](https://huggingface.co/papers/2409.02392) paper.
        train_on_turns (`str`, *optional*, defaults to `"all"`):
            `"all"` trains every turn of the policy, `"last"` only the last one, `"answer"` the turns that call no
            tool. Turns that the rows flag (`"train": False` on a message, `turn_weights` 0) train in no case.
    """

    mask_observations: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss leaves out everything that the policy did not sample: tool results, user turns, "
            "role headers. `False` trains on every token after the prompt."
        },
    )
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
        super().__post_init__()
