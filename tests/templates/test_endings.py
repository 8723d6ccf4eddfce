"""What ends a turn, also where the last turn of a rendering has no end."""

from __future__ import annotations

from tests.support import TOOLS, assistant, byte_tokenizer, call, render_actions, result, user
from tests.templates.chatml import CALLS, TEXT, chatml, tokenizer
from trl_multiturn.segments import split_segments
from trl_multiturn.templates import TurnTemplate


BETWEEN = "{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}"
MARKERS = (  # the next role's marker ends a turn
    "{% set markers = {'user': '<|user|>', 'tool': '<|observation|>', 'assistant': '<|assistant|>'} %}"
    "{% for m in messages %}{{ markers[m.role] }}{{ m.content }}"
    + CALLS
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [call(1, 2), result("3"), assistant("It is 3."), user("Sure?"), assistant("Yes.")]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def measured(processing_class, completion=TURNS):
    template = TurnTemplate(processing_class, TOOLS)
    return template, render_actions(processing_class, template.tokenize([user("Q")], completion))


def test_an_end_that_stands_only_between_messages_also_ends_the_last_turn():
    _, actions = measured(tokenizer(words=TEXT + CALLS, end=BETWEEN))
    assert actions == [CALL + "<|im_end|>", "It is 3.<|im_end|>", "Yes.<|im_end|>"]


def test_the_marker_of_the_next_role_ends_a_turn_where_nothing_else_does():
    template, actions = measured(byte_tokenizer(MARKERS))
    assert actions == [CALL + "<|observation|>", "It is 3.<|user|>", "Yes.<|user|>"]
    tokens = template.processing_class.convert_ids_to_tokens
    assert tokens(list(template.end_of_turn_ids)) == ["<|user|>", "<|observation|>"]
    assert tokens(template.close_turn([65], "tool")) == ["<|observation|>"]
    assert tokens(template.close_turn([65])) == ["<|user|>"]


def test_a_rollout_goes_on_behind_the_marker():
    template, _ = measured(byte_tokenizer(MARKERS))
    ids = template.observation_ids([user("Q"), call(1, 2)], [result("3")])
    assert template.processing_class.decode(ids) == "3<|assistant|>"


def test_a_header_that_nobody_asked_for_is_no_part_of_the_end():
    always = chatml(end="<|im_end|>").replace("{% if add_generation_prompt %}", "{% if true %}")
    _, actions = measured(byte_tokenizer(always))
    assert actions[-1] == "Yes.<|im_end|>"


def test_two_tokens_can_end_a_turn():
    end = "{% if m.role == 'assistant' %}<|end_response|>{% endif %}<|im_end|>"
    _, actions = measured(tokenizer(words=TEXT + CALLS, end=end))
    assert actions[-1] == "Yes.<|end_response|><|im_end|>"


def test_a_template_that_prints_no_end_leaves_it_to_the_tokenizer():
    """The beginning of the next text ends no turn; sampling stops at the tokenizer's token, which no prompt shows."""
    prompt = "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    text = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}{% endfor %}" + prompt
    processing_class = byte_tokenizer(text)
    template = TurnTemplate(processing_class)
    row = template.tokenize([user("Q")], [assistant("A"), user("R"), assistant("B")])
    assert render_actions(processing_class, row) == ["A<eos>", "B<eos>"]
    first, second = split_segments(
        *(row[name] for name in ("prompt_ids", "completion_ids", "action_mask", "branches"))
    )
    assert processing_class.decode(second.context_ids) == "<bos>user: Q<bos>assistant: A<bos>user: R<bos>assistant: "
    assert template.rewrites([user("Q"), assistant("A")], [user("R")])
    sampled = template.observation_ids([user("Q"), assistant("A")], [user("R")])
    assert processing_class.decode(sampled) == "<bos>user: R<bos>assistant: "  # where what was sampled stays


# A turn whose rendering does not continue its prompt


def test_an_empty_block_that_only_the_prompt_prints_is_context():
    words = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + TEXT
    processing_class = tokenizer(words=words, prompt="<think></think>")
    row = TurnTemplate(processing_class).tokenize([user("Q")], [assistant("A")])
    assert processing_class.decode(row["prompt_ids"]).endswith("<think></think>")
    assert render_actions(processing_class, row) == ["A<|im_end|>"]


def test_the_prompt_is_what_the_policy_saw_where_only_the_last_user_turn_shows_the_system_message():
    words = (
        "{% if m.role == 'user' and loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n{% endif %}{% if m.role != 'system' %}" + TEXT + "{% endif %}"
    )
    processing_class = tokenizer(words=words)
    template = TurnTemplate(processing_class)
    prompt = [{"role": "system", "content": "Be kind."}, user("Question")]
    row = template.tokenize(prompt, [assistant("A")])
    assert row["prompt_ids"] == template.prompt_ids(prompt)
    assert render_actions(processing_class, row) == ["A<|im_end|>"]
    row = template.tokenize(prompt, [assistant("A"), user("Question"), assistant("B")])
    first, second = split_segments(
        *(row[name] for name in ("prompt_ids", "completion_ids", "action_mask", "branches"))
    )
    assert second.context_ids == template.prompt_ids([*prompt, assistant("A"), user("Question")])
    assert render_actions(processing_class, row) == ["A<|im_end|>", "B<|im_end|>"]
