"""What `examples/iterative_oreo.py` does after the loop: the values alone learn on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.trainer.value_helpers import make_trainer, token_rows
from trl_multiturn.journal.journal import Journal
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from embedded.value_search import fit_values  # noqa: E402


def sampled(row: dict, number: int) -> Trajectory:
    return Trajectory(
        prompt=[],
        completion=[],
        **{name: row[name] for name in ("prompt_ids", "completion_ids", "action_mask", "reward")},
        stop_reason=StopReason.ANSWERED,
        verdict=Verdict.CORRECT if row["reward"] == 1 else Verdict.INCORRECT,
        info={"prompt_index": number, "sample_index": 0, "trajectory_id": f"{number}/current/0", "policy": "current"},
    )


@pytest.mark.parametrize(("value_model", "lora"), [("full", False), ("adapter", True), ("head", False)])
def test_values_alone_learn_the_outcomes_of_all_iterations(tmp_path, value_model, lora):
    trainer = make_trainer(
        tmp_path, value_model=value_model, lora=lora, value_learning_rate=1e-2, value_warmup_steps=0, max_steps=-1
    )
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    trainer.processing_class.save_pretrained(folder)
    rows = list(token_rows())
    for iteration in range(2):
        with Journal(tmp_path / f"rollouts/iteration_00{iteration}/journal") as journal:
            for number, row in enumerate(rows):
                journal.append("current", sampled(row, number))
    (tmp_path / "rollouts/iteration_002").mkdir()  # the next policy's snapshot lies in such a folder

    def policy_files():
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def error():
        states = [row["prompt_ids"] + row["completion_ids"][:-1] for row in rows]
        values = ValueModel.from_pretrained(folder / "value_model").score(states)
        return sum((value - row["reward"]) ** 2 for value, row in zip(values, rows, strict=True))

    before, policy = error(), policy_files()
    fit_values(8, tmp_path / "rollouts", trainer.args)
    assert error() < 0.7 * before
    assert policy_files() == policy and policy
