"""Rollouts whose history is rewritten: what was read and what was sampled is what is trained."""

from __future__ import annotations

import pytest

from tests.support import byte_tokenizer
from trl_multiturn import RolloutConfig, ScriptedEngine, Trajectory, generate_trajectories
from trl_multiturn.journal.journal import Journal


PROMPTS = [{"prompt": [{"role": "user", "content": "2+2?"}]}]
TURNS = ["<think>\none\n</think>\n\n```python\nprint(2+2)\n```", "<think>\ntwo\n</think>\n\nThe answer is \\boxed{4}."]


def python(code: str) -> str:
    """Runs code.

    Args:
        code: The code.
    """
    return "4"


def roll_out(template: str, turns=TURNS, **settings):
    tokenizer = byte_tokenizer(template)
    engine = ScriptedEngine(turns, tokenizer)
    config = RolloutConfig(num_generations=1, dialect="fenced", **settings)
    (trajectory,) = generate_trajectories(PROMPTS, engine, [python], config, progress=False)
    return trajectory, engine, tokenizer


def assert_trained_is_sampled(trajectory: Trajectory, engine: ScriptedEngine) -> None:
    """Each turn's context is what the engine was given, and its tokens are what the engine sampled."""
    contexts = []
    for segment in trajectory.segments:
        ids, mask = segment.completion_ids, segment.action_mask
        starts = [t for t, bit in enumerate(mask) if bit and not (t and mask[t - 1])]
        for start in starts:
            stop = next((t for t in range(start, len(mask)) if not mask[t]), len(mask))
            contexts.append((segment.context_ids + ids[:start], ids[start:stop]))
    assert contexts == [(call.prompt_ids, call.generation.token_ids) for call in engine.calls]


def test_a_template_that_strips_thinking_begins_a_segment():
    trajectory, engine, tokenizer = roll_out("qwen3")
    assert len(trajectory.segments) == 2 and trajectory.info["segments"] == 2
    assert "one" not in engine.calls[1].prompt_text and "print(2+2)" in engine.calls[1].prompt_text
    assert engine.calls[1].prompt_text == tokenizer.apply_chat_template(
        trajectory.prompt + trajectory.completion[:2], tokenize=False, add_generation_prompt=True
    )
    assert_trained_is_sampled(trajectory, engine)


def test_a_template_that_strips_nothing_makes_one_segment():
    trajectory, engine, _ = roll_out("qwen2_5")
    assert trajectory.branches == [] and "segments" not in trajectory.info
    assert_trained_is_sampled(trajectory, engine)


def test_what_was_sampled_may_stay():
    trajectory, engine, _ = roll_out("qwen3", earlier_turns="as_sampled")
    assert trajectory.branches == [] and "one" in engine.calls[1].prompt_text
    assert_trained_is_sampled(trajectory, engine)


def summarize(messages):
    return messages if len(messages) < 5 else [{"role": "user", "content": "2+2? You tried twice."}]


def test_a_function_rewrites_the_history():
    turns = ["```python\nprint(1)\n```", "```python\nprint(2)\n```", "The answer is \\boxed{4}."]
    engine = ScriptedEngine(turns, byte_tokenizer("qwen2_5"))
    config = RolloutConfig(num_generations=1, dialect="fenced", rewrite_history=summarize)
    (trajectory,) = generate_trajectories(PROMPTS, engine, [python], config, progress=False)
    assert len(trajectory.segments) == 2 and len(trajectory.completion) == 5
    assert engine.calls[2].prompt_text.count("user") == 1 and "tried twice" in engine.calls[2].prompt_text
    assert_trained_is_sampled(trajectory, engine)


def test_a_journal_keeps_segments(tmp_path):
    turns = ["```python\nprint(1)\n```", "```python\nprint(2)\n```", "The answer is \\boxed{4}."]
    config = RolloutConfig(num_generations=1, dialect="fenced", rewrite_history=f"{__name__}.summarize")
    found = []
    for script in (turns, []):  # the second run samples nothing
        engine = ScriptedEngine(script, byte_tokenizer("qwen2_5"))
        with Journal(tmp_path) as journal:
            found += generate_trajectories(PROMPTS, engine, [python], config, journal=journal, progress=False)
    assert found[0].branches and found[0] == found[1]


@pytest.mark.parametrize(
    ("function", "error"), [(lambda messages: None, TypeError), ("no.such.path", ValueError), (7, TypeError)]
)
def test_a_function_that_returns_no_messages_is_the_users_mistake(function, error):
    with pytest.raises(error, match="rewrite_history"):
        roll_out("qwen2_5", rewrite_history=function)
