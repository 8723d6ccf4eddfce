"""An asyncio loop on a thread of its own: the asynchronous core under a synchronous face."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
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
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

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

    def stop(self) -> None:
        """Cancels what is left and ends the thread."""
        if os.getpid() != self._pid or self._loop.is_closed():
            return

        async def drain() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
