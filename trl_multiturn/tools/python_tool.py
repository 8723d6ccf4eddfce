"""The Python interpreter as a tool that a policy may call."""

from __future__ import annotations

from typing import Any

from ..sandbox.sandbox import Sandbox, SandboxConfig, Session
from ..version import __version__


_DESCRIPTION = (
    "Runs Python code in a stateful interpreter, like the cells of one notebook, and returns what it prints and the "
    "value of its last expression, or the error message."
)


class PythonTool:
    """A Python interpreter with one isolated session per trajectory.

    Constructing it starts nothing; the first [`PythonTool.open`] does. It can be pickled: the copy has the same
    configuration and an interpreter of its own.

    Args:
        config ([`SandboxConfig`], *optional*):
            Limits and isolation of the sandbox that the tool owns.
        sandbox ([`Sandbox`], *optional*):
            A sandbox to share with others instead; closing the tool leaves it open.
    """

    name = "python"
    description = _DESCRIPTION

    def __init__(self, config: SandboxConfig | None = None, sandbox: Sandbox | None = None) -> None:
        if config is not None and sandbox is not None:
            raise ValueError("Both `config` and `sandbox` are given, but a sandbox has its own config. Give one.")
        self._owns_sandbox = sandbox is None
        self.sandbox = Sandbox(config) if sandbox is None else sandbox

    @property
    def config(self) -> SandboxConfig:
        """The sandbox's configuration."""
        return self.sandbox.config

    @property
    def schema(self) -> dict[str, Any]:
        """The function's JSON schema, as chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {"code": {"type": "string", "description": "The Python code to run."}},
                    "required": ["code"],
                },
            },
        }

    @property
    def version(self) -> str:
        """What produced an observation, for provenance."""
        return f"python-{__version__}-{self.config.backend}"

    def open(self) -> Session:
        """Opens a session for one trajectory; its process starts with the first cell that needs one."""
        return self.sandbox.open(on_first_use=True)

    async def aopen(self) -> Session:
        """[`PythonTool.open`] for event loops."""
        return await self.sandbox.aopen(on_first_use=True)

    def close(self) -> None:
        """Ends all sessions, unless the sandbox was handed in."""
        if self._owns_sandbox:
            self.sandbox.close()

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
