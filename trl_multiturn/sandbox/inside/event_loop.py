"""The session's event loop: it is there in every cell, as in a kernel, and costs nothing until a cell asks for it.

In a kernel, cells run inside a running loop: `asyncio.create_task` needs no `await`. Here the loop only counts as
running while a cell runs, so that `asyncio.run`, which a kernel refuses, works as well. Tasks get on while a cell
awaits something, and before and after each cell as far as they get without waiting.

Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from asyncio.events import _get_running_loop, _set_running_loop
from collections.abc import Awaitable, Callable, Iterator
from typing import Any


_MOST_ROUNDS = 1000  # of a task that waits for nothing but its next turn


class SessionLoop(asyncio.SelectorEventLoop):
    """An event loop that begins to exist when its first attribute is asked for."""

    def __init__(self) -> None:
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        if vars(self).get("_begun", True):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._begun = True
        with outside():
            super().__init__()
        return getattr(self, name)

    def __del__(self) -> None:
        if self._begun:
            super().__del__()

    @property
    def usable(self) -> bool:
        """Whether no cell has closed it."""
        return not vars(self).get("_closed", False)

    @property
    def marks(self) -> bool:
        """Whether it only counts as running."""
        return vars(self).get("_thread_id") is None

    def is_running(self) -> bool:
        return _get_running_loop() is self or super().is_running()

    def run_until_complete(self, future: Awaitable[Any]) -> Any:  # type: ignore[override]  # generators are of the past
        with outside():
            task = asyncio.ensure_future(future, loop=self)
            try:
                return super().run_until_complete(task)
            except BaseException:
                if not task.done():  # its time is over: it must not go on under another cell
                    task.cancel()
                    self.get_on()
                raise

    def get_on(self) -> None:
        """Runs what is ready, and what becomes ready by that."""
        for _ in range(_MOST_ROUNDS if self._begun else 0):
            if not self.usable or not (self._ready or self._scheduled):
                return
            idle = not self._ready
            self.call_soon(self.stop)
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task, not of the cell
                self.run_forever()
            if idle and not self._ready:
                return


@contextlib.contextmanager
def counts_as_running(loop: SessionLoop) -> Iterator[None]:
    """Lets `asyncio.create_task` and its like find the loop."""
    _set_running_loop(loop)
    try:
        yield
    finally:
        _set_running_loop(None)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """No loop counts as running, unless one does run."""
    loop = _get_running_loop()
    if not isinstance(loop, SessionLoop) or not loop.marks:
        yield
        return
    _set_running_loop(None)
    try:
        yield
    finally:
        _set_running_loop(loop)


def install() -> None:
    """Lets `asyncio.run`, and loops of a cell's own, run although the session's loop counts as running."""
    for owner, name in (
        (asyncio, "run"),
        (asyncio.Runner, "run"),
        (asyncio.BaseEventLoop, "run_forever"),
        (asyncio.BaseEventLoop, "run_until_complete"),
    ):
        setattr(owner, name, _outside(getattr(owner, name)))


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with outside():
            return function(*args, **kwargs)

    return run
