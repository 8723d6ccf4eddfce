"""Threads that cells leave behind: which of them spin, and which only wait for the next cell's work.

Standard library only. Functions are bound early: patched modules do not reach them.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import sys
import threading
import time
from types import FrameType


_sleep, _cpu_clock, _clock = time.sleep, time.pthread_getcpuclockid, time.clock_gettime
_count, _native_id, _frames, _main = _thread._count, _thread.get_native_id, sys._current_frames, _thread.get_ident()
_threads, _task_ids = threading._active, os.listdir  # type: ignore[attr-defined]
_STATIONARY = 0.25  # share of a core above which a thread left behind counts as spinning

# module and function of a thread that waits until another one wakes it, and what it calls its time limit
_WAITS: dict[tuple[str, str], tuple[str, object] | None] = {
    ("concurrent.futures.thread", "_worker"): None,
    ("multiprocessing.pool", "worker"): None,
    ("threading", "wait"): ("timeout", None),
    ("selectors", "select"): ("timeout", -1),
}


def threads_at_work() -> frozenset[str]:
    """System ids of the threads that earlier cells have left at work; this thread is not among them.

    Workers that wait for a task (an idle pool, a queue's consumer) are not at work: what they print next is printed
    for the cell that wakes them.
    """
    if not _count():
        return frozenset()
    return frozenset(_task_ids("/proc/self/task")) - {str(_native_id())} - _waiting()


def _waiting() -> set[str]:
    frames = _frames()
    with contextlib.suppress(Exception):  # a cell may have filled the table of threads with anything
        return {
            str(thread.native_id)
            for ident, thread in list(_threads.items())
            if ident in frames and ident != _main and _waits(frames[ident])
        }
    return set()


def _waits(frame: FrameType) -> bool:
    place = (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
    if place not in _WAITS:
        return False
    limit = _WAITS[place]
    return limit is None or frame.f_locals.get(limit[0], limit) == limit[1]


def end_spinning_threads() -> bool:
    """Asks threads that burn CPU after their cell to exit; says whether any thread is still alive.

    Threads that wait (an idle pool) belong to the notebook's state and stay.
    """
    others = [ident for ident in _frames() if ident != _main]
    before = _cpu_times(others)
    start = _clock(time.CLOCK_MONOTONIC)
    _sleep(0.002)
    elapsed = _clock(time.CLOCK_MONOTONIC) - start
    for ident, used in _cpu_times(others).items():
        if used - before.get(ident, used) > _STATIONARY * elapsed:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
    for _ in range(10):
        if not _count():
            return False
        _sleep(0.001)
    return True


def _cpu_times(idents: list[int]) -> dict[int, float]:
    alive, times = set(_frames()), {}
    for ident in idents:
        if ident in alive:
            with contextlib.suppress(OSError):
                times[ident] = _clock(_cpu_clock(ident))
    return times
