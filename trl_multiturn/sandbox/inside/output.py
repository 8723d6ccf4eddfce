"""What cells print: a bounded text per cell, and the standard streams of the session, which last as it does.

Standard library only.
"""

from __future__ import annotations

import _thread
import io
from typing import Any


_native_id = _thread.get_native_id  # bound early: a cell may patch the module


class Output:
    """Collects text, keeping its head and its tail.

    Args:
        limit (`int`):
            Characters to keep at either end.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.head: list[str] = []
        self.tail: list[str] = []
        self.room = limit
        self.tail_size = 0
        self.dropped = 0

    def add(self, text: str) -> None:
        if self.room:
            self.head.append(text[: self.room])
            text, self.room = text[self.room :], self.room - min(self.room, len(text))
        if text:
            self.tail.append(text[-self.limit :])
            self.dropped += max(0, len(text) - self.limit)
            self.tail_size += min(self.limit, len(text))
            if self.tail_size > 4 * self.limit:
                self._compact()

    def _compact(self) -> None:
        text = "".join(self.tail)
        self.dropped += max(0, len(text) - self.limit)
        self.tail = [text[-self.limit :]]
        self.tail_size = len(self.tail[0])

    def text(self) -> str:
        self._compact()
        return "".join(self.head) + self.tail[0]


class Stream(io.TextIOBase):
    """Standard output or standard error of a session: one object for all its cells.

    What a cell keeps of it (a printer, a logging handler, a default argument) prints in later cells, too. The text
    goes to the cell that runs. That of threads that an earlier cell has left at work goes into the void, as does
    everything between two cells.
    """

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, name: str) -> None:
        self.name = name
        self.buffer = _Bytes(self)
        self._output: Output | None = None
        self._silenced: frozenset[str] = frozenset()
        self._own = dict(vars(self))

    def switch(self, output: Output | None, silenced: frozenset[str] = frozenset()) -> None:
        """Begins a cell, or ends it where there is no output; undoes what a cell has set on this object."""
        state = vars(self)
        if len(state) != len(self._own) + 1 or state["buffer"] is not self._own["buffer"]:
            own = self._own
            state.clear()
            state.update(own, _own=own)
        self._output, self._silenced = output, silenced

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Does nothing: later cells print as well."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._output is not None and not (self._silenced and str(_native_id()) in self._silenced):
            self._output.add(text)
        return len(text)


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Does nothing, as that of its stream."""

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode("utf-8", "replace"))
        return len(data)
