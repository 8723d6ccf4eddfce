"""The command line, the dataset check behind it, the mask preview, and supervised rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from tests.formats.written import ONE_CALL, TRAJECTORIES, rows
from tests.support import TOOLS, assistant, byte_tokenizer, call, result, save_tiny, user
from trl_multiturn import IterationReport, Journal, StopReason, Trajectory, Verdict, preview_masks, tokenize_trajectory
from trl_multiturn.cli import main
from trl_multiturn.data import load_rows, supervised_rows
from trl_multiturn.data.check import check_dataset
from trl_multiturn.online.report import save_start
from trl_multiturn.rollout import read_dataset


TOKENIZER = byte_tokenizer("qwen2_5")
PROMPT = [user("What is 1+2?")]
WORKED = [call(1, 2), result("3"), assistant("It is 3.")]
GUESSED = [assistant("It is 4.")]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def preference(**changes):
    return {"prompt": PROMPT, "chosen": WORKED, "rejected": GUESSED, "tools": TOOLS, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), TOKENIZER)


def test_check_accepts_good_rows_and_shows_them(tmp_path, model, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [preference(), preference()])
    assert main(["check", "--model", model, "--dataset", path]) == 0
    out = capsys.readouterr().out
    assert "2 rows in 1 split(s): 2 preference" in out and "No errors." in out and "turn 2" in out


def test_check_names_every_malformed_row_and_fails(tmp_path, model, capsys):
    rows = [
        preference(),
        preference(rejected=WORKED),
        preference(chosen=[user("no turn of the policy")]),
        {"prompt": PROMPT, "chosen": WORKED, "tools": TOOLS},
    ]
    assert main(["check", "--model", model, "--dataset", write_jsonl(tmp_path / "rows.jsonl", rows)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "row 0" not in out.partition("error:")[2]
    assert "train, row 1: `chosen` and `rejected` are the same tokens" in out
    assert "train, row 2: `chosen` has" in out
    assert "train, row 3" in out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": PROMPT, "completion": GUESSED}, "neither a `label` nor a `reward`"),
        ({"question": "?", "answer": "!"}, "the columns are ['answer', 'question']"),
        (
            {"simulations": [{"messages": PROMPT + GUESSED, "reward": 1.0}]},
            "the rows stand in `simulations` of one obj",
        ),
        (
            {"prompt_ids": [1], "response_ids": [2], "response_mask": [1]},
            "message logs with token ids (`--from logs`)",
        ),
        ({"prompt_ids": [1], "completion_ids": [2, 3], "action_mask": [1], "label": True}, "1 entries but"),
        ({"prompt_ids": [1], "completion_ids": [2, 3], "action_mask": [0, 0], "reward": 1.0}, "no gradient"),
    ],
)
def test_check_says_what_is_wrong(row, message):
    report = check_dataset(Dataset.from_list([row]), TOKENIZER, progress=False)
    assert message in report.errors[0] and report.errors[0].startswith("train, row 0: ")


@pytest.mark.parametrize("form", TRAJECTORIES)
def test_check_reads_rows_of_other_tools_and_names_the_converter(form):
    name, write = TRAJECTORIES[form]
    count = 2 if form in ONE_CALL else 3
    report = check_dataset(Dataset.from_list([write(row) for row in rows()[:count]]), TOKENIZER, progress=False)
    expected = check_dataset(Dataset.from_list(rows()[:count]), TOKENIZER, progress=False)
    assert report.errors == [] and report.kinds == {"trajectory": count}
    assert (report.lengths, report.trained) == (expected.lengths, expected.trained)
    assert [f"--from {name}" in note for note in report.notes] == [True] * (name != "trl")


def test_check_takes_conversations_without_an_outcome_for_supervised_rows():
    flagged = [{"role": "assistant", "content": "Agreed.", "train": False}, *GUESSED]
    report = check_dataset(Dataset.from_list([{"messages": PROMPT + flagged}]), TOKENIZER, progress=False)
    assert report.errors == [] and report.kinds == {"supervised": 1}
    assert "neither a `reward` nor a `label`" in report.warnings[0]
    plain = check_dataset(Dataset.from_list([{"messages": PROMPT + GUESSED}]), TOKENIZER, progress=False)
    assert report.trained == plain.trained and report.lengths[0] > plain.lengths[0]


def test_check_counts_what_max_length_does():
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1] * 4] * 2,
            "completion_ids": [[2] * 4] * 2,
            "action_mask": [[1] * 4, [0, 0, 0, 1]],
            "label": [True] * 2,
        }
    )
    report = check_dataset(rows, TOKENIZER, max_length=6, progress=False)
    assert report.lengths == [8] and report.trained == [2]
    assert "cuts 1 of 1 sequences" in report.warnings[-1]
    assert "none of them sampled by the policy within `max_length=6`" in report.errors[0]


def test_check_reports_a_defect_of_the_template():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.eos_token = None  # and so nothing ends a turn
    report = check_dataset(Dataset.from_list([preference()]), tokenizer, progress=False)
    assert report.errors[0].startswith("Chat template: ")


def test_unknown_file_is_named(model, capsys):
    assert main(["check", "--model", model, "--dataset", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "rows.jsonl is empty"), ('{"prompt": "a", "chosen"', "rows.jsonl cannot be read as json: ")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, model, capsys, text, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    assert main(["check", "--model", model, "--dataset", str(path)]) == 2
    assert reason in capsys.readouterr().err


def trajectory(prompt_index, sample_index):
    row = tokenize_trajectory(TOKENIZER, PROMPT, GUESSED)
    info = {"prompt_index": prompt_index, "sample_index": sample_index, "tool_calls": 0}
    return Trajectory(PROMPT, GUESSED, **row, stop_reason=StopReason.ANSWERED, verdict=Verdict.INCORRECT, info=info)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    for iteration in range(2):
        with Journal(folder / f"iteration_{iteration:03d}" / "journal") as journal:
            for sample in (1, 0):
                journal.append(f"{iteration}/current", trajectory(0, sample))
        report = IterationReport(iteration, trajectories=2, incorrect=2, dropped={"duplicate": 1})
        report.evaluation = {"pass@1": 0.5 + iteration / 4, "pass@1_se": 0.05}
        report.save(folder / f"iteration_{iteration:03d}")
    save_start(folder, {"policy_revision": "0", "evaluation": {"pass@1": 0.25, "pass@1_se": 0.04}})
    return tmp_path / "run"


def test_stats_prints_the_table_of_a_run(run, capsys):
    assert main(["stats", str(run)]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("25.0 ± 4.0", "50.0 ± 5.0", "75.0 ± 5.0", "duplicate 1"))


def test_stats_counts_what_an_iteration_under_way_has_finished(run, capsys):
    with Journal(run / "rollouts" / "iteration_002" / "journal") as journal:
        for sample in range(3):
            journal.append("2/current", trajectory(0, sample))
        journal.judge("2/current", trajectory(0, 1).judged(Verdict.CORRECT, 1.0))
    IterationReport(2, ready=False).save(run / "rollouts" / "iteration_002")
    (run / "rollouts" / "iteration_003").mkdir()  # the next policy's snapshot lies there
    assert main(["stats", str(run)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "under way" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")][:3] == ["3, under way", "3", "33.3"]


@pytest.mark.parametrize("content", [b"", b'{"iteration": 1', b"[]", b'{"unknown": 1}', b"\xff"])
@pytest.mark.parametrize("name", ["iteration_001/report.json", "start.json"])
def test_a_damaged_report_is_named(run, capsys, name, content):
    (run / "rollouts" / name).write_bytes(content)
    assert main(["stats", str(run)]) == 2
    err = capsys.readouterr().err
    assert f"{run / 'rollouts' / name} is damaged, or of another version" in err and "Restore it" in err


def test_a_damaged_list_of_dropped_trajectories_is_named(run, tmp_path, capsys):
    path = run / "rollouts" / "iteration_000" / "dropped.jsonl"
    path.write_text('[0, "0/cur')
    assert main(["export", str(run), "--output", str(tmp_path / "all.parquet")]) == 2
    assert f"{path} is damaged" in one_line(capsys)


def test_what_a_policy_cannot_have_meant_is_exported_all_the_same(run, tmp_path):
    r"""Arguments of a call are JSON, in which `"\ud800"` is half a character."""
    odd = replace(trajectory(7, 0), completion=[call("\ud800", 2)])
    with Journal(run / "rollouts" / "iteration_001" / "journal") as journal:
        journal.append("1/current", odd)
    for name in ("all.jsonl", "all.parquet"):
        assert main(["export", str(run), "--output", str(tmp_path / name)]) == 0
    (*_, row) = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"a": "?", "b": 2}
    assert read_dataset(tmp_path / "all.parquet")[-1] == odd


def test_export_writes_every_trajectory_in_order(run, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "all.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [Trajectory.from_dict(row) for row in rows] == [trajectory(0, sample) for sample in (0, 1)] * 2
    assert main(["export", str(run), "--output", str(tmp_path / "all.parquet")]) == 0
    dataset = load_dataset("parquet", data_files=str(tmp_path / "all.parquet"), split="train")
    assert dataset["completion_ids"][:] == [row["completion_ids"] for row in rows]


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("trl-multiturn export: ")
    return err


def test_export_names_a_damaged_shard_and_writes_nothing(run, tmp_path, capsys):
    (shard,) = (run / "rollouts" / "iteration_001" / "journal").glob("shard-*.jsonl")
    shard.write_bytes(shard.read_bytes().replace(b'"kind"', b'"kinf"', 1))
    for name in ("all.jsonl", "all.parquet"):
        assert main(["export", str(run), "--output", str(tmp_path / name)]) == 2
        assert f"Line 1 of {shard} is damaged" in one_line(capsys)
        assert not (tmp_path / name).exists()


def test_export_says_what_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("all.jsonl", "all.parquet"):
        assert main(["export", str(run), "--output", str(tmp_path / "file" / name)]) == 2
        assert str(tmp_path / "file") in one_line(capsys)
    (tmp_path / "folder.jsonl").mkdir()
    assert main(["export", str(run), "--output", str(tmp_path / "folder.jsonl")]) == 2
    assert "Is a directory" in one_line(capsys) and not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("name", ["all.jsonl", "all.parquet"])
def test_export_to_a_full_disk_says_so(run, tmp_path, capsys, name):
    (tmp_path / f"{name}.partial").symlink_to("/dev/full")
    assert main(["export", str(run), "--output", str(tmp_path / name)]) == 2
    assert "No space left on device" in one_line(capsys)
    assert not (tmp_path / name).exists()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["stats", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_preview_shows_kinds_turns_and_cuts():
    row = tokenize_trajectory(TOKENIZER, PROMPT, WORKED, TOOLS) | {"label": True}
    preview = preview_masks(Dataset.from_list([row]), processing_class=TOKENIZER, show=False)
    (title, segments) = preview.sequences[0]
    assert title == "row 0 · completion · label True"
    assert [(s.kind, s.turn) for s in segments] == [
        ("context", 0),
        ("trained", 1),
        ("context", 0),
        ("trained", 2),
        ("context", 0),
    ]
    assert segments[3].text == "It is 3.<|im_end|>"
    assert sum(s.num_tokens for s in segments) == len(row["prompt_ids"]) + len(row["completion_ids"])

    short = preview_masks(
        Dataset.from_list([row]),
        1,
        TOKENIZER,
        max_length=len(row["prompt_ids"]) + segments[1].num_tokens + 3,
        show=False,
    )
    assert [s.kind for s in short.sequences[0][1]] == ["context", "trained", "truncated", "truncated", "truncated"]


def test_preview_shows_where_training_begins_and_ends_without_colours():
    row = tokenize_trajectory(TOKENIZER, PROMPT, WORKED) | {"label": True}
    text = str(preview_masks([row], processing_class=TOKENIZER, show=False))
    lines = [line.strip("│ ") for line in text.splitlines()]
    assert lines[lines.index("▌turn 1▐ <tool_call>") + 1 : -1] == [
        '{"name": "add", "arguments": {"a": 1, "b": 2}}',
        "</tool_call><|im_end|>▌context▐",
        "<|im_start|>user",
        "<tool_response>",
        "3",
        "</tool_response><|im_end|>",
        "<|im_start|>assistant",
        "▌turn 2▐ It is 3.<|im_end|>▌context▐",
        "",
        f"{sum(row['action_mask'])} of {len(row['prompt_ids'] + row['completion_ids'])} tokens trained",
    ]
    first_turn = row["action_mask"].index(0)
    cut = str(preview_masks([row], 1, TOKENIZER, max_length=len(row["prompt_ids"]) + first_turn + 3, show=False))
    assert "</tool_call><|im_end|>▌truncated▐" in cut and "▌turn 2, truncated▐ It is 3." in cut


def test_preview_takes_text_rows_and_trajectories_and_escapes_html():
    text = preview_masks(Dataset.from_list([preference()]), processing_class=TOKENIZER, show=False)
    assert [title for title, _ in text.sequences] == ["row 0 · chosen", "row 0 · rejected"]
    html = preview_masks(trajectory(0, 0), processing_class=TOKENIZER, show=False)._repr_html_()
    assert "&lt;|im_end|&gt;" in html and "<|im_end|>" not in html
    with pytest.raises(ValueError, match="needs a tokenizer"):
        preview_masks(trajectory(0, 0))


def test_supervised_rows_label_the_policys_tokens_alone():
    rows = Dataset.from_list(
        [{"messages": PROMPT + WORKED, "tools": TOOLS}, {"messages": PROMPT + WORKED, "tools": TOOLS}]
    )
    token_row = tokenize_trajectory(TOKENIZER, PROMPT, WORKED, TOOLS)
    for row in supervised_rows(rows, TOKENIZER):
        labelled = TOKENIZER.decode([token for token in row["labels"] if token != -100])
        assert labelled.endswith("<|im_end|>It is 3.<|im_end|>") and "tool_response" not in labelled
        assert row["input_ids"] == token_row["prompt_ids"] + token_row["completion_ids"]
    assert supervised_rows(Dataset.from_list([token_row]), TOKENIZER)[0] == row
    with pytest.raises(ValueError, match="Row 0: no message is an assistant's"):
        supervised_rows(Dataset.from_list([{"messages": PROMPT}]), TOKENIZER)


def test_load_rows_reads_files_and_saved_datasets(tmp_path):
    rows = Dataset.from_list([{"a": 1}])
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        assert load_rows(str(tmp_path / name))["train"]["a"][:] == [1]
    with pytest.raises(ValueError, match="No dataset was named"):
        load_rows("")
