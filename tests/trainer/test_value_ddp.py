"""Two processes (DDP over gloo) do what one does with all the rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .value_ddp_worker import CASES


ROOT = Path(__file__).parents[2]


def launch(folder: Path, processes: int) -> None:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if processes == 1:
        command = [sys.executable]
    command += ["-m", "tests.trainer.value_ddp_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    base = tmp_path_factory.mktemp("ddp")
    for processes in (1, 2):
        launch(base / str(processes), processes)
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(outcomes, name):
    one = torch.load(outcomes / "1" / f"{name}.rank0.pt")
    for rank in (0, 1):
        two = torch.load(outcomes / "2" / f"{name}.rank{rank}.pt")
        assert two["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=1e-4, atol=1e-6)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["eval"].keys() == one["eval"].keys() == {"eval_loss", "eval_value/mean"}
        assert two["eval"] == pytest.approx(one["eval"], rel=1e-3)
