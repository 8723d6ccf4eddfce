"""Rows as other tools write them are read as what they mean, and recognized."""

from __future__ import annotations

import json

import pytest

from tests.formats.written import ONE_CALL, PAIRS, TRAJECTORIES, pairs, rows, without_ids
from trl_multiturn.formats import columns_read, describe, read_row, recognize


@pytest.mark.parametrize("form", TRAJECTORIES)
def test_one_completion_in_every_form(form):
    name, write = TRAJECTORIES[form]
    for row in rows()[: 2 if form in ONE_CALL else None]:
        written = write(dict(row))
        read = {"reward": written.get("reward"), **read_row(written)}
        assert without_ids(read) == without_ids(row)
        assert recognize(written) == name
        assert columns_read(written) == {"prompt", "completion", "reward"}


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_in_every_form(form):
    for row in pairs():
        written = PAIRS[form](dict(row))
        read = without_ids(read_row(written))
        shared = len(read["prompt"]) - 1  # without a prompt it takes what both sides begin with
        expected = without_ids(row)
        assert read["prompt"] == (expected["prompt"] + expected["chosen"])[: shared + 1]
        for side in ("chosen", "rejected"):
            assert read[side] == expected[side][shared:]
        assert columns_read(written) == {"prompt", "chosen", "rejected"}


SAID = {"from": "gpt", "value": "A wharf."}
ASKED = {"from": "human", "value": "What is a quay?"}


def test_sides_that_are_one_message():
    read = read_row({"conversations": [ASKED], "chosen": SAID, "rejected": {**SAID, "value": "A ship."}})
    assert [read[side][0]["content"] for side in ("prompt", "chosen", "rejected")] == [
        "What is a quay?",
        "A wharf.",
        "A ship.",
    ]


def test_a_rejected_answer_beside_a_conversation():
    read = read_row({"messages": [ASKED, SAID], "rejected_response": "A ship."})
    assert [m["content"] for m in read["chosen"] + read["rejected"]] == ["A wharf.", "A ship."]
    read = read_row({"messages": [ASKED, SAID], "rejected_messages": [ASKED, {**SAID, "value": "A ship."}]})
    assert [m["content"] for m in read["prompt"] + read["rejected"]] == ["What is a quay?", "A ship."]


def test_the_completion_begins_with_the_first_turn_that_trains():
    told = [{"from": "human", "loss": None, "value": "Be brief."}, {"from": "gpt", "loss": False, "value": "Agreed."}]
    read = read_row({"conversations": [*told, ASKED, {**SAID, "loss": True}, ASKED, {**SAID, "loss": False}]})
    assert [m["content"] for m in read["prompt"]] == ["Be brief.", "Agreed.", "What is a quay?"]
    assert [m.get("train", True) for m in read["completion"]] == [True, True, False]


def test_conversations_a_level_deeper():
    tools = rows()[0]["tools"]
    asked, said = {"role": "user", "content": "What is a quay?"}, {"role": "assistant", "content": "A wharf."}
    row = {
        "input": {"messages": [asked], "tools": tools, "parallel_tool_calls": True},
        "preferred_output": [said],
        "non_preferred_output": [{**said, "content": "A ship."}],
    }
    assert recognize(row) == "openai" and columns_read(row) == {"prompt", "chosen", "rejected"}
    read = read_row(row)
    assert (read["prompt"], read["chosen"], read["tools"]) == ([asked], [said], tools)
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A wharf."}]}
    request = {"input": "What is a quay?", "instructions": "Be brief.", "tools": tools}
    row = {"responses_create_params": request, "response": {"output": [item]}, "reward": 1.0}
    assert recognize(row) == "rollouts" and columns_read(row) == {"prompt", "completion", "reward"}
    read = read_row(row)
    assert read["prompt"] == [{"role": "system", "content": "Be brief."}, asked] and read["completion"] == [said]


def test_a_system_column_is_the_first_message():
    read = read_row({"system": "Be brief.", "conversations": [ASKED, SAID]})
    assert read["prompt"][0] == {"role": "system", "content": "Be brief."}
    again = read_row({"system": "Other.", "messages": [*read["prompt"], SAID]})
    assert again["prompt"] == read["prompt"]


def test_tools_of_a_rollouts_info():
    tools = rows()[0]["tools"]
    for info in ({"oai_tools": tools}, json.dumps({"oai_tools": tools})):
        assert read_row({"messages": [ASKED, SAID], "info": info})["tools"] == tools


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "?"}, "the columns are `question`, and none of them holds a conversation"),
        ({"messages": [ASKED]}, "no message is an assistant's that trains .`messages`."),
        ({"prompt": [ASKED], "completion": None}, "`completion` is None, not a list of messages"),
        ({"conversations": [ASKED, {**SAID, "from": "critic"}]}, "`conversations`: message 1 has the role 'critic'"),
    ],
)
def test_what_cannot_be_read_is_named(row, error):
    with pytest.raises(ValueError, match=error):
        read_row(row)


def test_other_rows_are_not_recognized():
    assert [recognize(row) for row in ({"text": "a"}, {"prompt": "a"}, {"messages": []})] == [None] * 3
    assert recognize({"prompt_ids": [1], "completion_ids": [2], "action_mask": [1]}) == "tokens"
    assert describe("sharegpt") == "ShareGPT conversations (`from`, `value`) (`--from sharegpt`)"
