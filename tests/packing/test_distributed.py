"""Two processes (gloo): packed rows, also in parts, take the same steps as TRL's padded batches."""

from __future__ import annotations

import json

import pytest

from tests.launch import run_module, torchrun


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_module(torchrun(2), "tests.packing.distributed_run", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    stock, packed, parts = ([found[arm] for found in ranks] for arm in ("stock", "packed", "parts"))
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
