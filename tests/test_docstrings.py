"""Examples in docstrings run as they stand, but for those that load a model by name or a run from the disk."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path

import pytest
import torch

import trl_multiturn
from tests.support import TOOLS, assistant, byte_tokenizer, call, result, tiny_model, user
from trl_multiturn import RolloutConfig


ROOT = Path(trl_multiturn.__file__).parent
# What cannot run here: checkpoints by name (and ids of their tokenizers), runs and files of the user's
ABSENT = ("Qwen/", "from_pretrained(", "my-", "outputs/", ".jsonl", "151645")


def blocks() -> list:
    """The fenced blocks with prompts (`>>>`) of all docstrings."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if "inside" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            lines, block = (ast.get_docstring(node) or "").splitlines(), None
            for line in lines:
                if line.strip() == "```python":
                    block = []
                elif line.strip() == "```" and block is not None:
                    text = "\n".join(block) + "\n"
                    if ">>>" in text and not any(word in text for word in ABSENT):
                        name = getattr(node, "name", "module")
                        found.append(pytest.param(path, text, id=f"{path.stem}.{name}"))
                    block = None
                elif block is not None:
                    block.append(line)
    return found


class Layout(doctest.OutputChecker):
    """Compares without blanks and line breaks, in which a docstring may differ from what is printed."""

    def check_output(self, want, got, optionflags):
        return super().check_output("".join(want.split()), "".join(got.split()), optionflags)


def add(a: int, b: int) -> int:
    """
    Adds two integers.

    Args:
        a: First.
        b: Second.
    """
    return a + b


@pytest.fixture(scope="module")
def names():
    """What the examples take for granted."""
    tokenizer = byte_tokenizer("qwen2_5")
    config = RolloutConfig(dialect="fenced", num_generations=1)
    place = {"iteration": 0, "prompt_index": 0, "sample_index": 0}
    values = {"tokenizer": tokenizer, "processing_class": tokenizer, "model": tiny_model(tokenizer), "torch": torch}
    conversation = {"prompt": [user("2+2?")], "completion": [call(2, 2), result("4"), assistant("The sum is 4.")]}
    public = {name: getattr(trl_multiturn, name) for name in trl_multiturn.__all__}
    return {
        **public,
        **values,
        **place,
        **conversation,
        "add": add,
        "config": config,
        "prompts": [{"prompt": [user("6 * 7?")]}],
        "tools": TOOLS,
    }


@pytest.mark.parametrize(("path", "text"), blocks())
def test_the_example_runs_and_shows_what_it_says(path, text, names):
    module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    globs = {**vars(__import__(module, fromlist=["_"])), **names}
    test = doctest.DocTestParser().get_doctest(text, globs, path.stem, str(path), 0)
    runner = doctest.DocTestRunner(Layout(), optionflags=doctest.ELLIPSIS, verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
