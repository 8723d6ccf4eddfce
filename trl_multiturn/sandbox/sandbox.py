"""The Python interpreter behind the tools: isolated sessions that behave like the cells of one notebook."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import sys
import threading
import weakref
from typing import Any

from ._admission import Gate
from ._loop import LoopThread
from .arithmetic import Answers, Calculator
from .backend import Backend, Interpreter
from .config import SandboxConfig
from .session import Session


_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()


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
        repeats = self.config.repeats_arithmetic and backend is None and self.config.backend == "forkserver"
        self.answers = Answers() if repeats else None
        self.calculator: Calculator | None = None
        self._backend: Backend | None = None
        self._thread: LoopThread | None = None
        self._guard = threading.RLock()  # a finalizer may come in between
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        _sandboxes.add(self)

    def open(self, on_first_use: bool = False) -> Session:
        """Opens a session. Raises [`ToolFailure`] where no interpreter can be started.

        Args:
            on_first_use (`bool`, *optional*, defaults to `False`):
                Whether its process starts with the first cell that needs one, instead of now.
        """
        return self._open_here(on_first_use) or self.loop_thread().run(self._open(on_first_use))

    async def aopen(self, on_first_use: bool = False) -> Session:
        """[`Sandbox.open`] for event loops."""
        return self._open_here(on_first_use) or await self.loop_thread().wait(self._open(on_first_use))

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
        self.__init__(**state)  # type: ignore[misc]  # made anew, as a subclass would be

    @property
    def running_thread(self) -> LoopThread | None:
        """The thread of this sandbox's event loop, if one runs."""
        return self._thread

    def loop_thread(self) -> LoopThread:
        """The thread of this sandbox's event loop, which is started where none runs."""
        with self._guard:
            if self._thread is None:
                self._thread = LoopThread("trl-multiturn-sandbox")
                self._starting = asyncio.Lock()
                self.admission = Gate(self.config.running_cells)
                if self.answers is not None:
                    self.calculator = Calculator(self.spawn, self.config.timeout_seconds)
            return self._thread

    def _open_here(self, on_first_use: bool) -> Session | None:
        """A session without a process, on the caller's thread, where the backend is known to start."""
        thread = self.loop_thread()
        thread.check()
        if not on_first_use or self._backend is None or not thread.usable:
            return None
        return self._remember(Session(self))

    async def _open(self, on_first_use: bool) -> Session:
        session = Session(self)
        if on_first_use:
            await self._started_backend()  # of which the user must know at once where it does not start
        else:
            await session._start()
        return self._remember(session)

    def _remember(self, session: Session) -> Session:
        with self._guard:
            self._sessions.add(session)
        return session

    async def spawn(self) -> Interpreter:
        """An interpreter process for a session, from the backend, which starts with the first."""
        return await (await self._started_backend()).spawn()

    async def _started_backend(self) -> Backend:
        async with self._starting:
            if self._thread is None:
                raise RuntimeError("The sandbox was closed while a session was starting.")
            if self._backend is None:
                backend = self._custom_backend or make_backend(self.config)
                await backend.start()
                self._backend = backend
        return self._backend

    def forget(self, session: Session) -> None:
        """Called by a session that is closed."""
        with self._guard:
            self._sessions.discard(session)

    async def _close(self) -> None:
        with self._guard:
            sessions = list(self._sessions)
        await asyncio.gather(*(session._close() for session in sessions), return_exceptions=True)
        if self.calculator is not None:
            await self.calculator.close()
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
