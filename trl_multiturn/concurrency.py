"""Synchronous calls inside an event loop, and event loops inside synchronous calls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar


T = TypeVar("T")


class BackgroundCoroutine(Generic[T]):
    """
    A coroutine that runs, from now on, on a thread and an event loop of its own.

    Args:
        coroutine (`Coroutine`): what to run.
        name (`str`): name of the thread.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(coroutine)
        self._outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._work, name=name)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._outcome.set_result(self._loop.run_until_complete(self._task))
        except BaseException as error:
            self._outcome.set_exception(error)
        finally:
            self._loop.close()

    def result(self) -> T:
        """Waits for the coroutine's end. Raises what it raised; an interrupt ends the wait, not the coroutine."""
        return self._outcome.result()

    def cancel(self) -> None:
        """Cancels the coroutine, unless it has ended, and waits until it has closed what it had opened."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._outcome.exception()  # an interrupted `Thread.join` cannot be waited on again
        self._thread.join()  # which is about to end


async def run_in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Awaits a synchronous call in a daemon thread of its own, with the caller's context variables.

    A pool would be exhausted, and the process kept from exiting, by calls that never return.
    """
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # the caller gave up
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(function, *args, **kwargs)
        except (StopIteration, SystemExit) as stop:  # a future cannot carry the one, the other would end the program
            error = RuntimeError(f"{type(stop).__name__}: {stop}")
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop was closed while the call hung
            pass

    threading.Thread(target=work, daemon=True, name="trl-multiturn-call").start()
    return await future


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, also where a loop is running already (a notebook): then in a thread, which an interrupt cancels.

    Raises:
        Whatever the coroutine raises; `KeyboardInterrupt` once the coroutine has closed what it had opened.
    """
    if not _inside_a_loop():
        return asyncio.run(coroutine)
    background = BackgroundCoroutine(coroutine, "trl-multiturn-loop")
    try:
        return background.result()
    except KeyboardInterrupt:
        background.cancel()  # every session is closed
        raise


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def await_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Awaits all; the first error cancels the others, so that none goes on with what is being closed.

    Raises:
        `ExceptionGroup`: of what failed.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]
