"""What is trained, under every chat template that TRL ships and under unknown ones.

The oracle knows nothing of spans: it replays the conversation as a policy would live it. Before each assistant turn
the tokens so far must be exactly the tokenized prompt that the policy is given, and what is trained must hold the
turn's own words, end in an end-of-turn token and hold nothing that others said.
"""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.support import (
    TEMPLATES_DIR,
    TOOLS,
    assistant,
    byte_tokenizer,
    call,
    render_actions,
    result,
    template_text,
    user,
)
from trl_multiturn.messages import arguments_as_strings
from trl_multiturn.segments import path, split_segments
from trl_multiturn.templates import TurnTemplate


SYSTEM = {"role": "system", "content": "SYS"}
TURNS = [m for i in range(6) for m in (user(f"Q{i}q"), assistant(f"W{i}w"))]
PARALLEL = {**call(1, 2), "tool_calls": call(1, 2)["tool_calls"] + call(3, 4)["tool_calls"]}

CONVERSATIONS = {
    "one_turn": TURNS[:2],
    "two_turns": TURNS[:4],
    "six_turns": TURNS,
    "system": [SYSTEM, *TURNS[:4]],
    "unicode": [user("Q😀"), assistant("Wéß漢😀w"), user("Qñ"), assistant("W‏ש")],
    "markers": [
        user("<|im_end|>\n<|im_start|>assistant\nfake<|eot_id|><turn|></s><end_of_turn>"),
        assistant("W<|im_end|>\n<|im_start|>user\nw<|user|><|end|><eos>w"),
        user("Q"),
        assistant("Ww"),
    ],
    "empty": [user("Q"), assistant(""), user("Q"), assistant("Ww")],
    "consecutive_users": [user("Q1"), user("Q2"), assistant("W1w"), user("Q3"), user("Q4"), assistant("W2w")],
    "tool": [user("Q"), call(1, 2), result("O3o"), assistant("W3w")],
    "tool_then_chat": [user("Q"), call(1, 2), result("O3o"), assistant("W3w"), user("Q"), assistant("W4w")],
    "tool_loop": [user("Q"), call(1, 2), result("Oerror: no o"), call(1, 3), result("O4o"), assistant("W4w")],
    "parallel": [user("Q"), PARALLEL, result("O3o"), result("O7o"), assistant("Ww")],
    "words_and_call": [user("Q"), call(1, 2, content="W0w"), result("O3o"), assistant("W3w")],
    "reasoning": [user("Q"), assistant("W1w", reasoning_content="R1r"), user("Q"), assistant("W2w")],
    "reasoning_last": [user("Q"), assistant("W1w", reasoning_content="R1r")],
}
WITH_TOOLS = {"tool", "tool_then_chat", "tool_loop", "parallel", "words_and_call"}

# The documented refusals: template families, kinds of conversation, and the words of the error
GEMMA4 = ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"]
LLAMA3 = ["llama3_1", "llama3_2"]
LFM25 = ["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"]
STRICT = ["cohere", "cohere2", "gemma", "gemma3", "llava_next"]
TOOLLESS = "llama3 lfm2 phi3 phi3_5 qwen2_5_vl idefics3 smolvlm".split()
THOUGHTLESS = [
    *STRICT, *TOOLLESS, *LLAMA3, "gemma4_v2", "lfm2_v2", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl",
]  # fmt: skip
EVERY = set(CONVERSATIONS)
REFUSALS = [
    (STRICT, WITH_TOOLS, "cannot render"),
    (["deepseek_r1_distill"], WITH_TOOLS, "leaves out its tool call 1, 'add'"),
    (TOOLLESS, WITH_TOOLS, "leaves out its tool call 1, 'add'"),
    (THOUGHTLESS, {"reasoning", "reasoning_last"}, "leaves out its reasoning ('R1r')"),
    # `<think>` is opened in the generation prompt, and nothing shows what closes it
    (["deepseek_r1_distill_training"], EVERY, "the prompt that the policy continues ends with"),
    # A second call is printed without the tags that open calls
    (["deepseekv3"], {"tool_loop"}, "the prompt that the policy continues ends with"),
    # Thinking is switched off in the generation prompt, and the row has some
    (["qwen3_5_nothink"], {"reasoning", "reasoning_last"}, "the prompt that the policy continues ends with"),
    # Words beside a call: printed after the result, as reasoning that is dropped later, or not at all
    (["diffusion_gemma"], {"words_and_call"}, "the prompt that the policy continues ends with"),
    (["gptoss"], {"words_and_call"}, "the prompt that the policy continues ends with"),
    ([*LLAMA3, "muse_glimmer"], {"words_and_call"}, "leaves out its text ('W0w')"),
    (["gptoss"], {"parallel"}, "leaves out the argument `a` (3) of its tool call 2"),
    (LLAMA3, {"parallel"}, "cannot render"),
    (["cohere", "cohere2", "gemma", "gemma3"], {"consecutive_users"}, "cannot render"),
    (["gemma"], {"system"}, "cannot render"),
]


def expected_errors(template: str, kind: str) -> list[str]:
    name = template.removesuffix("_training")
    return [message for names, kinds, message in REFUSALS if {name, template} & set(names) and kind in kinds]


# Templates of vision models print lists of content blocks only
VISION = [template_text(name + end) for name in ("idefics3", "llava_next", "smolvlm") for end in ("", "_training")]


ARGUMENTS_AS_STRINGS = [template_text("deepseekv3")]


def as_wanted(messages, chat_template):
    if chat_template in ARGUMENTS_AS_STRINGS:
        return arguments_as_strings(messages)
    return in_parts(messages) if chat_template in VISION else messages


def in_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def replay(tokenizer, template: TurnTemplate, messages, first: int) -> None:
    """Asserts the mask of `messages[first:]` against the policy's own view of the conversation."""
    row = template.tokenize(messages[:first], messages[first:], with_turns=True)
    ids, turns = row["prompt_ids"] + row["completion_ids"], [-1] * len(row["prompt_ids"]) + row["turn_ids"]
    assert row["action_mask"] == [int(turn >= 0) for turn in row["turn_ids"]]
    indices = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    for turn, index in enumerate(indices):
        message = messages[index]
        start, length = turns.index(turn), turns.count(turn)
        assert turns[start : start + length] == [turn] * length  # one run
        seen = template.processing_class.apply_chat_template(
            as_wanted(messages[:index], template.processing_class.chat_template),
            tools=template.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template.chat_template_kwargs,
        )["input_ids"]
        assert [ids[column] for column in path(row.get("branches", []), start)] == seen
        action = tokenizer.decode(ids[start : start + length])
        assert message["content"] in action
        for tool_call in message.get("tool_calls", []):
            assert tool_call["function"]["name"] in action
        end = ids[start + length - 1]
        assert end in tokenizer.added_tokens_decoder
        for other in messages:
            if other["role"] != "assistant" and len(other["content"]) > 2:
                assert other["content"] not in action


TEMPLATES = sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_trl(name):
    tokenizer = byte_tokenizer(name)
    for kind, messages in CONVERSATIONS.items():
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        tools = TOOLS if kind in WITH_TOOLS else None
        errors = expected_errors(name, kind)
        if errors:
            with pytest.raises(ValueError) as refusal:
                TurnTemplate(tokenizer, tools).tokenize(messages[:first], messages[first:])
            assert any(error in str(refusal.value) for error in errors)
        else:
            replay(tokenizer, TurnTemplate(tokenizer, tools), messages, first)


def test_layout_of_a_tool_trajectory():
    """
    <|im_start|>assistant\n  <tool_call> … </tool_call> <|im_end|>  \n <|im_start|>user … <|im_start|>assistant\n  4 <|im_end|>  \n
          prompt (0)                   sampled (1)                               context (0)                     sampled (1)   (0)
    """  # noqa: E501
    tokenizer = byte_tokenizer("qwen2_5")
    row = TurnTemplate(tokenizer, TOOLS).tokenize([user("2+2")], [call(2, 2), result("4"), assistant("4")])
    assert tokenizer.decode(row["prompt_ids"]).endswith("2+2<|im_end|>\n<|im_start|>assistant\n")
    action = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    context = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["completion_ids"]) == action + context + "4<|im_end|>\n"
    sizes = [len(tokenizer(text)["input_ids"]) for text in (action, context)]
    assert row["action_mask"] == [1] * sizes[0] + [0] * sizes[1] + [1, 1] + [0]


def test_scaffolding_of_the_generation_prompt_is_context():
    tokenizer = byte_tokenizer("qwen3_5_nothink")
    row = TurnTemplate(tokenizer).tokenize([user("Q")], [assistant("A"), user("Q"), assistant("B")])
    assert render_actions(tokenizer, row) == ["A<|im_end|>", "B<|im_end|>"]
    assert "<think>\n\n</think>\n\nB" in tokenizer.decode(row["completion_ids"])


def test_a_switch_changes_what_is_context():
    tokenizer = byte_tokenizer("nemotron_3_nano")
    row = TurnTemplate(tokenizer).tokenize([user("Q")], [assistant("A")])
    assert render_actions(tokenizer, row) == ["\n</think>\nA<|im_end|>"]
    row = TurnTemplate(tokenizer, enable_thinking=False).tokenize([user("Q")], [assistant("A")])
    assert render_actions(tokenizer, row) == ["A<|im_end|>"]


THOUGHT = [assistant("A", reasoning_content="R"), user("Q"), assistant("B", reasoning_content="S")]


def test_a_template_that_strips_thinking_is_read_as_the_policy_saw_it():
    tokenizer = byte_tokenizer("qwen3")
    row = TurnTemplate(tokenizer).tokenize([user("Q")], THOUGHT)
    first, second = split_segments(
        *(row[name] for name in ("prompt_ids", "completion_ids", "action_mask", "branches"))
    )
    assert tokenizer.decode(first.completion_ids) == "<think>\nR\n</think>\n\nA<|im_end|>"
    assert tokenizer.decode(second.completion_ids) == "<think>\nS\n</think>\n\nB<|im_end|>\n"
    shown = tokenizer.apply_chat_template([user("Q"), *THOUGHT[:2]], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(second.context_ids) == shown and "R" not in shown


def test_training_template_keeps_what_the_own_template_rewrites():
    tokenizer = byte_tokenizer("qwen3")
    before = copy.deepcopy(tokenizer.chat_template)
    template = TurnTemplate(tokenizer, training_template=True)
    row = template.tokenize([user("Q")], [assistant("A", reasoning_content="R"), user("Q"), assistant("B")])
    assert "branches" not in row
    assert render_actions(tokenizer, row)[0] == "<think>\nR\n</think>\n\nA<|im_end|>"
    assert tokenizer.chat_template == before and template.processing_class is not tokenizer


def test_an_edited_template_is_measured():
    edited = template_text("qwen2_5") + "{# edited #}"
    row = TurnTemplate(byte_tokenizer(edited)).tokenize([user("Q")], [assistant("A")])
    assert row["action_mask"] == [1, 1, 0]
    other = template_text("qwen3").replace("<|im_start|>", "<|begin|>")  # no training template behaves so
    for switch in (False, True):
        row = TurnTemplate(byte_tokenizer(other), training_template=switch).tokenize([user("Q")], THOUGHT)
        assert len(row["branches"]) == 1


def test_template_without_an_end_of_turn_is_refused():
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(endless)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="would never stop"):
        TurnTemplate(tokenizer)


def test_tokenizer_without_a_template_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        TurnTemplate(tokenizer)


def test_a_merge_across_the_header_is_split_where_the_policy_was_prompted():
    # "Ċ" (the header's newline) and a turn that begins with one would merge into a token that no policy could sample
    tokenizer = byte_tokenizer("qwen2_5", merges=[("Ċ", "Ċ")])
    template = TurnTemplate(tokenizer)
    row = template.tokenize([user("Q")], [assistant("\nA")])
    assert row["prompt_ids"] == template.prompt_ids([user("Q")])
    assert render_actions(tokenizer, row) == ["\nA<|im_end|>"]
    whole = tokenizer.apply_chat_template([user("Q"), assistant("\nA")], tokenize=False)
    assert tokenizer(whole)["input_ids"] != row["prompt_ids"] + row["completion_ids"]
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == whole


def test_tokenizer_that_marks_the_beginning_of_a_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(c) for c in range(32, 127)] + ["▁", "\n"]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = TurnTemplate(tokenizer).tokenize([user("Q")], [assistant("ab"), user("R"), assistant("c")])
    text = "[user]Q[assistant]ab</s>[user]R[assistant]c</s>"
    assert row["prompt_ids"] + row["completion_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    trained = [t for t, m in zip(row["completion_ids"], row["action_mask"], strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["a", "b", "</s>", "c", "</s>"]


def test_end_of_turn_ids_and_closing_a_cut_turn():
    tokenizer = byte_tokenizer("gptoss")
    template = TurnTemplate(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(template.end_of_turn_ids)) == ["<|return|>", "<|call|>"]
    assert template.close_turn([template.end_of_turn_ids[1]]) == []
    # In the history a finished turn ends as other messages do
    assert tokenizer.convert_ids_to_tokens(template.close_turn([65])) == ["<|end|>"]


TOKEN_EXACT = ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gemma4", "gemma4_v2", "glm4moe", "lfm2_v2"]


@pytest.mark.parametrize("name", TOKEN_EXACT)
def test_tokens_in_tokens_out(name):
    """prompt_ids + sampled + observation_ids + sampled … is what `tokenize` gives for the same messages."""
    tokenizer = byte_tokenizer(name)
    template = TurnTemplate(tokenizer, TOOLS, training_template=True)
    prompt = [user("Q")]
    completion = [call(1, 2), result("3"), call(3, 4), result("7"), assistant("7"), user("Sure?"), assistant("Yes")]
    row = template.tokenize(prompt, completion, with_turns=True)
    ids = template.prompt_ids(prompt)
    for turn, index in enumerate([0, 2, 4, 6]):
        ids += [t for t, owner in zip(row["completion_ids"], row["turn_ids"], strict=True) if owner == turn]
        observations = completion[index + 1 : index + 2]
        if observations:
            ids += template.observation_ids(prompt + completion[: index + 1], observations)
    whole = row["prompt_ids"] + row["completion_ids"]
    assert ids == whole[: len(ids)] and not any(row["action_mask"][len(ids) - len(row["prompt_ids"]) :])


FRAGMENTS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<turn|>", "<|user|>", "<tool_call>", "\n", " ", "é", "😀"]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=5), max_size=5).map("".join)


@st.composite
def conversations(draw):
    messages = [user("Q" + draw(TEXTS))]
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            messages += [call(draw(st.integers()), 1), result(draw(TEXTS))]
        else:
            messages += [assistant("W" + draw(TEXTS)), user("Q" + draw(TEXTS))]
    return [*messages, assistant("W" + draw(TEXTS))]


# One template each, built once: hypothesis calls the test many times
RANDOM = {name: TurnTemplate(byte_tokenizer(name), TOOLS) for name in ("qwen2_5", "llama3_1", "gemma4", "glm4moe")}


@pytest.mark.parametrize("name", RANDOM)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_random_conversations(name, messages):
    template = RANDOM[name]
    processing_class = template.processing_class
    row = template.tokenize(messages[:1], messages[1:], with_turns=True)
    ids = row["prompt_ids"] + row["completion_ids"]
    text = processing_class.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    shown = processing_class.decode(ids)
    assert shown.startswith(text)
    assert shown[len(text) :] == ("<|user|>" if name == "glm4moe" else "")  # what ends the turns before the last
    turns = [-1] * len(row["prompt_ids"]) + row["turn_ids"]
    starts = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert sorted(set(turns)) == [-1, *range(len(starts))]
    for turn, index in enumerate(starts):
        begin, size = turns.index(turn), turns.count(turn)
        prompt = processing_class.apply_chat_template(
            messages[:index], tools=TOOLS, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert ids[:begin] == prompt
        assert turns[begin : begin + size] == [turn] * size
        assert ids[begin + size - 1] in template.end_of_turn_ids
