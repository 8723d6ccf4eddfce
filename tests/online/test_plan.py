"""What an iteration does with what is on disk of it, decided from its report alone."""

from __future__ import annotations

import pytest

from trl_multiturn import PairingConfig, PythonTool, RolloutConfig
from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online.plan import Beginning, Plan, plan_iteration
from trl_multiturn.online.report import IterationReport
from trl_multiturn.online.settings import IterationSettings
from trl_multiturn.rollout.judging import Judge


def reward(completions, **columns):
    return [1.0] * len(completions)


def settings(reward_funcs=(reward,), threshold=0.5, pairing=None, **rollout):
    judge = Judge(list(reward_funcs), correct_threshold=threshold)
    pairing = pairing or PairingConfig(filters=[])
    return IterationSettings([], judge, RolloutConfig(**rollout), pairing).describe()


def begun(tmp_path, ready=True, revision="a", **fields):
    folder = RunFolder(tmp_path).iteration(1)
    report = IterationReport(1, 4, policy_revision=revision, ready=ready, settings=settings(), **fields)
    report.save(folder.path)
    return folder


def beginning(now=None, inside=False, revision="a", first_step=4):
    return Beginning(1, inside, settings() if now is None else now, revision, first_step)


def test_what_stands_is_loaded_and_what_does_not_goes_on(tmp_path):
    assert plan_iteration(RunFolder(tmp_path).iteration(1), beginning()) == Plan("roll out")
    assert plan_iteration(begun(tmp_path), beginning()).action == "load"
    plan = plan_iteration(begun(tmp_path, ready=False), beginning())
    assert plan.action == "roll out" and "goes on with the rollouts" in plan.notice


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(reward_funcs=[lambda completions, **columns: [0.0] * len(completions)]), "reward_funcs"),
        (dict(threshold=0.9), "correct_threshold"),
        (dict(pairing=PairingConfig(max_pairs_per_prompt=2, filters=[])), "pairing"),
        (dict(pairing=PairingConfig(filters=["over_length"])), "pairing"),
        (dict(num_generations=40), "num_generations"),
        (dict(previous_policy_generations=3), "previous_policy_generations"),
    ],
)
def test_what_decides_no_rollout_may_change(tmp_path, changes, name):
    plan = plan_iteration(begun(tmp_path), beginning(settings(**changes)))
    assert plan.action == "roll out" and "keeps the rollouts" in plan.notice and f"`{name}`" in plan.notice


@pytest.mark.parametrize(("changes", "name"), [(dict(temperature=0.5), "temperature"), (dict(seed=1), "seed")])
def test_what_decides_rollouts_is_refused_with_the_folder_to_delete_and_what_that_loses(tmp_path, changes, name):
    folder = begun(tmp_path, trajectories=12)
    with pytest.raises(ValueError, match=f"other settings \\(`{name}`") as raised:
        plan_iteration(folder, beginning(settings(**changes)))
    assert f"delete {folder.path}, which loses 12 trajectories of iteration 2" in str(raised.value)


def test_another_policy_is_set_aside_or_refused(tmp_path):
    folder = begun(tmp_path)
    assert plan_iteration(folder, beginning(revision="b")).action == "set aside"
    assert plan_iteration(folder, beginning(first_step=8)).action == "set aside"
    with pytest.raises(ValueError, match="another policy"):
        plan_iteration(folder, beginning(revision="b", first_step=0))


def test_inside_an_epoch_its_rows_stay_whatever_changed(tmp_path):
    plan = plan_iteration(begun(tmp_path), beginning(settings(threshold=0.9), inside=True))
    assert plan.action == "load" and "counts from the next iteration on" in plan.notice
    with pytest.raises(ValueError, match="does not hold its rows"):
        plan_iteration(begun(tmp_path, ready=False), beginning(inside=True))


def test_a_patch_release_of_the_interpreter_changes_nothing(tmp_path, monkeypatch):
    with PythonTool() as tool:
        before, now = (
            IterationSettings([tool], Judge(reward), pairing=PairingConfig(filters=[])).describe() for _ in range(2)
        )
    assert before["tools"] == {"python": "python-0.1.0-" + before["tools"]["python"].rpartition("-")[2]}
    now["tools"]["python"] = now["tools"]["python"].replace("0.1.0", "0.1.7")
    folder = RunFolder(tmp_path).iteration(1)
    IterationReport(1, 4, policy_revision="a", settings=before).save(folder.path)
    assert plan_iteration(folder, beginning(now)).action == "load"
    now["tools"]["python"] = now["tools"]["python"].replace("0.1.7", "0.2.0")
    with pytest.raises(ValueError, match="`tools`"):
        plan_iteration(folder, beginning(now))


def samples(n, previous, before=None, iteration=1):
    config = RolloutConfig(num_generations=n, previous_policy_generations=previous)
    return IterationSettings([], Judge(reward), config).samples(iteration, before)


def test_more_samples_are_added_to_those_that_are_there():
    first = samples(4, 1)
    assert first == {"current": [range(3)], "previous": [range(3, 4)]}
    more = samples(7, 3, first)
    assert more == {"current": [range(3), range(4, 5)], "previous": [range(3, 4), range(5, 7)]}
    assert samples(3, 1, more) == {"current": [range(2)], "previous": [range(3, 4)]}
    assert samples(4, 1, iteration=0) == {"current": [range(4)], "previous": []}


def test_a_report_of_an_earlier_release_implies_its_samples():
    report = IterationReport(1, settings={"num_generations": 4, "previous_policy_generations": 1})
    assert report.spans() == samples(4, 1)
    assert IterationReport(1).spans() is None
