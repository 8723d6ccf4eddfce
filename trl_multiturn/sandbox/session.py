"""One stateful session of the sandbox: cells in turn, replay after a crash.

A cell runs on the sandbox's event loop, where everything that can go wrong is waited for. Most cells answer within a
millisecond, however, and two changes of thread cost about as much as such a cell: [`Session.run`] therefore sends the
cell and reads the answer on the caller's own thread, if nobody is before it, and hands whatever turns out to be more
than that to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Set
from typing import Any, Protocol

from ._admission import Gate, Visit
from ._loop import LoopThread
from .arithmetic import MOST_CELLS, Answers, Calculator, Key, can_share_a_process, names_after
from .backend import Begins, Begun, Interpreter, Reply
from .config import SandboxConfig
from .observation import Addresses, clean, truncate
from .result import ToolResult


logger = logging.getLogger(__name__)

_CLOSED = "This session is closed. Open another one from the sandbox."


class SessionHost(Protocol):
    """What a session needs of the sandbox that opened it."""

    config: SandboxConfig
    admission: Gate  # bounds the cells that run at the same time
    answers: Answers | None  # of plain arithmetic, where it need not run again
    calculator: Calculator | None  # runs plain arithmetic that is new

    @property
    def running_thread(self) -> LoopThread | None: ...

    def loop_thread(self) -> LoopThread: ...

    async def spawn(self) -> Interpreter: ...

    def forget(self, session: Session) -> None: ...


class Session:
    """One stateful interpreter, as the cells of one notebook; made by [`Sandbox.open`].

    The process behind it starts with the first cell that needs one. It may die (a crash, a kill after a timeout): the
    next cell then runs in a fresh one, in which the earlier successful cells have been run again.
    """

    def __init__(self, sandbox: SessionHost) -> None:
        self._sandbox = sandbox
        self._config = sandbox.config
        self._interpreter: Interpreter | None = None
        self._begins: Begins | None = None  # the same, if it can begin a cell on the caller's thread
        self._history: list[str] = []
        self._names: Set[str] | None = frozenset()  # assigned so far, if all cells were plain arithmetic
        self._had_process = False
        self._cells = 0
        self._addresses = Addresses()
        self._turn = Gate(1)
        self._closed = False

    def run(self, code: str) -> ToolResult:
        """Runs one cell. Never raises for what the code does; [`ToolFailure`] if the machine fails."""
        thread, visit = self._enter()
        try:
            result = self._run_here(thread, visit, code)
            if isinstance(result, ToolResult):
                visit.leave()
                return result
            if visit.would_wait_for(threading.get_ident()):
                raise RuntimeError(
                    "This thread is in the middle of another cell, so this one would never run: it comes from a "
                    "signal handler or a finalizer. Run it on another thread."
                )
            return thread.run(self._run(visit, code, result))
        except BaseException:
            if visit.take_over():
                self._give_up(thread, visit)
            raise

    async def arun(self, code: str) -> ToolResult:
        """[`Session.run`] for event loops. A cancelled call kills the cell; the session can go on."""
        thread, visit = self._enter()
        try:
            if self._turn.join(visit) and not self._closed:
                known = None if self._refusal(code) else self._known_answer(code)
                if known is not None:
                    visit.leave()
                    return known
            return await thread.wait(self._run(visit, code))
        except BaseException:
            if visit.take_over():
                visit.leave()
            raise

    def close(self) -> None:
        """Ends the process and removes its files. Safe to call twice, and while a cell runs."""
        if not self._close_here():
            self._sandbox.loop_thread().run(self._close())

    async def aclose(self) -> None:
        """[`Session.close`] for event loops."""
        if not self._close_here():
            await self._sandbox.loop_thread().wait(self._close())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __del__(self) -> None:
        # forgotten rather than closed: its process must not wait for the sandbox's end
        interpreter, thread = getattr(self, "_interpreter", None), self._sandbox.running_thread
        if interpreter is not None and thread is not None and thread.usable:
            with contextlib.suppress(RuntimeError):
                thread.submit(interpreter.close())

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self.aclose()

    # ------------------------------------------------------------------------------------- on the caller's thread

    def _enter(self) -> tuple[LoopThread, Visit]:
        thread = self._sandbox.loop_thread()
        thread.check()
        return thread, Visit(self._turn, self._sandbox.admission)

    def _run_here(self, thread: LoopThread, visit: Visit, code: str) -> ToolResult | Begun | None:
        """Runs a cell without a change of thread, unless others come first or it turns out to be a long one."""
        if not self._turn.join(visit):
            return None
        if self._closed or thread.is_current or not thread.usable:
            return None
        refusal = self._refusal(code)
        if refusal is not None:
            return ToolResult(refusal, "error")
        begins = self._begins
        if begins is None:
            return self._known_answer(code)
        if not self._sandbox.admission.try_enter(visit):
            return None
        visit.caller = threading.get_ident()
        start = time.monotonic()
        reply = begins.begin(code, self._config.timeout_seconds)
        return self._conclude(code, reply, time.monotonic() - start) if isinstance(reply, Reply) else reply

    def _close_here(self) -> bool:
        """Closes a session that has no process, unless a cell runs or waits. Returns whether it is closed."""
        if self._closed or self._sandbox.running_thread is None:
            return True
        visit = Visit(self._turn)
        try:
            if not self._turn.try_enter(visit) or self._interpreter is not None:
                return False
            self._closed = True
            self._sandbox.forget(self)
            return True
        finally:
            visit.leave()

    def _give_up(self, thread: LoopThread, visit: Visit) -> None:
        """Sees out a visit that was interrupted, by Ctrl-C say, before the loop took it over."""
        visit.caller = None
        if all(gate.holds(visit) for gate in visit.gates):
            # in the middle of a cell: nobody knows what the process is doing now
            with contextlib.suppress(RuntimeError):  # the sandbox was closed meanwhile, and the process has ended
                thread.submit(self._abandon(visit))
                return
        visit.leave()

    # ------------------------------------------------------------------------------------------------ on the loop

    async def _start(self) -> Interpreter:
        if self._closed:
            raise RuntimeError(_CLOSED)
        self._had_process = True
        self._interpreter = interpreter = await self._sandbox.spawn()
        self._begins = interpreter if isinstance(interpreter, Begins) else None
        return interpreter

    async def _close(self) -> None:
        self._closed = True
        self._sandbox.forget(self)
        await self._discard()

    async def _discard(self) -> None:
        interpreter, self._interpreter, self._begins = self._interpreter, None, None
        if interpreter is not None:
            await interpreter.close()

    async def _abandon(self, visit: Visit) -> None:
        try:
            await self._discard()
        finally:
            visit.leave()

    async def _run(self, visit: Visit, code: str, begun: Begun | None = None) -> ToolResult:
        if not visit.take_over():
            raise asyncio.CancelledError  # its caller has given it up
        visit.caller = None
        try:
            await self._turn.enter(visit)
            if begun is None:
                if self._closed:
                    raise RuntimeError(_CLOSED)
                refusal = self._refusal(code)
                if refusal is not None:
                    return ToolResult(refusal, "error")
            if begun is not None or self._had_process:
                return await self._run_in_process(visit, code, begun)
            async with self._known_or_new(code) as known:
                return known or await self._run_in_process(visit, code)
        finally:
            visit.leave()

    async def _run_in_process(self, visit: Visit, code: str, begun: Begun | None = None) -> ToolResult:
        admission = visit.gates[1]
        await admission.enter(visit)
        start = time.monotonic() if begun is None else begun.start
        try:
            reply = await self._execute(code, begun)
        except BaseException:
            # cancelled in the middle: nobody knows what the process is doing now
            await asyncio.shield(self._discard())
            raise
        admission.leave(visit)
        result = self._conclude(code, reply, time.monotonic() - start)
        if not reply.alive:
            await self._discard()
        return result

    @contextlib.asynccontextmanager
    async def _known_or_new(self, code: str) -> AsyncIterator[ToolResult | None]:
        """The answer of a session that had no process, if it is known; of equal new cells, one runs first."""
        key, answers = self._key(code), self._sandbox.answers
        if key is None or answers is None:
            yield None
            return
        async with answers.one_first(key):
            yield self._known_answer(code)

    def _known_answer(self, code: str) -> ToolResult | None:
        """What a session that needed no process so far would answer, if another one has."""
        if self._had_process:
            return None
        start, key, answers = time.monotonic(), self._key(code), self._sandbox.answers
        reply = answers.get(key) if answers is not None and key is not None else None
        return None if reply is None else self._conclude(code, reply, time.monotonic() - start)

    def _key(self, code: str) -> Key | None:
        """The cells up to this one, if they are plain arithmetic."""
        if self._names is None or names_after(code, self._names) is None or len(self._history) >= MOST_CELLS:
            return None
        return (*self._history, code)

    async def _calculated(self, code: str) -> Reply | None:
        """The answer to plain arithmetic of a session that needed no process so far."""
        calculator, key = self._sandbox.calculator, self._key(code)
        names = names_after(code, self._names or frozenset())
        if calculator is None or self._had_process or key is None or names is None or not can_share_a_process(names):
            return None
        return await calculator.answer(key)

    def _refusal(self, code: str) -> str | None:
        config = self._config
        if not isinstance(code, str):  # a policy fills in the arguments of native tool calls
            return f"TypeError: `code` must be a string, not {type(code).__name__}"
        if len(code) > config.code_limit_chars:
            return f"ValueError: the cell has {len(code)} characters, more than the limit of {config.code_limit_chars}"
        if config.max_cells is not None and self._cells >= config.max_cells:
            return f"RuntimeError: the limit of {config.max_cells} cells is reached"
        return None

    def _conclude(self, code: str, reply: Reply, seconds: float) -> ToolResult:
        if self._names is not None:
            if self._sandbox.answers is not None and (key := self._key(code)) is not None:
                self._sandbox.answers.keep(key, reply)
            self._names = names_after(code, self._names) if reply.status == "ok" else None
        self._cells += 1
        if reply.status == "ok":
            self._history.append(code)
        text = clean(reply.output)
        if self._config.seed is not None:
            text = self._addresses.repeat(text)
        output = truncate(text, self._config.output_limit_chars, reply.dropped)
        return ToolResult(output, reply.status, seconds)

    async def _execute(self, code: str, begun: Begun | None) -> Reply:
        if begun is None and (calculated := await self._calculated(code)) is not None:
            return calculated
        for attempt in range(3):
            if begun is not None:
                reply = await begun.finish()
            else:
                interpreter = self._interpreter or await self._replace()
                reply = await interpreter.execute(code, self._config.timeout_seconds)
            if reply.ran:
                break
            # An earlier cell broke the interpreter under this one. Once more in a fresh process; if the replay of
            # the earlier cells breaks that one too, without them.
            begun = None
            await self._discard()
            if attempt:
                self._history.clear()
        return reply

    async def _replace(self) -> Interpreter:
        """A fresh process with the earlier successful cells run again, within the time of one cell."""
        interpreter = await self._start()
        deadline = time.monotonic() + self._config.timeout_seconds
        for cell in self._history:
            reply = await interpreter.execute(cell, max(0.1, deadline - time.monotonic()))
            if reply.status != "ok" or not reply.alive:
                # Cells that broke their own interpreter, or whose second run behaves differently: starting empty
                # keeps the session usable, and the policy reads its missing names in the next error.
                logger.debug("A replayed cell ended with %s; the session starts empty.", reply.status)
                self._history.clear()
                await self._discard()
                return await self._start()
        return interpreter
