"""The study's runner resumes, its statistics are scipy's, and its tasks are what they say (see `docs/evidence.md`)."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.study.arms import ARMS
from benchmarks.study.cell import result_path, run_cell
from benchmarks.study.claims import CLAIMS, Claim
from benchmarks.study.plan import quick_study, whole_study
from benchmarks.study.results import REPRODUCED, REVERSED, UNDECIDED, Interval, collect, difference, verdict
from benchmarks.study.runner import Cell, run
from benchmarks.study.tabular import TABULAR_ARMS
from benchmarks.study.worlds import CERTAIN, CHANCES, GAMBLE, KEEP, WORLDS, demonstrate


def record(world: str, seed: int, arm: str, score: float) -> dict:
    return {"world": world, "seed": seed, "arm": arm, "score": score}


def write(out: Path, *records: dict) -> None:
    for each in records:
        path = result_path(out, each["world"], each["seed"], each["arm"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each))


def test_a_cell_runs_only_the_arms_without_a_result(tmp_path):
    write(tmp_path, record("tabular-uncertain", 0, "m-dpo", 0.25))
    run_cell(tmp_path, "tabular-uncertain", 0, ["m-dpo", "oreo"], quick=True)
    results = collect(tmp_path).set_index("arm")
    assert results.score["m-dpo"] == 0.25  # as it was
    assert results.steps["oreo"] == 30


def test_an_arm_that_fails_leaves_no_result_and_the_others_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit, match="m-nothing failed"):
        run_cell(tmp_path, "tabular-uncertain", 0, ["m-nothing", "oreo"], quick=True)
    assert list(collect(tmp_path).arm) == ["oreo"]
    assert "is no arm" in capsys.readouterr().err


class ScriptedCell(Cell):
    """A cell whose child writes the results of its arms, and fails at the arm `fails` the first time."""

    def command(self, out, quick):
        script = (
            "import json, pathlib, sys\n"
            "out, world, seed, arms = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]\n"
            "for arm in arms:\n"
            "    if arm == 'fails' and not (out / 'failed').exists():\n"
            "        (out / 'failed').touch(); sys.exit(3)\n"
            "    path = out / 'results' / f'{world}-{seed}-{arm}.json'\n"
            "    path.parent.mkdir(exist_ok=True)\n"
            "    with path.open('x') as stream: json.dump({'arm': arm}, stream)\n"  # never written twice
        )
        return [sys.executable, "-c", script, str(out), self.world, str(self.seed), *self.missing(out)]


def test_a_study_that_lost_a_cell_goes_on_with_what_is_missing(tmp_path):
    cells = [ScriptedCell("late", 0, ("one", "fails", "two")), ScriptedCell("late", 1, ("one",))]
    assert run(cells, tmp_path) is False
    finished = {path.name for path in (tmp_path / "results").iterdir()}
    assert finished == {"late-0-one.json", "late-1-one.json"}
    assert run(cells, tmp_path) is True
    assert len(list((tmp_path / "results").iterdir())) == 4
    assert run(cells, tmp_path) is True  # nothing is left to do, and nothing was done twice


def test_every_arm_of_plan_and_claims_is_described():
    known = {*ARMS, *TABULAR_ARMS, "zero"}
    planned = {(cell.world, arm) for cell in whole_study() for arm in cell.arms}
    assert {arm for cell in [*quick_study(), *whole_study()] for arm in cell.arms} <= known
    for claim in CLAIMS:
        for arm in (claim.better, claim.worse):
            name = arm.partition(":")[0]
            assert name == "zero" or all((world, name) in planned for world in claim.worlds), (claim.text, arm)


@pytest.mark.parametrize(
    ("differences", "kind", "expected"),
    [
        ([0.1, 0.12, 0.09, 0.11, 0.1], "greater", REPRODUCED),
        ([-0.1, -0.12, -0.09, -0.11, -0.1], "greater", REVERSED),
        ([0.1, -0.12, 0.09, -0.11, 0.1], "greater", UNDECIDED),
        ([0.1, 0.12, 0.09, 0.11], "greater", UNDECIDED),  # four seeds decide nothing
        ([0.001, -0.002, 0.001, 0.0, 0.002], "equal", REPRODUCED),
        ([0.1, 0.12, 0.09, 0.11, 0.1], "equal", REVERSED),
        ([0.1, -0.12, 0.09, -0.11, 0.1], "equal", UNDECIDED),
    ],
)
def test_a_verdict_needs_an_interval_of_five_seeds(differences, kind, expected):
    rows = [record("late", seed, "worse", 0.5) for seed in range(5)]
    rows += [record("late", seed, "better", 0.5 + d) for seed, d in enumerate(differences)]
    claim = Claim("", "", "", "", "better", "worse", ("late",), kind)
    assert verdict(claim, difference(pd.DataFrame(rows), claim, "late")) == expected


def test_an_interval_is_student_s_t():
    interval = Interval.of(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (interval.mean, interval.seeds) == (3.0, 5)
    assert interval.high - 3.0 == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)  # t of 4 degrees times s / sqrt(5)


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_no_test_case_is_a_training_case(world):
    cases = [
        {(row["errand"], *row["signs"]) for row in world.problems(30, seed, split)}
        for seed, split in ((0, "train"), (1, "test"))
    ]
    assert not cases[0] & cases[1]


def test_a_world_without_enough_cases_says_so():
    with pytest.raises(ValueError, match="no 5000 different prompts"):
        WORLDS["tiny"].problems(5000, 0, "train")


@pytest.mark.parametrize("name", ["noisy", "late"])
def test_a_case_pays_only_where_every_action_was_right(name):
    world = WORLDS[name]
    problem = world.problems(1, 0, "train")[0]
    for mistake in (None, *range(world.steps)):
        station = world.environment()
        station.reset(problem["errand"], problem["signs"], luck=0)
        for step, sign in enumerate(problem["signs"]):
            rule = world.rule(problem["errand"], sign)
            station.act(rule.wrong if step == mistake else rule.right)
        assert station.done and station.get_reward() == float(mistake is None)


def test_a_fair_gamble_pays_its_chance_and_keeping_what_is_certain():
    world = WORLDS["uncertain"]
    for errand in CHANCES:
        for action, paid in ((GAMBLE, CHANCES[errand]), (KEEP, CERTAIN[errand])):
            station = world.fair_environment()
            station.reset(errand, ["amber", "blue"], luck=0)
            station.act(action)
            station.act(world.rule(errand, "blue").right)
            assert station.get_reward() == paid


def test_the_teacher_mistakes_a_sign_at_its_rate():
    world, rng = WORLDS["tiny"], random.Random(0)
    rule = world.rule("wash", "amber")
    problem = {"prompt": [{"role": "user", "content": ""}], "errand": "wash", "signs": ["amber"]}
    said = [demonstrate(world, problem, rng)[-1]["content"] for _ in range(2000)]
    assert said.count(rule.wrong) / 2000 == pytest.approx(rule.error_rate, abs=0.04)
    assert said.count(rule.right) + said.count(rule.wrong) == 2000


@pytest.mark.slow
def test_the_quick_study_runs_and_reports(tmp_path, monkeypatch, capsys):
    from benchmarks.study.__main__ import main

    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--out", str(tmp_path)])
    main()
    printed = capsys.readouterr().out
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert {*zip(results.world, results.arm, strict=True)} == {
        ("tiny", "start"),
        ("tiny", "m-dpo"),
        ("tabular-uncertain", "m-dpo"),
        ("tabular-uncertain", "m-dpo-margin"),
    }
    assert "**tiny**" in printed and "not run" in printed
    assert results.torch.notna().all() and (results.seconds > 0).all()
