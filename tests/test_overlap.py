"""`max_policy_lag=1`: rollouts of the next iteration while this one trains, with the policy that training began with.

Nothing here depends on timing: what has to happen at once waits for the other by events.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import threading

import pytest
import torch
from datasets import Dataset

from tests.support import tiny_model
from tests.test_callbacks import (  # noqa: F401
    LORA,
    TOKENIZER,
    LoadingEngine,
    SleepingEngine,
    TwoPolicies,
    fingerprint_of,
    make_run,
    problems,
    solve,
    tool,
    training_rows,
)
from trl_multiturn import (
    DQOConfig,
    DQOTrainer,
    GroupRegressionConfig,
    GroupRegressionTrainer,
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PairingConfig,
    RolloutConfig,
    ScriptedEngine,
    ToolRolloutGenerator,
    TransformersEngine,
    UnpairedConfig,
    generate_trajectories,
)
from trl_multiturn.distributed.preemption import Preempted
from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online import overlap
from trl_multiturn.online.endings import stopped
from trl_multiturn.rollout import Journal
from trl_multiturn.trainer.loop.policy_copy import copy_for_sampling
from trl_multiturn.trainer.loop.policy_weights import load_policy_weights, policy_revision, snapshot_revision


SECONDS = 60  # after which something that should have happened by itself has not


def lagging(folder, tool, script=solve, **arguments):  # noqa: F811
    return make_run(folder, tool, script, **{"iterations": 3, "max_policy_lag": 1, **arguments})


def rollouts(generator, iteration):
    return list(Journal(generator.run.iteration(iteration).journal).read())


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "trl-multiturn-rollouts"]


class Meeting(ScriptedEngine):
    """Its rollouts of iteration 2 and the training of iteration 1 each wait for the other to be under way."""

    def __init__(self):
        super().__init__(solve, TOKENIZER)
        self.rolls_out, self.trains = threading.Event(), threading.Event()

    async def generate(self, prompt_ids, sampling, *, session=None):
        if session.startswith("1/"):
            self.rolls_out.set()
            assert await asyncio.to_thread(self.trains.wait, SECONDS), "training did not go on meanwhile"
        return await super().generate(prompt_ids, sampling, session=session)


def test_rollouts_and_training_go_on_at_the_same_time(tmp_path, tool):  # noqa: F811
    engine = Meeting()
    trainer, generator, _ = lagging(tmp_path, tool, engine=engine, iterations=2)
    compute_loss = trainer.compute_loss

    def loss(*args, **kwargs):
        assert engine.rolls_out.wait(SECONDS), "no rollout began meanwhile"
        engine.trains.set()
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = loss
    trainer.train()
    assert [report.rows for report in generator.reports] == [3, 3]
    assert generator.reports[1].overlapped_seconds > 0 and not threads()


def vowels(completions, **columns):
    texts = ["".join(m["content"] for m in completion if m["role"] == "assistant") for completion in completions]
    return [float(sum(text.lower().count(vowel) for vowel in "aeiou") % 2) for text in texts]


PLAYED = RolloutConfig(num_generations=4, previous_policy_generations=2, max_turn_tokens=24, max_trajectory_tokens=300)
QUESTIONS = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}?"}] for i in range(3)]})


def sampled_run(folder, trainer_class=MultiTurnDPOTrainer, config=MultiTurnDPOConfig, peft_config=None, **settings):
    """A run in which the policy itself samples."""
    pairing = PairingConfig(filters=[]) if trainer_class is MultiTurnDPOTrainer else UnpairedConfig(filters=[])
    generator = ToolRolloutGenerator(
        QUESTIONS, reward_funcs=[vowels], config=PLAYED, pairing=pairing, max_policy_lag=1
    )
    args = config(
        str(folder), num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        bf16=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, logging_steps=1, **settings,
    )  # fmt: skip
    trainer = trainer_class(
        tiny_model(TOKENIZER), args=args, processing_class=TOKENIZER, callbacks=[generator], peft_config=peft_config
    )
    return trainer, generator


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def trained(request, tmp_path_factory):
    trainer, generator = sampled_run(tmp_path_factory.mktemp("run"), peft_config=request.param)
    trainer.train()
    return trainer, generator


def test_rows_are_of_the_policy_before_and_say_so(trained):
    trainer, generator = trained
    started = [report.starting_revision for report in generator.reports]
    assert len(set(started)) == 3
    assert [report.policy_revision for report in generator.reports] == [started[0], *started[:2]]
    assert [report.policy_lag for report in generator.reports] == [0, 1, 1]
    names = ("policy", "policy_revision", "policy_iteration", "policy_lag")
    said = [{tuple(t.info.get(name) for name in names) for t in rollouts(generator, i)} for i in range(3)]
    assert said == [
        {("current", started[0], None, None)},
        {("current", started[0], 0, 1)},  # the first policy has none before it
        {("current", started[1], 1, 1), ("previous", started[0], 0, 2)},
    ]
    logged = [entry["rollout/policy_lag"] for entry in trainer.state.log_history if "rollout/policy_lag" in entry]
    assert logged == [1, 1]
    assert not list(generator.run_folder.glob("stale_*"))


def test_trajectories_are_to_the_last_bit_those_of_the_policy_that_is_named(trained):
    trainer, generator = trained
    policy, found = trainer.model, rollouts(generator, 2)
    for label, number, first in (("current", 1, 0), ("previous", 0, 2)):
        load_policy_weights(policy, generator.run.iteration(number).policy)
        alone = generate_trajectories(
            QUESTIONS, TransformersEngine(policy, TOKENIZER), config=PLAYED, num_generations=2, sample_offset=first,
            policy=label, iteration=2, progress=False,
        )  # fmt: skip
        mine = [t for t in found if t.info["policy"] == label]
        assert len(mine) == 6
        assert [(t.completion_ids, t.logps) for t in mine] == [(t.completion_ids, t.logps) for t in alone]
        for trajectory in mine:  # and by a forward pass of the trainer's model
            ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
            with torch.no_grad():
                logps = policy.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
            own = logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(trajectory.prompt_ids) - 1 :]
            sampled = torch.tensor(trajectory.action_mask, dtype=torch.bool)
            torch.testing.assert_close(own[sampled], torch.tensor(trajectory.logps)[sampled], rtol=0, atol=1e-4)


def test_the_engine_is_held_against_the_policy_that_sampled_and_the_drift_is_told(trained):
    agreements = [report.agreement for report in trained[1].reports]
    assert all(agreement["sampling/kl"] < 1e-6 for agreement in agreements)
    assert "sampling/lag_kl" not in agreements[0]
    assert all(agreement["sampling/lag_kl"] > 1e-4 for agreement in agreements[1:])


def test_the_reference_is_the_policy_that_training_starts_from(trained):
    """Not the one that sampled: each iteration is anchored where its steps begin, so that margins restart at 0."""
    trainer, generator = trained
    rows = training_rows(generator, 2)
    load_policy_weights(trainer.model, generator.run.iteration(2).policy)
    expected = trainer.compute_reference_columns(rows)
    assert rows["ref_chosen_logps"][:] == expected["ref_chosen_logps"][:]
    first_steps = [report.first_step for report in generator.reports]
    margins = {e["step"]: e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e}
    assert [abs(margins[step + 1]) < 1e-5 for step in first_steps] == [True] * 3


def test_dqo_weighs_lagging_rows_by_how_likely_they_are_now(tmp_path):
    trainer, generator = sampled_run(tmp_path, DQOTrainer, DQOConfig, value_model="head")
    trainer.train()
    weights = {
        entry["step"]: entry["importance/weight"]
        for entry in trainer.state.log_history
        if "importance/weight" in entry
    }
    first_steps = [report.first_step + 1 for report in generator.reports]
    assert weights[first_steps[0]] == pytest.approx(1.0, abs=1e-4)
    assert weights[first_steps[1]] != pytest.approx(1.0, abs=1e-3)  # before the first step on these rows
    # the held copy has no value model, and the policy keeps its own
    assert snapshot_revision(generator.run.iteration(3).policy) == policy_revision(trainer.model)


class Broken(Exception):
    pass


def breaking_at(place, prompt_text, sampling, session):
    if session.startswith(place):
        raise Broken("the tool's machine is on fire")
    return solve(prompt_text, sampling, session)


breaking = functools.partial(breaking_at, "1/current/2")


def test_an_error_of_the_rollouts_is_raised_when_the_iteration_is_trained_and_costs_nothing(tmp_path, tool, caplog):  # noqa: F811
    whole, undisturbed, _ = lagging(tmp_path / "whole", tool, iterations=2)
    whole.train()
    broken, _, _ = lagging(tmp_path / "broken", tool, breaking, iterations=2)
    with pytest.raises(Broken, match="on fire"):
        broken.train()
    assert "iteration 2, which run while iteration 1 trains, have failed (Broken" in caplog.text
    assert (tmp_path / "broken" / "checkpoint-2").exists() and not threads()

    resumed, generator, engine = lagging(tmp_path / "broken", tool, iterations=2)
    resumed.train(resume_from_checkpoint=True)
    assert not [call for call in engine.calls if call.session.startswith("0/")]
    assert policy_revision(resumed.model) == policy_revision(whole.model)
    for mine, theirs in zip(generator.reports, undisturbed.reports, strict=True):
        assert (mine.rows, mine.policy_revision, mine.starting_revision, mine.last_step) == (
            theirs.rows, theirs.policy_revision, theirs.starting_revision, theirs.last_step,
        )  # fmt: skip


class Waiting(ScriptedEngine):
    """Its rollouts of iteration 2 end when they are cancelled."""

    def __init__(self):
        super().__init__(solve, TOKENIZER)
        self.waits, self.cancelled = threading.Event(), False

    async def generate(self, prompt_ids, sampling, *, session=None):
        if session.startswith("1/"):
            self.waits.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return await super().generate(prompt_ids, sampling, session=session)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("end", "error"),
    [(interrupt, KeyboardInterrupt), (terminate, Preempted)],
    ids=lambda x: x.__name__,
)
def test_what_ends_the_training_ends_the_rollouts(tmp_path, tool, end, error, capsys):  # noqa: F811
    engine = Waiting()
    trainer, generator, _ = lagging(tmp_path, tool, engine=engine, iterations=2)
    compute_loss = trainer.compute_loss

    def loss(*args, **kwargs):
        assert engine.waits.wait(SECONDS)
        if trainer.state.global_step == 1:
            end()
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = loss
    with pytest.raises(error):
        trainer.train()
    assert engine.cancelled and not threads()
    if error is KeyboardInterrupt:
        assert "Stopped in iteration 1, while it trained on its 3 rows" in capsys.readouterr().out
        return
    again, generator, _ = lagging(tmp_path, tool, iterations=2)
    again.train(resume_from_checkpoint=True)  # inside the iteration, where SIGTERM has left a checkpoint
    assert [report.policy_lag for report in generator.reports] == [0, 1]
    assert generator.reports[1].policy_revision == generator.reports[0].starting_revision


def test_where_training_ends_for_good_nothing_is_rolled_out_any_more(tmp_path, tool):  # noqa: F811
    trainer, generator, engine = lagging(tmp_path, tool)
    trainer.args.max_steps = 1
    trainer.train()
    assert {call.session[0] for call in engine.calls} == {"0"}
    assert "while it trained" in stopped(generator.run)


def test_a_lag_that_is_switched_off_sets_its_rollouts_aside(tmp_path, tool):  # noqa: F811
    broken, _, _ = lagging(tmp_path, tool, breaking)
    with pytest.raises(Broken):
        broken.train()
    trainer, generator, engine = make_run(tmp_path, tool, iterations=2)
    trainer.train(resume_from_checkpoint=True)
    assert (generator.run_folder / "stale_iteration_001_1" / "journal").exists()
    assert generator.reports[1].policy_revision == generator.reports[1].starting_revision


@pytest.mark.parametrize("last", [1, 3], ids=["while it rolls out", "between two iterations"])
def test_a_lag_that_is_switched_on_counts_from_the_next_iteration_on(tmp_path, tool, last):  # noqa: F811
    """What the present policy has rolled out stays. Nor is an older policy asked for whose snapshot is gone."""
    script = functools.partial(breaking_at, f"{last}/current/2")
    trainer, generator, _ = make_run(tmp_path, tool, script, iterations=last + 2)
    with pytest.raises(Broken):
        trainer.train()
    if last == 3:
        shutil.rmtree(generator.run.iteration(last).journal)
        generator.run.iteration(last).report.unlink()
        assert not generator.run.iteration(last - 2).policy.exists()
    resumed, generator, _ = lagging(tmp_path, tool, iterations=last + 2)
    resumed.train(resume_from_checkpoint=True)
    assert [report.policy_lag for report in generator.reports] == [*[0] * (last + 1), 1]
    assert not list(generator.run_folder.glob("stale_*"))


def test_an_engine_with_weights_of_its_own_holds_the_earlier_ones_and_is_evaluated_with_the_present(tmp_path, tool):  # noqa: F811
    seen = {}

    def script(prompt_text, sampling, session):
        place = "/".join(session.split("/")[:2])
        seen.setdefault(place if session[0].isdigit() else session, set()).add(engine.loaded)
        return solve(prompt_text, sampling, session)

    engine = LoadingEngine(script, TOKENIZER)
    trainer, generator, _ = lagging(tmp_path, tool, engine=engine, eval_prompts=problems(1, first=50))
    trainer.train()
    started = [report.starting_revision for report in generator.reports]
    rolled_out = {
        place: revisions for place, revisions in seen.items() if place[0].isdigit() and "evaluation" not in place
    }
    assert rolled_out == {
        "0/current": {started[0]},
        "1/current": {started[0]},
        "2/current": {started[1]},
        "2/previous": {started[0]},
    }
    evaluated = set.union(*(revisions for place, revisions in seen.items() if place not in rolled_out))
    assert evaluated == {*started, snapshot_revision(RunFolder(generator.run_folder).iteration(3).policy)}
    assert len(list(generator.run_folder.glob("engine_*"))) == 1


def test_an_engine_with_room_for_two_adapters_samples_from_both_policies_at_once(tmp_path, tool):  # noqa: F811
    engine = TwoPolicies()
    trainer, generator, _ = lagging(tmp_path, tool, engine=engine, peft_config=LORA)
    trainer.train()
    first, again, second = map(fingerprint_of, engine.loaded)
    assert first == again != second
    assert engine.sampled == {("0/current", first), ("1/current", first), ("2/current", second), ("2/previous", first)}
    assert engine.together
    assert len(generator.run.engine_checkpoints()) == 1


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_copy_shares_only_what_is_not_trained(tmp_path, peft_config):
    trainer, _ = sampled_run(tmp_path, peft_config=peft_config)
    policy = trainer.model
    handle = policy.register_forward_hook(lambda *args: pytest.fail("the copy runs a hook of the policy"))
    copied = copy_for_sampling(trainer)
    mine, theirs = dict(policy.named_parameters()), dict(copied.named_parameters())
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] is theirs[name]} == {n for n, p in mine.items() if not p.requires_grad}
    ids = torch.tensor([[5, 6, 7]])
    before = copied(input_ids=ids).logits
    handle.remove()
    torch.testing.assert_close(policy.eval()(input_ids=ids).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    torch.testing.assert_close(copied(input_ids=ids).logits, before, rtol=0, atol=0)


class Unable(ScriptedEngine):
    over = None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_policy_lag=2), "`max_policy_lag=2` is neither 0 .* nor 1"),
        (dict(max_policy_lag=True), "`max_policy_lag=True` is neither"),
        (dict(engine=SleepingEngine(solve, TOKENIZER)), "sleeps while the policy is trained"),
        (dict(engine=Unable(solve, TOKENIZER)), "has no `over"),
        (dict(split=True), "splits the weights over processes"),
        (dict(trainer_class=GroupRegressionTrainer, baseline="soft_mean"), "Set `behavior_reference=True`"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_overlap_is_refused_at_once(tmp_path, tool, monkeypatch, arguments, message):  # noqa: F811
    arguments = dict(arguments)
    if arguments.pop("split", False):
        monkeypatch.setattr(overlap, "is_deepspeed_zero3_enabled", lambda: True)
    if baseline := arguments.pop("baseline", None):

        def config(**settings):
            return GroupRegressionConfig(baseline=baseline, **settings)

        arguments["config"] = config
    with pytest.raises(ValueError, match=message):
        lagging(tmp_path, tool, **arguments)
