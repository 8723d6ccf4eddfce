r"""Worked examples that use the Python interpreter, in the words of the dialect that the policy is to speak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..rollout.config import RolloutConfig
from ..rollout.dialects.choice import choose_dialect
from ..tools.base import tool_schema


Message = dict[str, Any]

# question, program, what it prints, answer
EXAMPLES = (
    (
        "A baker sells 12 rolls at 3 dollars each and gives 5 dollars back. How many dollars does the baker keep?",
        "earned = 12 * 3\nearned - 5",
        "31",
        "The answer is \\boxed{31}.",
    ),
    (
        "A train leaves with 48 people. At the first stop half of them get off and 9 get on. How many are on it now?",
        "people = 48\npeople = people - people // 2 + 9\npeople",
        "33",
        "The answer is \\boxed{33}.",
    ),
    (
        "What is the sum of all odd numbers below 20?",
        "sum(n for n in range(20) if n % 2)",
        "100",
        "The answer is \\boxed{100}.",
    ),
)


def python_shots(
    count: int, config: RolloutConfig, processing_class: Any, tools: Sequence[Any]
) -> list[list[Message]]:
    """
    The first `count` worked examples, as conversations.

    Args:
        count (`int`):
            How many, at most three.
        config ([`RolloutConfig`]):
            Its dialect decides how the program and its output are written.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        tools (`list`):
            What the policy may call: [`PythonTool`] alone.

    Raises:
        `ValueError`: if there are not so many, or the tools are others.
    """
    names = [tool_schema(tool)["function"]["name"] for tool in tools]
    if names != ["python"] or not 0 <= count <= len(EXAMPLES):
        raise ValueError(
            f"`--num_shots {count}` asks for worked examples of {', '.join(names) or 'no tool'}; there are "
            f"{len(EXAMPLES)}, of the Python interpreter. Give your own: `--shots_name FILE`, a file of `messages`."
        )
    dialect = choose_dialect(config.dialect, processing_class, [tool_schema(tool) for tool in tools], config)
    if dialect.name not in ("fenced", "native", "hermes"):
        raise ValueError(
            f"There are no worked examples in the dialect {dialect.name!r}. Give your own: `--shots_name FILE`."
        )
    write = _fenced if dialect.name == "fenced" else _native
    return [write(*example) for example in EXAMPLES[:count]]


def _fenced(question: str, code: str, output: str, answer: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"```python\n{code}\n```"},
        {"role": "user", "content": f"```output\n{output}\n```"},
        {"role": "assistant", "content": answer},
    ]


def _native(question: str, code: str, output: str, answer: str) -> list[Message]:
    function = {"name": "python", "arguments": {"code": code}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "python", "content": output},
        {"role": "assistant", "content": answer},
    ]
