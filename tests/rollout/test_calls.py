"""Native calls are read as the policy wrote them, in the format that the chat template prints."""

from __future__ import annotations

import json

import pytest

from tests.rollout.test_dialects import PYTHON
from tests.support import byte_tokenizer, user
from trl_multiturn.rollout.calls import UnreadableTemplateError, choose_reader
from trl_multiturn.rollout.dialects import choose_dialect
from trl_multiturn.templates import TurnTemplate


CODE = "  def f(x):\n    return {'a': [x(\"q\", 1)], 'b': '\\n'}  # it's <b>\n\n"
# One of every way to write calls: JSON, a name and JSON, marks, Python, gpt-oss, a dialect of JSON; a turn with
# one call of `python`, whose code is {json}, {raw} or {escaped}
WRITTEN = {
    "qwen3": '<tool_call>\n{"name": "python", "arguments": {"code": {json}}}\n</tool_call>',
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>python\n```json\n"
    '{"code": {json}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "qwen3_5_nothink": "<tool_call>\n<function=python>\n<parameter=code>\n{raw}\n</parameter>\n</function>\n"
    "</tool_call>",
    "glm4moe": "\n<think></think>\n<tool_call>python\n<arg_key>code</arg_key>\n<arg_value>{raw}</arg_value>\n"
    "</tool_call>",
    "lfm2_2_5_v2": "<|tool_call_start|>[python(code='{raw}')]<|tool_call_end|>",
    "lfm2_v2": "<|tool_call_start|>[python(code='{escaped}')]<|tool_call_end|>",
    "gptoss": ' to=functions.python<|channel|>commentary json<|message|>{"code": {json}}',
    "llama3_1": '{"name": "python", "parameters": {"code": {json}}}',
    "gemma4": '<|tool_call>call:python{code:<|"|>{raw}<|"|>}<tool_call|>',
    "muse_glimmer": ' to=python<|message|><atem:function_calls>\n<atem:invoke name="python">\n'
    '<atem:parameter name="code">{raw}</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
}
TOKENIZERS = {}


def tokenizer(family):
    if family not in TOKENIZERS:
        TOKENIZERS[family] = byte_tokenizer(family)
    return TOKENIZERS[family]


def written(family, code):
    escaped = repr(code + '"')[1:-2] if "'" in code else repr(code)[1:-1]
    text = WRITTEN[family]
    return text.replace("{json}", json.dumps(code)).replace("{raw}", code).replace("{escaped}", escaped)


def read(family, text):
    """A turn of a policy with the one tool `python`."""
    return read_with(choose_dialect("native", tokenizer(family), [PYTHON]), family, text)


def read_with(dialect, family, text):
    """The same by a dialect."""
    template = TurnTemplate(tokenizer(family), tools=[PYTHON])
    ids = tokenizer(family)(text, add_special_tokens=False)["input_ids"]
    return dialect.read(text, [*ids, template.end_of_turn_ids[-1]], template.prompt_ids([user("q")]))


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("code", [CODE, "75001", "true", "print(1)"], ids=["code", "digits", "a word", "short"])
def test_an_argument_reaches_the_tool_as_the_policy_wrote_it(family, code):
    turn = read(family, written(family, code))
    assert [(call.name, call.arguments) for call in turn.calls] == [("python", {"code": code})]
    assert turn.problem is None and turn.message["content"] == ""


@pytest.mark.parametrize("family", sorted(set(WRITTEN) - {"gemma4"}))
def test_code_may_hold_what_closes_a_call(family):
    end = WRITTEN[family].partition("}" if "{json}" in WRITTEN[family] else "w}")[2].partition("}")[2]
    code = f"a = 1{end or '}'}\nb = 2"
    assert read(family, written(family, code)).calls[0].arguments == {"code": code}


@pytest.mark.parametrize(
    "text",
    [
        ' to=functions.python<|channel|>commentary json<|message|>{"code": "1"}',
        '<|channel|>commentary to=functions.python <|constrain|>json<|message|>{"code": "1"}',
        '<|channel|>commentary to=functions.python<|constrain|>json<|message|>{"code": "1"}',
        '<|channel|>commentary json to=functions.python<|message|>{"code": "1"}',
    ],
)
@pytest.mark.parametrize("thought", ["", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"])
def test_gpt_oss_writes_channel_and_recipient_in_either_order(text, thought):
    turn = read("gptoss", thought + text)
    assert [(call.name, call.arguments) for call in turn.calls] == [("python", {"code": "1"})]
    assert turn.message.get("reasoning_content", "") == ("Hm." if thought else "")


def test_gpt_oss_answers_in_a_channel():
    turn = read(
        "gptoss", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is 5."
    )
    assert turn.answered and turn.message == {"role": "assistant", "content": "It is 5.", "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen3_5_nothink", "<tool_call>\n<function=python>\n<parameter=code>\nprint(1)\n</function>\n</tool_call>"),
        ("qwen3_5_nothink", "<tool_call>\n<function=python>\n<parameter=code>\nprint(1)\n</parameter>\n</function>"),
        ("qwen3", '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}'),
        ("qwen3", '<tool_call>\n{"name": "python", "input": {"code": "1"}}\n</tool_call>'),
        ("glm4moe", "<tool_call>python\n<arg_key>code</arg_key>\n</tool_call>"),
        ("lfm2_v2", "<|tool_call_start|>[python(code='1']<|tool_call_end|>"),
        ("gptoss", "<|channel|>commentary to=functions.python <|constrain|>json<|message|>{'code': 1}"),
        ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>python\n{code}"),
    ],
)
def test_a_call_that_cannot_be_read_is_a_problem_that_the_policy_reads(family, text):
    turn = read(family, text)
    assert turn.calls == [] and not turn.answered
    assert turn.problem == "{'error': 'The tool call could not be read.'}"


@pytest.mark.parametrize("family", ["qwen3_5_nothink", "lfm2_v2", "glm4moe", "deepseekv3", "gptoss"])
def test_text_beside_calls_and_answers_stay_words(family):
    said = {
        "gptoss": "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant",
        "glm4moe": "\n<think></think>\nLet me see.",
    }.get(family, "Let me see.")
    beside = read(family, said + written(family, "1").removeprefix("\n<think></think>"))
    assert (beside.message["content"], len(beside.calls)) == ("Let me see.", 1)
    answer = read(family, "So [f(x)] is {5}, <b>clearly</b>.")
    assert answer.answered and answer.message["content"] == "So [f(x)] is {5}, <b>clearly</b>."


def test_other_blanks_than_the_template_prints_are_no_mistake():
    text = "<tool_call><function=python><parameter=code>print(1)</parameter></function></tool_call>"
    assert read("qwen3_5_nothink", text).calls[0].arguments == {"code": "print(1)"}


def test_reasoning_stands_apart_where_the_template_shows_it_apart():
    turn = read("qwen3", "<think>\nHm.\n</think>\n\n" + written("qwen3", "1"))
    assert turn.message["reasoning_content"] == "Hm." and turn.message["content"] == ""


@pytest.mark.parametrize(
    ("family", "opening"), [("qwen3", "<think>\n"), ("qwen3_5_think", ""), ("lfm2_2_5_v2", "<think>")]
)
def test_a_call_that_is_only_thought_of_is_not_run(family, opening):
    call = WRITTEN.get(family, WRITTEN["qwen3_5_nothink"]).replace("{json}", '"1"').replace("{raw}", "1")
    turn = read(family, f"{opening}Shall I write {call}, or <tool_call>?\n</think>\n\nIt is 5.")
    assert turn.answered and turn.message["content"].strip() == "It is 5."


def test_a_parser_of_trl_that_changes_text_is_passed_over():
    assert choose_reader(tokenizer("qwen3_5_nothink")).reader.name == "the format of the chat template"
    assert choose_reader(tokenizer("llama3_1")).reader.name == "TRL's response template `llama3`"


@pytest.mark.parametrize(
    ("family", "parallel"), [("qwen3", True), ("glm4moe", True), ("llama3_1", False), ("gptoss", False)]
)
def test_several_calls_in_a_turn_are_possible_where_the_template_shows_them(family, parallel):
    assert choose_reader(tokenizer(family)).parallel is parallel


def test_a_template_whose_calls_nobody_can_read_is_told():
    silent = byte_tokenizer("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    with pytest.raises(UnreadableTemplateError, match="leaves out tool calls"):
        choose_reader(silent)
    odd = byte_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{{ c.function.name }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(UnreadableTemplateError, match="could not be learned"):
        choose_reader(odd)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_nothink", "lfm2_2_5_v2", "glm4moe", "gptoss"])
@pytest.mark.parametrize(
    "piece", ["'", "[", "</parameter>", " ", "<tool_call>", "=", '{"name": "', "a, b = '", "to=f"]
)
def test_what_a_policy_repeats_without_end_is_read(family, piece):
    start = written(family, "1").partition("1")[0]
    read(family, start + piece * (2_000 // len(piece)))
