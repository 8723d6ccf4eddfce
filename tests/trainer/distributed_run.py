"""Run by `accelerate launch` in test_distributed.py: trains on rows made in memory, writes what it logged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.trainer.helpers import dpo_config, kto_config, move, preference_dataset, unpaired_dataset
from trl_multiturn.trainer import MultiTurnDPOTrainer, MultiTurnKTOTrainer


def main(kind: str, model: str, output: str, batch_size: int, precompute: bool) -> None:
    kwargs = dict(
        per_device_train_batch_size=batch_size,
        precompute_ref_log_probs=precompute,
        train_sampling_strategy="sequential",
        max_steps=3,
        learning_rate=1e-3,
    )
    if kind == "dpo":
        trainer = MultiTurnDPOTrainer(model, args=dpo_config(output, **kwargs), train_dataset=preference_dataset(8))
    else:
        trainer = MultiTurnKTOTrainer(model, args=kto_config(output, **kwargs), train_dataset=unpaired_dataset(8))
    before = trainer.train_dataset
    trainer.train()
    move(trainer.model)
    # Weights are the same on every process and so must be the columns, complete and in order on each
    columns = trainer.compute_reference_columns(before, batch_size=3).select_columns(trainer._reference_columns)
    result = {"history": trainer.state.log_history, "columns": columns.to_dict(), "world": trainer.args.world_size}
    rank = trainer.accelerator.process_index
    Path(output, f"rank{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "precompute")
