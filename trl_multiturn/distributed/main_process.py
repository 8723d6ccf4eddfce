"""What one process does for all: it decides or writes, and the others learn what came of it, errors included."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .pace import at_own_pace


T = TypeVar("T")

_ended: list[dist.ProcessGroup] = []


def on_main(do: Callable[[], T]) -> T:
    """Calls `do`, which must not be collective, on the main process alone and returns its result on all.

    Where it raises, all raise: a process that went on alone would wait for the others until `ddp_timeout`.

    Raises:
        On the main process whatever `do` raised. On the others `ValueError`, with the same message, where that was
        the user's mistake (a `ValueError`), and `RuntimeError` otherwise (disk full, folder read-only).
    """
    error: Exception | None = None
    outcome: list = [None, None, None]  # result, what failed, the user's mistake
    if PartialState().is_main_process:
        try:
            outcome[0] = do()
        except Exception as raised:
            error = raised
            outcome = [None, f"{type(raised).__name__}: {raised}", None]
            if isinstance(raised, ValueError):
                outcome = [None, None, str(raised)]
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    result, failure, mistake = outcome
    if mistake is not None:
        raise ValueError(mistake)
    if failure is not None:
        raise RuntimeError(f"The main process could not go on, and so neither can this one: {failure}")
    return result


def on_main_at_own_pace(do: Callable[[], T], silence_limit_seconds: float) -> T:
    """[`on_main`] for what may take longer than a collective operation waits (see [`at_own_pace`])."""
    done: Future[T] = Future()
    with at_own_pace(silence_limit_seconds):
        if PartialState().is_main_process:
            try:
                done.set_result(do())
            except Exception as error:
                done.set_exception(error)
    return on_main(done.result)


def outlive_collectives() -> None:
    """Lets gloo's threads let go of the last collective operation: before the process group is destroyed, and at exit.

    They need the interpreter's lock to drop its tensors. DDP's reducer goes with the trainer and, where the group is
    destroyed already, takes the last reference to it along: PyTorch (2.13) then joins these threads while it holds the
    lock, and the process hangs. Where the interpreter ends first, it ends such a thread, and the process aborts after
    its work is done. So one more reference stays, and the threads are given the lock once.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        _ended.append(dist.group.WORLD)
        time.sleep(0.2)


atexit.register(outlive_collectives)  # most scripts never call `trainer.end()`
