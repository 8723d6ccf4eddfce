"""The Python interpreter behind the tools: isolated sessions that behave like the cells of one notebook."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

from ._loop import LoopThread
from .observation import clean, truncate
from .result import ToolResult


logger = logging.getLogger(__name__)

_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()

BACKENDS = ("forkserver", "jupyter")
ISOLATION = ("strict", "best_effort", "none")
_CLOSED = "This session is closed. Open another one from the sandbox."
_LEAST = {
    "timeout_seconds": 0.01,
    "grace_seconds": 0,
    "memory_limit_mb": 1,
    "output_limit_chars": 1,
    "code_limit_chars": 1,
    "scratch_limit_mb": 0,
    "file_limit_mb": 1,
    "max_files": 0,
    "max_cells": 1,
    "cpu_limit_seconds": 1,
    "max_running_cells": 1,
}


@dataclass(frozen=True)
class SandboxConfig:
    """Limits and isolation of a [`Sandbox`]. Picklable; every limit holds per session unless it says otherwise.

    Args:
        backend (`str`, *optional*, defaults to `"forkserver"`):
            `"forkserver"`: confined sessions forked from one warm interpreter (Linux). `"jupyter"`: each session
            is a Jupyter kernel of its own (any kernelspec, any system), slower and less confined.
        isolation (`str`, *optional*, defaults to `"strict"`):
            `"strict"` refuses to start unless every layer is granted by this kernel. `"best_effort"` takes what is
            granted and logs one line about the rest. `"none"` confines nothing but time, memory and output.
        timeout_seconds (`float`, *optional*, defaults to `20.0`):
            Wall-clock limit per cell, counted from its admission to a core (20 s in the M-DPO authors' executor).
        grace_seconds (`float`, *optional*, defaults to `0.5`):
            Time between the interruption of a cell and the kill of its process.
        memory_limit_mb (`int`, *optional*, defaults to `1024`):
            Address space that a session may use on top of the warm interpreter's.
        output_limit_chars (`int`, *optional*, defaults to `4096`):
            Longer outputs keep their head and tail.
        code_limit_chars (`int`, *optional*, defaults to `100_000`):
            Longer cells are refused with an error that the policy reads.
        scratch_limit_mb (`int`, *optional*, defaults to `64`):
            Disk space in the session's folder. 0 makes the folder read-only.
        file_limit_mb (`int`, *optional*, defaults to `16`):
            Size of one file.
        max_files (`int`, *optional*, defaults to `1000`):
            Files and folders in the session's folder.
        max_cells (`int`, *optional*):
            Cells that a session accepts; later ones get an error that the policy reads.
        cpu_limit_seconds (`int`, *optional*, defaults to `600`):
            CPU time of one session process, over all its threads: the backstop when nobody is left to watch the clock.
        max_running_cells (`int`, *optional*):
            Cells that run at the same time, over all sessions of the sandbox. Defaults to the number of cores that
            this process may use.
        preload (`tuple[str, ...]`, *optional*, defaults to `("numpy", "sympy")`):
            Modules imported once, before the sessions are forked. Absent ones are skipped.
        readonly_paths (`tuple[str, ...]`, *optional*):
            Files and folders that sessions may read, beside the interpreter and its libraries.
        network (`bool`, *optional*, defaults to `False`):
            Whether sessions may open internet connections.
        environment (`dict[str, str]`, *optional*):
            Variables to add to the sessions' environment, which is otherwise all but empty.
        include_stderr (`bool`, *optional*, defaults to `False`):
            Whether the observation holds what the cell wrote to standard error (warnings, mostly).
        seed (`int`, *optional*):
            Seeds `random` and `numpy.random` at the start of every session.
        python (`str`, *optional*):
            Interpreter of the sessions (it needs IPython); the running one by default.
        launcher (`tuple[str, ...]`, *optional*):
            Command prefix for the warm interpreter, e.g. `("bwrap", …)`: one more wall around all sessions.
        kernel_name (`str`, *optional*, defaults to `"python3"`):
            Kernelspec of the Jupyter backend.
    """

    backend: str = "forkserver"
    isolation: str = "strict"
    timeout_seconds: float = 20.0
    grace_seconds: float = 0.5
    memory_limit_mb: int = 1024
    output_limit_chars: int = 4096
    code_limit_chars: int = 100_000
    scratch_limit_mb: int = 64
    file_limit_mb: int = 16
    max_files: int = 1000
    max_cells: int | None = None
    cpu_limit_seconds: int = 600
    max_running_cells: int | None = None
    preload: tuple[str, ...] = ("numpy", "sympy")
    readonly_paths: tuple[str, ...] = ()
    network: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    include_stderr: bool = False
    seed: int | None = None
    python: str | None = None
    launcher: tuple[str, ...] = ()
    kernel_name: str = "python3"

    def __post_init__(self) -> None:
        for name, choices in (("backend", BACKENDS), ("isolation", ISOLATION)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}={getattr(self, name)!r}` does not exist. Use one of {', '.join(choices)}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}={value}` would refuse every cell or file. Give at least {least:g}.")
        for name in ("preload", "readonly_paths", "launcher"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"`{name}={value!r}` is one string. Give a list or tuple of strings.")
            object.__setattr__(self, name, tuple(value))  # lists come from YAML and argument parsers

    @property
    def running_cells(self) -> int:
        """Cells admitted at the same time: `max_running_cells`, or the cores that this process may use."""
        if self.max_running_cells is not None:
            return self.max_running_cells
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Reply:
    """What an interpreter process says about one cell.

    `alive`: whether it can run another. `ran`: `False` if the cell never ran, or was interrupted by somebody else, so
    that it can be run again elsewhere. `dropped`: characters already cut out of the middle of `output`.
    """

    output: str
    status: str
    alive: bool = True
    dropped: int = 0
    ran: bool = True


class Interpreter(Protocol):
    """One live interpreter process: the thing that a session replaces when it dies."""

    async def execute(self, code: str, timeout: float) -> Reply: ...

    async def close(self) -> None: ...


class Backend(Protocol):
    """Where interpreter processes come from. An executor of your own (a container, a remote service) fits here."""

    async def start(self) -> None: ...

    async def spawn(self) -> Interpreter: ...

    async def stop(self) -> None: ...


class Session:
    """One stateful interpreter, as the cells of one notebook; made by [`Sandbox.open`].

    The process behind it may die (a crash, a kill after a timeout): the next cell then runs in a fresh one, in which
    the earlier successful cells have been run again.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._config = sandbox.config
        self._interpreter: Interpreter | None = None
        self._history: list[str] = []
        self._cells = 0
        self._turn = asyncio.Lock()
        self._closed = False

    def run(self, code: str) -> ToolResult:
        """Runs one cell. Never raises for what the code does; [`ToolFailure`] if the machine fails."""
        return self._sandbox._loop_thread().run(self._run(code))

    async def arun(self, code: str) -> ToolResult:
        """[`Session.run`] for event loops. A cancelled call kills the cell; the session can go on."""
        return await self._sandbox._loop_thread().wait(self._run(code))

    def close(self) -> None:
        """Ends the process and removes its files. Safe to call twice, and while a cell runs."""
        if not self._closed and self._sandbox._thread is not None:
            self._sandbox._loop_thread().run(self._close())

    async def aclose(self) -> None:
        """[`Session.close`] for event loops."""
        if not self._closed and self._sandbox._thread is not None:
            await self._sandbox._loop_thread().wait(self._close())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __del__(self) -> None:
        # forgotten rather than closed: its process must not wait for the sandbox's end
        interpreter, thread = getattr(self, "_interpreter", None), self._sandbox._thread
        if interpreter is not None and thread is not None and thread.usable:
            with contextlib.suppress(RuntimeError):
                thread.submit(interpreter.close())

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.aclose()

    async def _start(self) -> None:
        if self._closed:
            raise RuntimeError(_CLOSED)
        self._interpreter = await self._sandbox._spawn()

    async def _close(self) -> None:
        self._closed = True
        self._sandbox._sessions.discard(self)
        await self._discard()

    async def _discard(self) -> None:
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is not None:
            await interpreter.close()

    async def _run(self, code: str) -> ToolResult:
        async with self._turn:
            if self._closed:
                raise RuntimeError(_CLOSED)
            refusal = self._refusal(code)
            if refusal is not None:
                return ToolResult(refusal, "error")
            async with self._sandbox._admission:
                start = time.monotonic()
                try:
                    reply = await self._execute(code)
                except BaseException:
                    # cancelled in the middle: nobody knows what the process is doing now
                    await asyncio.shield(self._discard())
                    raise
                seconds = time.monotonic() - start
            self._cells += 1
            if reply.status == "ok":
                self._history.append(code)
            if not reply.alive:
                await self._discard()
            output = truncate(clean(reply.output), self._config.output_limit_chars, reply.dropped)
            return ToolResult(output, reply.status, seconds)

    def _refusal(self, code: str) -> str | None:
        config = self._config
        if not isinstance(code, str):  # a policy fills in the arguments of native tool calls
            return f"TypeError: `code` must be a string, not {type(code).__name__}"
        if len(code) > config.code_limit_chars:
            return f"ValueError: the cell has {len(code)} characters, more than the limit of {config.code_limit_chars}"
        if config.max_cells is not None and self._cells >= config.max_cells:
            return f"RuntimeError: the limit of {config.max_cells} cells is reached"
        return None

    async def _execute(self, code: str) -> Reply:
        for attempt in range(3):
            if self._interpreter is None:
                await self._replace()
            reply = await self._interpreter.execute(code, self._config.timeout_seconds)
            if reply.ran:
                break
            # An earlier cell broke the interpreter under this one. Once more in a fresh process; if the replay of
            # the earlier cells breaks that one too, without them.
            await self._discard()
            if attempt:
                self._history.clear()
        return reply

    async def _replace(self) -> None:
        """A fresh process with the earlier successful cells run again, within the time of one cell."""
        await self._start()
        deadline = time.monotonic() + self._config.timeout_seconds
        for cell in self._history:
            reply = await self._interpreter.execute(cell, max(0.1, deadline - time.monotonic()))
            if reply.status != "ok" or not reply.alive:
                # Cells that broke their own interpreter, or whose second run behaves differently: starting empty
                # keeps the session usable, and the policy reads its missing names in the next error.
                logger.debug("A replayed cell ended with %s; the session starts empty.", reply.status)
                self._history.clear()
                await self._discard()
                await self._start()
                return


class Sandbox:
    """Opens isolated Python sessions. Nothing starts before the first [`Sandbox.open`].

    Args:
        config ([`SandboxConfig`], *optional*):
            Limits and isolation.
        backend ([`Backend`], *optional*):
            Where interpreter processes come from, instead of the one that `config.backend` names.

    Example:

    ```python
    with Sandbox() as sandbox, sandbox.open() as session:
        session.run("x = 2")
        session.run("x + 1").output  # "3"
    ```
    """

    def __init__(self, config: SandboxConfig | None = None, backend: Backend | None = None) -> None:
        self.config = config or SandboxConfig()
        self._custom_backend = backend
        self._backend: Backend | None = None
        self._thread: LoopThread | None = None
        self._guard = threading.Lock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        _sandboxes.add(self)

    def open(self) -> Session:
        """Opens a session. Raises [`ToolFailure`] where no interpreter can be started."""
        return self._loop_thread().run(self._open())

    async def aopen(self) -> Session:
        """[`Sandbox.open`] for event loops."""
        return await self._loop_thread().wait(self._open())

    def close(self) -> None:
        """Ends every session and the warm interpreter. The sandbox starts anew if it is used again."""
        with self._guard:
            thread, self._thread = self._thread, None
        if thread is not None and thread.usable:
            thread.run(self._close())
            thread.stop()

    def __del__(self) -> None:
        thread, backend = getattr(self, "_thread", None), getattr(self, "_backend", None)
        if thread is not None and thread.usable:
            with contextlib.suppress(RuntimeError):
                thread.finish(_stop(backend))

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # worker processes get the configuration, never the connections
        return {"config": self.config, "backend": self._custom_backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _loop_thread(self) -> LoopThread:
        with self._guard:
            if self._thread is None:
                self._thread = LoopThread("trl-multiturn-sandbox")
                self._starting = asyncio.Lock()
                self._admission = asyncio.Semaphore(self.config.running_cells)
            return self._thread

    async def _open(self) -> Session:
        session = Session(self)
        await session._start()
        self._sessions.add(session)
        return session

    async def _spawn(self) -> Interpreter:
        async with self._starting:
            if self._thread is None:
                raise RuntimeError("The sandbox was closed while a session was starting.")
            if self._backend is None:
                backend = self._custom_backend or make_backend(self.config)
                await backend.start()
                self._backend = backend
        return await self._backend.spawn()

    async def _close(self) -> None:
        await asyncio.gather(*(session._close() for session in list(self._sessions)), return_exceptions=True)
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.stop()


async def _stop(backend: Backend | None) -> None:
    if backend is not None:
        await backend.stop()


def _close_all() -> None:
    """At the interpreter's exit; a killed trainer's sandboxes end by themselves."""
    for sandbox in list(_sandboxes):
        with contextlib.suppress(Exception):
            sandbox.close()


atexit.register(_close_all)


def make_backend(config: SandboxConfig) -> Backend:
    """The backend that a configuration names."""
    if config.backend == "forkserver" and (sys.platform == "linux" or config.isolation == "strict"):
        from .forkserver import ForkServer

        return ForkServer(config)
    from .jupyter import JupyterBackend

    return JupyterBackend(config)
