"""Where an environment lives: in this process, its methods called in threads, or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import dill

from ..concurrency import run_in_thread
from ..sandbox.result import ToolFailure
from .base import RolloutContext, rollout_or_none
from .environment_worker import END, HEADER, OPEN, receive, says_done, send


_ANSWER_SECONDS = 120.0  # loading the code of an environment takes seconds, on a crowded machine many
_EXIT_SECONDS = 10.0
_THREAD_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Host(Protocol):
    """One environment, wherever it lives.

    Attributes:
        usable (`bool`): false once a call did not come back: nobody knows what the environment is doing.
    """

    usable: bool

    @property
    def done(self) -> bool:
        """Whether the environment said after the last call that its episode is over."""
        ...

    async def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Calls a method of the environment.

        Raises:
            [`ToolFailure`]: if the environment is lost.
            Whatever the method raises.
        """
        ...

    async def environment_class(self) -> type:
        """The class of the environment."""
        ...

    def end(self) -> None:
        """Frees what the environment holds. May take a while: called in a thread."""
        ...


class InThread:
    """An environment of this process; its plain methods run in threads."""

    def __init__(self, instance: Any):
        self.instance = instance
        self.usable = True

    @classmethod
    async def start(cls, factory: Callable[[], Any]) -> InThread:
        """Makes the environment off the event loop."""
        return cls(await run_in_thread(factory))

    @property
    def done(self) -> bool:
        """Whether the environment says that the episode is over."""
        return says_done(self.instance)

    async def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """See [`Host`]."""
        function = getattr(self.instance, method)
        try:
            if not inspect.iscoroutinefunction(function):
                return await run_in_thread(function, **arguments)
            return await function(**arguments)
        except SystemExit as stop:  # an environment that ends its own call must not end the program
            raise RuntimeError(f"SystemExit: {stop}") from stop
        except asyncio.CancelledError:
            self.usable = False
            raise

    async def environment_class(self) -> type:
        """See [`Host`]."""
        return type(self.instance)

    def end(self) -> None:
        """See [`Host`]. A call that never came back may still be at work inside: then the instance is left alone."""
        close = getattr(self.instance, "close", None)
        if self.usable and callable(close):
            close()


class InProcess:
    """An environment in a process of its own, forked from a [`WarmInterpreter`]."""

    def __init__(self, interpreter: WarmInterpreter, pid: int, connection: socket.socket):
        self.pid = pid
        self.usable = True
        self._done = False
        self._interpreter = interpreter
        self._connection = connection

    async def call(self, method: str | None, arguments: dict[str, Any]) -> Any:
        """See [`Host`]."""
        kind, value, self._done = await self._ask((method, arguments, _portable(rollout_or_none())))
        if kind == "raised":
            raise value
        return value

    async def environment_class(self) -> type:
        """See [`Host`]."""
        return dill.loads(await self.call(None, {}))

    @property
    def done(self) -> bool:
        """See [`Host`]."""
        return self._done

    async def started(self) -> None:
        """Waits until the environment is made.

        Raises:
            Whatever the factory raises.
        """
        kind, value, _ = await self._ask(None)
        if kind == "raised":
            raise value

    async def _ask(self, request: Any) -> tuple[str, Any, bool]:
        """Anything but an answer, and also being cancelled, ends the process: the next answer would be another's."""
        loop, answered = asyncio.get_running_loop(), False
        try:
            if request is not None:
                payload = pickle.dumps(request)
                await loop.sock_sendall(self._connection, HEADER.pack(len(payload)) + payload)
            (size,) = HEADER.unpack(await self._receive(HEADER.size))
            answer = pickle.loads(await self._receive(size))
            answered = True
            return answer
        except (OSError, EOFError) as error:
            raise ToolFailure(
                f"The process of the environment (pid {self.pid}) ended in the middle of a call, and with it the "
                "episode. What it wrote to stderr says why."
            ) from error
        finally:
            if not answered:
                self.usable = False

    async def _receive(self, size: int) -> bytes:
        loop, chunks = asyncio.get_running_loop(), bytearray()
        while len(chunks) < size:
            chunk = await loop.sock_recv(self._connection, min(size - len(chunks), 1 << 20))
            if not chunk:
                raise EOFError
            chunks += chunk
        return bytes(chunks)

    def end(self) -> None:
        """Ends the process: by its own `close` where it is idle, else at once."""
        with contextlib.suppress(OSError):
            self._connection.close()
        self._interpreter.end(self.pid, gently=self.usable)


class WarmInterpreter:
    """A process that has loaded the environment's code once, and forks a process for each environment.

    It is a program of its own, so that it does not matter whether CUDA and threads are up in this one; what the forks
    have in common they share. It and all its forks end when this process does.

    Args:
        factory (`Callable`):
            Makes an environment; a class or function of a notebook or script travels, too.
        preload (`Sequence[str]`, *optional*, defaults to `()`):
            Names of modules to import before the first fork.

    Raises:
        `TypeError`: if the factory cannot travel to another process.
    """

    def __init__(self, factory: Callable[[], Any], preload: Sequence[str] = ()):
        if isinstance(preload, str) or not all(isinstance(name, str) for name in preload):
            raise TypeError(f"`preload={preload!r:.80}` is no list of names of modules. Pass e.g. `['textworld']`.")
        self._preload = list(preload)
        try:
            self._factory = dill.dumps(factory, recurse=True)
        except Exception as error:
            raise TypeError(
                f"The environment's factory {factory!r:.80} cannot be sent to another process ({error}). Pass the "
                "class, or a `functools.partial` of it with plain arguments; or `isolation='thread'`, if the "
                "environment is thread-safe."
            ) from error
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._finish: weakref.finalize | None = None
        _INTERPRETERS.add(self)

    async def open(self) -> InProcess:
        """Forks a process; it begins to make its environment.

        Raises:
            [`ToolFailure`]: if there is no process to be had.
        """
        ours, theirs = socket.socketpair()
        try:
            pid = await run_in_thread(self._fork, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return InProcess(self, pid, ours)

    def end(self, pid: int, gently: bool = False) -> None:
        """Ends one of the forks and what it started; gently: it may close its environment first."""
        with self._lock, contextlib.suppress(OSError, EOFError):
            if self._control is not None:
                send(self._control, [END, pid, gently])
                receive(self._control)

    def close(self) -> None:
        """Ends the interpreter and all its forks. It starts again when it is needed."""
        with self._lock:
            self._control = None
            if self._finish is not None:
                self._finish()

    def _fork(self, theirs: socket.socket) -> int:
        with self._lock:
            try:
                control = self._started()
                socket.send_fds(control, [OPEN], [theirs.fileno()])
                return int(receive(control))
            except (OSError, EOFError) as error:
                self._control = None  # the next call starts another
                if self._finish is not None:
                    self._finish()
                raise ToolFailure(
                    f"No process for an environment could be started ({type(error).__name__}: {error}). What the "
                    "process that should have forked it wrote to stderr says why."
                ) from error

    def _started(self) -> socket.socket:
        if self._control is not None:
            return self._control
        control, theirs = socket.socketpair()
        program = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); " + (
            f"from {__package__}.environment_worker import main; main(int(sys.argv[1]))"
        )
        path = json.dumps([os.getcwd(), *filter(None, sys.path)])
        control.settimeout(_ANSWER_SECONDS)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno()), path],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a library that prints does not disturb what the trainer prints
                env={**dict.fromkeys(_THREAD_POOLS, "1"), **os.environ},  # there is a process for each environment
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the trainer
            )
        self._finish = weakref.finalize(self, _finish, control, process)
        send(control, (self._preload, self._factory))
        error = receive(control)
        if error is not None:
            self._finish()
            raise error
        self._control = control
        return control

    def _forget(self) -> None:
        """After a fork of this process: the interpreter is the parent's."""
        self._control, self._lock = None, threading.Lock()
        if self._finish is not None:
            self._finish.detach()


def _finish(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Ends an interpreter: it goes when its socket closes, and its forks with it."""
    control.close()
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _portable(context: RolloutContext | None) -> dict[str, Any] | None:
    return None if context is None else {**vars(context), "row": dict(context.row)}


_INTERPRETERS: weakref.WeakSet[WarmInterpreter] = weakref.WeakSet()


def _forget_all() -> None:
    for interpreter in list(_INTERPRETERS):
        interpreter._forget()


os.register_at_fork(after_in_child=_forget_all)
