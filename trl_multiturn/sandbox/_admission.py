"""Who goes next: one order of arrival for coroutines, which wait, and for threads, which would rather not."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class Visit:
    """One cell on its way through gates.

    Two may see it out: the caller that brought it, until a coroutine takes it over, and the coroutine from then on.
    However either of them is interrupted, nothing stays occupied: leaving twice, or without having entered, is
    harmless.

    Args:
        gates ([`Gate`]):
            What it may pass, in this order.
    """

    def __init__(self, *gates: Gate) -> None:
        self.gates = gates
        self.caller: int | None = None  # the thread that runs the cell itself, meanwhile
        self.waiter: asyncio.Future | None = None
        self._taken = threading.Lock()

    def take_over(self) -> bool:
        """Makes whoever calls this first responsible for [`Visit.leave`]; later callers get `False`."""
        return self._taken.acquire(blocking=False)

    def leave(self) -> None:
        """Leaves all gates and their queues, and lets the next ones in."""
        for gate in reversed(self.gates):
            gate.leave(self)

    def would_wait_for(self, caller: int) -> bool:
        """Whether only this thread could make way: a wait on it would have no end."""
        return any(not gate.holds(self) and gate.waits_for(caller) for gate in self.gates)

    def wake(self) -> None:
        """Called by a gate that has let the visit in."""
        if self.waiter is not None:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                self.waiter.get_loop().call_soon_threadsafe(_resolve, self.waiter)


class Gate:
    """Lets a number of visits in at a time, first come, first served. Every method may be called on any thread.

    Args:
        places (`int`):
            How many may be inside at the same time.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._guard = threading.RLock()  # held for moments only; a signal handler may come in between
        self._inside: set[Visit] = set()
        self._queue: dict[Visit, None] = {}

    def holds(self, visit: Visit) -> bool:
        """Whether the visit is inside."""
        return visit in self._inside

    def join(self, visit: Visit) -> bool:
        """Lets a visit in, or else puts it at the end of the queue. Returns whether it is inside."""
        with self._guard:
            if not self.try_enter(visit):
                self._queue.setdefault(visit)
                return False
            return True

    def try_enter(self, visit: Visit) -> bool:
        """Lets a visit in if no other waits. Returns whether it is inside."""
        with self._guard:
            if visit not in self._inside:
                if self._queue or len(self._inside) >= self._places:
                    return False
                self._inside.add(visit)
            return True

    async def enter(self, visit: Visit) -> None:
        """Waits until the visit is inside. Whoever gives up waiting calls [`Visit.leave`]."""
        with self._guard:
            if self.join(visit):
                return
            visit.waiter = asyncio.get_running_loop().create_future()
        await visit.waiter

    def leave(self, visit: Visit) -> None:
        """Lets the next ones in after a visit, which may be inside, in the queue, or neither."""
        with self._guard:
            self._inside.discard(visit)
            self._queue.pop(visit, None)
            while self._queue and len(self._inside) < self._places:
                following = next(iter(self._queue))
                self._inside.add(following)
                del self._queue[following]
                following.wake()

    def waits_for(self, caller: int) -> bool:
        """Whether all places are taken by cells that this thread is running."""
        with self._guard:
            full = len(self._inside) >= self._places
            return full and all(visit.caller == caller for visit in self._inside)


def _resolve(waiter: asyncio.Future) -> None:
    if not waiter.done():
        waiter.set_result(None)
