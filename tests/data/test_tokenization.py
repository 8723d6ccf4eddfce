from __future__ import annotations

import gc
import json
import weakref

import pytest

from tests.support import TOOLS, assistant, byte_tokenizer, call, render_actions, result, user
from tests.templates.chatml import chatml
from trl_multiturn.data import tokenize_trajectory, turn_template
from trl_multiturn.data.tokenization import common_prefix_length, tokenize_preference_row, tokenize_unpaired_row


PROMPT, COMPLETION = [user("2+2")], [call(2, 2), result("4"), assistant("4")]


def test_columns_of_the_contract():
    tokenizer = byte_tokenizer()
    row = tokenize_trajectory(tokenizer, PROMPT, COMPLETION, tools=TOOLS)
    assert set(row) == {"prompt_ids", "completion_ids", "action_mask"}
    assert len(row["action_mask"]) == len(row["completion_ids"])
    assert render_actions(tokenizer, row)[1] == "4<|im_end|>"


def test_tools_as_a_json_string_are_rendered_alike():
    tokenizer = byte_tokenizer()
    as_list = tokenize_trajectory(tokenizer, PROMPT, COMPLETION, tools=TOOLS)
    assert tokenize_trajectory(tokenizer, PROMPT, COMPLETION, tools=json.dumps(TOOLS)) == as_list
    assert len(tokenize_trajectory(tokenizer, PROMPT, COMPLETION)["prompt_ids"]) < len(as_list["prompt_ids"])


def test_template_arguments_reach_the_template():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}<|im_start|>{{ (m.role | upper) if loud else m.role }} {{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ 'ASSISTANT' if loud else 'assistant' }} {% endif %}"
    )
    row = tokenize_trajectory(tokenizer, [user("Q")], [assistant("A")], loud=True)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>USER Q<|im_end|><|im_start|>ASSISTANT "
    assert render_actions(tokenizer, row) == ["A<|im_end|>"]


def test_templates_are_built_once_and_follow_the_tokenizer():
    tokenizer = byte_tokenizer("qwen2_5")
    first = turn_template(tokenizer, TOOLS)
    assert turn_template(tokenizer, json.dumps(TOOLS)) is first
    assert turn_template(tokenizer) is not first
    tokenizer.chat_template = byte_tokenizer("lfm2_v2").chat_template
    assert turn_template(tokenizer, TOOLS) is not first


def test_sides_that_begin_differently_share_what_they_have_in_common():
    """A side that begins with a tool result has no generation prompt before it."""
    tokenizer = byte_tokenizer()
    example = {
        "prompt": [user("2+2"), call(2, 2)],
        "chosen": [result("4"), assistant("4")],
        "rejected": [result("5"), assistant("5")],
    }
    row = tokenize_preference_row(example, tokenizer)
    for side in ("chosen", "rejected"):
        ids, mask = row["prompt_ids"] + row[f"{side}_ids"], row[f"{side}_action_mask"]
        whole = tokenizer.apply_chat_template(example["prompt"] + example[side], tokenize=True, return_dict=True)
        assert ids == whole["input_ids"]
        trained = [t for t, m in zip(row[f"{side}_ids"], mask, strict=True) if m]
        assert tokenizer.decode(trained) == example[side][-1]["content"] + "<|im_end|>"


def test_one_turn_under_an_unprovable_template_is_tokenized_as_trl_does(caplog):
    tokenizer = byte_tokenizer(chatml(prompt="<think>"))
    with caplog.at_level("WARNING"):
        row = tokenize_unpaired_row({"prompt": [user("Q")], "completion": [assistant("A")]}, tokenizer)
    assert tokenizer.decode(row["completion_ids"]) == "A<|im_end|>\n"
    assert row["action_mask"] == [1] * len(row["completion_ids"])
    assert "the prompt that the policy continues ends with" in caplog.text


def test_several_turns_under_an_unprovable_template_are_refused():
    example = {"prompt": [user("Q")], "completion": [assistant("A"), user("Q"), assistant("B")]}
    with pytest.raises(ValueError, match="`completion`: Assistant turn 0"):
        tokenize_unpaired_row(example, byte_tokenizer(chatml(prompt="<think>")))


def test_tool_calls_that_a_template_drops_are_refused():
    with pytest.raises(ValueError, match="leaves out its tool call 1, 'add'.*tool_dialect='hermes'"):
        tokenize_unpaired_row({"prompt": PROMPT, "completion": COMPLETION}, byte_tokenizer("llama3"))


def test_keys_that_arrow_fills_with_none_are_not_there():
    """Llama 3.1 takes a message for a tool call where it has the key, whatever its value."""
    tokenizer = byte_tokenizer("llama3_1")
    row = {"prompt": PROMPT, "completion": COMPLETION, "tools": TOOLS}
    keys = {key for messages in (PROMPT, COMPLETION) for message in messages for key in message}
    filled = {**row, **{c: [{**dict.fromkeys(keys), **m} for m in row[c]] for c in ("prompt", "completion")}}
    assert filled["prompt"][0]["tool_calls"] is None
    assert tokenize_unpaired_row(filled, tokenizer) == tokenize_unpaired_row(row, tokenizer)


def test_empty_completion_is_refused():
    with pytest.raises(ValueError, match="holds no message"):
        tokenize_trajectory(byte_tokenizer(), PROMPT, [])


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([], [1]) == 0


def test_kept_templates_do_not_keep_their_tokenizer():
    tokenizer = byte_tokenizer()
    turn_template(tokenizer)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None
