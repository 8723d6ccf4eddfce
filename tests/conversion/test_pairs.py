"""Pairs from several episodes of one task."""

from __future__ import annotations

import json

import pytest

from trl_multiturn import PairingConfig, convert_rows
from trl_multiturn.cli import main


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def episode(task, reward, *turns, opening="Hello."):
    return {"task_id": task, "reward": reward, "traj": [SYSTEM, user(opening), *turns]}


EPISODES = [
    episode("a", 1.0, says("look"), user("a quay"), says("A wharf.")),
    episode("b", 0.0, says("No.")),
    episode("a", 0.0, says("look"), user("a quay"), says("A ship.")),
    episode("a", 0.2, says("A fish.")),
    episode("c", 1.0, says("Yes.")),
    episode("c", 0.0, says("No."), opening="Good morning."),
]


def paired(tmp_path, rows=EPISODES, **settings):
    pairing = PairingConfig(filters=[], **settings)
    report = convert_rows(rows, tmp_path / "pairs.jsonl", pairing=pairing, progress=False)
    return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()], report


def test_the_best_and_the_worst_of_each_task(tmp_path):
    rows, report = paired(tmp_path, strategy="best_worst")
    assert rows[0] == {
        "prompt": [SYSTEM, user("Hello.")],
        "chosen": EPISODES[0]["traj"][2:],
        "rejected": EPISODES[2]["traj"][2:],
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
        "chosen_row": 0,
        "rejected_row": 2,
        "task_id": "a",
    }
    # What a simulated user opened with differs: it is context of each side
    assert rows[1]["prompt"] == [SYSTEM]
    assert rows[1]["chosen"] == [user("Hello."), says("Yes.")]
    assert rows[1]["rejected"] == [user("Good morning."), says("No.")]
    assert report.rows_written == 2 and report.unpaired == ["not paired: 1 of 3 tasks, whose episodes make no pair"]


def test_pairs_begin_where_the_episodes_part(tmp_path):
    rows, _ = paired(tmp_path, strategy="step")
    assert [row["prompt"] for row in rows] == [EPISODES[0]["traj"][:4]]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ([says("A wharf.")], [says("A ship.")])


def test_assistant_turns_of_the_prompt_are_no_turns_of_the_policy(tmp_path):
    prompt = [user("1+1"), says("2"), user("2+2")]
    rows = [{"prompt": prompt, "completion": [says(text)], "reward": r} for text, r in (("4", 1.0), ("5", 0.0))]
    [row], _ = paired(tmp_path, rows)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, [says("4")], [says("5")])


def test_token_rows_are_paired_by_their_tokens(tmp_path):
    rows = [
        {"prompt_ids": [1], "completion_ids": [2, i], "action_mask": [0, 1], "reward": float(i), "task_id": 1}
        for i in range(2)
    ]
    [row], _ = paired(tmp_path, rows)
    assert row == {
        "prompt_ids": [1],
        "chosen_ids": [2, 1],
        "chosen_action_mask": [0, 1],
        "rejected_ids": [2, 0],
        "rejected_action_mask": [0, 1],
        "chosen_reward": 1.0,
        "rejected_reward": 0.0,
        "chosen_row": 1,
        "rejected_row": 0,
        "task_id": 1,
    }


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"messages": [user("?"), says("!")]}], "it has no completion with a reward"),
        ([{"messages": [user("?"), says("!")], "reward": 1.0}], "there is no `task`, so nobody knows its task"),
    ],
)
def test_what_cannot_be_paired_is_told_by_number(tmp_path, rows, told):
    pairing = PairingConfig(filters=[])
    report = convert_rows(rows, tmp_path / "out.jsonl", pairing=pairing, task_column="task", progress=False)
    assert report.unreadable[0][0] == 0 and told in report.unreadable[0][1]


def test_other_tools_and_other_openings_make_no_pair(tmp_path):
    rows = [
        {"prompt": [user("?")], "completion": [says(str(i))], "reward": float(i), "tools": [{"name": f"f{i}"}]}
        for i in range(2)
    ]
    rows += [{**row, "prompt": [user(str(i))], "task_id": 1, "tools": None} for i, row in enumerate(rows)]
    found, report = paired(tmp_path, rows)
    assert found == []
    assert report.unpaired[:2] == [
        "not paired: rows 1 and 0, of one task but with other tools",
        "not paired: rows 3 and 2, of one task but with no message in common before the policy's first turn",
    ]


def test_the_command(tmp_path, capsys):
    path = tmp_path / "episodes.json"
    path.write_text(json.dumps(EPISODES))
    assert (
        main(["convert", str(path), str(tmp_path / "out.parquet"), "--from", "episodes", "--pairs", "best_worst"]) == 0
    )
    assert "6 rows read, 2 written." in capsys.readouterr().out
