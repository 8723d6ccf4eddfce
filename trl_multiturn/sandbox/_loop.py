"""An asyncio loop on a thread of its own: the asynchronous core under a synchronous face."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class LoopThread:
    """Runs coroutines on a daemon thread, so that synchronous callers and any number of event loops share one core.

    Args:
        name (`str`):
            Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._guard = threading.RLock()  # a finalizer may come in between
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    @property
    def usable(self) -> bool:
        """Whether this is the process that started the thread, and the thread still runs."""
        return os.getpid() == self._pid and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on the thread."""
        return threading.get_ident() == self._thread.ident

    def check(self) -> None:
        """Raises `RuntimeError` in a process that has inherited the object by a fork."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "This sandbox belongs to another process: it was created before a fork, and its connections do not "
                "survive one. Create the `Sandbox` (or `PythonTool`) in the process that uses it."
            )

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        """Schedules a coroutine; cancelling the future cancels it."""
        try:
            self.check()
            with self._guard:
                if self._ending:  # what came later would never be run, and its caller wait forever
                    raise RuntimeError("The sandbox has been closed meanwhile.")
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine from a synchronous caller and waits for it."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("A synchronous sandbox call on the sandbox's own thread would wait for itself.")
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine from another event loop."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls a function on the thread, soon."""
        self._loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancels what is left and ends the thread."""
        if self.usable:
            with self._guard:
                self._ending = True
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def finish(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Runs a last coroutine and then ends the thread, without waiting: for finalizers, on whatever thread."""
        if not self.usable:
            coroutine.close()
            return
        self.submit(coroutine).add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
