"""The package's own exceptions: one tree, as the docstring of `errors` draws it, importable where they always were."""

from __future__ import annotations

import importlib
import inspect

import pytest

import trl_multiturn
from trl_multiturn import errors


TREE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", TREE)
def test_every_exception_has_the_common_base_and_a_line_in_the_tree(cls):
    assert issubclass(cls, trl_multiturn.TRLMultiturnError)
    assert f" {cls.__name__}" in errors.__doc__


@pytest.mark.parametrize(
    ("home", "name", "base"),
    [
        ("sandbox.result", "ToolFailure", Exception),
        ("sandbox.result", "IsolationError", errors.ToolFailure),
        ("tools.toolbox", "UnsupportedOutput", TypeError),
        ("engines.transformers.engine", "EngineError", RuntimeError),
        ("journal.journal", "JournalError", RuntimeError),
        ("rollout.loop", "TooManyToolFailures", RuntimeError),
        ("data.truncation", "NoRowsLeftError", ValueError),
    ],
)
def test_exceptions_are_importable_beside_what_raises_them_and_keep_their_builtin_base(home, name, base):
    found = getattr(importlib.import_module(f"trl_multiturn.{home}"), name)
    assert found is getattr(errors, name) and issubclass(found, base)
