"""The default backend: sessions forked from one warm, confined interpreter.

The trainer starts one program (`inside/start.py`) and never forks itself, so that it does not matter whether CUDA and
threads are up. The program imports IPython, numpy and sympy once and forks a process per session in milliseconds. A
session answers on a socket of its own; everything it sends has a maximum size and a deadline, and anything else than
the expected frame means that the session is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import Any

from .config import SandboxConfig
from .forked import Exit, ForkedInterpreter
from .inside import scratch
from .result import IsolationError, ToolFailure, advice


logger = logging.getLogger(__name__)

_START_SECONDS = 60.0
_SPAWN_SECONDS = 30.0
_EXIT_SECONDS = 5.0
_SPAWNS_AT_ONCE = 16
_KERNEL_MODULES = ("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "zmq.eventloop.zmqstream")
_THREAD_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_HIDDEN_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_servers: weakref.WeakSet[ForkServer] = weakref.WeakSet()


class ForkServer:
    """Owns the warm interpreter and the sessions forked from it. All methods run on one event loop.

    Args:
        config ([`SandboxConfig`]):
            Limits and isolation.
        kernels (`bool`, *optional*, defaults to `False`):
            Whether the sessions are Jupyter kernels (`ipykernel` is imported beforehand).
        quiet (`bool`, *optional*, defaults to `False`):
            Whether `isolation="best_effort"` logs nothing about what is missing.
    """

    def __init__(self, config: SandboxConfig, kernels: bool = False, quiet: bool = False) -> None:
        self.config = config
        self.kernels = kernels
        self.quiet = quiet
        self.layers: dict[str, str] = {}
        self.warm_up_seconds = 0.0
        self.pid: int | None = None
        self.root = ""
        self._control: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._numbers = 0
        self._spawned: dict[int, asyncio.Future] = {}
        self._exits: dict[int, asyncio.Future] = {}
        self._open: set[socket.socket] = set()
        _servers.add(self)

    # ------------------------------------------------------------------------------------------------- start

    async def start(self) -> None:
        """Starts the warm interpreter. Raises [`ToolFailure`] or [`IsolationError`] where it cannot."""
        if sys.platform != "linux":
            raise IsolationError(
                f"Confined sessions need Linux, and this is {sys.platform}. Use a Linux container, or set "
                "`isolation='best_effort'` to run every session as an unconfined Jupyter kernel."
            )
        self._spawning = asyncio.Semaphore(_SPAWNS_AT_ONCE)
        await self._launch()

    async def _launch(self) -> None:
        loop = asyncio.get_running_loop()
        # paths of sockets in here must stay short, and a session must not read its neighbours' names
        self.root = tempfile.mkdtemp(prefix="trl-multiturn-")
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = os.path.join(self.root, "log")
        with open(log, "wb") as errors, theirs:
            self._process = subprocess.Popen(
                self._command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=self._environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the trainer
            )
        control.setblocking(False)
        self._control = control
        try:
            async with asyncio.timeout(_START_SECONDS):
                await loop.sock_sendall(control, json.dumps(self._settings()).encode())
                hello = json.loads(await loop.sock_recv(control, 65536) or b'{"op": "failed"}')
        except (OSError, TimeoutError) as error:
            hello = {"op": "failed", "reason": str(error)}
        if hello["op"] != "ready":
            with contextlib.suppress(OSError), open(log) as file:
                hello.setdefault("reason", file.read()[-2000:].strip())
            self.kill()
            raise ToolFailure(
                f"The sandbox's interpreter does not start ({hello.get('reason') or 'it gave no reason'}), so "
                f"no session can. Check that `{self._command(0)[0]} -c 'import IPython'` works."
            )
        self.pid, self.layers, self.warm_up_seconds = hello["pid"], hello["layers"], hello["seconds"]
        loop.add_reader(control, self._on_control)
        self._judge_layers()

    def _command(self, descriptor: int) -> list[str]:
        config = self.config
        # `-I` would also ignore PYTHONHASHSEED; with an environment made from nothing, these flags isolate as well
        flags = ["-P"] if site.ENABLE_USER_SITE else ["-P", "-s"]
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside", "start.py")
        return [*config.launcher, config.python or sys.executable, *flags, program, str(descriptor)]

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ", "TZDIR") if name in os.environ}
        extra = {name: value for name, value in self.config.environment.items() if not name.startswith("PYTHON")}
        return {
            **kept,
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": self.root,
            "TMPDIR": self.root,
            "MPLBACKEND": "Agg",
            "PYTHONHASHSEED": self.config.environment.get("PYTHONHASHSEED", str((self.config.seed or 0) % 2**32)),
            **dict.fromkeys(_THREAD_POOLS, "1"),
            **dict.fromkeys(_HIDDEN_DEVICES, ""),
            **extra,
        }

    def _settings(self) -> dict[str, Any]:
        config = self.config
        names = ("isolation", "memory_limit_mb", "file_limit_mb", "cpu_limit_seconds", "scratch_limit_mb", "max_files",
                 "output_limit_chars", "include_stderr", "network", "seed", "environment")  # fmt: skip
        return {
            **{name: getattr(config, name) for name in names},
            "root": self.root,
            "kernels": self.kernels,
            "preload": [*(_KERNEL_MODULES if self.kernels else ()), *config.preload],
            "readonly_paths": list(config.readonly_paths),
            "namespaces": not self.kernels and not config.launcher,
            # inside a launcher's namespaces the number would mean another process
            "owner": 0 if config.launcher else os.getpid(),
        }

    def _judge_layers(self) -> None:
        missing = [name for name in ("landlock", "seccomp") if self.layers[name] == "off"]
        if self.config.isolation == "none" or not missing:
            return
        text = "; ".join(f"no {name}: {advice(name)}" for name in missing)
        if self.config.isolation == "strict":
            self.kill()
            raise IsolationError(
                f"This machine does not confine model-written code as `isolation='strict'` promises ({text}). Or set "
                "`isolation='best_effort'` to run with what there is, where all you could lose is this machine."
            )
        if not self.quiet:
            logger.warning("The sandbox runs with less isolation than it could (%s).", text)

    # ---------------------------------------------------------------------------------------------- sessions

    async def spawn(self, kernel: dict | None = None) -> ForkedInterpreter:
        """Forks a session. Restarts the warm interpreter if something has killed it.

        Args:
            kernel (`dict`, *optional*):
                Connection information of a Jupyter kernel, which the process becomes instead.
        """
        async with self._spawning:
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                raise ToolFailure(
                    f"No connection to another session can be made ({error}). Raise the limit on open files "
                    "(`ulimit -n`): every open session takes one."
                ) from error
            ours.setblocking(False)
            try:
                number, info = await self._request_process(theirs, kernel)
                interpreter = ForkedInterpreter(self, number, info, ours)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
        self._open.add(ours)
        try:
            async with asyncio.timeout(_SPAWN_SECONDS):
                await interpreter.ready()
        except TimeoutError as error:
            await interpreter.close()
            raise ToolFailure(f"A forked session did not answer within {_SPAWN_SECONDS:g} seconds.") from error
        except BaseException:
            await interpreter.close()
            raise
        return interpreter

    async def _request_process(self, theirs: socket.socket, kernel: dict | None) -> tuple[int, dict]:
        """Asks for a process that talks on `theirs`; returns its number and what the warm interpreter says of it."""
        for attempt in (1, 2):
            if self._control is None:
                await self._launch()
            self._numbers += 1
            number = self._numbers
            future = self._spawned[number] = asyncio.get_running_loop().create_future()
            self._exits[number] = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(_SPAWN_SECONDS):
                    await self._tell({"op": "spawn", "id": number, "kernel": kernel}, [theirs.fileno()])
                    return number, await future
            except ToolFailure:
                self._exits.pop(number, None)
                raise
            except (OSError, TimeoutError) as error:
                self._exits.pop(number, None)
                self.kill()
                if attempt == 2:
                    raise ToolFailure(f"The sandbox's interpreter does not fork sessions any more: {error}") from error
            finally:
                self._spawned.pop(number, None)
        raise AssertionError("unreachable")

    async def _tell(self, message: dict, descriptors: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        while True:
            if self._control is None:
                raise ConnectionError("the warm interpreter is gone")
            try:
                socket.send_fds(self._control, [data], descriptors or [])
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)

    def tell(self, **message: Any) -> None:
        """Sends a small message and waits for no answer. A warm interpreter that is gone has no sessions to tell."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(json.dumps(message).encode())

    def _on_control(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.kill()
                return
            message = json.loads(data)
            if message["op"] == "spawned":
                _resolve(self._spawned.get(message["id"]), message)
            elif message["op"] == "refused":
                future = self._spawned.get(message["id"])
                if future is not None and not future.done():
                    future.set_exception(ToolFailure(f"A session cannot be forked: {message['reason']}."))
            elif message["op"] == "exit":
                _resolve(self._exits.get(message["id"]), Exit(message["code"], message["reason"]))

    async def exit_of(self, number: int) -> Exit | None:
        """How a session ended; `None` if the warm interpreter does not say in time."""
        future = self._exits.get(number)
        if future is None:
            return None
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(future), _EXIT_SECONDS)
        return None

    def exit_code(self, number: int) -> int | None:
        """How a session ended; `None` while it lives."""
        future = self._exits.get(number)
        if future is None or (future.done() and future.exception() is not None):
            return -signal.SIGKILL  # closed, or gone with the warm interpreter
        return future.result().code if future.done() else None

    def forget(self, number: int, connection: socket.socket) -> None:
        """Called by a session that has ended."""
        self._exits.pop(number, None)
        self._open.discard(connection)

    # --------------------------------------------------------------------------------------------------- end

    def kill(self) -> None:
        """Ends the warm interpreter with everything it forked, at once. The next spawn starts another one."""
        process, root = self._disconnect()
        if process is not None:
            threading.Thread(target=_bury, args=(process, root), daemon=True).start()

    async def stop(self) -> None:
        """Ends everything and waits until it is gone."""
        process, root = self._disconnect()
        if process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_SECONDS):
                    while process.poll() is None:
                        await asyncio.sleep(0.002)
            process.kill()
            _bury(process, root)

    def _disconnect(self) -> tuple[subprocess.Popen | None, str]:
        control, self._control = self._control, None
        if control is not None:
            with contextlib.suppress(Exception):
                asyncio.get_running_loop().remove_reader(control)
            control.close()  # its end of file tells the interpreter to end everything
        for future in (*self._spawned.values(), *self._exits.values()):
            if not future.done():
                future.set_exception(ConnectionError("the warm interpreter is gone"))
                future.exception()  # nobody may be waiting for it
        process, self._process = self._process, None
        root, self.root = self.root, ""
        return process, root

    def abandon(self) -> None:
        """Closes every connection of this object, without an event loop: for copies of it in forked processes."""
        for connection in (self._control, *self._open):
            if connection is not None:
                connection.close()


def _bury(process: subprocess.Popen, root: str) -> None:
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if root:
        scratch.remove(root)  # already gone unless the interpreter was killed


def _resolve(future: asyncio.Future | None, value: Any) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _abandon_all() -> None:
    """A forked worker must not hold connections: the sessions end when the last holder is gone."""
    for server in list(_servers):
        server.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
