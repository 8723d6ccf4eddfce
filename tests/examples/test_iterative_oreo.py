"""What `examples/iterative_oreo.py` does after the loop: states and their outcomes, and a vote that values weigh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support import assistant
from tests.trainer.value_helpers import make_trainer, token_rows
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trajectory import StopReason, Trajectory


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from embedded.value_search import elect, fit_values, last_state, to_states, value_loss  # noqa: E402


def test_each_state_that_chose_a_token_is_labelled_with_the_outcome():
    row = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5, 6], "action_mask": [1, 0, 1, 1], "reward": 0.5}
    # 2 chose 3; 3 was followed by what the policy only read; 4 chose 5, 5 chose 6, nothing follows 6
    assert to_states(row) == {
        "input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100.0, 0.5, -100.0, 0.5, 0.5, -100.0], "length": 6
    }  # fmt: skip


def test_the_loss_is_a_mean_over_the_states_of_all_accumulated_batches():
    values = torch.tensor([[9.0, 0.5, 0.0]], requires_grad=True)
    labels = torch.tensor([[-100.0, 1.0, 1.0]])
    assert value_loss(values, labels).item() == pytest.approx((0.25 + 1.0) / 2)
    value_loss(values, labels, num_items_in_batch=10).backward()
    assert values.grad.tolist() == [[0.0, pytest.approx(-0.1), pytest.approx(-0.2)]]


@pytest.mark.parametrize(("value_model", "lora"), [("full", False), ("adapter", True), ("head", False)])
def test_values_alone_learn_the_outcomes_of_all_iterations(tmp_path, value_model, lora):
    trainer = make_trainer(
        tmp_path, value_model=value_model, lora=lora, value_learning_rate=1e-2, value_warmup_steps=0, max_steps=-1
    )
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    trainer.processing_class.save_pretrained(folder)
    for iteration in range(2):
        token_rows().save_to_disk(tmp_path / f"rollouts/iteration_00{iteration}/rows")
    (tmp_path / "rollouts/iteration_002").mkdir()  # the next policy's snapshot lies in such a folder

    def policy_files():
        return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}

    def error():
        values = ValueModel.from_pretrained(folder / "value_model").score([row["input_ids"] for row in states])
        return sum((value - row["labels"][-2]) ** 2 for value, row in zip(values, states, strict=True))

    states = [to_states(row) for row in token_rows()]
    states = [row | {"input_ids": row["input_ids"][:-1]} for row in states]
    before, policy = error(), policy_files()
    fit_values(8, tmp_path / "rollouts", trainer.args)
    assert error() < 0.7 * before
    assert policy_files() == policy and policy


def answered(text: str) -> Trajectory:
    return Trajectory([], [assistant(text)], [7], [8, 9], [1, 1], StopReason.ANSWERED)


def test_votes_weigh_as_much_as_the_values():
    texts = (r"\boxed{1}", r"\boxed{1.0}", r"\boxed{2}", "I do not know.")
    one, two, other, none = map(answered, texts)
    assert elect([(0.3, one), (0.3, two), (0.5, other), (0.9, none)]) is one  # 0.6 against 0.5; no answer, no vote
    assert elect([(0.3, one), (-0.3, two), (0.5, other)]) is other  # a value below 0 counts nothing
    assert elect([(0.9, none)]) is none


def test_the_last_state_is_the_one_before_the_token_that_ends_it():
    assert last_state(answered("yes")) == [7, 8]
