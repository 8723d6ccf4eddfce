"""What a step launches on a GPU, counted without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("launches", "launch_counter", "train_step_arms", "train_step_rows"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import launches

    return launches


@pytest.mark.slow
def test_a_packed_step_launches_half_of_what_trls_does(launches):
    """Of 8 layers, beside what embeddings, head and loss take; of 24 it is 0.41 x."""
    setting = launches.Setting("test", scale=0.03, body=launches.narrow(8))
    stock, ours = launches.count(setting, ["TRL, precomputed", "packed"]).values()
    assert ours.loss == pytest.approx(stock.loss, abs=1e-3)
    assert ours.both <= 660
    assert ours.both <= 0.5 * stock.both
