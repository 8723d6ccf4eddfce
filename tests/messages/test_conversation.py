"""Messages as real tools write them, and what each becomes."""

from __future__ import annotations

import copy
import json
from datetime import date

import pytest

from trl_multiturn.messages import arguments_as_strings, normalize_messages, normalize_tools, without_flags


ARGUMENTS = {"harbour": "Nordhavn", "days": 1}
FUNCTION = {"name": "tide_table", "arguments": ARGUMENTS}
STRING = json.dumps(ARGUMENTS)

QUESTION = {"role": "user", "content": "High water in Nordhavn?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "name": "tide_table", "content": "06:12"}
ANSWER = {"role": "assistant", "content": "At 06:12."}
FORM = [QUESTION, CALL, RESULT, ANSWER]

FARE = {"name": "ferry_fare", "arguments": {"route": "Ebbsund"}}
TWO = {**CALL, "tool_calls": [{"type": "function", "function": f} for f in (FUNCTION, FARE)]}


def calling(**keys):
    return [QUESTION, {"role": "assistant", "content": "", **keys}, RESULT, ANSWER]


def said(speaker, text):
    return {"from": speaker, "value": text}


WRITTEN = {
    "in the form": FORM,
    "arguments as a JSON string": calling(
        tool_calls=[{"type": "function", "function": {**FUNCTION, "arguments": STRING}}]
    ),
    "arguments encoded twice": calling(tool_calls=[{"function": {**FUNCTION, "arguments": json.dumps(STRING)}}]),
    "content null": calling(content=None, tool_calls=[{"type": "function", "function": FUNCTION}]),
    "flat calls": calling(tool_calls=[{"name": "tide_table", "arguments": STRING}]),
    "flat calls of another library": calling(
        tool_calls=[{"name": "tide_table", "args": ARGUMENTS, "type": "tool_call"}]
    ),
    "calls as a JSON string": calling(tool_calls=json.dumps([{"function": FUNCTION}])),
    "the first form of OpenAI": [
        QUESTION,
        {"role": "assistant", "content": None, "function_call": {**FUNCTION, "arguments": STRING}},
        {"role": "function", "name": "tide_table", "content": "06:12"},
        ANSWER,
    ],
    "roles for calls and results": [
        QUESTION,
        {"role": "tool_call", "content": json.dumps(FUNCTION)},
        {"role": "tool_response", "content": "06:12"},
        ANSWER,
    ],
    "from and value": [
        said("human", QUESTION["content"]),
        said("function_call", json.dumps(FUNCTION)),
        said("observation", "06:12"),
        said("gpt", ANSWER["content"]),
    ],
    "items of OpenAI's later API": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "user",
            "content": [{"type": "input_text", "text": QUESTION["content"]}],
        },
        {"type": "function_call", "id": "fc_1", "name": "tide_table", "arguments": STRING, "status": "completed"},
        {"type": "function_call_output", "output": "06:12"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": ANSWER["content"], "annotations": []}],
        },
    ],
    "text parts": [{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in FORM],
    "keys that Arrow fills with null": [
        {**dict.fromkeys(("tool_calls", "tool_call_id", "name", "train", "function_call")), **m} for m in FORM
    ],
    "empty keys of an API": [
        {**m, "refusal": None, "annotations": [], "tool_calls": m.get("tool_calls", [])} for m in FORM
    ],
    "flags that say nothing new": [
        {**m, "weight": 1} if m["role"] == "assistant" else {**m, "weight": 0} for m in FORM
    ],
}


@pytest.mark.parametrize("messages", WRITTEN.values(), ids=WRITTEN)
def test_what_others_write_comes_into_the_form_and_stays_in_it(messages):
    before = copy.deepcopy(messages)
    assert normalize_messages(messages) == FORM
    assert normalize_messages(normalize_messages(messages)) == FORM
    assert messages == before


def test_messages_in_the_form_are_not_copied():
    assert all(a is b for a, b in zip(normalize_messages(FORM), FORM, strict=True))


def test_calls_one_after_another_are_one_turn_with_the_text_before_them():
    messages = [
        QUESTION,
        {"role": "assistant", "content": "Two questions."},
        {"role": "tool_call", "content": json.dumps(FUNCTION)},
        {"role": "tool_call", "content": json.dumps(FARE)},
        {"role": "tool_response", "content": "06:12"},
        {"role": "tool_response", "content": "12.00"},
    ]
    turn = {**TWO, "content": "Two questions."}
    assert normalize_messages(messages) == [
        QUESTION,
        turn,
        RESULT,
        {**RESULT, "name": "ferry_fare", "content": "12.00"},
    ]
    assert normalize_messages([{"role": "tool_call", "content": json.dumps([FUNCTION, FARE])}]) == [TWO]


def test_results_take_the_name_of_the_call_that_their_id_says():
    calls = [{"id": str(i), **call} for i, call in enumerate(TWO["tool_calls"])]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in "10"]
    named = normalize_messages([QUESTION, {**TWO, "tool_calls": calls}, *results])[2:]
    assert [(m["name"], m["content"]) for m in named] == [("ferry_fare", "1"), ("tide_table", "0")]
    unknown = normalize_messages([QUESTION, {**TWO, "tool_calls": calls}, {**results[0], "tool_call_id": "7"}])
    assert "name" not in unknown[-1]


def test_results_may_answer_calls_of_messages_before():
    observation = {"role": "tool", "content": "12.00"}
    assert normalize_messages([observation], after=[QUESTION, TWO, RESULT])[0]["name"] == "ferry_fare"
    assert "name" not in normalize_messages([observation], after=[QUESTION, CALL, RESULT])[0]


def test_reasoning_keeps_its_key_and_is_there_once():
    turn = {**ANSWER, "reasoning_content": "Hm.", "reasoning": "Hm.", "thinking": None}
    assert normalize_messages([turn]) == [{**ANSWER, "reasoning_content": "Hm."}]
    assert normalize_messages([{**ANSWER, "thinking": "Hm."}]) == [{**ANSWER, "thinking": "Hm."}]


def test_a_thought_of_its_own_belongs_to_the_turn_after_it():
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "7", **FUNCTION, "arguments": STRING}
    turns = normalize_messages([QUESTION, thought, call])
    assert turns[1]["reasoning_content"] == "Hm." and turns[1]["tool_calls"][0]["id"] == "7"
    assert normalize_messages([{"type": "reasoning", "summary": []}, ANSWER]) == [ANSWER]
    for lost in ([thought, QUESTION], [ANSWER, thought], [ANSWER, thought, call]):
        with pytest.raises(ValueError, match="thought"):
            normalize_messages(lost)


def test_what_a_tool_returned_as_data_becomes_json():
    contents = [{"tide": "06:12"}, 31.5, ["a", "b"], [{"type": "tide", "text": "high"}]]
    texts = [m["content"] for m in normalize_messages([{**RESULT, "content": c} for c in contents])]
    assert [json.loads(text) for text in texts] == contents


def test_roles_and_keys_that_the_template_names_are_let_through():
    template = "{% if m.role == 'critic' %}{{ m.verdict }}{% elif m['role'] == 'observation' %}…{% endif %}"
    messages = [{"role": "critic", "content": "", "verdict": "good"}, {"role": "observation", "content": "06:12"}]
    assert normalize_messages(messages, template=template) == messages
    both = "{% if m.role == 'function' or m.role == 'tool' %}"
    assert normalize_messages([{"role": "function", "content": "1"}], template=both)[0]["role"] == "tool"


def test_keys_that_nobody_knows_are_counted_where_they_may_be_left_out():
    left_out: dict[str, int] = {}
    turns = [{**ANSWER, "cost": 0.1}, {**ANSWER, "cost": None}, {**ANSWER, "usage": {"tokens": 3}}]
    assert normalize_messages(turns, left_out=left_out) == [ANSWER] * 3
    assert left_out == {"cost": 1, "usage": 1}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hello", "`chosen`: message 1 has no `role` .'hello'."),
        ({"content": "x"}, "message 1 has no `role`"),
        ({"role": "critic", "content": "x"}, "message 1 has the role 'critic', which is none that the chat template"),
        ({"role": "user", "content": None}, "message 1 .user. has neither `content` nor `tool_calls`"),
        ({"role": "user", "content": {"a": 1}}, "message 1 .user.: the content is {'a': 1}, which chat templates"),
        ({"role": "user", "content": [{"type": "audio", "url": "x"}]}, "part 0 of the content is of the type 'audio'"),
        ({**ANSWER, "tool_plan": "first"}, "message 1 .assistant. has the key `tool_plan` .'first'., which the chat"),
        ({**QUESTION, "tool_calls": CALL["tool_calls"]}, "message 1 .user. calls a tool .tide_table., which only the"),
        ({**CALL, "function_call": FARE}, "has a `function_call` beside other `tool_calls`"),
        ({**QUESTION, "value": "other"}, "has a `content` and another `value`"),
        ({"role": "tool_call", "content": "look()"}, "message 1 .tool_call.: the call is no valid JSON"),
        ({**CALL, "tool_calls": 3}, "`tool_calls` is 3, but it is a list"),
        ({**CALL, "tool_calls": [{"arguments": {}}]}, "`tool_calls.0.` names no tool"),
        ({**CALL, "tool_calls": [{**FUNCTION, "arguments": "{'a'"}]}, "`tool_calls.0.` .tide_table.: the arguments"),
        ({**CALL, "tool_calls": [{**FUNCTION, "arguments": "[1]"}]}, "are JSON, but no object"),
        ({**CALL, "tool_calls": [{**FUNCTION, "arguments": [1]}]}, "the arguments are .1., but they are an object"),
        ({**CALL, "tool_calls": [{**FUNCTION, "result": "06:12"}]}, "has the key `result` .'06:12'."),
        ({**CALL, "tool_calls": [{"type": "custom", "custom": {}}]}, "is of the type 'custom'"),
        ({**CALL, "tool_calls": [{**FUNCTION, "arguments": {"on": [date(2026, 1, 2)]}}]}, "arguments hold datetime"),
        ({**RESULT, "content": date(2026, 1, 2)}, "message 1 .tool.: the content is datetime.date"),
        ({**ANSWER, "weight": 0.5}, "`weight` is 0.5, but a turn is trained .1, True. or not .0, False."),
        ({**ANSWER, "train": True, "weight": 0}, "its flags contradict each other"),
        ({**QUESTION, "train": True}, "message 1 .user.: `train` is True, but only what the policy says"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(message, error):
    with pytest.raises(ValueError, match=error):
        normalize_messages([QUESTION, message], "chosen")


@pytest.mark.parametrize("flag", ["train", "weight", "loss", "training"])
def test_flags_of_other_tools_say_which_turns_train(flag):
    off = {**ANSWER, "train": False}
    messages = normalize_messages([{**QUESTION, flag: None}, {**ANSWER, flag: False}, {**ANSWER, flag: True}, ANSWER])
    assert messages == [QUESTION, off, ANSWER, ANSWER]
    assert without_flags(messages) == ([QUESTION, ANSWER, ANSWER, ANSWER], [True, False, True, True])


def test_a_turn_of_several_messages_trains_as_a_whole():
    call = {"role": "tool_call", "content": json.dumps(FUNCTION), "loss": False}
    assert normalize_messages([{**ANSWER, "loss": False}, call])[0]["train"] is False
    with pytest.raises(ValueError, match="message 1 .tool_call. belongs to the turn before it"):
        normalize_messages([ANSWER, call])


def test_arguments_as_strings_for_templates_that_print_strings():
    calls = [{"id": "1", "type": "function", "function": {"name": "tide_table", "arguments": STRING}}]
    objects = [QUESTION, {**CALL, "tool_calls": [{"id": "1", **CALL["tool_calls"][0]}]}]
    assert arguments_as_strings(objects) == [QUESTION, {**CALL, "tool_calls": calls}]
    assert normalize_messages(arguments_as_strings(objects)) == objects


PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BARE = {"name": "add", "parameters": PARAMETERS}
WRAPPED = {"type": "function", "function": BARE}


@pytest.mark.parametrize(
    "tools",
    [
        [WRAPPED],
        [BARE],
        [{"type": "function", **BARE}],
        [{"name": "add", "input_schema": PARAMETERS}],
        [json.dumps(BARE)],
        json.dumps([WRAPPED]),
        [{**WRAPPED, "name": None, "parameters": None}],
    ],
)
def test_tools_come_into_the_form(tools):
    assert normalize_tools(tools) == [WRAPPED]


def test_no_tools_are_none_and_functions_stay():
    assert [normalize_tools(tools) for tools in (None, "", "[]", [])] == [None, None, [], []]
    assert normalize_tools([len]) == [len]
