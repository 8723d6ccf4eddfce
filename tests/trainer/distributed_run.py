"""Run by test_distributed.py on one process or two: trains on rows made in memory, writes what it logged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support import save_tiny
from tests.trainer.helpers import dpo_config, kto_config, move, preference_dataset, unpaired_dataset
from trl_multiturn.trainer import MultiTurnDPOTrainer, MultiTurnKTOTrainer


CASES = [("dpo", "precompute"), ("dpo", "online"), ("kto", "precompute")]


def outcome(kind: str, reference: str, folder: Path, processes: int) -> dict[str, Any]:
    # KTO rotates completions within a process's batch, so only DPO's batches can be put together
    batch_size = 4 // processes if kind == "dpo" else 2
    kwargs = dict(
        per_device_train_batch_size=batch_size,
        precompute_ref_log_probs=reference == "precompute",
        train_sampling_strategy="sequential",
        max_steps=3,
        learning_rate=1e-3,
    )
    model, output = str(folder / "model"), folder / f"{kind}-{reference}"
    if kind == "dpo":
        trainer = MultiTurnDPOTrainer(model, args=dpo_config(output, **kwargs), train_dataset=preference_dataset(8))
    else:
        trainer = MultiTurnKTOTrainer(model, args=kto_config(output, **kwargs), train_dataset=unpaired_dataset(8))
    before = trainer.train_dataset
    trainer.train()
    move(trainer.model)
    # Weights are the same on every process and so must be the columns, complete and in order on each
    columns = trainer.compute_reference_columns(before, batch_size=3).select_columns(trainer._reference_columns)
    return {"history": trainer.state.log_history, "columns": columns.to_dict(), "world": trainer.args.world_size}


def main(folder: Path, rank: int, processes: int) -> list[dict[str, Any]]:
    save_tiny(folder / f"rank{rank}" / "model")  # before the processes know of each other: later only one would write
    results = [outcome(*case, folder / f"rank{rank}", processes) for case in CASES]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
