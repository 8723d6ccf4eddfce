"""The Python interpreter behind the tools. It imports nothing else of this package.

What runs in the trainer's process lies here, what runs behind the walls (or builds them) in `inside`. One cell passes
as a `Reply` from its interpreter to its session, which makes a `ToolResult` of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .backend import Backend as Backend, Begun as Begun, Interpreter as Interpreter, Reply as Reply
    from .config import SandboxConfig as SandboxConfig
    from .result import IsolationError as IsolationError, ToolFailure as ToolFailure, ToolResult as ToolResult
    from .sandbox import Sandbox as Sandbox
    from .session import Session as Session
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".backend": ["Backend", "Begun", "Interpreter", "Reply"],
            ".config": ["SandboxConfig"],
            ".result": ["IsolationError", "ToolFailure", "ToolResult"],
            ".sandbox": ["Sandbox"],
            ".session": ["Session"],
        },
    )
