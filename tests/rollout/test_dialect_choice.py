"""Dialects of the user's own: by dotted path, as a class, a factory or an object; what is none is named."""

from __future__ import annotations

import pytest
from trl import TrlParser

from tests.rollout.test_dialects import PYTHON
from tests.support import byte_tokenizer, user
from trl_multiturn import RolloutConfig, ScriptedEngine, ToolResult, generate_trajectories
from trl_multiturn.rollout.dialects import FencedDialect, Turn, choose_dialect
from trl_multiturn.tools import ToolCall


class LoudDialect:
    """Every turn in capitals is an answer; every other one is a call of the one tool."""

    name = "loud"
    stop_strings = ()
    template_tools = None

    def __init__(self, processing_class, schemas, config):
        self.tool = schemas[0]["function"]["name"]
        self.mark = config.answer_pattern

    def read(self, text, sampled_ids, prefix_ids):
        message = {"role": "assistant", "content": text}
        answered = text.isupper()
        return Turn(message, [] if answered else [ToolCall(self.tool, {"text": text})], answered)

    def observe(self, turn, results):
        return [user("; ".join(result.output for result in results))]


class FencedWithoutBackticks(FencedDialect):
    name = "spoken"

    def observe(self, turn, results):
        return [user(result.output) for result in results]


def echo(text: str) -> str:
    """
    Repeats.

    Args:
        text: What to repeat.
    """
    return f"You said {text}."


def loud(processing_class, schemas, config):
    return LoudDialect(processing_class, schemas, config)


TOKENIZER = byte_tokenizer("qwen2_5")
SCHEMA = {"type": "function", "function": {"name": "echo", "parameters": {}}}
HERE = __name__


@pytest.mark.parametrize(
    "dialect", [f"{HERE}.LoudDialect", LoudDialect, loud, LoudDialect(None, [SCHEMA], RolloutConfig())]
)
def test_a_dialect_of_the_users_own_leads_the_rollout(dialect):
    config = RolloutConfig(dialect=dialect, num_generations=1)
    engine = ScriptedEngine(["hello", "BYE"], TOKENIZER)
    (trajectory,) = generate_trajectories([{"prompt": [user("Talk.")]}], engine, [echo], config, progress=False)
    contents = [message["content"] for message in trajectory.completion]
    assert contents == ["hello", "You said hello.", "BYE"]
    assert trajectory.info["dialect"] == "loud"


def test_a_dialect_that_inherits_from_one_of_ours_needs_no_constructor():
    dialect = choose_dialect(FencedWithoutBackticks, TOKENIZER, [PYTHON], RolloutConfig(answer_pattern="Done"))
    turn = dialect.read("```python\nprint(1)\n```", [], [])
    assert turn.calls == [ToolCall("python", {"code": "print(1)\n"})]
    assert dialect.observe(turn, [ToolResult("1")]) == [user("1")]
    assert dialect.read("Done", [], []).answered


def test_the_command_line_takes_a_dotted_path():
    (config,) = TrlParser(RolloutConfig).parse_args_and_config(["--dialect", f"{HERE}.LoudDialect"])
    assert config.dialect == f"{HERE}.LoudDialect"


def test_the_journal_keeps_where_a_dialect_comes_from_and_its_version():
    assert RolloutConfig(dialect="fenced").sampler_settings()["dialect"] == "fenced"
    by_path, by_class = (RolloutConfig(dialect=d).sampler_settings()["dialect"] for d in (f"{HERE}.loud", LoudDialect))
    assert by_path.startswith(f"{HERE}.loud source:") and by_class.startswith(f"{HERE}.LoudDialect source:")


@pytest.mark.parametrize(
    ("dialect", "error", "message"),
    [
        (3, TypeError, "`dialect=3` is a int, which can neither read"),
        ("fencd", ValueError, "`dialect='fencd'` is unknown. Use one of 'auto', 'native', 'hermes', 'fenced'"),
        ("no.such.Dialect", ValueError, "could not be loaded"),
        (f"{HERE}.NoSuchDialect", ValueError, "could not be loaded"),
        (lambda: None, TypeError, "three arguments `processing_class`, `schemas` and `config`"),
        (object(), TypeError, "which can neither read"),
    ],
)
def test_what_is_no_dialect_is_refused_with_the_configuration(dialect, error, message):
    with pytest.raises(error, match=message):
        RolloutConfig(dialect=dialect)


def test_a_factory_that_makes_no_dialect_is_refused_before_the_first_rollout():
    engine = ScriptedEngine([], TOKENIZER)
    config = RolloutConfig(dialect=lambda processing_class, schemas, config: 3)
    with pytest.raises(TypeError, match="made a int, which lacks name, stop_strings, template_tools, read, observe"):
        generate_trajectories([{"prompt": [user("Talk.")]}], engine, [echo], config, progress=False)
