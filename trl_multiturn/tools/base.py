"""What a policy may call: the values of a call, the schema of a callable, and the rollout a call belongs to.

Three kinds of tool, the first two exactly as [`~trl.GRPOTrainer`] takes them:

- a plain function, synchronous or asynchronous, with type hints and a Google-style docstring;
- an environment (`environment_factory`): an object per trajectory whose public methods are tools;
- a *session tool* such as [`PythonTool`]: an object with a `name`, a JSON `schema` and `open()`, which gives each
  trajectory a session of its own.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class ToolCall:
    """One call that the policy asked for.

    Attributes:
        name (`str`): the tool, as the policy spelled it.
        arguments: the arguments, a `dict` unless the policy wrote something else.
        id (`str`, *optional*): the call's id in templates that print one.
    """

    name: str
    arguments: Any
    id: str | None = None


@runtime_checkable
class ToolSession(Protocol):
    """A trajectory's own instance of a session tool.

    One that is at home on an event loop offers [`RunsAsync`] and [`ClosesAsync`] besides: then these are awaited,
    where `run` and `close` are called in a thread.
    """

    def run(self, **arguments: Any) -> Any:
        """Answers one call with a [`ToolResult`] or with text; raises [`ToolFailure`] where the machine failed."""
        ...

    def close(self) -> None:
        """Ends the session and frees what it holds."""
        ...


@runtime_checkable
class RunsAsync(Protocol):
    """A session whose calls are awaited."""

    async def arun(self, **arguments: Any) -> Any:
        """[`ToolSession.run`] for event loops."""
        ...


@runtime_checkable
class ClosesAsync(Protocol):
    """A session whose end is awaited."""

    async def aclose(self) -> None:
        """[`ToolSession.close`] for event loops."""
        ...


@runtime_checkable
class SessionTool(Protocol):
    """A tool that keeps state within a trajectory, and never across; [`OpensAsync`] is optional."""

    name: str
    schema: dict[str, Any]

    def open(self) -> ToolSession:
        """A new session."""
        ...


@runtime_checkable
class OpensAsync(Protocol):
    """A session tool whose opening is awaited."""

    async def aopen(self) -> ToolSession:
        """[`SessionTool.open`] for event loops."""
        ...


@dataclass(frozen=True)
class RolloutContext:
    """Which rollout a tool call belongs to; a tool reads it with [`current_rollout`].

    Attributes:
        trajectory_id (`str`): unique within a run.
        iteration (`int`), policy (`str`): of the online loop (`"current"` or `"previous"`).
        prompt_index (`int`), sample_index (`int`): which row of the prompts, and which sample of it.
        seed (`int`): the trajectory's own seed, for tools that draw random numbers.
        row (`Mapping`): the row of the prompts, all columns.
    """

    trajectory_id: str
    iteration: int
    policy: str
    prompt_index: int
    sample_index: int
    seed: int
    row: Mapping[str, Any]


_ROLLOUT: ContextVar[RolloutContext] = ContextVar("trl_multiturn_rollout")


def current_rollout() -> RolloutContext:
    """The rollout that is calling this tool (in the tool's own thread or task).

    Raises:
        `LookupError`: outside a rollout.
    """
    try:
        return _ROLLOUT.get()
    except LookupError:
        raise LookupError(
            "`current_rollout()` was called outside a rollout, so there is no trajectory to name. Call it inside a "
            "tool or an environment that the rollout loop runs."
        ) from None


def rollout_or_none() -> RolloutContext | None:
    """The current rollout, or `None` outside one."""
    return _ROLLOUT.get(None)


def enter_rollout(context: RolloutContext) -> None:
    """Makes `context` the current rollout of the running task and of what it starts."""
    _ROLLOUT.set(context)


def is_session_tool(tool: Any) -> bool:
    """Whether `tool` opens a session per trajectory (rather than being a plain callable)."""
    return not inspect.isroutine(tool) and isinstance(tool, SessionTool)


def tool_name(tool: Any) -> str:
    """The name by which the policy calls `tool`."""
    return tool.name if is_session_tool(tool) else tool.__name__


def tool_schema(tool: Any) -> dict[str, Any]:
    """The JSON schema that the chat template shows to the policy.

    Raises:
        `TypeError`: if `tool` is neither a callable with a name nor a session tool.
        `ValueError`: if a callable's type hints or docstring do not give a schema.
    """
    if is_session_tool(tool):
        return tool.schema
    if not callable(tool) or not hasattr(tool, "__name__"):
        raise TypeError(
            f"Tool {tool!r} is neither a named callable nor a session tool, so the policy has no name to call it by. "
            "Pass a function (wrap a `functools.partial` in one) or an object with `name`, `schema` and `open()`."
        )
    from transformers.utils import get_json_schema  # late: a process that only plays an environment needs it not

    try:
        return get_json_schema(tool)
    except Exception as error:
        raise ValueError(
            f"Tool `{tool.__name__}` has no usable JSON schema: {error}. Give every argument a type hint and a line "
            "in a Google-style `Args:` section of the docstring."
        ) from error


def tool_version(tool: Any) -> str:
    """What identifies a tool's behavior in provenance: its `version`, or a hash of its source."""
    version = getattr(tool, "version", None)
    if version is not None:
        return str(version)
    tool = getattr(tool, "__func__", tool)  # of a bound method
    defined: Any = tool if inspect.isroutine(tool) or inspect.isclass(tool) else type(tool)
    return _source_version(defined)


@lru_cache(maxsize=256)
def _source_version(defined: Any) -> str:
    """Of the source as it was when first asked for: the file may be edited while a run goes on."""
    try:
        source = inspect.getsource(defined)
    except (OSError, TypeError):
        return "unknown"
    return "source:" + hashlib.sha256(source.encode()).hexdigest()[:12]
