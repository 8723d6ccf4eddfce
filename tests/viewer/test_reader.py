"""From runs, rows and results to records: ids, fates, pairs and token layers."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Dataset, load_from_disk

from tests.support import TOOLS, assistant, call, result, user
from tests.viewer.runs import TOKENIZER, UNPAIRED, Machine, VariedEngine, judge, make_run, play, prompts, roll_out
from trl_multiturn import RolloutConfig, evaluate_policy
from trl_multiturn.cli import main
from trl_multiturn.journal.run_folder import RunFolder
from trl_multiturn.online.report import IterationReport
from trl_multiturn.viewer.source import open_source


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("unpaired"), 1, UNPAIRED, "unpaired")


def records_of(source, **kwargs):
    return {record.id: record for record in open_source(source, **kwargs).read()}


def test_a_run_is_its_rollouts_and_its_evaluations(run):
    source = open_source(run)
    records = list(source.read())
    assert source.kind == "run" and len(source.iterations) == 2 and source.start["pass@1"] == 0.25
    assert Counter((r.split, r.iteration) for r in records) == {
        ("rollout", 1): 12, ("rollout", 2): 12, ("evaluation", 0): 3, ("evaluation", 1): 3, ("evaluation", 2): 3,
    }  # fmt: skip
    assert records[0].id == "0/current/0/0" and records[-1].id == "evaluation/2/greedy/2/0"
    assert len({record.id for record in records}) == len(records)


def test_the_same_prompt_has_one_key_in_all_iterations_and_evaluations(run):
    records = records_of(run)
    keys = Counter(record.prompt_key for record in records.values())
    assert sorted(keys.values()) == [11, 11, 11]
    assert records["0/current/1/0"].prompt_key == records["evaluation/0/greedy/1/0"].prompt_key


def test_each_trajectory_has_its_fate(run):
    records = records_of(run)
    fates = {i: [records[f"0/current/{i}/{sample}"].fate for sample in range(4)] for i in range(3)}
    assert fates[1][:2] == ["row", "dropped: duplicate"] and sorted(fates[1][2:]) == ["row", "unused: in_no_pair"]
    assert set(fates[2]) == {"unused: no_correct_one", "dropped: duplicate"}


def test_fates_of_an_iteration_under_way_are_open_and_its_counts_are_those_of_now(tmp_path):
    output = make_run(tmp_path, 1)
    roll_out(journal=RunFolder(output / "rollouts").iteration(1).journal, iteration=1, count=2)
    IterationReport(1, ready=False).save(RunFolder(output / "rollouts").iteration(1).path)
    source = open_source(output)
    for _ in range(2):  # reading twice counts once
        fates = {record.fate for record in source.read() if record.iteration == 2 and record.split == "rollout"}
    assert fates == {"not selected yet"}
    assert source.iterations[1].trajectories == 8 and source.iterations[1].correct == 4


def test_pairs_carry_the_references_sums(run):
    source = open_source(run)
    verdicts = {record.id: record.verdict for record in source.read()}
    assert len(source.pairs) > 0
    for pair in source.pairs:
        assert (verdicts[pair.chosen], verdicts[pair.rejected]) == ("correct", "incorrect")
        assert pair.trained and (pair.ref_chosen_logps, pair.ref_rejected_logps) == (-1.5, -2.5)


def test_the_reference_of_a_row_is_a_layer_and_the_trainers_view_of_the_policy_that_sampled(unpaired):
    (record,) = [r for r in records_of(unpaired).values() if r.id == "0/current/1/0"]
    logps, reference = record.layers["logps"], record.layers["ref_logps"]
    sampled = [i for i, bit in enumerate(record.action_mask) if bit]
    assert [round(logps[i] - reference[i], 6) for i in sampled] == [0.25] * len(sampled)
    assert record.layers["trainer_logps"] == reference


def test_at_another_temperature_the_trainer_scores_another_distribution(tmp_path):
    output = make_run(tmp_path, 1, UNPAIRED, "unpaired", settings={"temperature": 0.7})
    record = records_of(output)["0/current/1/0"]
    assert "ref_logps" in record.layers and "trainer_logps" not in record.layers


def test_what_training_cut_is_known(tmp_path):
    output = make_run(tmp_path, 1, UNPAIRED, "unpaired")
    folder = RunFolder(output / "rollouts").iteration(0)
    rows = load_from_disk(folder.training_rows)
    cut = [{**row, **{name: row[name][:5] for name in ("completion_ids", "action_mask")}} for row in rows]
    from trl_multiturn.rows import save_rows

    save_rows(Dataset.from_list(cut[1:]), folder.training_rows)
    fates = Counter(record.fate for record in records_of(output).values() if record.split == "rollout")
    assert fates["row, lost to max_length"] == 1
    assert {r.kept for r in records_of(output).values() if r.fate == "row"} == {5}


def test_one_iteration_alone(run):
    records = records_of(run, iteration=2).values()
    assert {(record.split, record.iteration) for record in records} == {("rollout", 2), ("evaluation", 2)}
    with pytest.raises(ValueError, match="has no iteration 7"):
        open_source(run, iteration=7)


def test_an_export_of_a_run_shows_the_same_trajectories(run, tmp_path):
    def shown(record):
        return record.prompt, record.completion, record.verdict, record.layers["logps"]

    wanted = {r.id: shown(r) for r in records_of(run).values() if r.split == "rollout"}
    for name in ("all.jsonl", "all.parquet"):
        assert main(["export", str(run), "--output", str(tmp_path / name)]) == 0
        found = records_of(tmp_path / name)
        assert {r.id: shown(r) for r in found.values()} == wanted
    assert found["0/current/1/1"].fate == "dropped: duplicate"


def test_a_journal_alone(run):
    records = records_of(RunFolder(run / "rollouts").iteration(0).journal)
    assert list(records)[:4] == [f"0/current/0/{sample}" for sample in range(4)] and len(records) == 12


def test_an_evaluation_and_a_list_of_trajectories():
    found = evaluate_policy(
        prompts(2),
        VariedEngine(play, TOKENIZER),
        [Machine()],
        [judge],
        n=2,
        config=RolloutConfig(dialect="fenced"),
        progress=False,
    )
    source = open_source(found, tokenizer=TOKENIZER)
    records = list(source.read())
    assert source.metrics["pass@1"] == 1.0 and len(records) == 6
    assert {(record.split, record.policy) for record in records} == {
        ("evaluation", "evaluation-greedy"),
        ("evaluation", "evaluation-samples"),
    }
    assert len({record.id for record in open_source([*found.trajectories, *found.trajectories]).read()}) == 12


PROMPT = [user("What is 1+2?")]
WORKED = [call(1, 2), result("3"), assistant("It is 3.")]
GUESSED = [assistant("It is 4.")]


def test_text_rows_get_the_tokens_that_the_trainers_would_train():
    rows = [{"prompt": PROMPT, "chosen": WORKED, "rejected": GUESSED, "tools": TOOLS}]
    plain = list(open_source(rows).read())
    assert [(r.id, r.verdict, r.completion_ids) for r in plain] == [
        ("0/chosen", "correct", []),
        ("0/rejected", "incorrect", []),
    ]
    source = open_source(rows, tokenizer=TOKENIZER)
    chosen, rejected = source.read()
    assert (
        TOKENIZER.decode([t for t, bit in zip(rejected.completion_ids, rejected.action_mask, strict=True) if bit])
        == "It is 4.<|im_end|>"
    )
    assert chosen.num_turns == 2 and [(p.chosen, p.rejected) for p in source.pairs] == [("0/chosen", "0/rejected")]


def test_rows_that_cannot_be_tokenised_are_shown_with_the_reason(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": PROMPT, "completion": [{"role": "chef", "content": "Soup."}], "label": True})
    )
    source = open_source(tmp_path / "rows.jsonl", tokenizer=TOKENIZER)
    (record,) = source.read()
    assert record.completion == [{"role": "chef", "content": "Soup."}]
    assert any("chef" in note for note in source.notes)


def test_token_rows_have_their_rewards_where_they_are_paid():
    row = {
        "prompt_ids": [1],
        "completion_ids": [2, 3, 4, 5],
        "action_mask": [1, 0, 1, 1],
        "reward": 1.0,
        "turn_rewards": [0.5, 0.25],
    }
    (record,) = open_source(Dataset.from_list([{**row, "behavior_logps": [-0.5, 0.0, -1.0, -2.0]}])).read()
    assert record.layers["rewards"] == [0.5, 0.0, 0.0, 1.25] and record.layers["logps"] == [-0.5, 0.0, -1.0, -2.0]
    assert (record.verdict, record.num_turns) == ("correct", 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "holds no row"),
        ("rows.jsonl", '{"prompt"', "line 1 is no JSON"),
        ("rows.jsonl", "[1]", "line 1 is no object but '[1]'"),
        ("rows.jsonl", '{"question": "?"}', "has the columns"),
        ("rows.parquet", "x", "cannot be read as Parquet"),
        ("rows.txt", "x", "its format is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_named(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_text(content)
    assert main(["view", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trl-multiturn view: ") and message in err and err.count("\n") == 1


def test_a_folder_without_a_run_and_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["view", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(ValueError, match="A int is nothing to look at"):
        open_source(3)
