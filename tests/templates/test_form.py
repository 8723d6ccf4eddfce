"""Messages reach a template in the form that it wants."""

from __future__ import annotations

import pytest

from tests.support import TOOLS, assistant, call, render_actions, result, user
from tests.templates.chatml import CALLS, TEXT, tokenizer
from trl_multiturn.templates import TurnTemplate


STRINGS = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments }}{% endfor %}"
PRINTED = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}"
STRICT_IDS = (
    "{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}{{ c | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}<id>{{ m.tool_call_id }}</id>{% endif %}"
)


def with_ids(identity):
    turn = call(1, 2)
    turn["tool_calls"] = [{"id": identity, **turn["tool_calls"][0]}]
    return [turn, {**result("3"), "tool_call_id": identity}, assistant("A")]


def actions(template, completion, tools=TOOLS):
    processing_class = tokenizer(words=template)
    return render_actions(processing_class, TurnTemplate(processing_class, tools).tokenize([user("Q")], completion))


@pytest.mark.parametrize("words", [STRINGS, PRINTED], ids=["raises on objects", "prints them as Python does"])
def test_arguments_are_json_text_where_a_template_wants_text(words):
    first, _ = actions(TEXT + words, [call(1, 2), result("3"), assistant("A")])
    assert '{"a": 1, "b": 2}' in first


def test_arguments_stay_an_object_where_a_template_takes_one():
    first, _ = actions(TEXT + CALLS, [call(1, 2), result("3"), assistant("A")])
    assert first == '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>'


@pytest.mark.parametrize("identity", [None, "call_0123456789abcdef", "abcDEF123"])
def test_call_ids_have_the_form_that_a_template_demands(identity):
    completion = [call(1, 2), result("3"), assistant("A")] if identity is None else with_ids(identity)
    processing_class = tokenizer(words=TEXT + STRICT_IDS)
    row = TurnTemplate(processing_class, TOOLS).tokenize([user("Q")], completion)
    text = processing_class.decode(row["completion_ids"])
    given = text.split('"id": "')[1].split('"')[0]
    assert len(given) == 9 and given.isalnum() and f"<id>{given}</id>" in text  # the result names its call
    assert (given == identity) == (identity == "abcDEF123")


def test_ids_that_a_template_takes_stay_as_they_are():
    first, _ = actions(TEXT + "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}", with_ids("call_01"))
    assert '"id": "call_01"' in first


def test_the_developers_message_is_a_system_message_where_only_that_is_shown():
    words = "{% if m.role == 'system' %}" + TEXT + "{% elif m.role in ('user', 'assistant') %}" + TEXT + "{% endif %}"
    prompts = [[{"role": role, "content": "Be kind."}, user("Q")] for role in ("developer", "system")]
    template = TurnTemplate(tokenizer(words=words))
    assert template.prompt_ids(prompts[0]) == template.prompt_ids(prompts[1])
    template = TurnTemplate(tokenizer())  # which shows any role
    assert "<|im_start|>developer\nBe kind." in template.processing_class.decode(template.prompt_ids(prompts[0]))


def test_content_comes_in_parts_where_a_template_wants_parts():
    words = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    assert actions(words, [assistant("Aa")], tools=None) == ["Aa<|im_end|>"]


def test_a_template_that_goes_through_the_tools_gets_an_empty_list():
    top = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    processing_class = tokenizer(top=top)
    row = TurnTemplate(processing_class).tokenize([user("Q")], [assistant("A")])
    assert render_actions(processing_class, row) == ["A<|im_end|>"]
