"""Run on two processes by test_distributed.py: packed and stock steps of plain gradient descent."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from trl import DPOConfig, DPOTrainer

from tests.packing.test_trainers import PLAIN, PackedDPOTrainer, policy, preference_rows
from tests.support import byte_tokenizer


def outcome(arm: str, folder: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    settings = {**PLAIN, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    args = DPOConfig(output_dir=str(folder / arm), train_sampling_strategy="sequential", **settings)
    args.packed = arm != "stock"
    args.max_tokens_per_batch = 50 if arm == "parts" else None
    trainer = (PackedDPOTrainer if args.packed else DPOTrainer)(
        model=policy(tokenizer),
        ref_model=policy(tokenizer, seed=1),
        args=args,
        train_dataset=preference_rows(),
        processing_class=tokenizer,
    )
    trainer.train()
    calls = trainer._packed_forwards[0].calls if args.packed else {}
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    return {"history": trainer.state.log_history, "weights": weights, "calls": calls, "world": args.world_size}


def main(folder: Path) -> None:
    results = {arm: outcome(arm, folder) for arm in ("stock", "packed", "parts")}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
