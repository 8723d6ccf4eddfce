"""The online loop on two processes: the work is shared, the rows and the policy are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_share_the_rollouts_and_agree(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command += ["-m", "tests.online_worker", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for key in ("revision", "rows", "trajectories", "steps", "pass@1"):
        assert first[key] == second[key]
    assert first["rows"] == [5, 5] and first["trajectories"] == [20, 20]
    assert first["steps"] == 6  # five pairs, one per process and step: three steps an iteration
    for share in ("rolled_out", "evaluated"):
        assert first[share] and second[share] and not set(first[share]) & set(second[share])
    assert len(first["rolled_out"]) + len(second["rolled_out"]) == 40
