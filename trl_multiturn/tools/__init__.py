"""What the policy may call. Names load on first use: describing a tool needs no interpreter."""

from __future__ import annotations

import importlib
from typing import Any


_MODULES = {
    "base": ["RolloutContext", "SessionTool", "ToolCall", "ToolSession", "current_rollout"],
    "environments": ["EnvironmentType"],
    "python_tool": ["PythonTool"],
    "result": ["ToolFailure", "ToolResult"],
    "sandbox": ["Sandbox", "SandboxConfig"],
    "textworld": ["TextWorldEnvironment", "make_games"],
    "toolbox": ["Toolbox", "ToolLimits", "Toolset"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
