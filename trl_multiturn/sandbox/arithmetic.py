"""Cells of plain arithmetic, whose text decides their answer: what such a cell has answered once, it answers again.

A policy that samples many solutions of one problem writes the same few lines again and again, and a process costs a
hundred times what they compute. Nothing is evaluated here: the first such cell runs in a process that such sessions
share ([`Calculator`]), and its answer is kept. A session gets a process of its own with the first cell of
another kind; the arithmetic before that is then run in it, as after a crash.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import keyword
import re
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Set
from functools import lru_cache

from .backend import Interpreter, Reply


Key = tuple[str, ...]  # the cells of a session, the last one included
Token = tuple[str | None, str]  # kind and text

_LONGEST = 1000  # characters of a cell, and of its answer
MOST_CELLS = 8  # of a session
_MOST_SHARED_CELLS = 500  # of a process that sessions share: a shell keeps what its cells display
_LONGEST_SECONDS = 1.0  # that others may have to wait there; what takes longer takes it in a process of its own
_MOST_SLOW_CELLS = 3  # then a policy writes such arithmetic, or the machine is too busy, and nobody waits any more
_FUNCTIONS = frozenset(("abs", "float", "int", "max", "min", "print", "round"))
_RESERVED = frozenset((*keyword.kwlist, *dir(builtins), "In", "Out", "display", "get_ipython")) - _FUNCTIONS
_TOKEN = re.compile(
    r"[ \t]*(?:(?P<name>[A-Za-z][A-Za-z0-9_]*)|(?P<number>[0-9]{1,15}(?:\.[0-9]{0,15})?)|(?P<comment>#[ -~]*)"
    r"|(?P<operator>//=?|[-+*/%]=?|==|[<>]=?|=|[(),]))[ \t]*"
)
# Elsewhere than at these, a statement is a command of the shell or nothing that runs
_BEGINNINGS = frozenset("+-(")


def names_after(code: str, names: Set[str]) -> Set[str] | None:
    """The variables that exist after a cell of plain arithmetic, where `names` existed before; `None` of other cells.

    Plain arithmetic is numbers, variables that were assigned before, `+ - * / // %`, comparisons, brackets, calls of a
    few functions of numbers, assignments and comments. What it says depends on nothing else, if it ends without an
    error: not on time, chance, files, the process, or the history that the shell keeps.
    """
    if len(code) > _LONGEST or "**" in code:
        return None
    return _names_after(code, frozenset(names))


@lru_cache(maxsize=4096)  # a cell is looked at several times, and samples of one problem write the same
def _names_after(code: str, names: frozenset[str]) -> frozenset[str] | None:
    found = names
    statement: list[Token] = []
    for line in code.split("\n"):
        tokens = _tokens(line)
        if tokens is None:
            return None
        statement += tokens
        open_brackets = sum({"(": 1, ")": -1}.get(text, 0) for _, text in statement)
        if open_brackets > 0:  # it goes on in the next line, where `name=` would assign nothing
            continue
        after = _names_after_statement(statement, found) if open_brackets == 0 else None
        if after is None:
            return None
        found, statement = after, []
    return None if statement else found


def _tokens(line: str) -> list[Token] | None:
    """Of a line, without its comment; `None` if it holds anything else."""
    tokens: list[Token] = []
    position, end = 0, len(line.rstrip(" \t"))
    while position < end:
        match = _TOKEN.match(line, position)
        if match is None:
            return None
        if match.lastgroup != "comment":
            tokens.append((match.lastgroup, match[match.lastgroup or 0]))
        position = match.end()
    if tokens and tokens[0][0] == "operator" and tokens[0][1] not in _BEGINNINGS:
        return None
    return tokens


def _names_after_statement(statement: list[Token], names: frozenset[str]) -> frozenset[str] | None:
    assigned = frozenset((statement[0][1],)) if _assigns(statement) else frozenset[str]()
    used = statement[len(assigned) :]
    for (kind, text), (_, following) in zip(used, [*used[1:], (None, "")], strict=False):
        if kind == "name" and text not in names and not (text in _FUNCTIONS and following == "("):
            return None  # a function that is not called may be the target of an assignment
        if (kind == "number" or text == ")") and following == "(":  # of which Python warns, with the cell's number
            return None
        if text == "=" and following.startswith("%"):  # `x = %magic`
            return None
    return None if assigned & _RESERVED else names | assigned


def _assigns(statement: list[Token]) -> bool:
    return len(statement) > 1 and statement[0][0] == "name" and statement[1][1] == "="


def can_share_a_process(names: Set[str]) -> bool:
    """Whether plain arithmetic that assigned these names leaves nothing that arithmetic of others would read."""
    return not names & _FUNCTIONS


class Answers:
    """What plain arithmetic has answered, by the cells that led to it; the least recently used are forgotten.

    Args:
        most (`int`, *optional*, defaults to `4096`):
            How many answers are kept.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._replies: OrderedDict[Key, Reply] = OrderedDict()
        self._guard = threading.Lock()
        self._running: dict[Key, asyncio.Future[None]] = {}  # of the event loop

    def get(self, key: Key) -> Reply | None:
        """The answer, if it is known."""
        with self._guard:
            if key in self._replies:
                self._replies.move_to_end(key)
            return self._replies.get(key)

    def keep(self, key: Key, reply: Reply) -> None:
        """Keeps an answer, if it is one that the cells' text decided."""
        if reply.status != "ok" or not reply.alive or reply.dropped or len(reply.output) > _LONGEST:
            return
        with self._guard:
            self._replies[key] = reply
            if len(self._replies) > self._most:
                self._replies.popitem(last=False)

    @contextlib.asynccontextmanager
    async def one_first(self, key: Key) -> AsyncIterator[None]:
        """Around a cell that may be new: of those that run at the same time, the others wait until one has its answer.

        They wait once, so that a cell that has no answer does not hold them up in turn. Everything on one event loop.
        """
        if (running := self._running.get(key)) is not None:
            await asyncio.wait([running])
            yield
            return
        self._running[key] = running = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._running[key]
            running.set_result(None)


class Calculator:
    """Runs cells of plain arithmetic for sessions that share its process and cannot tell.

    Such a cell reads only variables that its own session assigned (see [`names_after`]). All cells of the
    session run here, one right after the other, so those variables are its own again, and what others left is never
    read. What redefines a function, fails, or takes long is none of this process's business.

    Args:
        spawn (`Callable[[], Awaitable[Interpreter]]`):
            Starts the process.
        seconds (`float`):
            The limit of a session's cells together, at most one second.
    """

    def __init__(self, spawn: Callable[[], Awaitable[Interpreter]], seconds: float) -> None:
        self._spawn = spawn
        self._seconds = min(seconds, _LONGEST_SECONDS)
        self._interpreter: Interpreter | None = None
        self._cells = 0
        self._slow_cells = 0
        self._turn = asyncio.Lock()

    async def answer(self, cells: Key) -> Reply | None:
        """What the last of a session's cells answers; `None` where that is for a process of its own to say."""
        async with self._turn:
            if self._slow_cells >= _MOST_SLOW_CELLS:
                return None
            try:
                reply = await self._run(cells)
            except BaseException:  # cancelled in the middle: nobody knows what the process is doing now
                await asyncio.shield(self.close())
                raise
            self._slow_cells += reply.status == "timeout"
            if not reply.alive or self._cells >= _MOST_SHARED_CELLS or self._slow_cells >= _MOST_SLOW_CELLS:
                await self.close()
            return reply if reply.status == "ok" and reply.alive else None

    async def close(self) -> None:
        """Ends the process. The next cell starts another."""
        interpreter, self._interpreter, self._cells = self._interpreter, None, 0
        if interpreter is not None:
            await interpreter.close()

    async def _run(self, cells: Key) -> Reply:
        if self._interpreter is None:
            self._interpreter = await self._spawn()
        deadline = time.monotonic() + self._seconds
        for cell in cells:
            reply = await self._interpreter.execute(cell, max(0.1, deadline - time.monotonic()))
            self._cells += 1
            if reply.status != "ok" or not reply.alive:
                break
        return reply
