"""Environments that are kept: so many at once, made off the event loop, handed out again where that is sound."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

from ..concurrency import run_coroutine, run_in_thread
from ..sandbox.result import ToolFailure
from .environment_hosts import Host, InThread, WarmInterpreter
from .environment_methods import EnvironmentMethods, class_of


logger = logging.getLogger(__name__)

Isolation = Literal["thread", "process"]
_PROCESSES_PER_CORE = 4


class EnvironmentPool:
    """An `environment_factory` with a limit: its environments are made when needed, kept, and handed out again.

    ```python
    with EnvironmentPool(ScienceWorldEnvironment, max_environments=4) as pool:
        generate_trajectories(rows, engine, environment_factory=pool)
    ```

    What is not passed is read from the environment's class: its attributes `isolation`, `max_environments`, `reusable`
    and `preload`. A plain class as `environment_factory` is pooled in the same way, for one call of
    [`generate_trajectories`]; a pool outlives the call, until it is closed. In [`~trl.GRPOTrainer`] a pool is a
    factory like any other.

    Args:
        factory (`Callable`):
            Makes an environment; called without arguments.
        max_environments (`int`, *optional*):
            Environments at a time; a trajectory that finds none free waits. By default as many as there are
            trajectories in threads, and four per core in processes.
        isolation (`str`, *optional*, defaults to `"thread"`):
            `"process"` gives each environment a process of its own, forked from one that has loaded the code: for
            what is not thread-safe, holds the interpreter's lock, or may crash. There a call that hangs is ended. In
            `"thread"` methods run in threads of this process.
        reusable (`bool`, *optional*, defaults to `False`):
            Whether an environment is as good as new after `reset`.
        start_seconds (`float`, *optional*, defaults to `120.0`):
            Longest wait for an environment to be made.
        preload (`Sequence[str]`, *optional*, defaults to `()`):
            Modules that the environments import when they are made or played. With `isolation="process"` they are
            imported once, before the first process is forked, and shared. They must start no threads when imported.

    Raises:
        `TypeError`, `ValueError`: if the factory, or what it makes, cannot be used.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        max_environments: int | None = None,
        isolation: Isolation | None = None,
        reusable: bool | None = None,
        start_seconds: float = 120.0,
        preload: Sequence[str] | None = None,
    ):
        if not callable(factory):
            raise TypeError(
                f"`environment_factory` must be callable without arguments, got {type(factory).__name__}. Pass the "
                "environment's class or a function that returns a new environment."
            )
        self.factory = factory
        self.start_seconds = start_seconds
        kind = class_of(factory)
        self.isolation = isolation or str(getattr(kind, "isolation", "thread"))
        if self.isolation not in ("thread", "process"):
            raise ValueError(f"`isolation={self.isolation!r}` is unknown. Use 'thread' or 'process'.")
        modules = getattr(kind, "preload", ()) if preload is None else preload
        self._interpreter = WarmInterpreter(factory, modules) if self.isolation == "process" else None
        first: list[Host] = []
        if self._interpreter is None:  # the first is made now: what is wrong with it is told before any rollout
            instance = factory()
            kind, first = type(instance), [InThread(instance)]
        self._methods: EnvironmentMethods | None = None if kind is None else EnvironmentMethods.of(kind)
        self.reusable: bool = getattr(kind, "reusable", False) if reusable is None else reusable
        most = max_environments if max_environments is not None else getattr(kind, "max_environments", None)
        if most is None and self._interpreter is not None:
            most = _PROCESSES_PER_CORE * _cores()
        if most is not None and most < 1:
            raise ValueError(f"`max_environments` must be at least 1, got {most}.")
        self.max_environments = most
        self._lock = threading.Lock()
        self._reset()
        self._idle += first
        self._started = len(first)
        _POOLS.add(self)

    def _reset(self) -> None:
        self._idle: list[Host] = []
        self._started = 0
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def __call__(self) -> Any:
        """A new environment in this process, outside the pool: what [`~trl.GRPOTrainer`] asks for."""
        return self.factory()

    @property
    def methods(self) -> EnvironmentMethods:
        """What the environments offer.

        Raises:
            `TypeError`, `ValueError`: if their class cannot be used.
            [`ToolFailure`]: if the process that should tell does not start.
        """
        if self._methods is None:
            self._methods = run_coroutine(self._ask_for_methods())
        return self._methods

    async def acquire(self) -> Host:
        """An environment for one trajectory, as soon as there is one; to be given back by [`release`].

        Raises:
            [`ToolFailure`]: if it is not made in time, or its process ends.
            Whatever the factory raises.
        """
        while True:
            with self._lock:
                if self._idle:
                    return self._idle.pop()
                if self.max_environments is None or self._started < self.max_environments:
                    self._started += 1
                    break
                loop = asyncio.get_running_loop()
                waiter = (loop, loop.create_future())
                self._waiting.append(waiter)
            await self._wait(waiter)
        try:
            return await self._start()
        except BaseException:
            self._vacate()
            raise

    async def release(self, host: Host, sound: bool = True) -> None:
        """Takes an environment back.

        Args:
            host ([`Host`]):
                From [`acquire`].
            sound (`bool`, *optional*, defaults to `True`):
                Whether nothing went wrong with it.
        """
        if self.reusable and sound and host.usable:
            with self._lock:
                self._idle.append(host)
            self._wake()
            return
        try:
            await run_in_thread(_end, host)
        finally:
            self._vacate()

    def close(self) -> None:
        """Closes the environments that nobody has, and ends all processes. The pool starts anew when it is used."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._started -= len(idle)
        for host in idle:
            _end(host)
        if self._interpreter is not None:
            self._interpreter.close()

    def __del__(self) -> None:
        if getattr(self, "_idle", None):  # a pool that was made to look at, say
            self.close()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _start(self) -> Host:
        async def start() -> Host:
            if self._interpreter is None:
                return await InThread.start(self.factory)
            host = await self._interpreter.open()
            try:
                await host.started()
            except BaseException:
                await run_in_thread(host.end)
                raise
            return host

        try:
            async with asyncio.timeout(self.start_seconds) as clock:
                return await start()
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise ToolFailure(
                f"An environment was not made within `start_seconds={self.start_seconds:g}`. Raise it, or lower "
                "`max_environments` if the machine is full."
            ) from error

    async def _ask_for_methods(self) -> EnvironmentMethods:
        host = await self.acquire()
        try:
            return EnvironmentMethods.of(await host.environment_class())
        finally:
            await self.release(host)

    async def _wait(self, waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]) -> None:
        try:
            await waiter[1]
        except asyncio.CancelledError:
            with self._lock:
                waits = waiter in self._waiting
                if waits:
                    self._waiting.remove(waiter)
            if not waits:
                self._wake()  # it was woken for nothing: the next one's turn
            raise

    def _vacate(self) -> None:
        with self._lock:
            self._started -= 1
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiter = self._waiting.popleft() if self._waiting else None
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_settle, future)
            except RuntimeError:  # that loop was closed
                self._wake()

    def _forget(self) -> None:
        """After a fork of this process: environments in threads were copied, the waiting are the parent's."""
        self._lock = threading.Lock()
        self._reset()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(host: Host) -> None:
    try:
        host.end()
    except Exception:
        logger.warning("An environment did not close cleanly.", exc_info=True)


_POOLS: weakref.WeakSet[EnvironmentPool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_POOLS):
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
