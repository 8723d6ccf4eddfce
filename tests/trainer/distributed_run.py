"""Run by test_distributed.py on one process or two: trains on rows made in memory, writes what it logged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support import save_tiny
from tests.trainer.helpers import dpo_config, kto_config, move, preference_dataset, unpaired_dataset
from tests.trainer.test_segments import pairs, trajectories
from trl_multiturn.trainer import MultiTurnDPOTrainer, MultiTurnKTOTrainer


# Rows, and where the reference is scored; those of `segments` are more than one token sequence
CASES = [
    ("dpo", "precompute", "plain"),
    ("dpo", "online", "segments"),
    ("kto", "precompute", "plain"),
    ("kto", "precompute", "segments"),
]


def outcome(kind: str, reference: str, rows: str, folder: Path, processes: int) -> dict[str, Any]:
    # KTO rotates completions within a process's batch, so without its KL term alone batches can be put together
    together = kind == "dpo" or rows == "segments"
    batch_size = 4 // processes if together else 2
    kwargs = dict(
        per_device_train_batch_size=batch_size,
        precompute_ref_log_probs=reference == "precompute",
        train_sampling_strategy="sequential",
        max_steps=3,
        learning_rate=1e-3,
    )
    model, output = str(folder / "model"), folder / f"{kind}-{reference}-{rows}"
    if kind == "dpo":
        dataset = pairs(8) if rows == "segments" else preference_dataset(8)
        trainer = MultiTurnDPOTrainer(model, args=dpo_config(output, **kwargs), train_dataset=dataset)
    else:
        dataset = trajectories(8) if rows == "segments" else unpaired_dataset(8)
        kwargs |= {"loss_type": "apo_zero_unpaired"} if together else {}
        trainer = MultiTurnKTOTrainer(model, args=kto_config(output, **kwargs), train_dataset=dataset)
    before = trainer.train_dataset
    trainer.train()
    move(trainer.model)
    # Weights are the same on every process and so must be the columns, complete and in order on each
    columns = trainer.compute_reference_columns(before, batch_size=3)
    columns = columns.select_columns([name for name in trainer._reference_columns if name in columns.column_names])
    return {"history": trainer.state.log_history, "columns": columns.to_dict(), "world": trainer.args.world_size}


def main(folder: Path, rank: int, processes: int) -> list[dict[str, Any]]:
    save_tiny(folder / f"rank{rank}" / "model")  # before the processes know of each other: later only one would write
    results = [outcome(*case, folder / f"rank{rank}", processes) for case in CASES]
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
