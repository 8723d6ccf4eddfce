"""Nothing of a conversation vanishes: what a template does not show is refused by name."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.support import TOOLS, assistant, byte_tokenizer, call, render_actions, result, user
from tests.templates.chatml import CALLS, TEXT, tokenizer
from trl_multiturn.data import tokenize_trajectory
from trl_multiturn.data.check import check_dataset
from trl_multiturn.data.tokenization import tokenize_preference_row
from trl_multiturn.errors import VanishedPartError
from trl_multiturn.templates import TurnTemplate


SYSTEM = {"role": "system", "content": "Be kind."}
TWO = {**call(1, 2), "tool_calls": call(1, 2)["tool_calls"] + call(3, 4)["tool_calls"]}
NAMES = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
FIRST = "{% for c in m.tool_calls or [] %}{% if loop.first %}{{ c.function | tojson }}{% endif %}{% endfor %}"
NO_SYSTEM = "{% if m.role != 'system' %}" + TEXT + "{% endif %}"
UNLESS_CALLS = "{% if m.tool_calls %}" + CALLS + "{% else %}" + TEXT + "{% endif %}"


@pytest.mark.parametrize(
    ("words", "messages", "part"),
    [
        (TEXT, [user("Q"), call(1, 2), result("3"), assistant("3")], "Message 1 (assistant).*its tool call 1, 'add'"),
        (TEXT + NAMES, [user("Q"), call(1, 2), result("3"), assistant("3")], "argument `a` (1) of its tool call 1"),
        (TEXT + FIRST, [user("Q"), TWO, result("3"), result("7"), assistant("3")], "`a` (3) of its tool call 2"),
        (UNLESS_CALLS, [user("Q"), call(1, 2, content="Look:"), result("3"), assistant("3")], "its text ('Look:')"),
        (TEXT, [user("Q"), assistant("A", reasoning="thought")], "its reasoning ('thought')"),
        (
            "{% if m.role != 'system' %}" + TEXT + "{% endif %}",
            [SYSTEM, user("Q"), assistant("A")],
            "Message 0 (system)",
        ),
        (
            "{% if m.role != 'tool' %}" + TEXT + CALLS + "{% endif %}",
            [user("Q"), call(1, 2), result("3"), assistant("3")],
            "Message 2 (tool).*its text ('3')",
        ),
    ],
    ids=["call", "arguments", "second call", "words beside a call", "reasoning", "system", "result"],
)
def test_what_a_template_leaves_out_is_refused_by_name(words, messages, part):
    pattern = part.replace("(", r"\(").replace(")", r"\)")
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    tools = TOOLS if any(message["role"] == "tool" for message in messages) else None
    with pytest.raises(VanishedPartError, match=pattern):
        tokenize_trajectory(tokenizer(words=words), messages[:first], messages[first:], tools)


def test_a_word_that_stands_elsewhere_by_chance_is_not_taken_for_shown():
    # The result is not shown, but "3" stands in the call
    words = "{% if m.role != 'tool' %}" + TEXT + CALLS + "{% endif %}"
    with pytest.raises(VanishedPartError, match=r"Message 2 \(tool\)"):
        tokenize_trajectory(tokenizer(words=words), [user("Q")], [call(3, 3), result("3"), assistant("A3")], TOOLS)


def test_a_word_that_only_some_values_lose_is_refused():
    words = "{{ m.content.split('</think>')[-1] }}"
    template = TurnTemplate(tokenizer(words=words))
    assert template.tokenize([user("Q")], [assistant("A")])["action_mask"] == [1, 1, 0]
    with pytest.raises(VanishedPartError, match="its text"):
        template.tokenize([user("What is </think>?")], [assistant("A")])


def test_what_is_escaped_is_shown():
    words = "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}" + TEXT + CALLS + "{% endif %}"
    completion = [call(1, 2), result('{"sum": "3"}\n'), assistant("A")]
    row = tokenize_trajectory(tokenizer(words=words), [user("Q")], completion, TOOLS)
    assert row["action_mask"][-3:] == [1, 1, 0]


def test_other_blanks_lose_no_word():
    words = "{{ m.content.split() | join(' ') }}"
    row = tokenize_trajectory(tokenizer(words=words), [user("Q")], [assistant("A  B")])
    assert render_actions(byte_tokenizer(), row) == ["A B<|im_end|>"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("family", ["qwen3", "lfm2_2_5_v2"])
def test_reasoning_is_shown_whatever_its_key(family, key):
    processing_class = byte_tokenizer(family)
    rows = [
        tokenize_trajectory(processing_class, [user("Q")], [assistant("A", **{name: "thought"})])
        for name in (key, "reasoning_content")
    ]
    assert rows[0] == rows[1] and "thought" in render_actions(processing_class, rows[0])[0]


def test_reasoning_is_dropped_knowingly():
    thinking = [assistant("A", reasoning_content="thought"), user("Q"), assistant("B", thinking="thought")]
    silent = [assistant("A"), user("Q"), assistant("B")]
    processing_class = byte_tokenizer("qwen2_5")
    row = tokenize_trajectory(processing_class, [user("Q")], thinking, drop_reasoning=True)
    assert row == tokenize_trajectory(processing_class, [user("Q")], silent)


def test_check_and_trainers_refuse_it_too():
    row = {"prompt": [user("Q")], "chosen": [assistant("A", reasoning="thought")], "rejected": [assistant("B")]}
    with pytest.raises(VanishedPartError, match="`chosen`: Message 1"):
        tokenize_preference_row(row, byte_tokenizer("qwen2_5"))
    with pytest.raises(VanishedPartError, match="`chosen`: Message 1"):  # where every token trains
        tokenize_preference_row(row, byte_tokenizer("qwen2_5"), all_tokens=True)
    rows = Dataset.from_list([row])
    (error,) = check_dataset(rows, byte_tokenizer("qwen2_5"), progress=False).errors
    assert "its reasoning ('thought')" in error and "drop_reasoning=True" in error
    assert not check_dataset(rows, byte_tokenizer("qwen2_5"), progress=False, drop_reasoning=True).errors


def test_a_rollout_prompt_is_refused_too():
    with pytest.raises(VanishedPartError, match=r"Message 0 \(system\).*into the first user message"):
        TurnTemplate(tokenizer(words=NO_SYSTEM)).prompt_ids([SYSTEM, user("Q")])
