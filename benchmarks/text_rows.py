"""
Rows of text in M-DPO: this checkout, and earlier ones (what rows with images cost those without).

    python benchmarks/text_rows.py --against ../earlier_checkout [--against …] --repeats 5

Pairs of two turns with a tool's result between them are prepared (a trainer is made of them), collated and trained on.
The arms are processes of their own and alternate; each does every part several times and tells its fastest, in CPU
seconds of one thread. All must prepare the same ids and masks, and end with the same loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROWS, STEPS = 64, 16
PARTS = {"prepare": "ms a row", "collate": "ms a batch of 4", "train": "ms a step"}


def measure() -> dict[str, Any]:
    """One arm, in a process of its own."""
    import datasets
    import torch

    import trl_multiturn
    from tests.support import byte_tokenizer, preference_rows, tiny_model
    from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer

    torch.set_num_threads(1)
    datasets.disable_caching()
    tokenizer, rows = byte_tokenizer("qwen2_5"), datasets.Dataset.from_list(preference_rows(8) * (ROWS // 8))
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip

    def prepare() -> Any:
        args = MultiTurnDPOConfig(output_dir=folder, **settings)
        models = tiny_model(tokenizer), tiny_model(tokenizer)
        return MultiTurnDPOTrainer(*models, args, None, rows, processing_class=tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare()
        prepared = trainer.train_dataset.select_columns(
            ["prompt_ids", *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ids", "action_mask"))]
        )
        loss = trainer.train().training_loss
        seconds = {
            "prepare": fastest(prepare, 5) / ROWS,
            "collate": fastest(lambda: list(trainer.get_train_dataloader()), 8) / (ROWS // 4),
            "train": fastest(trainer.train, 3) / STEPS,
        }
    return {
        "package": str(Path(trl_multiturn.__file__).parents[1]),
        "rows": json.dumps(prepared.to_list()),
        "loss": loss,
        **{part: 1e3 * value for part, value in seconds.items()},
    }


def fastest(do: Callable[[], Any], times: int) -> float:
    """CPU seconds of the fastest call."""
    found = []
    for _ in range(times):
        start = time.process_time()
        do()
        found.append(time.process_time() - start)
    return min(found)


def run_arm(checkout: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, __file__, "--arm"], env=environment, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(output.stderr)
    result = json.loads(output.stdout.splitlines()[-1])
    if result["package"] != str(checkout):
        raise SystemExit(f"{result['package']} was imported in place of {checkout}.")
    return result


def table(arms: dict[str, list[dict[str, Any]]], here: str) -> str:
    """The median of each part by arm, and the median of its ratio to that of this checkout, round by round."""
    runs = [run for found in arms.values() for run in found]
    if len({run["rows"] for run in runs}) > 1 or max(abs(run["loss"] - runs[0]["loss"]) for run in runs) > 1e-5:
        raise SystemExit("The arms' rows or losses differ. Nothing is reported.")
    lines = ["| checkout | " + " | ".join(f"{part}, {unit}" for part, unit in PARTS.items()) + " |"]
    lines.append("| --- |" + " ---: |" * len(PARTS))
    for name, found in arms.items():
        cells = []
        for part in PARTS:
            ratios = [mine[part] / run[part] for run, mine in zip(found, arms[here], strict=True)]
            cell = f"{statistics.median(run[part] for run in found):.2f}"
            if name != here:
                cell += f"; here **{statistics.median(ratios):.2f}** ({min(ratios):.2f}..{max(ratios):.2f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def name_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or checkout.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", type=Path, action="append", default=[], help="an earlier checkout; may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure()))
        return
    checkouts = [path.resolve() for path in [*args.against, Path(__file__).parents[1]]]
    names = [name_of(checkout) for checkout in checkouts]
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name, checkout in zip(names, checkouts, strict=True):
            arms[name].append(run_arm(checkout))
    print(f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores ({platform.machine()}),", end=" ")
    print(f"Python {platform.python_version()}; {args.repeats} rounds, the ratio of each; over 1: slower here.\n")
    print(table(arms, names[-1]))


if __name__ == "__main__":
    main()
