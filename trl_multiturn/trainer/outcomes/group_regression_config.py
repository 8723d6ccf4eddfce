from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .outcome_config import OutcomeConfig, check_numbers


@dataclass
class GroupRegressionConfig(OutcomeConfig):
    # docstyle-ignore
    """
    Configuration class for the [`GroupRegressionTrainer`].

    For the other parameters see [`OutcomeConfig`], [`PackedConfig`] and [`~trl.KTOConfig`].

    Parameters:
        > Parameters that control the loss

        baseline (`str`, *optional*, defaults to `"variance"`):
            What a trajectory's return is held against. `"variance"`: the returns less β times the log-ratios of its
            group, whose variance is the loss ([AGRO](https://huggingface.co/papers/2503.19612)); right whoever sampled
            the rows. `"soft_mean"`: β₁ log mean exp(R/β₁) of the group, right where the reference sampled the rows
            ([A*-PO](https://huggingface.co/papers/2505.20686), [OAPL](https://huggingface.co/papers/2602.19362)).
            `"mean"`: the mean return of the group ([Kimi k1.5](https://huggingface.co/papers/2501.12599)).
        baseline_beta (`float`, *optional*):
            β₁ of `"soft_mean"`. Defaults to `beta`, with which the optimum is that of the KL-regularized reward.
        behavior_reference (`bool`, *optional*, defaults to `False`):
            Whether the policy that sampled the rows is the reference (OAPL), by their column `behavior_logps`; then no
            reference model is held. Otherwise it is that of [`~trl.KTOTrainer`], or of the rows' `ref_logps`, and in a
            [`ToolRolloutGenerator`] that of its `reference`.
        group_by_prompt (`bool`, *optional*, defaults to `True`):
            Whether the rows of a group follow each other, so that they share a batch and, packed, their prompt.
    """

    baseline: Literal["variance", "soft_mean", "mean"] = field(
        default="variance",
        metadata={
            "help": "What a trajectory's return is held against: the returns less beta times the log-ratios of its "
            "group, whose variance is the loss ('variance', AGRO); the group's soft mean ('soft_mean', A*-PO, OAPL); "
            "or its mean ('mean').",
            "choices": ["variance", "soft_mean", "mean"],
        },
    )
    baseline_beta: float | None = field(
        default=None, metadata={"help": "Reward per nat of the soft mean. Defaults to `beta`."}
    )
    behavior_reference: bool = field(
        default=False,
        metadata={
            "help": "Whether the policy that sampled the rows is the reference, by their column `behavior_logps`."
        },
    )
    group_by_prompt: bool = field(
        default=True,
        metadata={"help": "Whether the rows of a group follow each other within the shuffled order."},
    )

    def __post_init__(self):
        if self.baseline not in ("variance", "soft_mean", "mean"):
            raise ValueError(f"`baseline` must be 'variance', 'soft_mean' or 'mean', got {self.baseline!r}.")
        if self.baseline_beta is not None:
            check_numbers(self, baseline_beta=(not self.baseline_beta > 0, "above 0: it divides the returns"))
        if self.baseline == "variance" and self.max_tokens_per_batch is not None:
            raise ValueError(
                "`max_tokens_per_batch` computes a batch in parts, but `baseline='variance'` compares the rows of a "
                "group, which would be in different parts. Lower `per_device_train_batch_size` instead, or use "
                "`baseline='soft_mean'` or `'mean'`, whose baselines are computed before training."
            )
        if self.behavior_reference:
            self.precompute_ref_log_probs = True  # the rows bring them, and no reference model is loaded
        super().__post_init__()
        if self.baseline_beta is None:
            self.baseline_beta = self.beta
