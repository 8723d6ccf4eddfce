"""Two processes by `accelerate launch` (gloo): the same numbers as one process with the batch twice as large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import save_tiny


ROOT = Path(__file__).parents[2]


def launch(processes: int, kind: str, model: str, output: Path, batch_size: int, reference: str) -> list[dict]:
    output.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    # The flag that starts several processes; `use_cpu` in the training arguments then picks gloo
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--num_cpu_threads_per_process", "1", "-m", "tests.trainer.distributed_run"]
    command += [kind, model, str(output), str(batch_size), reference]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reference"), [("dpo", "precompute"), ("dpo", "online"), ("kto", "precompute")])
def test_two_processes_equal_one(tmp_path, kind, reference):
    model = save_tiny(tmp_path / "model")
    # KTO rotates completions within a process's batch, so only DPO's batches can be put together
    sizes = (4, 2) if kind == "dpo" else (2, 2)
    (alone,) = launch(1, kind, model, tmp_path / "one", sizes[0], reference)
    first, second = launch(2, kind, model, tmp_path / "two", sizes[1], reference)
    assert (alone["world"], first["world"]) == (1, 2)
    assert first["columns"] == second["columns"]
    assert all(len(values) == 8 for values in first["columns"].values())
    if kind == "dpo":
        for key in ("loss", "rewards/margins", "logps/chosen"):
            values = [[entry[key] for entry in run["history"] if key in entry] for run in (alone, first)]
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)
