"""OREO and DQO in the online loop: which rows they get, and what becomes of the value model and of the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from tests.support import tiny_model
from tests.test_callbacks import TOKENIZER, logged, make_run, problems, solve, tool, training_rows  # noqa: F401
from tests.trainer.value_helpers import split
from trl_multiturn import (
    DQOConfig,
    DQOTrainer,
    OREOConfig,
    OREOTrainer,
    PairingConfig,
    RolloutConfig,
    ToolRolloutGenerator,
    UnpairedConfig,
    ValueModel,
)
from trl_multiturn.trainer.loop.policy_weights import policy_revision


OREO = dict(trainer_class=OREOTrainer, config=partial(OREOConfig, value_model="full", kl_coef=0.5))


def unbalanced(prompt_text, sampling, session):
    """Three of four samples are right."""
    sample = int(session.rpartition("/")[2])
    turn = solve(prompt_text, sampling, session)
    return turn.replace("-", "+") if sample % 4 == 1 else turn


class Watch(TrainerCallback):
    """Keeps policy and value model as they are at the start and at the end of each iteration."""

    def __init__(self, trainer):
        self.trainer, self.starts, self.ends = trainer, [], []
        trainer.add_callback(self)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.starts.append(split(self.trainer))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(split(self.trainer))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_value_model_goes_on_where_it_was(tmp_path, tool):  # noqa: F811
    """Whatever an iteration does to the policy (the previous one samples, the reference is scored), values stay."""
    trainer, generator, _ = make_run(tmp_path, tool, reference="initial", **OREO)
    watch = Watch(trainer)
    trainer.train()
    assert [report.rows for report in generator.reports] == [12, 12]
    (policy, values), (later_policy, later_values) = watch.ends
    assert equal(watch.starts[1][1], values) and equal(watch.starts[1][0], policy)
    assert not equal(values, watch.starts[0][1]) and not equal(later_values, values)
    assert not equal(later_policy, policy)

    # the policy's revision is what samples, and the value model has no say in it
    revision = policy_revision(trainer.model)
    torch.nn.init.zeros_(trainer.value_model.head.weight)
    assert policy_revision(trainer.model) == revision


def test_rows_are_balanced_trajectories_by_default(tmp_path, tool):  # noqa: F811
    """OREO, appendix A: no more correct than incorrect ones; and M-DPO's pairs where they are asked for."""
    cases = (
        (None, [0.0] * 6 + [1.0] * 6),
        (UnpairedConfig("all"), [0.0] * 6 + [1.0] * 18),
        (PairingConfig(), [0.0] * 3 + [1.0] * 3),
    )
    for pairing, expected in cases:
        folder = tmp_path / type(pairing).__name__ / str(pairing and pairing.strategy)
        trainer, generator, _ = make_run(
            folder, tool, unbalanced, generations=8, pairing=pairing, iterations=1, **OREO
        )
        trainer.train()
        assert sorted(training_rows(generator, 0)["reward"][:]) == expected


def test_the_best_policy_comes_with_its_value_model(tmp_path, tool):  # noqa: F811
    evaluations = []

    def script(prompt_text, sampling, session):
        if "evaluation" in session:
            if "output" not in prompt_text:
                evaluations.append(session)
            right = 2 < len(evaluations) <= 4  # only the second evaluation, after the first iteration, goes well
            return solve(prompt_text, sampling, "x/0" if right else "x/1")
        return solve(prompt_text, sampling, session)

    trainer, generator, _ = make_run(tmp_path, tool, script, eval_prompts=problems(2, first=50), **OREO)
    watch = Watch(trainer)
    trainer.train()
    assert generator.best_policy == 1
    policy, values = split(trainer)
    assert equal(policy, watch.ends[0][0]) and equal(values, watch.ends[0][1])
    trainer.save_model(str(tmp_path / "best"))
    saved = ValueModel.from_pretrained(tmp_path / "best" / "value_model")
    ids = training_rows(generator, 0)[0]["prompt_ids"]
    assert saved.score([ids]) == pytest.approx(trainer.value_model.score([ids]), abs=1e-5)


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_a_run_stopped_after_the_rollouts_gets_their_reference_back(tmp_path, tool, reference):  # noqa: F811
    """The rows of iteration two are on disk, the last checkpoint is of iteration one, as is the reference in it."""

    class Stop(Exception):
        pass

    undisturbed, _, _ = make_run(tmp_path / "a", tool, reference=reference, **OREO)
    undisturbed.train()

    stopped, generator, _ = make_run(tmp_path / "b", tool, reference=reference, **OREO)
    compute_loss = stopped.compute_loss

    def stopping(*args, **kwargs):
        if len(generator.reports) == 2 and stopped.state.global_step == generator.reports[1].first_step:
            raise Stop
        return compute_loss(*args, **kwargs)

    stopped.compute_loss = stopping
    with pytest.raises(Stop):
        stopped.train()

    resumed, _, engine = make_run(tmp_path / "b", tool, reference=reference, **OREO)
    resumed.train(resume_from_checkpoint=True)
    assert not engine.calls  # nothing was left to roll out
    first_step = len(logged(undisturbed, "kl")) // 2
    kl, expected = logged(resumed, "kl"), logged(undisturbed, "kl")
    assert kl == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (expected[first_step] < 1e-6) == (reference == "previous")
    for mine, theirs in zip(split(resumed), split(undisturbed), strict=True):
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_dqo_weighs_by_the_policy_that_sampled(tmp_path):
    """Tokens that the model itself has just sampled weigh 1 in the first step, and something else later."""

    def odd_lengths(completion_ids, **kwargs):
        return [float(len(ids) % 2) for ids in completion_ids]

    generator = ToolRolloutGenerator(
        problems(3),
        reward_funcs=[odd_lengths],
        config=RolloutConfig(num_generations=6, max_turn_tokens=4, dialect="fenced"),
        pairing=UnpairedConfig("all"),
    )
    args = DQOConfig(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DQOTrainer(tiny_model(TOKENIZER), args=args, processing_class=TOKENIZER, callbacks=[generator])
    trainer.train()
    weights = logged(trainer, "importance/weight")
    assert len(weights) > 2 and weights[0] == pytest.approx(1, abs=1e-4)
    assert any(abs(weight - 1) > 1e-3 for weight in weights[1:])
