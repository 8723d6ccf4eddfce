"""The Python interpreter behind the tools: isolated sessions that behave like the cells of one notebook."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from ._loop import LoopThread
from ._turns import Gate
from .session import Backend, Interpreter, Reply, Session


__all__ = ["Backend", "Interpreter", "Reply", "Sandbox", "SandboxConfig", "Session", "make_backend"]

_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()

BACKENDS = ("forkserver", "jupyter")
ISOLATION = ("strict", "best_effort", "none")
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
                self._admission = Gate(self.config.running_cells)
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
