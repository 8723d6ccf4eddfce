"""Rows under a tool dialect are what a rollout in it reads and samples, under templates that show no calls."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from tests.support import TOOLS, assistant, byte_tokenizer, call, result, tiny_model, user
from tests.templates.chatml import chatml
from trl_multiturn import (
    MultiTurnKTOConfig,
    MultiTurnKTOTrainer,
    RolloutConfig,
    ScriptedEngine,
    generate_trajectories,
    preview_masks,
    tokenize_trajectory,
)
from trl_multiturn.data.tokenization import tokenize_unpaired_row
from trl_multiturn.messages.tool_text import tool_text, written_as_text
from trl_multiturn.messages.wording import RenderingSwitches
from trl_multiturn.templates import TurnTemplate
from trl_multiturn.tools.base import tool_schema


PROMPT = [{"role": "system", "content": "Be brief."}, user("2+2?")]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
THOUGHT = {"reasoning_content": "hm"}


def add(a: int, b: int) -> str:
    """Adds.

    Args:
        a: First.
        b: Second.
    """
    return str(a + b)


def python(code: str) -> str:
    """Runs code.

    Args:
        code: The code.
    """
    return "4"


def tokens(row) -> list[list[int]]:
    """Ids, mask and branches up to the last sampled token: rollouts end there, renderings with the template's tail."""
    mask = row["action_mask"]
    last = len(mask) - mask[::-1].index(1)
    return [row["prompt_ids"], row["completion_ids"][:last], mask[:last], row.get("branches", [])]


def roll_out(template: str, turns: list[str], tool, prompt=PROMPT, **settings):
    tokenizer = byte_tokenizer(template)
    config = RolloutConfig(num_generations=1, **settings)
    engine = ScriptedEngine(turns, tokenizer)
    (trajectory,) = generate_trajectories([{"prompt": prompt}], engine, [tool], config, progress=False)
    return trajectory, engine, tokenizer


STRIPS = chatml(words="{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}")


# No system role; no calls; calls of its own; thinking stripped from earlier turns
@pytest.mark.parametrize("template", ["gemma", "llama3", "qwen2_5", STRIPS])
def test_rows_in_hermes_are_what_a_rollout_reads_and_samples(template):
    turns = [f"Let me add.\n{CALL}", f"{CALL}\n{CALL}", "It is 4."]
    if template == STRIPS:
        turns = [f"<think>\nhm\n</think>\n\n{turn}" for turn in turns]
    prompt = PROMPT[1:] if template == "gemma" else PROMPT
    trajectory, engine, tokenizer = roll_out(template, turns, add, prompt, dialect="hermes")
    assert [message["role"] for message in trajectory.completion[:-1]] == ["assistant", "tool"] * 2 + ["tool"]
    assert all(words in engine.calls[0].prompt_text for words in ("Adds.", prompt[0]["content"]))
    assert "<tool_response>\n4\n</tool_response>\n<tool_response>\n4" in engine.calls[2].prompt_text
    row = tokenize_trajectory(
        tokenizer, trajectory.prompt, trajectory.completion, tools=[tool_schema(add)], tool_dialect="hermes"
    )
    assert tokens(row) == tokens(vars(trajectory))
    assert bool(trajectory.branches) == (template == STRIPS)


def test_an_answer_keeps_what_looks_like_the_beginning_of_a_result():
    trajectory, _, tokenizer = roll_out("gemma", ["4 <tool_response>"], add, PROMPT[1:], dialect="hermes")
    assert [message["content"] for message in trajectory.completion] == ["4 <tool_response>"]
    row = tokenize_trajectory(
        tokenizer, trajectory.prompt, trajectory.completion, tools=[tool_schema(add)], tool_dialect="hermes"
    )
    assert tokenizer.decode(row["completion_ids"]).startswith("4 <tool_response>")


def test_rows_in_the_fenced_dialect_are_what_a_rollout_reads_and_samples():
    turns = ["So:\n```python\nprint(2+2)\n```", "It is \\boxed{4}."]
    trajectory, _, tokenizer = roll_out("gemma", turns, python, PROMPT[1:], dialect="fenced")
    function = {"name": "python", "arguments": {"code": "print(2+2)\n"}}
    calls = [{"type": "function", "function": function}]
    observed = {"role": "tool", "name": "python", "content": "4"}
    completion = [assistant("So:", tool_calls=calls), observed, assistant("It is \\boxed{4}.")]
    row = tokenize_trajectory(tokenizer, PROMPT[1:], completion, tools=[tool_schema(python)], tool_dialect="fenced")
    assert tokens(row) == tokens(vars(trajectory))


def test_the_words_of_hermes():
    template = TurnTemplate(byte_tokenizer(chatml()), TOOLS, tool_dialect="hermes")
    turns = [{**call(2, 2, "Let me add."), "train": False}, result("4"), result("5"), assistant("4")]
    row = template.tokenize(PROMPT, turns)
    prompt, rest = map(template.processing_class.decode, (row["prompt_ids"], row["completion_ids"]))
    system = prompt.partition("system\n")[2].partition("<|im_end|>")[0]
    assert system.startswith("Be brief.\n\n# Tools\n") and f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in system
    assert rest == (
        f"Let me add.\n{CALL}<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert sum(row["action_mask"]) == 2  # "4" and its end: the flag is kept


def test_a_fence_is_longer_than_those_in_its_text():
    template = TurnTemplate(byte_tokenizer("gemma"), [tool_schema(python)], tool_dialect="fenced")
    function = {"name": "python", "arguments": {"code": "'''\n```\n'''"}}
    words = template.sampled_text([user("Q"), assistant("", tool_calls=[{"type": "function", "function": function}])])
    assert words == "````python\n'''\n```\n'''\n````"


@pytest.mark.parametrize("dialect", ["hermes", "fenced"])
def test_what_a_dialect_cannot_say_is_refused(dialect):
    turns = [call(2, 2), result("4"), assistant("4")]
    if dialect == "hermes":
        assert tokenize_trajectory(byte_tokenizer("gemma"), PROMPT[1:], turns, TOOLS, tool_dialect=dialect)
        dialect = "herms"
    with pytest.raises(ValueError, match="hermes"):
        tokenize_trajectory(byte_tokenizer("gemma"), PROMPT[1:], turns, TOOLS, tool_dialect=dialect)


def test_turns_that_call_are_known_in_a_dialect():
    row = {"prompt": PROMPT[1:], "completion": [call(2, 2), result("4"), assistant("4")], "tools": TOOLS}
    switches = RenderingSwitches(tool_dialect="hermes")
    assert tokenize_unpaired_row(row, byte_tokenizer("gemma"), rendering=switches)["turn_calls"] == [1, 0]
    whole = tokenize_unpaired_row(row, byte_tokenizer("gemma"), all_tokens=True, rendering=switches)
    assert all(whole["action_mask"]) and "<tool_response>" in byte_tokenizer("gemma").decode(whole["completion_ids"])


def test_reasoning_is_written_where_a_template_can_show_none():
    turns = [{**call(2, 2), **THOUGHT}, result("4"), assistant("4", **THOUGHT)]
    tokenizer = byte_tokenizer("gemma")
    switches = {"tool_dialect": "hermes", "write_reasoning": True}
    row = tokenize_trajectory(tokenizer, PROMPT[1:], turns, TOOLS, **switches)
    sampled = tokenizer.decode([t for t, bit in zip(row["completion_ids"], row["action_mask"], strict=True) if bit])
    assert sampled == "".join(f"<think>\nhm\n</think>\n\n{said}<end_of_turn>" for said in (CALL, "4"))


def test_reasoning_is_not_written_where_the_template_has_a_way_to_show_it():
    own, plain = (
        tokenize_trajectory(byte_tokenizer("qwen3"), PROMPT, [assistant("4", **THOUGHT)], None, **switch)
        for switch in ({"write_reasoning": True}, {})
    )
    assert own == plain
    shown = "{% if thinking is defined and thinking %}{{ m.reasoning_content }}{% endif %}{{ m.content }}"
    with pytest.raises(ValueError, match="render with `thinking=True`"):
        tokenize_trajectory(
            byte_tokenizer(chatml(words=shown)), PROMPT, [assistant("4", **THOUGHT)], None, write_reasoning=True
        )
    closed = byte_tokenizer(chatml(prompt="<think>\n\n</think>\n\n"))  # a prompt that forbids to think
    with pytest.raises(ValueError, match="can train without the reasoning"):
        tokenize_trajectory(closed, PROMPT, [assistant("4", **THOUGHT)], None, write_reasoning=True)


def test_the_error_names_the_switches_that_make_a_row_trainable():
    turns = [{**call(2, 2), **THOUGHT}, result("4"), assistant("4")]
    with pytest.raises(ValueError, match=r"set `tool_dialect='hermes'` \(.*\) and `write_reasoning=True` \("):
        tokenize_trajectory(byte_tokenizer("llama3"), PROMPT, turns, TOOLS)
    with pytest.raises(ValueError, match=r"set `write_reasoning=True` \("):
        tokenize_trajectory(byte_tokenizer("llama3"), PROMPT, turns, TOOLS, tool_dialect="hermes")


def test_images_of_results_stand_before_their_texts():
    image = {"type": "image", "image": "a.png"}
    observed = [{**result("4"), "content": [{"type": "text", "text": "4"}, image]}, result("5")]
    (turn,) = written_as_text(observed, tool_text("hermes"))
    text = "<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>"
    assert turn == {"role": "user", "content": [image, {"type": "text", "text": text}]}


def test_a_preview_takes_the_switches():
    rows = Dataset.from_list([{"prompt": PROMPT[1:], "completion": [call(2, 2), result("4"), assistant("4")]}])
    preview = preview_masks(rows, 1, byte_tokenizer("gemma"), show=False, tool_dialect="hermes")
    assert "<tool_call>" in str(preview)


def test_a_template_that_cannot_render_tools_takes_them_as_text():
    broken = byte_tokenizer(chatml(top="{% for tool in tools or [] %}{{ tool.no.such }}{% endfor %}"))
    turns = [call(2, 2), result("4"), assistant("4")]
    with pytest.raises(ValueError, match="has no attribute 'no'.* You can set `tool_dialect='hermes'`"):
        tokenize_trajectory(broken, PROMPT, turns, TOOLS)
    assert tokenize_trajectory(broken, PROMPT, turns, TOOLS, tool_dialect="hermes")


def test_a_trainer_takes_the_switches(tmp_path):
    turns = [{**call(2, 2), **THOUGHT}, result("4"), assistant("4")]
    rows = [{"prompt": PROMPT[1:], "completion": turns, "label": label} for label in (True, False)]
    tokenizer = byte_tokenizer("gemma")
    switches = {"tool_dialect": "hermes", "write_reasoning": True}
    args = MultiTurnKTOConfig(str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=2, **switches)
    trainer = MultiTurnKTOTrainer(
        tiny_model(tokenizer), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert trainer.train_dataset[0]["prompt_ids"] == TurnTemplate(tokenizer, **switches).prompt_ids(PROMPT[1:])
    row = trainer.train_dataset[0]
    text = tokenizer.decode([t for t, bit in zip(row["completion_ids"], row["action_mask"], strict=True) if bit])
    assert text.startswith(f"<think>\nhm\n</think>\n\n{CALL}")
