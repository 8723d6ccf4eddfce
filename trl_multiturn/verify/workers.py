"""Verifier processes with limits that hold: one that is late or too large is killed, and its job has no result."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


_START_SECONDS = 60.0  # importing sympy takes 0.4 s on an idle core, many seconds on a crowded machine
# How often the size of a busy worker is looked at. Not left to `RLIMIT_AS`: sympy and math-verify catch the
# `MemoryError` it causes and go on to say "not equal".
_WATCH_SECONDS = 0.05
_PAGES_PER_MB = (1 << 20) // os.sysconf("SC_PAGE_SIZE")


class WorkerDied(Exception):
    """The process ended, or was killed at a limit, before it answered."""


class Worker:
    """One process that answers JSON lines, one request at a time.

    The script is started by `python -I` (no user site, no working folder on the path) in a session of its own, so it
    sees neither the trainer's modules nor the terminal's Ctrl-C. It ends when its standard input closes.
    """

    def __init__(self, script: Path, memory_limit_mb: int):
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._memory_limit_mb = memory_limit_mb
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        self._buffer = b""
        hello = self.ask({"path": [folder for folder in sys.path if folder]}, _START_SECONDS)
        if not hello["ready"]:
            self.kill()
            raise ImportError(
                f"The verifier's process could not load math-verify ({hello['error']}), so no answer can be compared. "
                "Install it: `pip install math-verify`."
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request. Kills the process and raises [`WorkerDied`] when it is not there in time."""
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._line(deadline))
        except BaseException as error:
            self.kill()  # also when interrupted: the next reader would get this request's reply
            if isinstance(error, OSError | ValueError):
                raise WorkerDied(str(error)) from error
            raise

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerDied("deadline passed")
            if not self._poll.poll(1000 * min(left, _WATCH_SECONDS)):
                if self._resident_mb() > self._memory_limit_mb:
                    raise WorkerDied("memory limit passed")
                continue
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise WorkerDied("process ended")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _resident_mb(self) -> float:
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) / _PAGES_PER_MB
        except OSError:  # no /proc on this system: only the deadline limits the worker
            return 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes the pipes and leaves the process alone: after a fork it belongs to the parent."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except OSError:  # unsent bytes for a process that is gone
                pass


class WorkerPool:
    """Up to `num_workers` processes, started when first needed; thread-safe; usable after a fork; closed at exit.

    Args:
        script (`Path`):
            The script that a worker runs.
        num_workers (`int`):
            Most processes at a time.
        memory_limit_mb (`int`):
            Resident memory of each, in MiB.
    """

    def __init__(self, script: Path, num_workers: int, memory_limit_mb: int):
        self.script, self.num_workers, self.memory_limit_mb = script, num_workers, memory_limit_mb
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._free = threading.Condition()
        self._idle: list[Worker] = []
        self._started = 0

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply, or `None` where the worker was late or died. The clock starts when a worker takes the job."""
        worker = self._take()
        try:
            reply = worker.ask(request, seconds)
        except BaseException as error:
            with self._free:
                self._started -= 1
                self._free.notify()
            if isinstance(error, WorkerDied):
                return None
            raise
        with self._free:
            self._idle.append(worker)
            self._free.notify()
        return reply

    def ask_all(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any] | None]:
        """The replies to many requests, in order, as many at a time as there are workers."""
        if len(requests) < 2 or self.num_workers == 1:
            return [self.ask(request, seconds) for request in requests]
        with ThreadPoolExecutor(min(self.num_workers, len(requests))) as threads:
            return list(threads.map(lambda request: self.ask(request, seconds), requests))

    def _take(self) -> Worker:
        with self._free:
            while not self._idle and self._started >= self.num_workers:
                self._free.wait()
            if self._idle:
                return self._idle.pop()
            self._started += 1
        try:
            return Worker(self.script, self.memory_limit_mb)
        except BaseException as error:
            with self._free:
                self._started -= 1
                self._free.notify()
            if isinstance(error, WorkerDied):
                raise RuntimeError(
                    f"The verifier's process did not start ({error}), so answers cannot be compared. Run "
                    f"`{sys.executable} -I {self.script}` to see why."
                ) from error
            raise

    def close(self) -> None:
        """Ends the idle workers; one at work is left to finish. The pool starts new ones when asked again."""
        with self._free:
            workers, self._idle = self._idle, []
            self._started -= len(workers)
        for worker in workers:
            worker.kill()

    def _forget(self) -> None:
        for worker in self._idle:
            worker.forget()
        self._reset()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS):
        pool.close()


def _forget_all() -> None:
    for pool in list(_POOLS):
        pool._forget()


# A forked child (a data loader's worker) shares the pipes: two processes would read each other's replies.
os.register_at_fork(after_in_child=_forget_all)
