"""Two processes (gloo): the same numbers as one process with the batch twice as large."""

from __future__ import annotations

import json

import pytest

from tests.launch import run_module_forked

from .distributed_run import CASES, main


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """One process's, then each of the two's; each has a result per case."""
    folder = tmp_path_factory.mktemp("distributed")
    run_module_forked("tests.trainer.distributed_run", folder)
    both = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    alone = main(tmp_path_factory.mktemp("alone"), rank=0, processes=1)
    return list(zip(alone, *both, strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_equal_one(outcomes, case):
    alone, first, second = outcomes[case]
    assert (alone["world"], first["world"]) == (1, 2)
    assert first["columns"] == second["columns"]
    assert all(len(values) == 8 for values in first["columns"].values())
    kind, _, rows = CASES[case]
    if kind == "dpo" or rows == "segments":
        for key in ("loss", "rewards/margins", "logps/chosen"):
            values = [[entry[key] for entry in run["history"] if key in entry] for run in (alone, first)]
            assert values[0] and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)
