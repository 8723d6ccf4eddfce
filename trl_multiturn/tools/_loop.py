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

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        """Schedules a coroutine; cancelling the future cancels it."""
        if os.getpid() != self._pid:
            coroutine.close()
            raise RuntimeError(
                "This sandbox belongs to another process: it was created before a fork, and its connections do not "
                "survive one. Create the `Sandbox` (or `PythonTool`) in the process that uses it."
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine from a synchronous caller and waits for it."""
        if threading.current_thread() is self._thread:
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
            self.run(_cancel_all())
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
