"""`RolloutConfig.tool_parser`: functions of the user's own; what cannot read calls is refused by name."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from trl import TrlParser

from tests.rollout.test_dialects import PYTHON
from tests.support import byte_tokenizer, user
from trl_multiturn import RolloutConfig, ScriptedEngine, StopReason, generate_trajectories
from trl_multiturn.rollout.dialects import choose_dialect


def read_hermes(text, tools):
    """Calls of the Hermes kind; a second pair of eyes on what the package reads itself."""
    found = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    return [json.loads(call) for call in found]  # JSON's errors are `ValueError`s


def read_message(text, tools):
    calls = [{"type": "function", "function": call} for call in read_hermes(text, tools)]
    return {"role": "assistant", "content": text.partition("<tool_call>")[0].strip(), "tool_calls": calls}


def read_nothing(text, tools):
    return []


def read_number(text, tools):
    return 3


def stripping(text, tools):
    calls = read_hermes(text, tools)
    return [{**call, "arguments": {k: str(v).strip() for k, v in call["arguments"].items()}} for call in calls]


def double(number: int) -> int:
    """
    Doubles.

    Args:
        number: What to double.
    """
    return 2 * number


HERE = __name__
TOKENIZER = byte_tokenizer("qwen2_5")
CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call>'


@pytest.mark.parametrize("parser", [read_hermes, read_message, f"{HERE}.read_hermes"])
def test_a_function_of_the_users_own_reads_the_calls(parser):
    config = RolloutConfig(tool_parser=parser, num_generations=1)
    engine = ScriptedEngine([CALL, "<tool_call>{</tool_call>", "It is 8."], TOKENIZER)
    (trajectory,) = generate_trajectories([{"prompt": [user("2·4?")]}], engine, [double], config, progress=False)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert [message["content"] for message in trajectory.completion[1:]] == [
        "8",
        "<tool_call>{</tool_call>",
        "{'error': 'The tool call could not be read.'}",
        "It is 8.",
    ]


def test_the_command_line_takes_a_dotted_path_and_the_journal_keeps_it():
    (config,) = TrlParser(RolloutConfig).parse_args_and_config(["--tool_parser", f"{HERE}.read_hermes"])
    assert config.sampler_settings()["tool_parser"].startswith(f"{HERE}.read_hermes source:")
    assert "tool_parser" not in RolloutConfig().sampler_settings()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tool_parser": 3}, TypeError, "`tool_parser=3` is a int, not a function"),
        ({"tool_parser": "no.such.parser"}, ValueError, "could not be loaded"),
        ({"tool_parser": lambda text: []}, TypeError, "does not take the two arguments `text` and `tools`"),
        ({"tool_parser": read_hermes, "dialect": "fenced"}, ValueError, "`dialect='fenced'` has none"),
    ],
)
def test_what_is_no_parser_is_refused_with_the_configuration(settings, error, message):
    with pytest.raises(error, match=message):
        RolloutConfig(**settings)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_parser_of_vllm_needs_vllm():
    with pytest.raises(ValueError, match="`tool_parser='hermes'` names a parser of vLLM, which is not installed"):
        RolloutConfig(tool_parser="hermes")


@pytest.mark.parametrize("parser", [read_nothing, read_number])
def test_a_parser_that_does_not_read_what_the_template_prints_is_refused(parser):
    with pytest.raises(ValueError, match="does not read a tool call as the chat template prints it"):
        choose_dialect("native", TOKENIZER, [PYTHON], RolloutConfig(tool_parser=parser))


def test_a_template_without_calls_has_no_use_for_a_parser():
    silent = byte_tokenizer("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    with pytest.raises(ValueError, match="leaves out tool calls"):
        choose_dialect("auto", silent, [PYTHON], RolloutConfig(tool_parser=read_hermes))


def test_a_parser_that_changes_text_is_told(caplog):
    choose_dialect("native", TOKENIZER, [PYTHON], RolloutConfig(tool_parser=stripping))
    assert "changes text arguments on the way to the tool (code)" in caplog.text
