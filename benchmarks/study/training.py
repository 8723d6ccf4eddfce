"""Trains one arm with the shipped trainer, offline on shared rollouts or online through the shipped loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arms import METHOD_ARGS, Arm
from .settings import Setting
from .start import load, rollouts, starting_policy, training_prompts, with_process_rewards


# What every arm's configuration says
COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "max_length": 512,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def train(arm: Arm, setting: Setting, seed: int, shared: Path, scratch: Path) -> tuple[Any, Any, dict[str, Any]]:
    """
    Trains an arm.

    Args:
        arm ([`Arm`]): the arm.
        setting ([`Setting`]): the world.
        seed (`int`): of everything.
        shared (`Path`): folder of the starting policy and its rollouts.
        scratch (`Path`): a folder for what the trainer writes.

    Returns:
        `(policy, trainer, facts)`; no trainer for the starting policy. `facts` counts rollouts, rows and steps.
    """
    start = starting_policy(setting, seed, shared)
    if arm.method == "none":
        return load(start)[0], None, {"rollouts": 0, "rows": 0, "steps": 0}
    policy, tokenizer = load(start)
    args = configuration(arm, setting, seed, scratch)
    common = {"model": policy, "args": args, "processing_class": tokenizer}
    if arm.online:
        return _train_online(arm, setting, seed, common)
    trajectories = rollouts(setting, seed, shared)
    if arm.process:
        trajectories = with_process_rewards(setting, seed, shared, trajectories, arm.process)
    rows = training_rows(arm, setting, trajectories, tokenizer)
    trainer = trainer_class(arm)(train_dataset=rows, **common)
    trainer.train()
    facts = {"rollouts": len(trajectories), "rows": len(rows), "steps": trainer.state.global_step}
    return trainer.model, trainer, facts


def _train_online(arm: Arm, setting: Setting, seed: int, common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl_multiturn import ToolRolloutGenerator

    sizes = setting.sizes
    options = {"eval_prompts": setting.problems(sizes.validation, 1, "test"), **setting.tools(), **arm.loop}
    generator = ToolRolloutGenerator(
        training_prompts(setting, seed, sizes.iterations),
        config=setting.rollout_config(seed, **arm.rollout),
        pairing=setting.unpaired() if arm.method in ("oreo", "dqo") else setting.pairing(),
        prompts_per_iteration=sizes.prompts,
        **options,
    )
    trainer = trainer_class(arm)(callbacks=[generator], **common)
    trainer.train()
    reports = generator.reports
    facts: dict[str, Any] = {
        "rollouts": sum(report.trajectories for report in reports),
        "rows": sum(report.trained_rows for report in reports),
        "steps": trainer.state.global_step,
        "best_iteration": generator.best_policy,
    }
    evaluations = [generator.start_evaluation, *(report.evaluation for report in reports)]
    for iteration, evaluation in enumerate(evaluations):
        facts[f"iteration_{iteration}"] = evaluation and evaluation["pass@1"]
    return trainer.model, trainer, facts


def configuration(arm: Arm, setting: Setting, seed: int, scratch: Path) -> Any:
    """The trainer's configuration: what all share, what the method's arms share, what the arm overrides."""
    from trl import SFTConfig

    from trl_multiturn import DQOConfig, GroupRegressionConfig, MultiTurnDPOConfig, MultiTurnKTOConfig, OREOConfig

    classes = {
        "sft": SFTConfig,
        "dpo": MultiTurnDPOConfig,
        "kto": MultiTurnKTOConfig,
        "oreo": OREOConfig,
        "dqo": DQOConfig,
        "group": GroupRegressionConfig,
    }
    sizes = setting.sizes
    trajectories_per_row = 2 if arm.method == "dpo" else 1
    length = {"num_train_epochs": sizes.iterations} if arm.online else {"max_steps": sizes.steps}
    batch = {"per_device_train_batch_size": sizes.batch // trajectories_per_row}
    options = {**COMMON, **batch, **length, **METHOD_ARGS[arm.method], **arm.args}
    return classes[arm.method](output_dir=str(scratch), seed=seed, **options)


def trainer_class(arm: Arm) -> Any:
    """The shipped trainer of an arm's method."""
    from trl import SFTTrainer

    from trl_multiturn import (
        DQOTrainer,
        GroupRegressionTrainer,
        MultiTurnDPOTrainer,
        MultiTurnKTOTrainer,
        OREOTrainer,
    )

    return {
        "sft": SFTTrainer,
        "dpo": MultiTurnDPOTrainer,
        "kto": MultiTurnKTOTrainer,
        "oreo": OREOTrainer,
        "dqo": DQOTrainer,
        "group": GroupRegressionTrainer,
    }[arm.method]


def training_rows(arm: Arm, setting: Setting, trajectories: list[Any], tokenizer: Any) -> Any:
    """The rows of an offline arm, selected from the shared trajectories as its method's paper does."""
    from trl_multiturn import UnpairedConfig, build_preference_dataset, build_unpaired_dataset
    from trl_multiturn.data import supervised_rows

    if arm.method == "dpo":
        return build_preference_dataset(trajectories, setting.pairing())
    if arm.method == "kto":
        return build_unpaired_dataset(trajectories, setting.pairing())
    if arm.method == "sft":
        winners = build_unpaired_dataset(trajectories, UnpairedConfig(strategy="winners"))
        return supervised_rows(winners, tokenizer)
    if arm.method == "group":
        return build_unpaired_dataset(trajectories, UnpairedConfig(**trainer_class(arm).default_sampling))
    return build_unpaired_dataset(trajectories, setting.unpaired())
