"""One session's process, seen from the trainer: cells out, verdicts in, and no trust at all.

Everything that the process sends has a maximum size and a deadline; anything but the expected frame means that it is
dead, and the session replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import _protocol as protocol
from . import _scratch
from .observation import last_paragraph
from .result import ToolFailure


if TYPE_CHECKING:
    from .forkserver import ForkServer

_WATCH_AFTER_SECONDS = 0.02
_WAKE_SECONDS = 1.0
_READ = 4096  # most replies fit


class _NobodyListensError(Exception):
    """A session takes no cell."""


@dataclass
class Exit:
    """How a session's process ended: its exit code (negative: the signal), and why, if it was killed on purpose."""

    code: int
    reason: str


class ForkedInterpreter:
    """One session's process."""

    def __init__(self, server: ForkServer, number: int, info: dict, connection: socket.socket) -> None:
        self.server = server
        self.config = server.config
        self.number = number
        self.pid: int = info["pid"]
        self.folder: str = info["folder"]
        self._connection = connection
        self._largest = protocol.largest_reply(self.config.output_limit_chars)
        self._unread = b""
        self._stopped = False
        self._closed = False

    async def ready(self) -> None:
        """Waits until the process has confined itself."""
        try:
            status, _, _, text = await self._receive(protocol.NO_NONCE, (protocol.READY, protocol.FAILED))
        except (ConnectionError, ValueError) as error:
            raise ToolFailure(f"A forked session ended before its first cell: {error}") from error
        if status != protocol.READY:
            raise ToolFailure(f"A forked session could not confine itself: {text}")

    async def execute(self, code: str, timeout: float):
        """Runs one cell and says what became of it."""
        from .sandbox import Reply

        threads = self._stopped  # of earlier cells; what they break is not this cell's fault
        watch = asyncio.get_running_loop().call_later(_WATCH_AFTER_SECONDS, self._watch, True)
        try:
            nonce = await self._request(code, timeout)
            async with asyncio.timeout(timeout + self.config.grace_seconds):
                status, flags, dropped, text = await self._receive(nonce, protocol.STATUS)
        except _NobodyListensError:
            return Reply("RuntimeError: an earlier cell broke the interpreter", "crashed", alive=False, ran=False)
        except TimeoutError:
            return Reply(timeout_message(timeout), "timeout", alive=False)
        except (OSError, ValueError) as error:
            reply = await self._autopsy(error)
            return replace(reply, ran=reply.ran and not threads)
        finally:
            watch.cancel()
            if watch.when() <= asyncio.get_running_loop().time():
                self._watch(False)
        if flags & protocol.NOT_RUN:
            return Reply(last_paragraph(text), "error", alive=False, ran=False)
        if flags & protocol.THREADS_LEFT:
            self._stopped = True  # what they do next is done on the next cell's time
            self.server.tell(op="signal", id=self.number, number=signal.SIGSTOP)
        excess = _scratch.over_quota(self.folder, self.config.scratch_limit_mb, self.config.max_files)
        if excess is not None:
            return Reply(_quota_message(excess), "error", alive=False)
        if status == protocol.TIMEOUT:
            return Reply(timeout_message(timeout), "timeout")
        if status != protocol.OK:
            text = last_paragraph(text)
        return Reply(text, protocol.STATUS[status], alive=not flags & protocol.SPOILED, dropped=dropped)

    def _watch(self, on: bool) -> None:
        self.server.tell(op="watch", id=self.number, on=on)

    async def _request(self, code: str, timeout: float) -> bytes:
        """Sends a cell; returns the nonce that its answer must carry."""
        with contextlib.suppress(BlockingIOError):
            if not self._unread:
                self._connection.recv(1)
            raise _NobodyListensError("it ended, or spoke unasked, between two cells")
        nonce, data, stopped = secrets.token_bytes(8), code.encode("utf-8", "replace"), self._stopped
        request = protocol.REQUEST.pack(nonce, -timeout if stopped else timeout, len(data)) + data
        if stopped:
            self._stopped = False
            self.server.tell(op="signal", id=self.number, number=signal.SIGCONT)
        try:
            request = request[self._connection.send(request) :]  # all of it, as a rule
        except BlockingIOError:
            pass
        except OSError as error:
            raise _NobodyListensError("it has just ended") from error
        if not request and not stopped:
            return nonce
        try:
            async with asyncio.timeout(_WAKE_SECONDS if stopped else timeout + self.config.grace_seconds):
                await asyncio.get_running_loop().sock_sendall(self._connection, request)
                if stopped:
                    await self._receive(nonce, (protocol.READY,))
        except TimeoutError:
            raise _NobodyListensError("a thread of an earlier cell took this one") from None
        return nonce

    async def _receive(self, nonce: bytes, expected: Container[int]) -> tuple[int, int, int, str]:
        await self._fill(protocol.REPLY.size)
        echo, status, flags, dropped, length = protocol.REPLY.unpack_from(self._unread)
        if echo != nonce or length > self._largest or status not in expected:
            raise ValueError("it answered garbage")
        end = protocol.REPLY.size + length
        await self._fill(end)
        text = self._unread[protocol.REPLY.size : end].decode("utf-8", "replace")
        self._unread = self._unread[end:]
        return status, flags, dropped, text

    async def _fill(self, size: int) -> None:
        """Reads until `size` bytes are there; never much more than an honest reply has."""
        while len(self._unread) < size:
            part = await asyncio.get_running_loop().sock_recv(self._connection, max(_READ, size - len(self._unread)))
            if not part:
                raise ConnectionError("its process ended")
            self._unread += part

    async def _autopsy(self, error: Exception):
        """The verdict on a cell whose process broke off."""
        from .sandbox import Reply

        if isinstance(error, ValueError):
            return Reply(f"RuntimeError: the interpreter was stopped, because {error}", "crashed", alive=False)
        self.kill()  # it may have closed its connection and live on; if it is dead, this changes nothing
        try:
            ended = await self.server.exit_of(self.number)
        except ConnectionError:  # the warm interpreter was killed, and its sessions with it: not this cell's fault
            return Reply("RuntimeError: the sandbox was restarted", "crashed", alive=False, ran=False)
        if ended is not None and ended.reason.startswith("quota: "):
            return Reply(_quota_message(ended.reason.removeprefix("quota: ")), "error", alive=False)
        if ended is not None and -ended.code == signal.SIGXCPU:
            return Reply("TimeoutError: the session used up its CPU time", "timeout", alive=False)
        return Reply(f"RuntimeError: the interpreter died{_cause(ended)}", "crashed", alive=False)

    def signal(self, number: int) -> None:
        """Sends a signal to the process."""
        self.server.tell(op="signal", id=self.number, number=int(number))

    def kill(self) -> None:
        """Ends the process, without waiting for its end."""
        self.server.tell(op="kill", id=self.number)

    def exit_code(self) -> int | None:
        """How the process ended (negative: by which signal); `None` while it lives."""
        return self.server.exit_code(self.number)

    async def close(self) -> None:
        """Ends the process, whatever it is doing, and returns when it and its files are gone."""
        if self._closed:
            return
        self._closed = True
        self.kill()
        with contextlib.suppress(ConnectionError):
            await self.server.exit_of(self.number)
        self.server.forget(self.number, self._connection)
        self._connection.close()


def timeout_message(timeout: float) -> str:
    """What the policy reads about a cell that ran too long."""
    return f"TimeoutError: the cell ran longer than {timeout:g} seconds"


def _quota_message(excess: str) -> str:
    return f"OSError: the session's folder held {excess}, and was emptied"


def _cause(ended: Exit | None) -> str:
    if ended is None or ended.code >= 0:
        return f" (exit code {ended.code})" if ended is not None else ""
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(-ended.code).name})"
    return f" (signal {-ended.code})"
