"""Files that other tools wrote, in the form that trainers read."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings, strategies as st

from tests.formats.written import ONE_CALL, TRAJECTORIES, rows, without_ids
from trl_multiturn import convert_rows
from trl_multiturn.cli import main
from trl_multiturn.conversion.row import RowConverter
from trl_multiturn.formats import column_shapes, columns_read, read_row


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


def write_jsonl(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(path):
    """The rows as `load_dataset` gives them, read as the trainers do."""
    dataset = load_dataset("parquet", data_files=str(path), cache_dir=str(path.parent / "cache"))["train"]
    shapes = column_shapes(dataset)
    return [{"reward": row["reward"], **read_row(row, shapes=shapes)} for row in dataset]


@pytest.mark.parametrize("form", TRAJECTORIES)
def test_every_form_as_json_lines(tmp_path, form):
    name, write = TRAJECTORIES[form]
    expected = rows()[: 2 if form in ONE_CALL else None]
    source = write_jsonl(tmp_path / "in.jsonl", map(write, expected))
    report = convert_rows(source, tmp_path / "out.jsonl", progress=False)
    assert report.formats == {name: len(expected)} and report.rows_written == len(expected) and not report.unreadable
    found = [{key: row[key] for key in expected[0]} for row in read_jsonl(tmp_path / "out.jsonl")]
    assert list(map(without_ids, found)) == list(map(without_ids, expected))
    again = convert_rows(tmp_path / "out.jsonl", tmp_path / "again.jsonl", progress=False)
    assert not again.unreadable and read_jsonl(tmp_path / "again.jsonl") == read_jsonl(tmp_path / "out.jsonl")


@pytest.mark.parametrize("form", ["the form itself", "ShareGPT", "fill-ins", "an episode"])
def test_parquet_brings_back_no_null(tmp_path, form):
    write_jsonl(tmp_path / "in.jsonl", map(TRAJECTORIES[form][1], rows()))
    convert_rows(tmp_path / "in.jsonl", tmp_path / "out.parquet", progress=False)
    assert list(map(without_ids, load(tmp_path / "out.parquet"))) == list(map(without_ids, rows()))
    convert_rows(tmp_path / "out.parquet", tmp_path / "back.jsonl", progress=False)
    back = [{key: row[key] for key in rows()[0]} for row in read_jsonl(tmp_path / "back.jsonl")]
    assert list(map(without_ids, back)) == list(map(without_ids, rows()))


def test_numbers_and_nulls_that_were_written_stay(tmp_path):
    row = rows()[0]
    arguments = {"word": None, "price": 0.3, "share": 0.123456789012345, "big": 2**70}
    row["completion"][0]["tool_calls"][0]["function"]["arguments"] = arguments
    convert_rows([row, rows()[1]], tmp_path / "out.parquet", progress=False)
    found = load(tmp_path / "out.parquet")[0]["completion"][0]["tool_calls"][0]["function"]["arguments"]
    assert found == arguments


def test_other_columns_stay(tmp_path):
    keys = {
        "task_id": 7,
        "info": {"a": None},
        "score": 1,
        "tags": ["x"],
        "costs": [1.0, 2.0],
        "note": None,
        "mixed": 1,
    }
    lines = [rows()[0] | keys, rows()[1] | keys | {"score": 0.5, "mixed": "a"}]
    convert_rows(lines, tmp_path / "out.jsonl", progress=False)
    assert read_jsonl(tmp_path / "out.jsonl")[1].items() >= {**keys, "score": 0.5, "mixed": "a"}.items()
    convert_rows(lines, tmp_path / "out.parquet", progress=False)
    stored = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))["train"][0]
    assert {name: stored[name] for name in keys} == keys | {
        "info": json.dumps(keys["info"]),
        "tags": '["x"]',
        "mixed": "1",
    }


def test_every_row_that_cannot_be_read_is_told_by_number(tmp_path, capsys):
    lines = [
        {"messages": [USER, ANSWER]},
        "{broken",
        {"messages": [USER, {**ANSWER, "role": "critic"}]},
        *[{"messages": [USER]}] * 3,
        '"text"',
        {"messages": [USER, {**ANSWER, "usage": {"tokens": 3}}]},
        {"question": "?"},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    assert main(["convert", str(source), str(tmp_path / "out.jsonl")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "9 rows read, 2 written." in out and "2 rows were taken for messages of an OpenAI-compatible API." in out
    for told in (
        "not read, row 1: the line is no valid JSON",
        "not read, row 2: `messages`: message 1 has the role 'critic'",
        "not read, rows 3-5: no message is an assistant's",
        "not read, row 6: the line is no JSON object",
        "not read, row 8: the columns are `question`",
        "left out, keys of messages that no chat template prints: `usage` (1 messages)",
    ):
        assert told in out
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 2


def test_rollouts_that_nobody_judged_are_left_out(tmp_path):
    rollout = rows()[0] | {"example_id": 1}
    lines = [rollout, rollout | {"error": "Timeout"}, rollout | {"reward": None}, rollout | {"reward": math.inf}]
    report = convert_rows(lines, tmp_path / "out.jsonl", progress=False)
    assert [number for number, _ in report.unreadable] == [1, 2, 3] and report.rows_written == 1
    assert "is the machine's and not the policy's" in report.unreadable[0][1]


def test_a_json_file_of_a_benchmark(tmp_path):
    lines = [TRAJECTORIES["a simulation"][1](row) for row in rows()]
    for name, content in (("list", lines), ("object", {"info": {}, "tasks": [{"id": 1}], "simulations": lines})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content, indent=1))
        report = convert_rows(tmp_path / f"{name}.json", tmp_path / "out.jsonl", progress=False)
        assert report.formats == {"episodes": 3} and not report.unreadable
        assert [row["reward"] for row in read_jsonl(tmp_path / "out.jsonl")] == [1.0, 1.0, 0.0]


def test_options(tmp_path):
    tools, score = rows()[0]["tools"], {"messages": [USER, ANSWER], "score": 0.7}
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    source = write_jsonl(tmp_path / "in.jsonl", [score])
    arguments = ["--reward", "score", "--label_above", "0.5", "--tools", str(tmp_path / "tools.json")]
    assert main(["convert", str(source), str(tmp_path / "out.jsonl"), *arguments]) == 0
    [row] = read_jsonl(tmp_path / "out.jsonl")
    assert (row["reward"], row["label"], row["tools"]) == (0.7, True, tools)
    source = write_jsonl(tmp_path / "in.jsonl", [rows()[0]])
    assert main(["convert", str(source), str(tmp_path / "out.jsonl"), "--string_arguments"]) == 0
    call = read_jsonl(tmp_path / "out.jsonl")[0]["completion"][0]["tool_calls"][0]
    assert call["function"]["arguments"] == '{"word": "quay"}'


def test_token_ids_are_kept_where_they_are_asked_for_or_found(tmp_path):
    messages = [{**USER, "token_ids": [1, 2]}, {**ANSWER, "token_ids": [3], "generation_logprobs": [-0.5]}]
    row = {"messages": messages, "reward": 1.0, "task_id": "a"}
    report = convert_rows([row], tmp_path / "out.jsonl", progress=False)
    expected = {"prompt_ids": [1, 2], "completion_ids": [3], "action_mask": [1], "behavior_logps": [-0.5]}
    assert read_jsonl(tmp_path / "out.jsonl") == [expected | {"reward": 1.0, "task_id": "a"}]
    assert report.formats == {"logs": 1}
    convert_rows([row], tmp_path / "out.jsonl", "openai", progress=False)
    assert read_jsonl(tmp_path / "out.jsonl")[0]["completion"] == [ANSWER]
    convert_rows([row], tmp_path / "out.parquet", progress=False)
    stored = load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))["train"]
    assert stored.features["prompt_ids"].feature.dtype == "int32" and stored[0]["behavior_logps"] == [-0.5]


def test_datasets_and_their_splits(tmp_path):
    dataset = Dataset.from_list(rows(), on_mixed_types="use_json")
    convert_rows(dataset, tmp_path / "out.jsonl", progress=False)
    assert [row["reward"] for row in read_jsonl(tmp_path / "out.jsonl")] == [1.0, 1.0, 0.0]
    dataset.train_test_split(test_size=1, seed=0).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has the splits .*Name one"):
        convert_rows(tmp_path / "saved", tmp_path / "out.jsonl", progress=False)
    assert convert_rows(tmp_path / "saved", tmp_path / "out.jsonl", split="test", progress=False).rows_written == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("in.jsonl", "out.csv"), "ends in neither `.jsonl` nor `.parquet`"),
        (("in.jsonl", "out.jsonl", "alpaca"), "The form 'alpaca' is unknown"),
        (("broken.json", "out.jsonl"), "is no valid JSON"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", rows())
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match=error):
        convert_rows(*arguments, progress=False)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=True)
    | st.sampled_from(["", "x", "[", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "from",
                    "content",
                    "value",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "type",
                    "text",
                    "train",
                ]
                + ["token_ids", "prompt_ids", "completion_ids", "tokens", "reward", "tool_call_id", "function_call"]
            ),
            inner
            | st.sampled_from(["user", "assistant", "tool", "gpt", "function_call", "observation", "{}", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)
_COLUMNS = ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "tools", "functions", "reward"]
_COLUMNS += [
    "reward_info",
    "info",
    "system",
    "label",
    "response",
    "prompt_ids",
    "completion_ids",
    "trajectory",
    "error",
]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(_COLUMNS), _VALUES, max_size=5))
def test_whatever_a_row_holds_it_is_read_or_refused_in_words(row):
    columns_read(row)
    try:
        RowConverter().convert(row)
    except ValueError as error:
        assert len(str(error)) > 20
