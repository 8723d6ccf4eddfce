"""Run by `accelerate launch` in test_distributed.py: packed or stock steps of plain gradient descent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trl import DPOConfig, DPOTrainer

from tests.packing.test_trainers import PLAIN, PackedDPOTrainer, policy, preference_rows
from tests.support import byte_tokenizer


def main(arm: str, output: str, budget: str) -> None:
    tokenizer = byte_tokenizer()
    settings = {**PLAIN, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    args = DPOConfig(output_dir=output, train_sampling_strategy="sequential", **settings)
    args.packed = arm == "packed"
    args.max_tokens_per_batch = int(budget) or None
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
    result = {"history": trainer.state.log_history, "weights": weights, "calls": calls, "world": args.world_size}
    Path(output, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
