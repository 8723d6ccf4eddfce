"""Turns that are rendered otherwise than they were prompted: what of them was sampled, and behind which context.

Each pair is what stands between the header of a turn and what was sampled, and what was sampled.
"""

from __future__ import annotations

import pytest

from tests.support import TOOLS, assistant, byte_tokenizer, call, render_actions, result, user
from tests.templates.chatml import CALLS, TEXT, chatml, tokenizer
from trl_multiturn.messages import nulls
from trl_multiturn.segments import split_segments
from trl_multiturn.templates import TurnTemplate


HEAD = "<|im_start|>assistant\n"
SHOWN = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}" + TEXT + CALLS
SPLIT = "{{ m.content.split('</think>')[-1] }}" + CALLS  # reasoning is never shown, and cut off the text of a turn
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def lived(processing_class, completion, tools=None, **kwargs):
    """The turns of a conversation: how the context of each ends, and what is sampled; contexts are checked."""
    template = TurnTemplate(processing_class, tools, **kwargs)
    prompt = [user("Question")]
    row = template.tokenize(prompt, completion)
    segments = split_segments(row["prompt_ids"], row["completion_ids"], row["action_mask"], row.get("branches", []))
    places = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    contexts = []
    for segment in segments:
        for t, bit in enumerate(segment.action_mask):
            if bit and not (t and segment.action_mask[t - 1]):
                contexts.append(segment.context_ids + segment.completion_ids[:t])
    assert contexts == [template.prompt_ids(prompt + completion[:place], check=False) for place in places]
    headers = [processing_class.decode(ids).rpartition(HEAD)[2] for ids in contexts]
    return list(zip(headers, render_actions(processing_class, row), strict=True))


def test_a_turn_without_reasoning_closes_the_block_that_its_prompt_opened(caplog):
    nulls._told.clear()  # others may have been told already
    thinking = tokenizer(words=SHOWN, prompt="<think>\n")
    turns = lived(thinking, [call(1, 2), result("3"), assistant("A", reasoning_content="R")], TOOLS)
    assert turns == [
        ("<think>\n", f"\n</think>\n{CALL}<|im_end|>"),
        ("<think>\n", "R\n</think>\nA<|im_end|>"),
    ]
    assert "trained to close the block at once" in caplog.text


def test_a_prompt_may_introduce_reasoning_in_words_that_no_finished_turn_shows():
    words = "{% if m.reasoning_content %}{{ m.reasoning_content }}\n[ANSWER]\n{% endif %}" + TEXT
    introduced = tokenizer(words=words, prompt="Let me think:\n")
    turns = lived(introduced, [assistant("A"), user("Q"), assistant("B", reasoning_content="R")])
    assert turns == [
        ("Let me think:\n", "\n[ANSWER]\nA<|im_end|>"),
        ("Let me think:\n", "R\n[ANSWER]\nB<|im_end|>"),
    ]


def test_a_finished_turn_may_show_the_block_without_the_reasoning():
    """DeepSeek V3.1: `<think></think>` stands in the history, whatever was thought."""
    emptied = "{% if m.role == 'assistant' %}<think></think>{% endif %}" + SPLIT
    turns = lived(
        tokenizer(words=emptied, prompt="<think>"),
        [{**call(1, 2), "reasoning_content": "R"}, result("3"), assistant("A", reasoning_content="S")],
        TOOLS,
    )
    assert turns == [("<think>", f"R</think>{CALL}<|im_end|>"), ("<think>", "S</think>A<|im_end|>")]


def test_reasoning_that_the_template_cuts_off_is_closed_by_its_mark():
    cutting = tokenizer(words=SPLIT, prompt="<think>\n")
    turns = lived(cutting, [assistant("A"), user("Q"), assistant("B", reasoning_content="R\n")])
    assert turns == [("<think>\n", "</think>A<|im_end|>"), ("<think>\n", "R\n</think>B<|im_end|>")]


@pytest.mark.parametrize("opened", ["<think>\n", ""])
def test_reasoning_within_the_text_is_trained_as_it_was_written(opened):
    cutting = tokenizer(words=SPLIT, prompt="<think>\n")
    turns = lived(cutting, [assistant(f"{opened}R\n</think>\n\nA"), user("Q"), assistant("B")])
    assert turns[0] == ("<think>\n", "R\n</think>\n\nA<|im_end|>")


def test_a_block_that_nothing_is_known_to_close_leaves_the_turn_unknown():
    template = TurnTemplate(tokenizer(words=TEXT, prompt="<think>\n"))
    with pytest.raises(ValueError, match="the prompt that the policy continues ends with '<think>"):
        template.tokenize([user("Q")], [assistant("A")])


@pytest.mark.parametrize("words", [TEXT, SHOWN])
def test_a_closed_block_is_context_and_no_reasoning_follows_it(words):
    silent = tokenizer(words=words, prompt="<think>\n</think>\n")
    assert lived(silent, [assistant("A")]) == [("<think>\n</think>\n", "A<|im_end|>")]
    with pytest.raises(ValueError, match="reasoning"):
        lived(silent, [assistant("A", reasoning_content="R")])


def test_a_turn_in_the_history_may_show_the_end_of_a_block_only():
    words = "{% if m.role == 'assistant' %}</think>{% endif %}" + TEXT
    turns = lived(tokenizer(words=words, prompt="<think></think>"), [assistant("A"), user("Q"), assistant("B")])
    assert turns == [("<think></think>", "A<|im_end|>"), ("<think></think>", "B<|im_end|>")]


def test_what_tells_an_answer_from_a_call_is_sampled():
    words = (
        "{% if m.tool_calls %}<|action|>"
        + CALLS
        + "{% elif m.role == 'assistant' %}<|say|>{{ m.content }}<|said|>{% else %}"
        + TEXT
        + "{% endif %}"
    )
    block = "<|START_THINKING|><|END_THINKING|>"
    turns = lived(tokenizer(words=words, prompt=block), [call(1, 2), result("3"), assistant("A")], TOOLS)
    assert turns == [(block, f"<|action|>{CALL}<|im_end|>"), (block, "<|say|>A<|said|><|im_end|>")]


def test_the_header_may_stand_in_the_prompt_or_in_the_history_only():
    text = chatml(words=TEXT + CALLS)
    after_results = "{% if not (m.role == 'assistant' and loop.index0 and messages[loop.index0 - 1].role == 'tool') %}"
    header = "<|im_start|>{{ m.role }}\n"
    for template, context in (
        (text.replace(header, f"{after_results}{header}{{% endif %}}"), ""),
        (text.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt and m.role != 'tool' %}"), None),
    ):
        template = template.replace("m.role != 'tool'", "messages[-1].role != 'tool'")
        turns = lived(byte_tokenizer(template), [call(1, 2), result("3"), assistant("A")], TOOLS)
        assert turns[1][1] == "A<|im_end|>"
        assert turns[1][0] == context or context is None


def test_other_blanks_are_no_other_words():
    words = "{% if m.tool_calls %}\n" + CALLS + "{% elif m.role == 'assistant' %} {{ m.content }}{% else %}" + TEXT
    template = chatml(words=words + "{% endif %}").replace("{{ m.role }}\n", "{{ m.role }}:")
    template = template.replace("<|im_start|>assistant\n", "<|im_start|>assistant: \n")
    processing_class = byte_tokenizer(template)
    row = TurnTemplate(processing_class, TOOLS).tokenize([user("Q")], [call(1, 2), result("3"), assistant("A")])
    assert render_actions(processing_class, row) == [CALL + "<|im_end|>", "A<|im_end|>"]


def test_reasoning_of_answers_is_written_as_that_of_calls_where_only_this_is_shown():
    words = "{% if m.tool_calls and m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}" + TEXT + CALLS
    completion = [{**call(1, 2), "reasoning": "one"}, result("3"), assistant("A", reasoning="two")]
    turns = lived(tokenizer(words=words), completion, TOOLS)
    assert [sampled for _, sampled in turns] == [
        f"<think>one</think>{CALL}<|im_end|>",
        "<think>two</think>A<|im_end|>",
    ]


def test_a_rollout_reads_what_the_template_makes_of_a_closed_block():
    template = TurnTemplate(tokenizer(words=SHOWN, prompt="<think>\n"))
    assert template.rewrites([user("Q"), assistant("A")], [user("R")])
    assert template.rewrites([user("Q"), assistant("A", reasoning_content="R")], [user("R")]) is False
