"""Every remedy that an error names works."""

from __future__ import annotations

import pytest

from tests.support import TOOLS, assistant, byte_tokenizer, call, result, user
from tests.templates.chatml import CALLS, TEXT, tokenizer
from trl_multiturn.templates import TurnTemplate


ONE_CALL = (
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    + TEXT
    + CALLS
)
TWO = {**call(1, 2), "tool_calls": call(1, 2)["tool_calls"] + call(3, 4)["tool_calls"]}


def refusal(processing_class, prompt, completion, tools=None, **kwargs):
    with pytest.raises(ValueError) as error:
        TurnTemplate(processing_class, tools, **kwargs).tokenize(prompt, completion)
    return str(error.value)


def test_a_switch_of_the_template_is_named_where_it_helps():
    processing_class = byte_tokenizer("qwen3_5_nothink")
    turn = assistant("A", reasoning_content="R")
    message = refusal(processing_class, [user("Q")], [turn])
    assert "`enable_thinking=True`" in message and "`enable_thinking=False`" not in message
    TurnTemplate(processing_class, enable_thinking=True).tokenize([user("Q")], [turn])


def test_a_switch_that_does_not_help_is_not_named():
    words = "{% if enable_thinking %}{% endif %}" + TEXT
    message = refusal(tokenizer(words=words, prompt="<think>"), [user("Q")], [assistant("A")])
    assert message.endswith("You can use rows that carry token ids and masks.")


def test_calls_one_after_another():
    processing_class = tokenizer(words=ONE_CALL)
    message = refusal(processing_class, [user("Q")], [TWO, result("3"), result("7"), assistant("A")], TOOLS)
    assert "write one call per turn, each followed by its result" in message
    apart = [call(1, 2), result("3"), call(3, 4), result("7"), assistant("A")]
    TurnTemplate(processing_class, TOOLS).tokenize([user("Q")], apart)


def test_calls_as_text_only_where_the_template_takes_user_turns_there():
    message = refusal(byte_tokenizer("llama3"), [user("Q")], [call(1, 2), result("3"), assistant("A")], TOOLS)
    assert "set `tool_dialect='hermes'`" in message
    no_user_twice = "{% if loop.index0 > 1 and m.role == 'user' %}{{ raise_exception('no') }}{% endif %}" + TEXT
    message = refusal(tokenizer(words=no_user_twice), [user("Q")], [call(1, 2), result("3"), assistant("A")], TOOLS)
    assert "as text" not in message


def test_a_template_that_cannot_render_says_why():
    message = refusal(byte_tokenizer("gemma"), [{"role": "system", "content": "S"}, user("Q")], [assistant("A")])
    assert "System role not supported" in message
    assert "write the system message into the first user message" in message
    broken = "{% for f in functions.all %}{{ f }}{% endfor %}"
    with pytest.raises(ValueError, match="cannot render a conversation .*'functions' is undefined"):
        TurnTemplate(byte_tokenizer(broken))
