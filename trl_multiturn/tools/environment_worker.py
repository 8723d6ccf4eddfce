"""The process side of environments that live outside the trainer: one interpreter that forks, and its forks.

`environment_hosts.WarmInterpreter` starts it. It loads the environment's code and makes none: what a constructor
starts (a JVM, threads) belongs to a fork. It ends, and ends its forks, when the trainer's end of its socket closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from typing import Any


HEADER = struct.Struct("!Q")
OPEN = b"o"
END = "end"
_CLOSING_SECONDS = 5.0


def send(connection: socket.socket, value: Any) -> None:
    """Sends a value over a blocking socket."""
    payload = pickle.dumps(value)
    connection.sendall(HEADER.pack(len(payload)) + payload)


def receive(connection: socket.socket) -> Any:
    """The next value of a blocking socket.

    Raises:
        `EOFError`: if the other side is gone.
    """
    (size,) = HEADER.unpack(_read(connection, HEADER.size))
    return pickle.loads(_read(connection, size))


def main(descriptor: int) -> None:
    """Loads the environment's code and forks on request."""
    control = socket.socket(fileno=descriptor)
    try:
        factory = _load(*receive(control))
    except Exception as error:
        send(control, portable(error))
        return
    send(control, None)
    forks: set[int] = set()
    try:
        while True:
            first, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if first == OPEN:
                forks.add(_fork(factory, control, descriptors[0]))
            elif first:
                _, pid, gently = pickle.loads(_rest(control, first))
                forks.discard(pid)
                _end(pid, gently)
                send(control, None)
            else:
                return
    except (EOFError, OSError):
        return  # the trainer is gone
    finally:
        for pid in forks:
            _end(pid, gently=False)


def _load(preload: Sequence[str], factory: bytes) -> Callable[[], Any]:
    """The factory, and the modules that its environments need, so that no fork imports them again."""
    import dill

    for module in preload:
        with contextlib.suppress(ImportError):  # the environment says better what is missing
            importlib.import_module(module)
    made: Callable[[], Any] = dill.loads(factory)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page of what is shared
    return made


def _fork(factory: Callable[[], Any], control: socket.socket, descriptor: int) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()  # what the environment starts ends with it
            control.close()
            _serve(factory, socket.socket(fileno=descriptor))
            status = 0
        except (EOFError, OSError):
            status = 0  # the trainer let go
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(descriptor)
    send(control, pid)
    return pid


def _end(pid: int, gently: bool) -> None:
    """Ends a fork and whatever it started. It was not waited for before, so the number is still its own."""
    if gently and hasattr(os, "pidfd_open"):
        fd = os.pidfd_open(pid)
        select.select([fd], [], [], _CLOSING_SECONDS)
        os.close(fd)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _serve(factory: Callable[[], Any], connection: socket.socket) -> None:
    """Makes the environment and answers calls until the trainer lets go."""
    from .base import RolloutContext, enter_rollout

    try:
        instance = factory()
    except BaseException as error:
        send(connection, ("raised", portable(error), False))
        return
    send(connection, ("made", None, False))
    try:
        with asyncio.Runner() as runner:
            while True:
                method, arguments, context = receive(connection)
                if context is not None:
                    enter_rollout(RolloutContext(**context))
                kind, value = _call(instance, method, arguments, runner)
                _answer(connection, kind, value, says_done(instance))
    finally:
        close = getattr(instance, "close", None)
        if callable(close):
            close()


def _call(instance: Any, method: str | None, arguments: dict[str, Any], runner: asyncio.Runner) -> tuple[str, Any]:
    """What a method returns or raises; without a method, the environment's class."""
    import dill

    try:
        if method is None:
            return "value", dill.dumps(type(instance), recurse=True)
        value = getattr(instance, method)(**arguments)
        return "value", runner.run(value) if inspect.iscoroutine(value) else value
    except (Exception, SystemExit) as error:
        return "raised", portable(error)


def _answer(connection: socket.socket, kind: str, value: Any, done: bool) -> None:
    try:
        payload = pickle.dumps((kind, value, done))
    except Exception:  # the policy reads text in any case
        payload = pickle.dumps((kind, str(value), done))
    connection.sendall(HEADER.pack(len(payload)) + payload)


def portable(error: BaseException) -> BaseException:
    """An error that survives the way to the trainer, with its traceback as a note."""
    if isinstance(error, SystemExit):
        error = RuntimeError(f"SystemExit: {error}")
    lines = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if not isinstance(copy, Exception) or str(copy) != str(error):
            raise TypeError
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.__notes__ = [*getattr(error, "__notes__", ()), f"In the environment's own process:\n{lines}"]
    return copy


def says_done(instance: Any) -> bool:
    """Whether an environment's attribute `done` is there and true."""
    done = getattr(instance, "done", False)
    return bool(done) and not callable(done)


def _read(connection: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = connection.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError("the other side closed the connection")
        chunks += chunk
    return bytes(chunks)


def _rest(control: socket.socket, first: bytes) -> bytes:
    """The payload of a frame of whose header one byte was read."""
    (size,) = HEADER.unpack(first + _read(control, HEADER.size - 1))
    return _read(control, size)
