"""Several processes that work for as long as each needs: waiting without a time limit, but never for the dead.

Rollouts take one process much longer than another. A collective operation, a barrier too, ends the run when its
partners are later than `ddp_timeout`; so processes first meet by looking at the store that they were started with.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


_LONGEST_PAUSE_SECONDS = 0.5
_meetings = itertools.count()  # every process counts the same ones


@contextmanager
def at_own_pace(silence_limit_seconds: float) -> Iterator[None]:
    """Runs the body, which must not be collective, and waits until every process has run it.

    Meanwhile each process says every now and then that it is alive.

    Args:
        silence_limit_seconds (`float`):
            How long a process that has not arrived may be silent; `ddp_timeout` is the limit that users know.

    Raises:
        `RuntimeError`: if a process has been silent for longer: it is dead, and the others would wait without end.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    store, meeting = _get_default_store(), f"trl_multiturn/{next(_meetings)}"
    every = min(10.0, silence_limit_seconds / 4)
    over = threading.Event()

    def show_life() -> None:
        while not over.wait(every):
            store.add(f"{meeting}/alive/{dist.get_rank()}", 1)

    thread = threading.Thread(target=show_life, name="trl-multiturn-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    store.set(f"{meeting}/arrived/{dist.get_rank()}", "")
    _await_all(store, meeting, every, silence_limit_seconds)


def _await_all(store: dist.Store, meeting: str, every: float, silence_limit_seconds: float) -> None:
    missing = set(range(dist.get_world_size()))
    signs = dict.fromkeys(missing, 0)
    last_sign = dict.fromkeys(missing, time.monotonic())
    looked, pause = time.monotonic(), 0.01
    while True:
        missing = {rank for rank in missing if not store.check([f"{meeting}/arrived/{rank}"])}
        if not missing:
            return
        if time.monotonic() - looked >= every:
            looked = time.monotonic()
            for rank in missing:
                count = store.add(f"{meeting}/alive/{rank}", 0)
                if count != signs[rank]:
                    signs[rank], last_sign[rank] = count, looked
                elif looked - last_sign[rank] > silence_limit_seconds:
                    raise RuntimeError(
                        f"Process {rank} has given no sign of life for {silence_limit_seconds:g} seconds, so it will "
                        "not finish its rollouts. See its log, and start again with the same command: what finished "
                        "is kept. (`ddp_timeout` sets the limit.)"
                    )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
