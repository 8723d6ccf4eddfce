"""Two processes (DDP over gloo) do what one does with all the rows."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_module_forked

from .value_ddp_worker import CASES, main


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    base = tmp_path_factory.mktemp("ddp")
    for processes in (1, 2):
        (base / str(processes)).mkdir()
    main(base / "1")
    run_module_forked("tests.trainer.value_ddp_worker", base / "2")
    return base


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(outcomes, name):
    one = torch.load(outcomes / "1" / f"{name}.rank0.pt")
    for rank in (0, 1):
        two = torch.load(outcomes / "2" / f"{name}.rank{rank}.pt")
        assert two["weights"].keys() == one["weights"].keys()
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=1e-4, atol=1e-6)
        for key, weight in two.get("resumed", {}).items():  # from the second of three steps
            torch.testing.assert_close(two["weights"][key], weight, rtol=1e-4, atol=1e-6)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["eval"].keys() == one["eval"].keys() and len(one["eval"]) == 2
        assert two["eval"] == pytest.approx(one["eval"], rel=1e-3)
