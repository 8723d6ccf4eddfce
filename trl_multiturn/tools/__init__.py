"""What the policy may call: plain functions, the Python interpreter, environments. Imports the sandbox only.

Names load on first use: describing a tool needs no interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from ..sandbox.config import SandboxConfig as SandboxConfig
    from ..sandbox.result import ToolFailure as ToolFailure, ToolResult as ToolResult
    from ..sandbox.sandbox import Sandbox as Sandbox
    from .alfworld import (
        ALFWorldEnvironment as ALFWorldEnvironment,
        alfworld_games as alfworld_games,
        make_alfworld_games as make_alfworld_games,
    )
    from .base import (
        RolloutContext as RolloutContext,
        SessionTool as SessionTool,
        ToolCall as ToolCall,
        ToolSession as ToolSession,
        current_rollout as current_rollout,
    )
    from .environment_pool import EnvironmentPool as EnvironmentPool
    from .environments import EnvironmentType as EnvironmentType
    from .python_tool import PythonTool as PythonTool
    from .scienceworld import (
        ScienceWorldEnvironment as ScienceWorldEnvironment,
        scienceworld_rows as scienceworld_rows,
    )
    from .textworld import TextWorldEnvironment as TextWorldEnvironment, make_games as make_games
    from .toolbox import Toolbox as Toolbox, ToolLimits as ToolLimits, Toolset as Toolset
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".alfworld": ["ALFWorldEnvironment", "alfworld_games", "make_alfworld_games"],
            ".base": ["RolloutContext", "SessionTool", "ToolCall", "ToolSession", "current_rollout"],
            ".environment_pool": ["EnvironmentPool"],
            ".environments": ["EnvironmentType"],
            ".python_tool": ["PythonTool"],
            ".scienceworld": ["ScienceWorldEnvironment", "scienceworld_rows"],
            ".textworld": ["TextWorldEnvironment", "make_games"],
            ".toolbox": ["Toolbox", "ToolLimits", "Toolset"],
            "..sandbox.config": ["SandboxConfig"],
            "..sandbox.result": ["ToolFailure", "ToolResult"],
            "..sandbox.sandbox": ["Sandbox"],
        },
    )
