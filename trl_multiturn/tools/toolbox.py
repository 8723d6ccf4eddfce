"""Running the policy's calls: validated once for a run, opened once per trajectory.

Failures are told apart. A tool that cannot be offered raises in [`Toolset`]'s constructor. A call that names no tool,
has wrong arguments, or makes the tool raise or run out of time is the policy's doing: it gets an answer that says so.
A [`ToolFailure`] is the machine's: the call is tried again, and then the exception leaves the toolbox, so that the
trajectory ends without becoming evidence.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..concurrency import run_in_thread
from ..errors import ToolFailure, UnsupportedOutput as UnsupportedOutput
from ..messages.images import as_blocks, is_image_part, portable, read_image_part
from ..sandbox.result import ToolResult, encodable
from .base import (
    ClosesAsync,
    OpensAsync,
    RunsAsync,
    SessionTool,
    ToolCall,
    ToolSession,
    is_session_tool,
    tool_name,
    tool_schema,
    tool_version,
)
from .environments import Environment, EnvironmentLost, EnvironmentSet, EnvironmentType


logger = logging.getLogger(__name__)

_RETRY_PAUSE_SECONDS = 0.1


@dataclass
class ToolLimits:
    """Limits that all trajectories of a run share.

    Args:
        timeout_seconds (`float`, *optional*):
            Longest wait for an environment's method, or for a function that has no attribute `timeout_seconds` of its
            own. Session tools keep their own clock, which does not run while a call queues for a core.
        retries (`int`, *optional*, defaults to `2`):
            How often a call is tried again after a [`ToolFailure`].
        max_concurrent (`int`, *optional*, defaults to `64`):
            Calls that run at the same time.
    """

    timeout_seconds: float | None = 30.0
    retries: int = 2
    max_concurrent: int = 64
    slots: asyncio.Semaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.max_concurrent)


class Toolset:
    """The tools of a run.

    Args:
        tools (`list`, *optional*):
            Functions and session tools.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            As in [`~trl.GRPOTrainer`]; a dictionary is chosen from by the rows' `environment` column.

    Raises:
        `TypeError`, `ValueError`: if a tool has no name or schema, or two tools share a name.
    """

    def __init__(
        self,
        tools: Sequence[Any] | None = None,
        environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
    ):
        if tools is not None and (callable(tools) or is_session_tool(tools)):
            raise TypeError(f"`tools` is a single tool ({tools!r}). Pass a list: `tools=[...]`.")
        if tools is not None and (isinstance(tools, (str, dict)) or not isinstance(tools, Iterable)):
            raise TypeError(f"`tools` is a {type(tools).__name__}. Pass a list of tools: `tools=[...]`.")
        tools = list(tools or [])
        self._schemas = [tool_schema(tool) for tool in tools]
        self.sessions: dict[str, SessionTool] = {tool_name(t): t for t in tools if is_session_tool(t)}
        self.functions: dict[str, Callable[..., Any]] = {tool_name(t): t for t in tools if not is_session_tool(t)}
        self.environments = EnvironmentSet(environment_factory)
        names = [tool_name(tool) for tool in tools]
        for kind in self.environments.types.values():
            _refuse_duplicates(names + kind.tool_names)
        _refuse_duplicates(names)

    @property
    def has_interpreter(self) -> bool:
        """Whether the policy writes programs: a tool is called `python`, or takes `code`."""
        functions = [schema["function"] for schema in self._schemas]
        return any(
            function["name"] == "python" or "code" in function.get("parameters", {}).get("properties", {})
            for function in functions
        )

    def schemas(self, environment: EnvironmentType | None = None) -> list[dict[str, Any]]:
        """JSON schemas of what a trajectory in `environment` may call."""
        return self._schemas + (environment.schemas if environment is not None else [])

    def versions(self) -> dict[str, str]:
        """Name to version of every tool and environment, for provenance."""
        versions = {name: tool_version(tool) for name, tool in {**self.sessions, **self.functions}.items()}
        for name, function in self.functions.items():
            if (limit := _own_limit(function)) is not None:
                versions[name] += f", {limit:g} s"
        versions.update({kind.name: kind.version for kind in self.environments.types.values()})
        return versions

    def close(self) -> None:
        """Closes the environments that the run made; the toolset may be used again."""
        self.environments.close()

    def open(self, row: Mapping[str, Any], limits: ToolLimits) -> Toolbox:
        """The tools of one trajectory, to be closed by `await toolbox.close()`."""
        kind = self.environments.for_row(row)
        return Toolbox(self, kind, self.environments.reset_arguments(row), limits)


class Toolbox:
    """One trajectory's tools: its own sessions, its own environment. Made by [`Toolset.open`].

    Sessions and the environment start when they are first needed.
    """

    def __init__(self, toolset: Toolset, kind: EnvironmentType | None, row: Mapping[str, Any], limits: ToolLimits):
        self._toolset = toolset
        self._kind = kind
        self._row = row
        self._limits = limits
        self._sessions: dict[str, ToolSession] = {}
        self._runs: dict[str, Callable[..., Awaitable[Any]]] = {}  # of the sessions that are open
        # Calls that may depend on earlier ones of the same session, or of the environment
        self._lanes: dict[str, Any] = {name: name for name in toolset.sessions}
        self._lanes |= dict.fromkeys(kind.tool_names if kind is not None else (), kind)
        self._environment: Environment | None = None
        self._schemas = {schema["function"]["name"]: schema for schema in toolset.schemas(kind)}

    @property
    def done(self) -> bool:
        """Whether the environment ended the episode."""
        return self._environment is not None and self._environment.done

    def keeps_state(self, name: str) -> bool:
        """Whether calls of `name` may depend on earlier ones: those of a session or of the environment."""
        return name in self._lanes

    async def reset(self) -> str | list[dict[str, Any]] | None:
        """Starts the environment, if there is one; returns its first observation.

        Raises:
            [`ToolFailure`]: if the environment did not start.
        """
        kind = self._kind
        if kind is None:
            return None

        async def start() -> Any:
            await self._leave_environment()  # of an attempt that failed
            self._environment = environment = kind.make()
            await environment.open()  # by its own clock: it may have to wait for other trajectories
            return await self._in_environment("reset", lambda: environment.reset(self._row))

        observation = await self._attempt(kind.name, start)
        return encodable(observation) if isinstance(observation, str) else observation

    async def reward(self) -> float | None:
        """The environment's own reward; `None` without one."""
        if self._environment is None or self._kind is None:
            return None
        reward = self._environment.reward
        return await self._attempt(self._kind.name, lambda: self._in_environment("get_reward", reward))

    async def call(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Runs the calls of one turn and answers in their order.

        Plain functions run at the same time. Calls to one session, or to the environment, run one after the other in
        the order of the turn, for each may depend on what the one before it did.

        Raises:
            [`ToolFailure`]: where the machine failed, also when tried again.
        """
        results: dict[int, ToolResult] = {}
        lanes: dict[Any, list[int]] = {}
        for index, call in enumerate(calls):
            lanes.setdefault(self._lanes.get(call.name, index), []).append(index)

        async def run_lane(indices: list[int]) -> None:
            for index in indices:
                results[index] = await self._answer(calls[index])

        outcomes = await asyncio.gather(*map(run_lane, lanes.values()), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [results[index] for index in range(len(calls))]

    async def close(self) -> None:
        """Ends the sessions and gives the environment back.

        A session that fails to end is logged, for the trajectory is finished anyway.
        """
        sessions, self._sessions, self._runs = self._sessions, {}, {}
        for name, session in sessions.items():
            try:
                if isinstance(session, ClosesAsync):
                    await session.aclose()
                else:
                    await run_in_thread(session.close)
            except Exception:
                logger.warning("A session of tool `%s` did not close cleanly.", name, exc_info=True)
        await self._leave_environment()

    async def _leave_environment(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None:
            await environment.close()

    async def _answer(self, call: ToolCall) -> ToolResult:
        if call.name not in self._schemas:
            return _error(f"Tool {call.name} not found.")
        try:
            arguments = parse_arguments(call.arguments, self._schemas[call.name])
        except ValueError as error:
            return _error(str(error))
        async with self._limits.slots:
            start = time.monotonic()
            try:
                output = await self._attempt(call.name, lambda: self._invoke(call.name, arguments))
            except _OutOfTime as error:
                return ToolResult(f"Timed out after {error.seconds:g} seconds.", "timeout", time.monotonic() - start)
            except (ToolFailure, UnsupportedOutput):
                raise
            except Exception as error:
                return _error(str(error), time.monotonic() - start)
            return output if isinstance(output, ToolResult) else ToolResult(output, "ok", time.monotonic() - start)

    async def _invoke(self, name: str, arguments: dict[str, Any]) -> ToolResult | str:
        if name in self._toolset.sessions:
            run = self._runs.get(name) or await self._open(name)
            return _text(await run(**arguments))
        environment = self._environment
        if environment is not None and name in environment.kind.tool_names:
            return _text(await self._in_environment(name, lambda: environment.call(name, arguments)))
        function = self._toolset.functions[name]
        return _text(await self._clocked(lambda: _call(function, arguments), _own_limit(function)))

    async def _open(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Opens the session of a tool; what runs its calls."""
        tool = self._toolset.sessions[name]
        session = await tool.aopen() if isinstance(tool, OpensAsync) else await run_in_thread(tool.open)
        self._sessions[name] = session
        self._runs[name] = session.arun if isinstance(session, RunsAsync) else partial(run_in_thread, session.run)
        return self._runs[name]

    async def _in_environment(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return await self._clocked(call)
        except _OutOfTime as error:
            raise EnvironmentLost(
                f"The environment's `{name}` did not answer within {error.seconds:g} seconds."
            ) from error

    async def _clocked(self, call: Callable[[], Any], own_limit: float | None = None) -> Any:
        """Awaits `call()` within the time limit; [`_OutOfTime`] is ours, a `TimeoutError` the tool's own."""
        seconds = self._limits.timeout_seconds if own_limit is None else own_limit
        try:
            async with asyncio.timeout(seconds) as clock:
                return await call()
        except TimeoutError as error:
            if seconds is not None and clock.expired():
                raise _OutOfTime(seconds) from error
            raise

    async def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """Awaits `call()`, again after each [`ToolFailure`] until the retries are used up."""
        for attempt in range(self._limits.retries + 1):
            try:
                return await call()
            except ToolFailure as failure:
                if attempt == self._limits.retries or isinstance(failure, EnvironmentLost):
                    raise
                logger.warning("Tool `%s` failed and is tried again: %s", name, failure)
                await asyncio.sleep(_RETRY_PAUSE_SECONDS * 2**attempt)


class _OutOfTime(Exception):
    """The time limit of this toolbox, or of the tool, passed."""

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


def parse_arguments(arguments: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's arguments as keywords.

    Raises:
        `ValueError`: saying to the policy what is wrong with them.
    """
    if isinstance(arguments, str):  # some templates carry arguments as JSON text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:  # the other: brackets in brackets
            raise ValueError(f"The arguments are not valid JSON: {error}.") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"The arguments must be an object of names and values, got {type(arguments).__name__}.")
    parameters = schema.get("function", schema).get("parameters", {})
    known = parameters.get("properties", {})
    missing = [name for name in parameters.get("required", []) if name not in arguments]
    unknown = [name for name in arguments if name not in known]
    if missing:
        raise ValueError(f"Missing argument(s): {', '.join(missing)}.")
    if unknown:
        expected = ", ".join(known) or "none"
        raise ValueError(f"Unknown argument(s): {', '.join(map(str, unknown))}. Expected: {expected}.")
    return arguments


def _own_limit(function: Callable[..., Any]) -> float | None:
    """A tool's own time limit, set as an attribute of the function."""
    return getattr(function, "timeout_seconds", None)


async def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    if not inspect.iscoroutinefunction(function):
        return await run_in_thread(function, **arguments)
    try:
        return await function(**arguments)
    except SystemExit as stop:  # a tool that ends its own call must not end the program
        raise RuntimeError(f"SystemExit: {stop}") from stop


def _text(output: Any) -> ToolResult | str:
    """What the policy reads of a tool's return value."""
    if isinstance(output, ToolResult):
        return output if output.output.isascii() else replace(output, output=encodable(output.output))
    if isinstance(output, str):
        return encodable(output)
    output = as_blocks(output)
    if isinstance(output, list) and output and all(isinstance(block, dict) and "type" in block for block in output):
        return _blocks(output)
    return _text(str(output))


def _blocks(blocks: Sequence[dict[str, Any]]) -> ToolResult | str:
    """Blocks of text and images, as messages hold them."""
    kinds = {block["type"] for block in blocks if not is_image_part(block)}
    if kinds - {"text"}:
        raise UnsupportedOutput(
            f"The tool returned blocks of types {sorted(kinds)}, but rollouts carry text and images alone. Return "
            "these."
        )
    text = encodable("".join(block["text"] for block in blocks if block["type"] == "text"))
    try:
        images = [read_image_part(block, "A tool's result") for block in blocks if is_image_part(block)]
        if any("image" not in image for image in images):
            raise ValueError("a block of the type 'image' has no image in it")
        urls = tuple(portable(image["image"]) for image in images)
    except ValueError as error:
        raise UnsupportedOutput(f"The tool returned an image that cannot be read: {error}") from error
    return ToolResult(text, images=urls) if urls else text


def _error(message: str, seconds: float = 0.0) -> ToolResult:
    """An error as [`~trl.GRPOTrainer`] words it, so that a policy reads the same under both."""
    return ToolResult(str({"error": message}), "error", seconds)


def _refuse_duplicates(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several tools are called {', '.join(map(repr, twice))}, so a call could not be told apart. Rename one."
        )
