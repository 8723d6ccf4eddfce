"""The online loop: a real trainer and a real interpreter, a scripted policy where the outcome must be known."""

from __future__ import annotations

import asyncio
import functools
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import SaveStrategy

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    MultiTurnKTOConfig,
    MultiTurnKTOTrainer,
    PairingConfig,
    PythonTool,
    RolloutConfig,
    ScriptedEngine,
    ToolRolloutGenerator,
    UnpairedConfig,
    Verdict,
    build_preference_dataset,
    build_unpaired_dataset,
    math_reward,
)
from trl_multiturn.journal.evaluations import read_evaluations
from trl_multiturn.journal.export import run_trajectories
from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online.endings import view_command
from trl_multiturn.rollout import Journal, JournalError
from trl_multiturn.rollout.judging import Judge
from trl_multiturn.scripts.online import what_was_saved
from trl_multiturn.trainer.loop.policy_weights import load_policy_weights, policy_revision
from trl_multiturn.verify import Filter


TOKENIZER = byte_tokenizer("qwen2_5")


def problems(n, first=0):
    questions = [(first + i, 2 * i + 3) for i in range(n)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{a}+{b}?"}] for a, b in questions],
            "answer": [str(a + b) for a, b in questions],
        }
    )


def solve(prompt_text, sampling, session):
    """Even samples compute what was asked, odd ones subtract; each writes a comment of its own."""
    a, b = re.search(r"(\d+)\+(\d+)\?", prompt_text).groups()
    sample = int(session.rpartition("/")[2])
    output = re.search(r"```output\n(.*?)\n```", prompt_text)
    if output:
        return f"\\boxed{{{output[1]}}}"
    return f"```python\nprint({a} {'+-'[sample % 2]} {b})  # {sample}\n```"


@pytest.fixture(scope="module")
def tool():
    tool = PythonTool()
    yield tool
    tool.close()


def make_run(folder, tool, script=solve, model=None, iterations=2, trainer_class=MultiTurnDPOTrainer, config=None,
             peft_config=None, generations=4, previous=2, **generator_kwargs):  # fmt: skip
    args = (config or MultiTurnDPOConfig)(
        output_dir=str(folder),
        num_train_epochs=iterations,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="epoch",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    engine = generator_kwargs.pop("engine", None) or ScriptedEngine(script, TOKENIZER)
    generator = ToolRolloutGenerator(
        generator_kwargs.pop("prompts", problems(3)),
        tools=[tool],
        reward_funcs=[math_reward],
        config=RolloutConfig(
            num_generations=generations, previous_policy_generations=previous, max_turn_tokens=100, dialect="fenced"
        ),
        engine=engine,
        **generator_kwargs,
    )
    trainer = trainer_class(
        model=model or tiny_model(TOKENIZER),
        args=args,
        processing_class=TOKENIZER,
        callbacks=[generator],
        peft_config=peft_config,
    )
    return trainer, generator, engine


def training_rows(generator, iteration):
    return load_from_disk(generator.run_folder / f"iteration_{iteration:03d}" / "training_rows")


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_two_iterations_end_to_end(tmp_path, tool, peft_config, reference):
    trainer, generator, engine = make_run(tmp_path, tool, peft_config=peft_config, reference=reference)
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()

    first, second = generator.reports
    assert (first.trajectories, first.correct, first.incorrect, first.rows) == (12, 6, 6, 3)
    assert (first.tool_calls, first.tool_failures) == (12, 0)
    assert (second.first_step, second.last_step) == (2, 4) == (first.last_step, trainer.state.global_step)
    assert trainer.ref_model is None
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == 0.0 and margins[1] != 0.0
    assert (margins[2] == 0.0) == (reference == "previous")  # the reference moved with the policy, or it did not

    # the second iteration's reference columns are the log-probabilities of the policy that the reference names
    rows = training_rows(generator, 1)
    with torch.no_grad():
        if reference == "previous":
            load_policy_weights(trainer.model, RunFolder(generator.run_folder).iteration(1).policy)
        else:
            for name, p in trainer.model.named_parameters():
                p.copy_(initial[name])
    expected = trainer.compute_reference_columns(rows)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        torch.testing.assert_close(rows[column][:], expected[column][:], rtol=0, atol=0)


def test_rows_are_what_was_rolled_out(tmp_path, tool):
    trainer, generator, _ = make_run(tmp_path, tool, iterations=1)
    trainer.train()
    for row in training_rows(generator, 0):
        assert "+" in TOKENIZER.decode(row["chosen_ids"]).partition("#")[0]
        trained = [t for t, bit in zip(row["chosen_ids"], row["chosen_action_mask"], strict=True) if bit]
        text = TOKENIZER.decode(trained)
        assert "output" not in text and text.count("<|im_end|>") == 2


def test_mixture_samples_with_the_previous_weights(tmp_path, tool):
    seen = {}

    def script(prompt_text, sampling, session):
        seen.setdefault(session.rpartition("/")[0].rpartition("/")[0], set()).add(policy_revision(trainer.model))
        return solve(prompt_text, sampling, session)

    trainer, generator, engine = make_run(tmp_path, tool, script)
    trainer.train()
    first, second = generator.reports
    assert first.policy_revision != second.policy_revision
    assert seen == {
        "0/current": {first.policy_revision},
        "1/current": {second.policy_revision},
        "1/previous": {first.policy_revision},
    }
    assert (second.policy_lag, second.starting_revision) == (0, second.policy_revision)
    journal = Journal(generator.run_folder / "iteration_001" / "journal")
    assert not any({"policy_lag", "policy_iteration"} & t.info.keys() for t in journal.read())


class TwoPolicies(ScriptedEngine):
    """Has adapters of its own; knows with which one each turn was sampled, and whether both were under way."""

    weights = "own"
    samples_beside = True

    def __init__(self):
        super().__init__(self.answer, TOKENIZER)
        self.loaded, self.sampled, self.under_way, self.together = [], set(), set(), False

    def answer(self, prompt_text, sampling, session):
        return solve(prompt_text, sampling, session)

    def refresh(self, model_path=None):
        self.loaded.append(load_file(Path(model_path, "adapter_model.safetensors")))

    def beside(self, model_path):
        return Earlier(self, load_file(Path(model_path, "adapter_model.safetensors")))

    async def generate(self, prompt_ids, sampling, *, session=None, weights=None):
        label = session.rpartition("/")[0].rpartition("/")[0]
        self.sampled.add((label, fingerprint_of(weights or self.loaded[-1])))
        self.under_way.add(label)
        await asyncio.sleep(0)
        self.together |= len(self.under_way) > 1
        generation = await super().generate(prompt_ids, sampling, session=session)
        self.under_way.discard(label)
        return generation


class Earlier:
    weights = "own"

    def __init__(self, engine, loaded):
        self.engine, self.loaded, self.processing_class = engine, loaded, engine.processing_class

    def generate(self, prompt_ids, sampling, *, session=None):
        return self.engine.generate(prompt_ids, sampling, session=session, weights=self.loaded)

    def __getattr__(self, name):
        return getattr(self.engine, name)


def fingerprint_of(weights):
    return sum(float(tensor.double().abs().sum()) for tensor in weights.values())


def test_an_engine_with_room_for_two_adapters_samples_from_both_policies_at_once(tmp_path, tool):
    engine = TwoPolicies()
    trainer, generator, _ = make_run(tmp_path, tool, engine=engine, peft_config=LORA)
    trainer.train()
    before, after = (fingerprint_of(weights) for weights in engine.loaded[:2])
    assert before != after
    assert engine.sampled == {("0/current", before), ("1/current", after), ("1/previous", before)}
    assert engine.together
    trajectories = list(Journal(generator.run_folder / "iteration_001" / "journal").read())
    revisions = {t.info["policy"]: t.info["policy_revision"] for t in trajectories}
    assert revisions == {
        "previous": generator.reports[0].policy_revision,
        "current": generator.reports[1].policy_revision,
    }
    assert not list(generator.run_folder.glob("earlier_adapter_*"))


@pytest.mark.parametrize(
    ("previous", "expected"),
    [(4, {"previous": 12}), (None, {"previous": 3, "current": 9}), (0, {"current": 12})],
    ids=["all", "a third by default", "none"],
)
def test_a_mixture_has_the_share_that_was_asked_for(tmp_path, tool, previous, expected):
    trainer, generator, _ = make_run(tmp_path, tool, previous=previous)
    trainer.train()
    journals = [Journal(generator.run_folder / f"iteration_00{i}" / "journal") for i in range(2)]
    assert [Counter(t.info["policy"] for t in journal.read()) for journal in journals] == [{"current": 12}, expected]


@pytest.mark.parametrize("pairing", [None, UnpairedConfig(max_positives=1)], ids=["pairs", "balanced"])
def test_rows_on_disk_are_those_of_the_whole_journal_at_once(tmp_path, tool, pairing):
    classes = {} if pairing is None else dict(trainer_class=MultiTurnKTOTrainer, config=MultiTurnKTOConfig)
    trainer, generator, _ = make_run(tmp_path, tool, prompts=problems(4), pairing=pairing, **classes)
    trainer.train()
    build = build_preference_dataset if pairing is None else build_unpaired_dataset
    for iteration in range(2):
        folder = generator.run_folder / f"iteration_{iteration:03d}"
        trajectories = list(Journal(folder / "journal").read())
        assert {t.info["policy"] for t in trajectories} == ({"current", "previous"} if iteration else {"current"})
        found, expected = load_from_disk(folder / "rows"), build(trajectories, generator.settings.pairing)
        assert found.features == expected.features and found.to_list() == expected.to_list()
        assert len(found) == generator.reports[iteration].rows == (4 if pairing is None else 12)
    assert not list(generator.run_folder.rglob("cache-*"))  # what was computed on the way to the training rows


def test_a_row_knows_what_dropped_it(tmp_path, tool):
    def undecided(**columns):
        return [None if i == 0 else reward for i, reward in enumerate(math_reward(**columns))]

    trainer, generator, _ = make_run(tmp_path, tool)
    generator.settings.judge = Judge([undecided])
    trainer.train()
    rows = list(run_trajectories(generator.run_folder))
    reasons = Counter((t.info["iteration"], t.info["dropped"]) for t in rows if "dropped" in t.info)
    expected = {(r.iteration, reason): n for r in generator.reports for reason, n in r.dropped.items() if n}
    assert expected and reasons == expected
    assert all((t.verdict is Verdict.UNDECIDED) == (t.info.get("dropped") == "undecided") for t in rows)


def test_history_all_trains_on_every_iteration_so_far(tmp_path, tool):
    prompts = problems(6)
    trainer, generator, _ = make_run(tmp_path, tool, history="all", prompts=prompts, prompts_per_iteration=3)
    trainer.train()
    assert [r.rows for r in generator.reports] == [3, 3]
    assert [r.trained_rows for r in generator.reports] == [3, 6]
    asked = [{TOKENIZER.decode(row["prompt_ids"]) for row in training_rows(generator, i)} for i in range(2)]
    assert len(asked[0]) == 3 and len(asked[1]) == 6 and asked[0] < asked[1]  # disjoint prompts, then both


def test_the_best_policy_is_loaded_at_the_end(tmp_path, tool):
    evaluations = []

    def script(prompt_text, sampling, session):
        if "evaluation" in session:
            if "output" not in prompt_text:
                evaluations.append(session)
            right = 2 < len(evaluations) <= 4  # only the second evaluation, after the first iteration, goes well
            return solve(prompt_text, sampling, "x/0" if right else "x/1")
        return solve(prompt_text, sampling, session)

    trainer, generator, _ = make_run(tmp_path, tool, script, eval_prompts=problems(2, first=50))
    trainer.train()
    assert generator.start_evaluation["pass@1"] == 0
    assert [r.evaluation["pass@1"] for r in generator.reports] == [1, 0]
    assert generator.best_policy == 1
    assert policy_revision(trainer.model) == generator.reports[1].policy_revision


def test_an_iteration_without_rows_is_skipped_with_a_warning(tmp_path, tool, caplog):
    def script(prompt_text, sampling, session):
        return solve(prompt_text, sampling, "x/0" if session.startswith("0/") else session)

    trainer, generator, _ = make_run(tmp_path, tool, script)
    trainer.train()
    assert [r.rows for r in generator.reports] == [0, 3]
    assert trainer.state.global_step == 2
    assert "found no row to train on" in caplog.text
    assert "The prompts are too easy" in caplog.text and "[user] 0+3?" in caplog.text  # why, and a trajectory to see


def test_a_policy_that_did_not_change_is_evaluated_once(tmp_path, tool):
    def script(prompt_text, sampling, session):
        return solve(prompt_text, sampling, "x/1")

    trainer, generator, engine = make_run(tmp_path, tool, script, eval_prompts=problems(2, first=50))
    trainer.train()
    assert len([c for c in engine.calls if "evaluation" in c.session]) == 4  # two prompts of two turns, once
    assert [r.evaluation["pass@1"] for r in generator.reports] == [0, 0] and generator.best_policy == 0
    assert what_was_saved(generator).startswith("No iteration found a row to train on")


def test_stopped_run_goes_on_and_ends_where_an_undisturbed_one_does(tmp_path, tool, capsys):
    whole, reference_run, _ = make_run(tmp_path / "whole", tool, iterations=3)
    whole.train()

    class Stop(Exception):
        pass

    def stopping(prompt_text, sampling, session):
        if session.startswith("1/current/2"):
            raise Stop
        return solve(prompt_text, sampling, session)

    stopped, _, _ = make_run(tmp_path / "stopped", tool, stopping, iterations=3)
    with pytest.raises(Stop):
        stopped.train()

    resumed, generator, engine = make_run(tmp_path / "stopped", tool, iterations=3)
    resumed.train(resume_from_checkpoint=True)
    assert "Iteration 2 goes on with the rollouts in" in capsys.readouterr().out  # also without progress bars
    assert not [call for call in engine.calls if call.session.startswith("0/")]  # nothing is rolled out twice
    assert policy_revision(resumed.model) == policy_revision(whole.model)
    for mine, theirs in zip(generator.reports, reference_run.reports, strict=True):
        assert (mine.rows, mine.policy_revision, mine.last_step) == (
            theirs.rows,
            theirs.policy_revision,
            theirs.last_step,
        )


def test_rows_that_are_taken_up_log_what_was_counted_of_them(tmp_path, tool, capsys):
    """Not the one placeholder with which the trainer was built."""
    first, _, _ = make_run(tmp_path, tool, iterations=1)
    first.train()
    again, _, _ = make_run(tmp_path, tool, iterations=1)
    again.train()  # from the start, with the rows that are there
    assert "Iteration 1 has its rows already" in capsys.readouterr().out
    for name in ("data/rows", "data/length_p95"):
        assert logged(again, name) == logged(first, name) and len(logged(first, name)) == 1
    assert logged(first, "data/rows") == [3]


def test_a_run_ends_with_where_to_look_at_it_and_keeps_what_it_was_measured_by(tmp_path, tool, capsys):
    trainer, generator, _ = make_run(tmp_path, tool, iterations=1, eval_prompts=problems(2, 50), eval_generations=2)
    trainer.train()
    assert capsys.readouterr().out.splitlines()[-1] == f"Look at it: {view_command(tmp_path)}"
    kept = dict(read_evaluations(generator.run))
    assert [len(trajectories) for trajectories in kept.values()] == [2 + 4] * 2 and list(kept) == [0, 1]
    assert {t.verdict for t in kept[0] if t.info["policy"] == "evaluation-greedy"} == {Verdict.CORRECT}


def test_rollouts_of_other_settings_or_prompts_are_refused_and_nothing_is_lost(tmp_path, tool):
    trainer, generator, _ = make_run(tmp_path, tool, iterations=1)
    trainer.train()
    before = {path: path.read_bytes() for path in generator.run_folder.rglob("shard-*")}
    other, second, _ = make_run(tmp_path, tool, iterations=1)
    second.settings.rollout.temperature = 0.5
    with pytest.raises(
        ValueError, match="other settings \\(`temperature`.*which loses 12 trajectories of iteration 1"
    ):
        other.train()
    with pytest.raises(JournalError, match="Prompt 0 is not the one"):
        make_run(tmp_path, tool, iterations=1, prompts=problems(3, first=7))[0].train()
    assert {path: path.read_bytes() for path in generator.run_folder.rglob("shard-*")} == before
    again, third, engine = make_run(tmp_path, tool, iterations=1)
    again.train()
    assert not engine.calls and [r.rows for r in third.reports] == [3]


class Stop(Exception):
    pass


def start_and_stop(number, *args, **kwargs):
    """A run that ends in the middle of the rollouts of an iteration, of which some have finished."""
    judge = kwargs.pop("judge", None)
    trainer, generator, _ = make_run(*args, script=stop_in_iteration(number), **kwargs)
    generator.settings.rollout.max_concurrent_trajectories = 1
    generator.settings.judge = judge or generator.settings.judge
    with pytest.raises(Stop):
        trainer.train()


def stop_in_iteration(number):
    def script(prompt_text, sampling, session):
        if session.startswith(f"{number}/current/2"):
            raise Stop
        return solve(prompt_text, sampling, session)

    return script


def outcome(generator, iteration=1):
    return training_rows(generator, iteration).to_list()


@pytest.mark.parametrize("history", ["latest", "all"])
def test_a_reward_repaired_between_two_starts_judges_anew_and_mixes_nothing(tmp_path, tool, history):
    """The first start has a reward of which some are wrong, a filter and a threshold; the second has none of them."""

    def unsteady(completions, **columns):
        return [float("3" in str(each)) for each in completions]

    pairing = PairingConfig(filters=["turn_without_code"], max_pairs_per_prompt=2)
    common = dict(history=history, prompts=problems(4))
    judge = Judge([unsteady], correct_threshold=0.9)
    start_and_stop(0, tmp_path / "a", tool, pairing=pairing, judge=judge, **common)
    again, generator, engine = make_run(tmp_path / "a", tool, **common)
    again.train()
    whole, undisturbed, _ = make_run(tmp_path / "b", tool, **common)
    whole.train()
    assert not [call for call in engine.calls if call.session.startswith("0/current/0")]
    assert [outcome(generator, i) for i in range(2)] == [outcome(undisturbed, i) for i in range(2)]
    assert policy_revision(again.model) == policy_revision(whole.model)


def test_rows_of_earlier_iterations_are_found_anew_for_a_history_of_all(tmp_path, tool):
    """A threshold above every reward finds no row; lowered before the second iteration, it does in both."""
    common = dict(history="all", prompts=problems(3))
    start_and_stop(1, tmp_path, tool, correct_threshold=2.0, **common)
    again, generator, engine = make_run(tmp_path, tool, **common)
    again.train(resume_from_checkpoint=True)
    assert not [call for call in engine.calls if call.session.startswith("0/")]
    assert [(r.rows, r.trained_rows) for r in generator.reports] == [(3, 3), (3, 6)]


def test_more_generations_and_more_prompts_keep_what_is_there(tmp_path, tool):
    start_and_stop(1, tmp_path, tool, prompts=problems(3))
    again, generator, engine = make_run(tmp_path, tool, prompts=problems(4), generations=6)
    again.train(resume_from_checkpoint=True)
    calls = {call.session for call in engine.calls if call.session.startswith("1/")}
    assert "1/previous/0/2" not in calls and "1/current/0/4" in calls and "1/previous/3/2" in calls
    assert (generator.reports[1].trajectories, generator.reports[1].samples) == (
        24,
        {"current": [[0, 2], [4, 6]], "previous": [[2, 4]]},
    )


class Blank:
    """An environment with nothing in it."""

    def reset(self, **row):
        return None


def settings_with(reward=math_reward, drops=None, **changes):
    """What a generator says of itself whose filter drops what `drops` says."""
    filters = [] if drops is None else [Filter("mine", "For this test.", drops)]
    pairing = PairingConfig(filters=["over_length", *filters])
    return ToolRolloutGenerator(problems(2), reward_funcs=reward, pairing=pairing, **changes).settings.describe()


def test_settings_are_the_same_in_another_process_and_others_where_the_code_is():
    """A function's address is another in each process, its source is not."""

    def make(number):
        def drops(trajectory):
            return False

        def reward(completions, **columns):
            return [0.0] * len(completions)

        def other(completions, **columns):
            return [1.0] * len(completions)

        other.__name__ = "reward"
        return drops, reward, (lambda trajectory: True), other

    (drops, reward, more, other), (same_drops, same_reward, _, _) = make(0), make(1)
    assert drops is not same_drops and settings_with(reward, drops) == settings_with(same_reward, same_drops)
    assert settings_with(drops=drops)["pairing"] != settings_with(drops=more)["pairing"]
    longer, shorter = (functools.partial(max, limit) for limit in (9, 8))
    assert settings_with(drops=longer)["pairing"] != settings_with(drops=shorter)["pairing"]
    assert settings_with(reward)["reward_funcs"] != settings_with(other)["reward_funcs"]
    assert settings_with("math_reward") == settings_with()
    for changes in (dict(correct_threshold=0.9), dict(missing_reward="skip"), dict(environment_factory=Blank)):
        assert settings_with(**changes) != settings_with()
    assert settings_with(reward_timeout_seconds=9.0) == settings_with()


def test_a_verifier_that_hangs_holds_up_an_iteration_for_its_limit_only(tmp_path, tool):
    released = threading.Event()

    def hangs(completions, **columns):
        released.wait(60)
        return [1.0] * len(completions)

    trainer, generator, _ = make_run(tmp_path, tool, iterations=1, eval_prompts=problems(1, first=50))
    generator.settings.judge = Judge([hangs], reward_timeout_seconds=0.1)
    trainer.train()
    assert not released.is_set()
    released.set()
    assert (generator.reports[0].undecided, generator.reports[0].rows) == (12, 0)
    assert generator.start_evaluation["undecided"] == 1


def test_a_threshold_decides_in_rollouts_and_evaluations(tmp_path, tool):
    trainer, generator, _ = make_run(
        tmp_path, tool, iterations=1, eval_prompts=problems(1, first=50), correct_threshold=1.5
    )
    trainer.train()
    assert (generator.reports[0].incorrect, generator.start_evaluation["pass@1"]) == (12, 0.0)


def test_another_initial_policy_is_refused(tmp_path, tool):
    make_run(tmp_path, tool, iterations=1)[0].train()
    other, _, engine = make_run(tmp_path, tool, iterations=1, model=tiny_model(TOKENIZER, seed=1))
    with pytest.raises(ValueError, match="begun from another policy"):
        other.train()
    assert not engine.calls


def test_iterations_after_a_policy_that_turned_out_differently_are_set_aside(tmp_path, tool, caplog):
    """Started anew with another learning rate: the first rollouts are the same policy's, the later ones are not."""
    make_run(tmp_path, tool, iterations=3)[0].train()
    again, generator, engine = make_run(tmp_path, tool, iterations=3)
    again.args.learning_rate = 1e-3
    again.train()
    assert not [call for call in engine.calls if call.session.startswith("0/")]
    assert {call.session[0] for call in engine.calls} == {"1", "2"}
    assert (generator.run_folder / "stale_iteration_001_1" / "training_rows").exists()
    assert (generator.run_folder / "stale_iteration_002_1" / "training_rows").exists()
    assert [r.iteration for r in generator.reports] == [0, 1, 2]
    assert "another policy" in caplog.text


def test_a_shorter_run_in_the_same_folder_ends_with_a_policy_of_its_own(tmp_path, tool):
    """The best of the longer run's policies is not the shorter one's, whose own is not written over that one's."""
    evaluations = []

    def script(prompt_text, sampling, session):
        if "evaluation" in session:
            evaluations.append(session)
            return solve(prompt_text, sampling, "x/0" if len(evaluations) > 6 else "x/1")  # the last goes well
        return solve(prompt_text, sampling, session)

    longer, first, _ = make_run(tmp_path, tool, script, iterations=3, eval_prompts=problems(1, first=50))
    longer.train()
    assert first.best_policy == 3
    snapshots = {path.parent.name: path.read_bytes() for path in first.run_folder.glob("*/policy.safetensors")}
    evaluations.clear()
    shorter, second, _ = make_run(tmp_path, tool, script, iterations=1, eval_prompts=problems(1, first=50))
    shorter.args.learning_rate = 1e-3
    shorter.train()
    assert [report.iteration for report in second.reports] == [0] and second.best_policy == 0
    assert policy_revision(shorter.model) == second.reports[0].policy_revision
    for number in (2, 3):
        aside = second.run_folder / f"stale_iteration_00{number}_1" / "policy.safetensors"
        assert aside.read_bytes() == snapshots[f"iteration_00{number}"]


def test_rollouts_cut_off_by_a_policy_that_turned_out_differently_start_anew(tmp_path, tool):
    def stopping(prompt_text, sampling, session):
        if session.startswith("1/current/2"):
            raise InterruptedError
        return solve(prompt_text, sampling, session)

    with pytest.raises(InterruptedError):
        make_run(tmp_path, tool, stopping)[0].train()
    again, generator, engine = make_run(tmp_path, tool)
    again.args.learning_rate = 1e-3
    again.train()
    assert (generator.run_folder / "stale_iteration_001_1" / "journal").exists()
    assert [r.iteration for r in generator.reports] == [0, 1]


def test_every_iteration_ends_with_a_checkpoint_by_default(tmp_path, tool):
    trainer, _, _ = make_run(tmp_path, tool)
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, 500  # transformers' defaults
    trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_an_iteration_of_rows_that_are_all_too_long_is_skipped(tmp_path, tool, caplog):
    trainer, generator, _ = make_run(tmp_path, tool)
    trainer.args.max_length = 20
    trainer.train()
    assert [(r.rows, r.trained_rows) for r in generator.reports] == [(3, 0), (3, 0)]
    assert "No row is left to train on" in caplog.text


class LoadingEngine(ScriptedEngine):
    """An engine with weights of its own: remembers the revision of each checkpoint it was given."""

    weights = "own"

    def refresh(self, model_path=None):
        super().refresh(model_path)
        self.loaded = policy_revision(AutoModelForCausalLM.from_pretrained(model_path))


def test_an_engine_with_weights_of_its_own_samples_and_is_evaluated_with_the_present_ones(tmp_path, tool):
    seen = []

    def script(prompt_text, sampling, session):
        present = policy_revision(trainer.model)
        seen.append((session.partition("/")[2].partition("/")[0], engine.loaded == present))
        return solve(prompt_text, sampling, session)

    engine = LoadingEngine(script, TOKENIZER)
    trainer, generator, _ = make_run(tmp_path, tool, eval_prompts=problems(1, first=50), engine=engine)
    trainer.train()
    assert {label for label, _ in seen} == {"current", "previous", "evaluation-greedy"}
    assert all(right for _, right in seen)
    assert len(list(generator.run_folder.glob("engine_*"))) == 1  # the last one alone is kept


class SleepingEngine(LoadingEngine):
    """An engine whose memory the trainer gets."""

    sleeps_while_training = True
    asleep = False

    def sleep(self):
        self.asleep = True

    def wake_up(self):
        self.asleep = False

    def refresh(self, model_path=None):
        assert not self.asleep
        super().refresh(model_path)


def test_an_engine_that_offers_it_sleeps_while_the_policy_is_trained(tmp_path, tool):
    def script(prompt_text, sampling, session):
        assert not engine.asleep
        return solve(prompt_text, sampling, session)

    engine, steps = SleepingEngine(script, TOKENIZER), []
    trainer, generator, _ = make_run(tmp_path, tool, eval_prompts=problems(1, first=50), engine=engine)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (steps.append(engine.asleep), compute_loss(*args, **kwargs))[1]
    trainer.train()
    assert steps and all(steps)


def test_evaluation_sees_the_environment(tmp_path):
    class Calculator:
        """An environment with one tool."""

        def reset(self, **row):
            return None

        def add(self, a: int, b: int) -> str:
            """Adds.

            Args:
                a: First.
                b: Second.
            """
            return str(a + b)

    def script(prompt_text, sampling, session):
        assert "Adds." in prompt_text  # the tool is in the prompt, in rollouts and in evaluations
        return "\\boxed{3}" if int(session.rpartition("/")[2]) % 2 else "\\boxed{4}"

    args = MultiTurnDPOConfig(str(tmp_path), num_train_epochs=1, use_cpu=True, bf16=False, report_to="none")
    generator = ToolRolloutGenerator(
        problems(2),
        reward_funcs=math_reward,
        config=RolloutConfig(num_generations=2, max_turn_tokens=50),
        environment_factory=Calculator,
        eval_prompts=problems(1, first=50),
        engine=lambda model, tokenizer: ScriptedEngine(script, tokenizer),
    )
    MultiTurnDPOTrainer(tiny_model(TOKENIZER), args=args, processing_class=TOKENIZER, callbacks=[generator]).train()
    assert generator.start_evaluation["pass@1"] == 0


def test_an_environment_that_owns_its_reward_needs_no_other(tmp_path):
    class Parity:
        """The one right answer is 4."""

        done = False

        def reset(self, **row):
            self.reward = None

        def answer(self, number: int) -> str:
            """Answers.

            Args:
                number: The answer.
            """
            self.done, self.reward = True, float(number == 4)
            return "thanks"

        def get_reward(self):
            return self.reward

    def script(prompt_text, sampling, session):
        number = 3 + int(session.rpartition("/")[2]) % 2
        return f'<tool_call>\n{{"name": "answer", "arguments": {{"number": {number}}}}}\n</tool_call>'

    args = MultiTurnDPOConfig(str(tmp_path), num_train_epochs=1, use_cpu=True, bf16=False, report_to="none")
    generator = ToolRolloutGenerator(
        problems(2),
        config=RolloutConfig(num_generations=4, max_turn_tokens=80),
        environment_factory=Parity,
        eval_prompts=problems(1, first=50),
        pairing=PairingConfig(filters=[]),
        engine=lambda model, tokenizer: ScriptedEngine(script, tokenizer),
    )
    MultiTurnDPOTrainer(tiny_model(TOKENIZER), args=args, processing_class=TOKENIZER, callbacks=[generator]).train()
    (report,) = generator.reports
    assert (report.correct, report.incorrect, report.rows) == (4, 4, 2)
    assert generator.start_evaluation["pass@1"] == 0


def test_kto_takes_the_same_rollouts_unpaired(tmp_path, tool):
    trainer, generator, _ = make_run(
        tmp_path, tool, trainer_class=MultiTurnKTOTrainer, config=MultiTurnKTOConfig, pairing=PairingConfig()
    )
    trainer.train()
    assert [r.rows for r in generator.reports] == [6, 6]
    assert sorted(training_rows(generator, 0)["label"][:]) == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reward_funcs=None), "No `reward_funcs`"),
        (dict(prompts=Dataset.from_dict({"question": ["2+2?"]})), "no `prompt`"),
        (dict(reference="last"), "`reference='last'` is unknown"),
        (dict(history="some"), "`history='some'` is unknown"),
        (dict(lr_schedule="epoch"), "`lr_schedule='epoch'` is unknown"),
        (dict(prompts_per_iteration=9), "not between 1 and the 3 prompts"),
        (dict(prompts=problems(3).select([])), "`prompts` is empty"),
        (dict(eval_prompts=problems(0)), "`eval_prompts`"),
        (dict(eval_prompts=problems(3).select([])), "`eval_prompts` is empty"),
        (dict(reward_funcs="no_such_reward"), "'no_such_reward', which could not be loaded"),
        (dict(reward_weights=[1.0, 2.0]), "2 entries for 1 reward functions"),
        (dict(missing_reward="drop"), "`missing_reward='drop'` is unknown"),
    ],
)
def test_mistakes_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        ToolRolloutGenerator(**{"prompts": problems(3), "reward_funcs": [math_reward], **arguments})
