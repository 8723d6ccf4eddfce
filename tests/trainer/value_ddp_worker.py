"""Run by `test_value_ddp.py` on one or two processes: trains, saves, resumes, and writes what came out."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch

from tests.support import save_tiny
from tests.trainer.test_segments import trajectories
from tests.trainer.value_helpers import group_rows, make_trainer, parameters, token_rows
from trl_multiturn.trainer import DQOTrainer, GroupRegressionTrainer, OREOTrainer


CASES = {
    # rows of several segments
    "oreo-full": (OREOTrainer, {"value_model": "full", "kl_coef": 0.5, "dataset": trajectories()}),
    "oreo-lora-adapter": (OREOTrainer, {"value_model": "adapter", "lora": True, "precompute_ref_log_probs": True}),
    "oreo-head-checkpointing": (OREOTrainer, {"value_model": "head", "gradient_checkpointing": True}),
    "dqo-adapter": (DQOTrainer, {"value_model": "adapter", "horizon": "turn", "dataset": trajectories()}),
    # the four rows of a group lie on both processes
    "group-variance": (GroupRegressionTrainer, {"dataset": group_rows(), "eval_dataset": group_rows(1)}),
}
RESUMED = "dqo-adapter"


def main(folder: Path) -> None:
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    for name in CASES:  # before the processes know of each other, after which only the first one would write
        save_tiny(folder / f"{name}-{rank}" / "model")
    for name, (cls, settings) in CASES.items():
        start = functools.partial(
            make_trainer,
            folder / f"{name}-{rank}",
            cls=cls,
            optim="sgd",
            max_steps=3,
            per_device_train_batch_size=4 // world_size,
            per_device_eval_batch_size=4 // world_size,
            train_sampling_strategy="sequential",
            **({} if cls is GroupRegressionTrainer else {"value_learning_rate": 1e-2}),
            **{"eval_dataset": token_rows(4), **settings},
        )
        saving = {"save_strategy": "steps", "save_steps": 2} if name == RESUMED else {}
        trainer = start(**saving)
        trainer.train()
        metrics = trainer.evaluate()
        result = {
            "weights": parameters(trainer.accelerator.unwrap_model(trainer.model)),
            "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "eval": {
                key: value for key, value in metrics.items() if key in ("eval_loss", "eval_value/mean", "eval_reward")
            },
        }
        if name == RESUMED:
            trainer = start(**saving)
            output = Path(trainer.args.output_dir).relative_to(folder / f"{name}-{rank}")
            trainer.train(resume_from_checkpoint=str(folder / f"{name}-0" / output / "checkpoint-2"))
            result["resumed"] = parameters(trainer.accelerator.unwrap_model(trainer.model))
        torch.save(result, folder / f"{name}.rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
