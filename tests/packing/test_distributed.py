"""Two processes (gloo): packed rows, also in parts, take the same steps as TRL's padded batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def launch(arm: str, output: Path, budget: int = 0) -> list[dict]:
    output.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", "-m", "tests.packing.distributed_run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, arm, str(output), str(budget)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    stock = launch("stock", tmp_path / "stock")
    packed = launch("packed", tmp_path / "packed")
    parts = launch("packed", tmp_path / "parts", budget=50)
    assert stock[0]["world"] == 2
    assert [run["calls"]["packed"] for run in packed] == [3, 3]
    # Both processes compute in the same number of parts, whatever their own batches would need
    assert parts[0]["calls"]["packed"] == parts[1]["calls"]["packed"] > 3
    for run in (packed, parts):
        assert run[0]["weights"] == run[1]["weights"]
        assert run[0]["weights"] == pytest.approx(stock[0]["weights"], rel=1e-4, abs=1e-4)
        for ours, theirs in zip(run[0]["history"][:3], stock[0]["history"][:3], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-4)
