"""One session's process, seen from the trainer: cells out, verdicts in, and no trust at all.

Everything that the process sends has a maximum size and a deadline; anything but the expected frame means that it is
dead, and the session replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from .backend import Reply
from .config import SandboxConfig
from .inside import protocol, scratch
from .observation import error_text, timeout_message
from .result import ToolFailure


_WATCH_AFTER_SECONDS = 0.02
_WAKE_SECONDS = 1.0
_READ = 4096  # most replies fit


class NobodyListensError(Exception):
    """A session takes no cell."""


class Answer(NamedTuple):
    """A frame that a session's process has sent."""

    status: int
    flags: int
    dropped: int
    text: str


@dataclass
class Exit:
    """How a session's process ended: its exit code (negative: the signal), and why, if it was killed on purpose."""

    code: int
    reason: str


@dataclass
class Request:
    """One cell on its way to a session's process and back, as far as it has got. `start` is of the monotonic clock."""

    interpreter: ForkedInterpreter
    code: str
    timeout: float
    start: float = field(default_factory=time.monotonic)
    nonce: bytes | None = None  # what its answer must carry; `None` if it is not sent yet
    rest: bytes = b""  # of the cell, not sent yet
    wakes: bool = False  # the process was stopped
    sent: float = 0.0  # when; the cell's time begins then
    answer: Answer | None = None
    reply: Reply | None = None
    error: Exception | None = None

    async def finish(self) -> Reply:
        """Waits for the end of the cell, whatever that is."""
        return self.reply or await self.interpreter.finish(self)


class SessionParent(Protocol):
    """What a session's process needs of the fork server."""

    config: SandboxConfig

    def tell(self, **message: Any) -> None: ...

    async def exit_of(self, number: int) -> Exit | None: ...

    def exit_code(self, number: int) -> int | None: ...

    def forget(self, number: int, connection: socket.socket) -> None: ...


class ForkedInterpreter:
    """One session's process."""

    def __init__(self, server: SessionParent, number: int, info: dict, connection: socket.socket) -> None:
        self.server = server
        self.config = server.config
        self.number = number
        self.pid: int = info["pid"]
        self.folder: str = info["folder"]
        self._connection = connection
        self._largest = protocol.largest_reply(self.config.output_limit_chars)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._unread, self._missing = b"", _READ
        self._stopped = False
        self._closed = self._ended = self._lent = False
        self._lending = threading.RLock()

    async def ready(self) -> None:
        """Waits until the process has confined itself."""
        try:
            status, *_, text = await self._receive(protocol.NO_NONCE, (protocol.READY, protocol.FAILED))
        except (ConnectionError, ValueError) as error:
            raise ToolFailure(f"A forked session ended before its first cell: {error}") from error
        if status != protocol.READY:
            raise ToolFailure(f"A forked session could not confine itself: {text}")

    async def execute(self, code: str, timeout: float) -> Reply:
        """Runs one cell and says what became of it."""
        return await Request(self, code, timeout).finish()

    async def finish(self, request: Request) -> Reply:
        """Goes on with a cell wherever it has got to."""
        loop = asyncio.get_running_loop()
        threads = self._stopped  # of earlier cells; what they break is not this cell's fault
        watch = loop.call_at(request.start + _WATCH_AFTER_SECONDS, self._watch, True)
        try:
            if request.error is not None:
                raise request.error
            if request.nonce is None:
                self._send(request)
            await self._send_rest(request)
            async with asyncio.timeout_at(request.sent + request.timeout + self.config.grace_seconds):
                request.answer = request.answer or await self._receive(request.nonce, protocol.STATUS)
        except NobodyListensError:
            return Reply("RuntimeError: an earlier cell broke the interpreter", "crashed", alive=False, ran=False)
        except TimeoutError:
            return Reply(timeout_message(request.timeout), "timeout", alive=False)
        except (OSError, ValueError) as error:
            reply = await self._autopsy(error)
            return replace(reply, ran=reply.ran and not threads)
        finally:
            watch.cancel()
            if watch.when() <= loop.time():
                self._watch(False)
        return self._judge(request)

    def begin(self, code: str, timeout: float) -> Reply | Request:
        """Runs the cell on the caller's thread for up to 20 ms.

        If it has answered in that time and nothing is unusual about the answer, returns the reply. Otherwise returns
        the request with what was read so far, and [`Request.finish`] decides on the event loop.
        """
        request = Request(self, code, timeout)
        if self._stopped:
            return request
        try:
            self._borrow()
            self._send(request)
            while not request.rest and request.answer is None:
                left = request.start + _WATCH_AFTER_SECONDS - time.monotonic()
                if left <= 0 or not self._poll.poll(1000 * left):
                    break
                with contextlib.suppress(BlockingIOError):
                    self._take_in(self._connection.recv(self._missing))
                request.answer = self._next_frame(request.nonce, protocol.STATUS)
            if request.answer is not None and not request.answer.flags:
                request.reply = self._judge(request)
        except (OSError, ValueError, NobodyListensError) as error:
            request.error = error
        finally:
            self._give_back()
        return request.reply if request.reply is not None and request.reply.alive else request

    def _borrow(self) -> None:
        """Keeps the connection's descriptor from being closed, and given to another, under a thread's hands."""
        with self._lending:
            if self._closed:
                raise NobodyListensError("it is being ended")
            self._lent = True

    def _give_back(self) -> None:
        with self._lending:
            self._lent = False
            if self._ended:
                self._connection.close()

    def _judge(self, request: Request) -> Reply:
        """The verdict on a cell that was answered."""
        status, flags, dropped, text = request.answer
        if flags & protocol.NOT_RUN:
            return Reply(error_text(text), "error", alive=False, ran=False)
        if flags & protocol.THREADS_LEFT:
            self._stopped = True  # what they do next is done on the next cell's time
            self.server.tell(op="signal", id=self.number, number=signal.SIGSTOP)
        excess = scratch.over_quota(self.folder, self.config.scratch_limit_mb, self.config.max_files)
        if excess is not None:
            return Reply(_quota_message(excess), "error", alive=False)
        if status == protocol.TIMEOUT:
            return Reply(timeout_message(request.timeout), "timeout")
        if status != protocol.OK:
            text = error_text(text)
        return Reply(text, protocol.STATUS[status], alive=not flags & protocol.SPOILED, dropped=dropped)

    def _watch(self, on: bool) -> None:
        self.server.tell(op="watch", id=self.number, on=on)

    def _send(self, request: Request) -> None:
        """Sends a cell, or as much of it as the socket takes at once: all of it, as a rule."""
        with contextlib.suppress(BlockingIOError):
            if not self._unread:
                self._connection.recv(1)
            raise NobodyListensError("it ended, or spoke unasked, between two cells")
        nonce, data = secrets.token_bytes(8), request.code.encode("utf-8", "replace")
        request.wakes, self._stopped = self._stopped, False
        header = protocol.REQUEST.pack(nonce, -request.timeout if request.wakes else request.timeout, len(data))
        if request.wakes:
            self.server.tell(op="signal", id=self.number, number=signal.SIGCONT)
        request.nonce, request.rest, request.sent = nonce, header + data, time.monotonic()
        try:
            request.rest = request.rest[self._connection.send(request.rest) :]
        except BlockingIOError:
            pass
        except OSError as error:
            raise NobodyListensError("it has just ended") from error

    async def _send_rest(self, request: Request) -> None:
        """Waits until a cell is sent, and until a process that was stopped says that it has it."""
        if not request.rest and not request.wakes:
            return
        try:
            patience = _WAKE_SECONDS if request.wakes else request.timeout + self.config.grace_seconds
            async with asyncio.timeout(patience):
                await asyncio.get_running_loop().sock_sendall(self._connection, request.rest)
                if request.wakes:
                    await self._receive(request.nonce, (protocol.READY,))
        except TimeoutError:
            raise NobodyListensError("a thread of an earlier cell took this one") from None
        request.sent = time.monotonic()

    async def _receive(self, nonce: bytes, expected: Container[int]) -> Answer:
        while (answer := self._next_frame(nonce, expected)) is None:
            self._take_in(await asyncio.get_running_loop().sock_recv(self._connection, self._missing))
        return answer

    def _take_in(self, part: bytes) -> None:
        if not part:
            raise ConnectionError("its process ended")
        self._unread += part

    def _next_frame(self, nonce: bytes, expected: Container[int]) -> Answer | None:
        """What was read, once it is all there; never much more than an honest reply has."""
        end = protocol.REPLY.size
        if len(self._unread) >= end:
            echo, status, flags, dropped, length = protocol.REPLY.unpack_from(self._unread)
            if echo != nonce or length > self._largest or status not in expected:
                raise ValueError("it answered garbage")
            end += length
            if len(self._unread) >= end:
                text = self._unread[protocol.REPLY.size : end].decode("utf-8", "replace")
                self._unread = self._unread[end:]
                return Answer(status, flags, dropped, text)
        self._missing = max(_READ, end - len(self._unread))
        return None

    async def _autopsy(self, error: Exception) -> Reply:
        """The verdict on a cell whose process broke off."""
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
        with self._lending:
            self._closed = True
        self.kill()
        with contextlib.suppress(ConnectionError):
            await self.server.exit_of(self.number)
        self.server.forget(self.number, self._connection)
        with self._lending:
            self._ended = True
            if not self._lent:
                self._connection.close()


def _quota_message(excess: str) -> str:
    return f"OSError: the session's folder held {excess}, and was emptied"


def _cause(ended: Exit | None) -> str:
    if ended is None or ended.code >= 0:
        return f" (exit code {ended.code})" if ended is not None else ""
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(-ended.code).name})"
    return f" (signal {-ended.code})"
