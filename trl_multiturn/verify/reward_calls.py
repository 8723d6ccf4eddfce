"""One reward function, called: in a thread or a loop, with a limit, row by row where it raises, its values checked."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..concurrency import run_in_thread
from ..messages.terminal import visible


logger = logging.getLogger(__name__)

RewardFunc = Callable[..., Any]

_SLOW_SECONDS = 60.0
_told: set[str] = set()  # functions of whose errors the log has one


def reward_name(reward_func: RewardFunc) -> str:
    """The name under which a reward function's values are kept."""
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def brief_error(error: BaseException) -> str:
    """An error in one line, as it is kept."""
    return visible(f"{type(error).__name__}: {error}"[:500])


class RewardCall:
    """Calls of one reward function.

    Args:
        func (`Callable`):
            The function.
        timeout_seconds (`float`, *optional*):
            Limit on a call.
        in_threads (`bool`, *optional*, defaults to `True`):
            Whether a plain function runs in a thread; otherwise in the caller's.

    Attributes:
        last_error (`Exception | None`): what the function raised last on a single trajectory.
    """

    def __init__(self, func: RewardFunc, timeout_seconds: float | None = None, in_threads: bool = True):
        self.func, self.timeout_seconds, self.in_threads = func, timeout_seconds, in_threads
        self.name = reward_name(func)
        self.last_error: Exception | None = None

    async def outcomes(self, kwargs: Mapping[str, Any], count: int) -> Sequence[float | Exception | None]:
        """What the function says of each of `count` trajectories, or what it raises on it.

        A function that raises is called again for each trajectory by itself.

        Raises:
            `TypeError`, `ValueError`: if it returns something other than one number or `None` per trajectory.
        """
        try:
            return await self._values(kwargs, count)
        except _Raised as raised:
            if count == 1:
                self._note(raised.error)
                return [raised.error]
        singly = [{name: _item(value, i, count) for name, value in kwargs.items()} for i in range(count)]
        return [(await self.outcomes(each, 1))[0] for each in singly]

    async def _values(self, kwargs: Mapping[str, Any], count: int) -> list[float | None]:
        try:
            with _told_when_slow(self.name, count):
                values = await self._call(kwargs)
        except TimeoutError as error:
            logger.warning(
                "The reward function %r gave no verdict on %d trajectories in time (%s).", self.name, count, error
            )
            return [None] * count
        except Exception as error:
            raise _Raised(error) from error
        return _checked_values(values, count, self.name)

    async def _call(self, kwargs: Mapping[str, Any]) -> Any:
        if _is_async(self.func):
            return await asyncio.wait_for(self.func(**kwargs), self.timeout_seconds)
        if self.in_threads:
            return await asyncio.wait_for(run_in_thread(self.func, **kwargs), self.timeout_seconds)
        return self.func(**kwargs)

    def _note(self, error: Exception) -> None:
        self.last_error = error
        error.add_note(f"It was raised by the reward function {self.name!r}.")
        level = logging.INFO if self.name in _told else logging.WARNING
        _told.add(self.name)
        message = "The reward function %r raised on a trajectory, which stays undecided: %s."
        logger.log(level, message, self.name, brief_error(error), exc_info=error if level == logging.WARNING else None)


class _Raised(Exception):
    """A reward function raised, as opposed to returning what it should not."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _item(value: Any, index: int, count: int) -> Any:
    """One trajectory's part of a keyword argument, where it has a part for each."""
    return [value[index]] if isinstance(value, list | tuple) and len(value) == count else value


def _is_async(reward_func: RewardFunc) -> bool:
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        getattr(reward_func, "__call__", None)  # noqa: B004  (an object whose `__call__` is a coroutine function)
    )


@contextlib.contextmanager
def _told_when_slow(name: str, count: int) -> Iterator[None]:
    """Says so where a call takes longer than a minute. By a timer, since the call may hold up the event loop."""
    timer = threading.Timer(
        _SLOW_SECONDS,
        logger.warning,
        (
            "The reward function %r has been at work on %d trajectories for %.0f seconds, and the run waits for it. "
            "If it hangs, set `reward_timeout_seconds` (`timeout_seconds` in `judge`): what is late stays undecided.",
            *(name, count, _SLOW_SECONDS),
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _checked_values(values: Any, count: int, name: str) -> list[float | None]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(
            f"The reward function {name!r} returned {values!r:.80}, not a list, so it cannot be matched with its "
            f"{count} trajectories. Return exactly one number or `None` per completion."
        )
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"The reward function {name!r} returned {len(values)} values for {count} trajectories, so they cannot be "
            "matched. Return exactly one number or `None` per completion."
        )
    return [_number(value, name) for value in values]


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The reward function {name!r} returned {value!r}, which is not a number. Return a number or `None`."
        ) from error
    if math.isinf(value):
        raise ValueError(f"The reward function {name!r} returned {value}. Return a finite number or `None`.")
    return None if math.isnan(value) else value
