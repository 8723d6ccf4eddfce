"""Tools by name, for a command line."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from ..tools.base import is_session_tool
from ..tools.python_tool import PythonTool


def load_tools(names: Sequence[str]) -> list[Any]:
    """
    The tools that `--tools` names.

    Args:
        names (`Sequence[str]`):
            `python`, or dotted paths of functions, tools, or classes whose constructor needs no arguments.

    Raises:
        `ValueError`: if a name is no dotted path, leads nowhere, or leads to what is no tool.
    """
    return [PythonTool() if name == "python" else _load(name) for name in names]


def _load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        if not module:
            raise ValueError("it has no module")
        found = getattr(importlib.import_module(module), attribute)
        tool = found() if inspect.isclass(found) else found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`--tools {name}` could not be loaded ({error}). Use `python`, or the dotted path of a function, of a "
            "tool, or of a class whose constructor needs no arguments; the folder of a module of your own has to be "
            "on `PYTHONPATH`."
        ) from error
    if not callable(tool) and not is_session_tool(tool):
        raise ValueError(
            f"`--tools {name}` is a {type(tool).__name__}, which can neither be called nor opened for a trajectory. "
            "Name a function with annotations and a docstring, as GRPOTrainer takes, or a session tool."
        )
    return tool
