"""What an interpreter must offer to stand behind a session, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


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


class Begun(Protocol):
    """A cell that an interpreter began on the caller's thread, at `start` (of the monotonic clock)."""

    start: float

    async def finish(self) -> Reply: ...


class Interpreter(Protocol):
    """One live interpreter process: the thing that a session replaces when it dies. [`Begins`] is optional."""

    async def execute(self, code: str, timeout: float) -> Reply: ...

    async def close(self) -> None: ...


@runtime_checkable
class Begins(Protocol):
    """An interpreter that runs short cells without a change of thread."""

    def begin(self, code: str, timeout: float) -> Reply | Begun:
        """Runs a cell on the caller's thread: to its reply, if that takes milliseconds and leaves the process alive,
        and otherwise as far as it gets."""
        ...


class Backend(Protocol):
    """Where interpreter processes come from. An executor of your own (a container, a remote service) fits here."""

    async def start(self) -> None: ...

    async def spawn(self) -> Interpreter: ...

    async def stop(self) -> None: ...
