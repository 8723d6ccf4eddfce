"""FSDP2 on two processes (gloo): training, checkpoints and the online loop do what DDP does, with the same rows."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_module_forked


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    base = tmp_path_factory.mktemp("sharded")
    for kind in ("ddp", "fsdp2"):
        (base / kind).mkdir()
        run_module_forked("tests.distributed.sharded_worker", base / kind, kind)

    def read(case: str) -> list[dict]:
        """DDP's first process, then FSDP2's two."""
        return [torch.load(base / file) for file in (f"ddp/{case}.0.pt", f"fsdp2/{case}.0.pt", f"fsdp2/{case}.1.pt")]

    return read


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, **tolerance)


@pytest.mark.parametrize("case", ["plain_dpo", "plain_kto", "oreo_resumed", "dqo_head", "online_dpo", "online_oreo"])
def test_same_losses_and_weights_as_ddp(outcomes, case):
    ddp, *fsdp = outcomes(case)
    assert ddp["wrapped"] == "DistributedDataParallel"
    for run in fsdp:
        assert run["wrapped"].startswith("FSDP")
        assert run["loss"] == pytest.approx(ddp["loss"], rel=1e-5)
        assert run["norm"] == pytest.approx(ddp["norm"], rel=1e-4)
        assert_same_weights(ddp["weights"], run["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["online_dpo", "online_oreo"])
def test_same_rows_to_the_byte_and_same_policies_as_ddp(outcomes, case):
    ddp, *fsdp = outcomes(case)
    for run in fsdp:
        for key in ("rows", "reports", "policy", "best"):
            assert run[key] == ddp[key]


def test_policy_and_value_model_resume_and_are_saved_whole(outcomes):
    ddp, *fsdp = outcomes("oreo_resumed")
    for run in fsdp:
        assert_same_weights(run["weights"], run["resumed"], rtol=0, atol=0)
        value = {name: w for name, w in run["weights"].items() if name.startswith("value_model.")}
        assert_same_weights(
            value, {f"value_model.{name}": w for name, w in run["saved_value"].items()}, rtol=0, atol=0
        )
        assert run["eval"] == pytest.approx(ddp["eval"], rel=1e-5)


def test_snapshots_go_in_and_out_and_each_process_samples_at_its_own_pace(outcomes):
    ddp, *fsdp = outcomes("swapped")
    assert fsdp[0]["revision"] == fsdp[1]["revision"]
    assert [run["text"] for run in fsdp] == [ddp["text"]] * 2
