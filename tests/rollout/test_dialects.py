"""Dialects: what a sampled turn says, and how its answer is worded."""

from __future__ import annotations

import pytest

from tests.support import TOOLS, assistant, byte_tokenizer, call, user
from trl_multiturn.rollout.dialects import ActionDialect, FencedDialect, NativeDialect, Turn, choose_dialect
from trl_multiturn.templates import TurnTemplate
from trl_multiturn.tools import ToolCall, ToolResult


PYTHON = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The code."}},
            "required": ["code"],
        },
    },
}


def fenced(text):
    return FencedDialect([PYTHON]).read(text, [], [])


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("Let us see.\n```python\nx = 1\nprint(x)\n```", ["x = 1\nprint(x)\n"]),
        ("```python\nprint(1)\n```\n```output", ["print(1)\n"]),  # stopped where it began to write the output itself
        ("```python\na\n```\nand\n```python\nb\n```\n", ["a\n", "b\n"]),
        ('```python\nprint("```")\n```', ['print("```")\n']),  # backticks within a line do not close the block
        ('```python\nprint(r"\\boxed{3}")\n```', ['print(r"\\boxed{3}")\n']),  # an answer in the code is none
        ("```python  \nprint(1)\n  ```", ["print(1)\n"]),
        # what chat models write instead
        ("```py\nprint(1)\n```", ["print(1)\n"]),
        ("```Python\nprint(1)\n```", ["print(1)\n"]),
        ("``` python3.11\nprint(1)\n```", ["print(1)\n"]),
        ("~~~python\nprint(1)\n~~~", ["print(1)\n"]),
        ("~~~python\nprint(1)\n~~~\n~~~output", ["print(1)\n"]),
        ("````python\n# a\n```\nb\n````", ["# a\n```\nb\n"]),
        ("Run:\r\n```python\r\nx = 1\r\nprint(x)\r\n```\r\n", ["x = 1\nprint(x)\n"]),
        ("I try ```python print(1)```", ["print(1)"]),
        ("```python\nprint(1)```", ["print(1)"]),
        ("```python\nprint(1)```\n```output", ["print(1)"]),
        ("1. First:\n   ```python\n   if x:\n       y()\n   ```", ["if x:\n    y()\n"]),
        ("- ```python\n  x\n  ```", ["x\n"]),
        ("```python\na\n```python\nb\n```", ["a\n", "b\n"]),  # the first fence was forgotten
        ("```python\nprint(1)\n```output", ["print(1)\n"]),
        # a box that is mentioned, empty or before the code is no answer
        ("I will put the answer in \\boxed{}.\n```python\nprint(1)\n```", ["print(1)\n"]),
        ("I guess \\boxed{3}.\n```python\nprint(1)\n```", ["print(1)\n"]),
        ("```python\nprint(1)\n```\nThen comes \\boxed{\\ldots}.", ["print(1)\n"]),
    ],
)
def test_fenced_blocks_are_calls(text, codes):
    turn = fenced(text)
    assert turn.message == {"role": "assistant", "content": text}
    assert turn.calls == [ToolCall("python", {"code": code}) for code in codes]
    assert not turn.answered and turn.problem is None


@pytest.mark.parametrize(
    "text",
    [
        "It is \\boxed{3}.",
        "\\boxed {3}",
        "```python\nprint(1)\n```\nIt is \\boxed{3}.",
        "```python\nprint(1)\nSo it is \\boxed{3}\n```\n\\boxed{3}",
        "It is \\boxed{3}, and I have put it in \\boxed{}.",
        "~~~\n\\boxed{3}\n~~~",
    ],
)
def test_a_boxed_answer_ends_the_conversation_and_runs_no_code(text):
    turn = fenced(text)
    assert turn.answered and turn.calls == []


@pytest.mark.parametrize(
    "text", ["I give up.", "", "I put it in \\boxed{}.", "\\boxed{3", "Write ```python in front."]
)
def test_other_turns_neither_call_nor_answer(text):
    turn = fenced(text)
    assert (turn.calls, turn.answered, turn.problem) == ([], False, None)


@pytest.mark.parametrize(
    "text", ["```c\nmain()\n```", "```\nprint(1)\n```", "```python-repl\n>>> 1\n```", "Run:\n```python", "~~~\n1\n~~~"]
)
def test_a_block_that_is_nobodys_is_a_problem_that_the_policy_reads(text):
    turn = fenced(text)
    assert (turn.calls, turn.answered) == ([], False)
    assert turn.problem == "SyntaxError: nothing was run, because no code block begins with a line ```python"


def test_a_policy_without_tools_gets_no_hint_about_blocks():
    assert FencedDialect([]).read("```python\nprint(1)\n```", [], []).problem is None


def test_a_name_of_the_language_that_another_tool_bears_is_that_tools():
    other = {"type": "function", "function": {**PYTHON["function"], "name": "py"}}
    turn = FencedDialect([PYTHON, other]).read("```py\na\n```\n```Python\nb\n```", [], [])
    assert [(call.name, call.arguments) for call in turn.calls] == [
        ("py", {"code": "a\n"}),
        ("python", {"code": "b\n"}),
    ]


def test_an_unclosed_block_is_a_problem_that_the_policy_reads():
    turn = fenced("```python\nprint(1)\n")
    assert turn.calls == [] and "not closed" in turn.problem
    (message,) = FencedDialect([PYTHON]).observe(turn, [])
    assert message["role"] == "user" and message["content"].startswith("```output\nSyntaxError: ")


def test_fenced_observations_are_one_user_turn_in_call_order():
    turn = fenced("```python\na\n```\n```python\nb\n```")
    observations = FencedDialect([PYTHON]).observe(turn, [ToolResult("1\n"), ToolResult("NameError: b", "error")])
    assert observations == [user("```output\n1\n```\n```output\nNameError: b\n```")]


def test_the_answer_can_be_marked_otherwise():
    dialect = FencedDialect([PYTHON], answer_pattern=r"^#### ")
    assert dialect.read("#### 5", [], []).answered
    assert not dialect.read("\\boxed{5}", [], []).answered


def test_a_tool_with_two_arguments_cannot_be_fenced():
    with pytest.raises(ValueError, match="Tool `add` does not take exactly one required text argument"):
        FencedDialect(TOOLS)


NATIVE_FAMILIES = ["qwen2_5", "qwen3", "qwen3_5_nothink", "llama3_1", "glm4moe", "gptoss", "lfm2_2_5", "gemma4"]


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@pytest.mark.parametrize("message", [call(2, 3), assistant("It is 5.")], ids=["call", "answer"])
def test_native_turns_are_read_back_as_they_were_rendered(family, message):
    tokenizer = byte_tokenizer(family)
    template = TurnTemplate(tokenizer, tools=TOOLS)
    row = template.tokenize([user("2+3?")], [message])
    sampled = [token for token, bit in zip(row["completion_ids"], row["action_mask"], strict=True) if bit]
    text = tokenizer.decode(sampled[:-1])
    turn = choose_dialect("auto", tokenizer, TOOLS).read(text, sampled, template.prompt_ids([user("2+3?")]))
    assert turn.message == message
    assert turn.calls == ([ToolCall("add", {"a": 2, "b": 3})] if "tool_calls" in message else [])
    assert turn.answered == ("tool_calls" not in message)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2,</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}',
        '<tool_call>\n{"nom": "add"}\n</tool_call>',
        "<tool_call>\n[1, 2]\n</tool_call>",
    ],
)
def test_a_broken_native_call_is_a_problem_that_the_policy_reads(text):
    tokenizer = byte_tokenizer("qwen2_5")
    dialect = choose_dialect("native", tokenizer, TOOLS)
    sampled = tokenizer(text + "<|im_end|>")["input_ids"]
    turn = dialect.read(text, sampled, TurnTemplate(tokenizer, tools=TOOLS).prompt_ids([user("q")]))
    assert turn.message == {"role": "assistant", "content": text}
    assert turn.calls == [] and not turn.answered
    assert dialect.observe(turn, []) == [user("{'error': 'The tool call could not be read.'}")]


def test_prose_that_merely_resembles_a_call_is_an_answer():
    tokenizer = byte_tokenizer("lfm2_2_5")  # its call pattern also matches ", f("
    text = "So, f(x) is 5."
    prefix = TurnTemplate(tokenizer, tools=TOOLS).prompt_ids([user("q")])
    turn = choose_dialect("auto", tokenizer, TOOLS).read(text, tokenizer(text + "<|im_end|>")["input_ids"], prefix)
    assert turn.answered and turn.problem is None


def test_a_turn_without_a_token_is_no_answer():
    turn = choose_dialect("native", byte_tokenizer("qwen2_5"), TOOLS).read("", [], [1])
    assert turn == Turn(assistant(""), [], answered=False)


def test_native_content_keeps_its_blanks():
    tokenizer = byte_tokenizer("qwen2_5")
    prefix = TurnTemplate(tokenizer, tools=TOOLS).prompt_ids([user("q")])
    turn = choose_dialect("native", tokenizer, TOOLS).read(" 5 \n", tokenizer(" 5 \n<|im_end|>")["input_ids"], prefix)
    assert turn.message == assistant(" 5 \n") and turn.answered


def test_native_observations_carry_name_and_id_in_call_order():
    tokenizer = byte_tokenizer("qwen2_5")
    dialect = choose_dialect("native", tokenizer, TOOLS)
    turn = Turn(call(1, 2), [ToolCall("add", {}, "c1"), ToolCall("sub", {})], answered=False)
    assert dialect.observe(turn, [ToolResult("3"), ToolResult("x", "error")]) == [
        {"role": "tool", "name": "add", "content": "3", "tool_call_id": "c1"},
        {"role": "tool", "name": "sub", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: it is dark.\nAction: go north", "go north"),
        ("Action: look\nYou see a troll.\n", "look"),  # only the line: the rest is what the policy imagined
        ("Action: a\nYou see a troll.\nAction: b", "a"),
        ("Thought: Action: a\nAction: b", "a"),
        ("**Action:** look", "look"),
        ("**Action**: look", "look"),
        ("**Action: go north**", "go north"),
        ("Action: `take_1 [lamp]`  ", "take_1 [lamp]"),
        ("Action:\n```\nlook\n```", "look"),
        ("Action: look\r\n", "look"),
        ("Action:\nObservation: It is dark.\nAction: look", None),
        ("I go north.", None),
        ("Action:  \n", None),
    ],
)
def test_every_turn_of_a_text_environment_is_an_action(text, action):
    dialect = choose_dialect("action", byte_tokenizer("qwen2_5"), [PYTHON])
    turn = dialect.read(text, [], [])
    assert turn.message == assistant(text) and not turn.answered
    if action is None:
        assert turn.calls == [] and dialect.observe(turn, []) == [user(turn.problem)]
    else:
        assert turn.calls == [ToolCall("python", {"code": action})]
        assert dialect.observe(turn, [ToolResult("It is dark.")]) == [user("It is dark.")]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is dark.\nAction: look\nObservation: A troll.\nAction: run", "It is dark.\nAction: look"),
        ("**Action:** look\n", "**Action:** look"),
        ("I go north.", None),
        ("Action:\n", None),
    ],
)
def test_a_turn_of_a_text_environment_ends_with_its_first_action(text, kept):
    assert ActionDialect([PYTHON]).turn_end(text) == (None if kept is None else len(kept))


def test_an_answer_after_the_first_action_is_of_the_policys_imagination():
    dialect = ActionDialect([PYTHON], answer_pattern="DONE")
    assert not dialect.read("Action: look\nYou see it.\nDONE", [], []).answered
    assert dialect.read("DONE", [], []).answered


def test_without_a_prefix_the_whole_turn_is_the_action():
    turn = ActionDialect([PYTHON], prefix="").read(" go north\n", [], [])
    assert turn.calls == [ToolCall("python", {"code": "go north"})]


def test_an_action_needs_one_place_to_go():
    with pytest.raises(ValueError, match="the tools are: add"):
        ActionDialect(TOOLS)
    with pytest.raises(ValueError, match="the tools are: python, add"):
        ActionDialect([PYTHON, *TOOLS])


def test_auto_prefers_native_and_falls_back_to_the_fence():
    assert isinstance(choose_dialect("auto", byte_tokenizer("qwen2_5"), [PYTHON]), NativeDialect)
    without_tools = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    assert isinstance(choose_dialect("auto", byte_tokenizer(without_tools), [PYTHON]), FencedDialect)
    edited = byte_tokenizer("qwen2_5")
    edited.chat_template += " "  # TRL finds response templates by the text of the chat template
    assert isinstance(choose_dialect("auto", edited, [PYTHON]), NativeDialect)
    with pytest.raises(ValueError, match="leaves out tool calls"):
        choose_dialect("auto", byte_tokenizer(without_tools), TOOLS)


def test_choosing_changes_nothing_of_the_users_tokenizer():
    tokenizer = byte_tokenizer("qwen2_5")
    choose_dialect("native", tokenizer, TOOLS)
    assert getattr(tokenizer, "response_template", None) is None


@pytest.mark.parametrize(
    "piece", ["`", "```", "```python ", "```python\n", " ", "~", "\\boxed{", "{", "Action:", "Action: *", "\n"]
)
def test_what_a_policy_repeats_without_end_is_read(piece):
    text = "```python" + piece * 3_000  # a pattern that tries every way to divide the blanks would take hours
    assert fenced(text).calls == []
    ActionDialect([PYTHON]).read(text, [], [])
