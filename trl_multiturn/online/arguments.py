"""The user's mistakes in the arguments of the online loop, told before anything starts."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from ..rollout.config import RolloutConfig
from ..rollout.judging import Judge
from ..tools.environments import owns_reward


logger = logging.getLogger(__name__)

_CHOICES = {
    "reference": ("previous", "initial"),
    "history": ("latest", "all"),
    "lr_schedule": ("run", "iteration"),
}


def refuse_mistakes(
    prompts: Dataset,
    eval_prompts: Dataset | None,
    judge: Judge,
    environment_factory: Any,
    prompts_per_iteration: int | None,
) -> None:
    """Refuses prompts that cannot be rolled out, and a loop in which nothing judges.

    Raises:
        `ValueError`: naming the argument.
    """
    if not judge and not owns_reward(environment_factory):
        raise ValueError(
            "No `reward_funcs` were given, and no environment with a `get_reward`, so no rollout could be told "
            "from another and no row could be built. Pass for example `reward_funcs=[math_reward]`."
        )
    for name, dataset in (("prompts", prompts), ("eval_prompts", eval_prompts)):
        if dataset is not None and "prompt" not in dataset.column_names:
            raise ValueError(
                f"`{name}` has the columns {dataset.column_names} but no `prompt`, so there is nothing to roll "
                "out from. Add a `prompt` column of messages."
            )
        if dataset is not None and len(dataset) == 0:
            raise ValueError(f"`{name}` is empty, so there is nothing to roll out from. Check how it was filtered.")
        if dataset is not None:
            judge.check_prompts(dataset)
    if prompts_per_iteration is not None and not 1 <= prompts_per_iteration <= len(prompts):
        raise ValueError(
            f"`prompts_per_iteration={prompts_per_iteration}` is not between 1 and the {len(prompts)} prompts."
        )


def refuse_unknown_choices(**given: str) -> None:
    """Refuses a value that is none of an argument's.

    Raises:
        `ValueError`: naming both.
    """
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"`{name}={value!r}` is unknown. Use one of {_CHOICES[name]}.")


def refuse_planned_learning_rate(trainer: Any) -> None:
    """Refuses a DeepSpeed configuration that plans the learning rate before any iteration.

    Raises:
        `ValueError`: naming the section.
    """
    if not trainer.is_deepspeed_enabled:
        return
    fixed = {"optimizer", "scheduler"} & set(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    if fixed:
        raise ValueError(
            f"DeepSpeed's configuration has a section {' and '.join(sorted(fixed))}, with which DeepSpeed "
            "plans the learning rate before the number of steps is known, which every iteration decides. "
            "Remove the section and set `optim`, `learning_rate` and `lr_scheduler_type` in `args`."
        )


def warn_of_cut_rows(rollout: RolloutConfig, max_length: int | None) -> None:
    """Warns where rollouts may be longer than what is trained on."""
    longest = rollout.max_trajectory_tokens
    if max_length is not None and max_length < longest:
        logger.warning(
            "Rollouts have up to `max_trajectory_tokens=%d` tokens, but training cuts or drops what is longer "
            "than `max_length=%d`. Raise `max_length` to train on whole trajectories.",
            *(longest, max_length),
        )
