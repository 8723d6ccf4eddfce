"""Runs that stop: by SIGTERM, by weights that are not finite, by an evaluation that fails; and how they go on."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from tests.support import byte_tokenizer, tiny_model
from tests.test_callbacks import make_run, problems, solve, tool, training_rows  # noqa: F401
from tests.trainer.helpers import dpo_config, preference_dataset
from trl_multiturn.distributed.lock import FolderInUseError, FolderLock
from trl_multiturn.distributed.preemption import Preempted
from trl_multiturn.errors import DivergedError
from trl_multiturn.trainer import MultiTurnDPOTrainer
from trl_multiturn.trainer.loop.policy_weights import policy_revision


class At(TrainerCallback):
    """Does something after an optimizer step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.do(model)


def run(folder, tool, at=None, **arguments):  # noqa: F811
    trainer, generator, engine = make_run(folder, tool, **arguments)
    if at is not None:
        trainer.callback_handler.callbacks.insert(0, At(*at))
    return trainer, generator, engine


def spoil(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = float("nan")


def preempt(model):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "arguments"),
    [(2, {}), (4, {}), (4, dict(eval_prompts=problems(1, first=50)))],
    ids=["first iteration", "last iteration", "last iteration, evaluated"],
)
def test_weights_that_are_not_finite_end_the_run_and_leave_what_was_good(tmp_path, tool, step, arguments):  # noqa: F811
    trainer, generator, _ = run(tmp_path, tool, at=(step, spoil), **arguments)
    trainer.args.save_total_limit = 1
    with pytest.raises(DivergedError, match="diverged.*Lower `learning_rate`"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-2"] if step == 4 else [])
    assert not generator.run.iteration(step // 2).policy.exists()
    assert all(report.last_step is None or report.last_step < step for report in generator.reports)


def test_weights_that_are_not_finite_are_told_without_a_checkpoint_too(tmp_path, tool):  # noqa: F811
    trainer, _, _ = run(tmp_path, tool, at=(1, spoil))
    trainer.args.save_strategy, trainer.args.max_steps = SaveStrategy.NO, 1
    with pytest.raises(DivergedError):
        trainer.train()


def offline(folder, dtype, *callbacks, **kwargs):
    tokenizer = byte_tokenizer()
    return MultiTurnDPOTrainer(
        model=tiny_model(tokenizer).to(dtype),
        args=dpo_config(folder, save_strategy="steps", save_steps=1, max_steps=3, **kwargs),
        train_dataset=preference_dataset(2),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def test_weights_that_are_not_finite_end_a_run_without_rollouts_too(tmp_path):
    with pytest.raises(DivergedError):
        offline(tmp_path, torch.float32, At(2, spoil)).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_float16_weights_that_overflow_stop_such_a_run_with_a_warning(tmp_path, caplog):
    """AdamW's epsilon is 0 in float16, so that a weight without a gradient becomes 0/0 at the first step."""
    trainer = offline(tmp_path, torch.float16, optim="adamw_torch")
    trainer.train()
    assert "not finite" in caplog.text and "Training stops here" in caplog.text
    assert trainer.state.global_step == 1 and not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(DivergedError):
        trainer.save_model(tmp_path / "saved")  # as a script does after training
    assert not (tmp_path / "saved").exists()


def test_a_run_that_diverged_goes_on_from_the_last_good_checkpoint(tmp_path, tool):  # noqa: F811
    whole, undisturbed, _ = run(tmp_path / "whole", tool)
    whole.train()
    broken, _, _ = run(tmp_path / "broken", tool, at=(3, spoil))
    with pytest.raises(DivergedError):
        broken.train()
    again, generator, engine = run(tmp_path / "broken", tool)
    again.train(resume_from_checkpoint=True)
    assert engine.calls == [] and policy_revision(again.model) == policy_revision(whole.model)
    assert training_rows(generator, 1).to_list() == training_rows(undisturbed, 1).to_list()


def test_an_evaluation_that_fails_loses_no_training_and_is_made_up_for(tmp_path, tool):  # noqa: F811
    def failing(prompt_text, sampling, session):
        if "evaluation" in session and trainer.state.global_step == 2:
            raise InterruptedError
        return solve(prompt_text, sampling, session)

    held_out = dict(eval_prompts=problems(1, first=50))
    whole, undisturbed, _ = run(tmp_path / "whole", tool, **held_out)
    whole.train()
    trainer, _, _ = run(tmp_path / "failed", tool, script=failing, **held_out)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert (tmp_path / "failed" / "checkpoint-2").is_dir()
    again, generator, engine = run(tmp_path / "failed", tool, **held_out)
    again.train(resume_from_checkpoint=True)
    assert not [call for call in engine.calls if call.session.startswith("0/") and "evaluation" not in call.session]
    assert [r.evaluation for r in generator.reports] == [r.evaluation for r in undisturbed.reports]
    logged = [entry["step"] for entry in again.state.log_history if "eval_pass@1" in entry]
    assert logged == [0, 2, 4] and policy_revision(again.model) == policy_revision(whole.model)


def test_sigterm_while_rolling_out_ends_the_run_cleanly(tmp_path, tool):  # noqa: F811
    def script(prompt_text, sampling, session):
        if session.startswith("1/current/2"):
            preempt(None)
        return solve(prompt_text, sampling, session)

    whole, _, _ = run(tmp_path / "whole", tool)
    whole.train()
    stopped, generator, _ = run(tmp_path / "stopped", tool, script=script)
    with pytest.raises(Preempted) as raised:
        stopped.train()
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not generator.run.lock.exists() and not list(tmp_path.rglob("*.partial"))
    again, _, _ = run(tmp_path / "stopped", tool)
    again.train(resume_from_checkpoint=True)
    assert policy_revision(again.model) == policy_revision(whole.model)


def test_sigterm_while_training_writes_the_step_and_a_changed_batch_is_refused(tmp_path, tool):  # noqa: F811
    whole, _, _ = run(tmp_path / "whole", tool)
    whole.train()
    stopped, _, _ = run(tmp_path / "stopped", tool, at=(3, preempt))
    with pytest.raises(Preempted):
        stopped.train()
    assert (tmp_path / "stopped" / "checkpoint-3").is_dir()

    for name, value in (("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 2), ("seed", 7)):
        other, _, _ = run(tmp_path / "stopped", tool)
        setattr(other.args, name, value)
        with pytest.raises(ValueError, match=f"inside iteration 2, after 1 of its steps, with `{name}"):
            other.train(resume_from_checkpoint=True)
    again, _, engine = run(tmp_path / "stopped", tool)
    again.train(resume_from_checkpoint=True)
    assert engine.calls == [] and policy_revision(again.model) == policy_revision(whole.model)


def test_a_handler_of_the_users_own_is_left_alone(tmp_path, tool):  # noqa: F811
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer, _, _ = run(tmp_path, tool, at=(1, preempt), iterations=1)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


def test_a_checkpoint_inside_an_iteration_whose_folder_is_gone_is_told(tmp_path, tool):  # noqa: F811
    stopped, generator, _ = run(tmp_path, tool, at=(3, preempt))
    with pytest.raises(Preempted):
        stopped.train()
    generator.run.iteration(1).path.rename(tmp_path / "elsewhere")
    again, _, _ = run(tmp_path, tool)
    with pytest.raises(ValueError, match="inside iteration 2.*does not hold its rows"):
        again.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # what the message says


def test_two_runs_in_one_folder_are_refused(tmp_path, tool):  # noqa: F811
    trainer, generator, engine = run(tmp_path, tool)
    lock = FolderLock(generator.run.lock)
    lock.acquire()
    with pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()}"):
        trainer.train()
    assert engine.calls == []
    lock.release()


def test_evaluations_by_another_reward_are_not_compared(tmp_path, tool):  # noqa: F811
    trainer, generator, _ = run(tmp_path, tool, iterations=1, eval_prompts=problems(1, first=50))
    trainer.train()
    assert generator.best_policy is not None
    start = json.loads(generator.run.start.read_text())
    generator.run.start.write_text(json.dumps({**start, "evaluated_by": "another", "evaluation": {"pass@1": 9.0}}))
    assert generator.best_policy == 1


def test_a_run_from_the_beginning_evaluates_its_own_policies(tmp_path, tool):  # noqa: F811
    """The rows of the first iteration are on disk, and so is what another learning rate had made of them."""
    held_out = dict(iterations=1, eval_prompts=problems(1, first=50))
    run(tmp_path, tool, **held_out)[0].train()
    again, generator, engine = run(tmp_path, tool, **held_out)
    again.args.learning_rate = 1e-3
    again.train()
    assert {call.session.partition("/")[2] for call in engine.calls} == {"evaluation-greedy/0/0"}
    assert [r.evaluation is not None for r in generator.reports] == [True]


def test_a_part_of_a_run_from_the_beginning_is_not_evaluated_as_the_whole_was(tmp_path, tool):  # noqa: F811
    held_out = dict(iterations=1, eval_prompts=problems(1, first=50))
    run(tmp_path, tool, **held_out)[0].train()
    again, _, engine = run(tmp_path, tool, **held_out)
    again.args.max_steps = 1
    again.train()
    assert engine.calls == []
