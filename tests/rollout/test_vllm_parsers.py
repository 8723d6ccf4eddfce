"""Parsers of vLLM's registry by name, on the real vLLM (`-m vllm`)."""

from __future__ import annotations

import importlib.util

import pytest

from tests.rollout.test_calls import read_with
from tests.rollout.test_dialects import PYTHON
from tests.support import byte_tokenizer
from trl_multiturn import RolloutConfig
from trl_multiturn.rollout.dialects import choose_dialect


HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed in this environment")]


def dialect(parser, family="qwen2_5"):
    return choose_dialect("native", byte_tokenizer(family), [PYTHON], RolloutConfig(tool_parser=parser))


def test_a_parser_of_vllm_reads_the_calls():
    turn = read_with(
        dialect("hermes"),
        "qwen2_5",
        'I see.\n<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>',
    )
    assert [(call.name, call.arguments) for call in turn.calls] == [("python", {"code": "1"})]
    assert turn.message["content"].strip() == "I see."


def test_a_call_that_it_cannot_read_is_a_problem_that_the_policy_reads():
    turn = read_with(dialect("hermes"), "qwen2_5", '<tool_call>\n{"name": "python", "argu</tool_call>')
    assert turn.calls == [] and turn.problem == "{'error': 'The tool call could not be read.'}"


def test_a_parser_of_another_family_is_refused():
    with pytest.raises(ValueError, match="`tool_parser='mistral'` does not read a tool call"):
        dialect("mistral")


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="`tool_parser='hermess'` is not in the registry .* hermes, "):
        RolloutConfig(tool_parser="hermess")
