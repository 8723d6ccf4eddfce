"""What the policy may call: plain functions, the Python interpreter, environments. Imports the sandbox only.

Names load on first use: describing a tool needs no interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from ..sandbox.config import SandboxConfig as SandboxConfig
    from ..sandbox.result import ToolFailure as ToolFailure
    from ..sandbox.result import ToolResult as ToolResult
    from ..sandbox.sandbox import Sandbox as Sandbox
    from .base import (
        RolloutContext as RolloutContext,
    )
    from .base import (
        SessionTool as SessionTool,
    )
    from .base import (
        ToolCall as ToolCall,
    )
    from .base import (
        ToolSession as ToolSession,
    )
    from .base import (
        current_rollout as current_rollout,
    )
    from .environments import EnvironmentType as EnvironmentType
    from .python_tool import PythonTool as PythonTool
    from .textworld import TextWorldEnvironment as TextWorldEnvironment
    from .textworld import make_games as make_games
    from .toolbox import Toolbox as Toolbox
    from .toolbox import ToolLimits as ToolLimits
    from .toolbox import Toolset as Toolset
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".base": ["RolloutContext", "SessionTool", "ToolCall", "ToolSession", "current_rollout"],
            ".environments": ["EnvironmentType"],
            ".python_tool": ["PythonTool"],
            ".textworld": ["TextWorldEnvironment", "make_games"],
            ".toolbox": ["Toolbox", "ToolLimits", "Toolset"],
            "..sandbox.config": ["SandboxConfig"],
            "..sandbox.result": ["ToolFailure", "ToolResult"],
            "..sandbox.sandbox": ["Sandbox"],
        },
    )
