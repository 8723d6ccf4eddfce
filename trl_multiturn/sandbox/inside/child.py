"""Inside a session's process: runs cells in an IPython shell and answers over a socket.

Model-written code shares this process, so nothing here is trusted by the client; it only has to be hard to break by
accident. Functions are bound early (patched modules do not reach them), the built-ins are restored after every cell,
and the text of a reply is cut before it leaves. Needs IPython and the standard library only.
"""

from __future__ import annotations

import _signal
import _thread
import builtins
import contextlib
import ctypes
import gc
import io
import os
import random
import signal
import sys
import time

from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell

from . import protocol


class CellTimeout(BaseException):
    """Raised in the main thread when the cell's time is over, again and again until it stops."""


_read, _write, _exit = os.read, os.write, os._exit
# without the conversions to enumerations that `signal` makes, which cost more than the system calls
_setitimer, _set_handler, _unblock = _signal.setitimer, _signal.signal, _signal.pthread_sigmask
_MASK = (int(signal.SIG_UNBLOCK), {int(signal.SIGALRM)})
_sleep, _cpu_clock = time.sleep, time.pthread_getcpuclockid
_clock = time.clock_gettime
_thread_count, _native_id, _frames, _main = (
    _thread._count,
    _thread.get_native_id,
    sys._current_frames,
    _thread.get_ident(),
)
_task_ids = os.listdir
_pristine = dict(vars(builtins))
_builtins = vars(builtins)
_HEADER, _unpack = protocol.REQUEST.size, protocol.REQUEST.unpack_from
_COMPILE_ERRORS = (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError, CellTimeout)
_REPEAT_SECONDS = 0.05
_STATIONARY = 0.25  # share of a core above which a thread left behind counts as spinning
_PLAIN = frozenset((bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple))
_NOTHING = contextlib.nullcontext()
_RECURSION = sys.getrecursionlimit()
_set_switch_interval, _SWITCH_SECONDS = sys.setswitchinterval, 0.0005  # do not wait long for spinning threads


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
    """Standard output or standard error of one cell. Threads of earlier cells write into the void."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, output: Output | None, silenced: frozenset[str]) -> None:
        self._output = output
        self._silenced = silenced
        self.buffer = _Bytes(self)

    def writable(self) -> bool:
        return True

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

    def write(self, data: bytes) -> int:
        self._stream.write(bytes(data).decode("utf-8", "replace"))
        return len(data)


class Display(DisplayHook):
    """Shows the value of the last expression on standard output, as a notebook does, without a prompt."""

    def quiet(self) -> bool:
        cells = self.shell.history_manager.input_hist_parsed
        return bool(cells) and ";" in cells[-1] and super().quiet()  # which reads the cell token by token

    def compute_format_data(self, result):
        formatter = self.shell.display_formatter
        special = formatter.ipython_display_formatter.type_printers or formatter.mimebundle_formatter.type_printers
        if type(result) not in _PLAIN or special:
            return formatter.format(result)
        text = formatter.formatters["text/plain"](result)  # of the dozen formats, the one that anybody reads
        return {} if text is None else {"text/plain": text}, {}

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict, md_dict=None) -> None:
        if "text/plain" in format_dict:
            self.shell.answer(format_dict["text/plain"])

    def finish_displayhook(self) -> None:
        pass


class Shell(InteractiveShell):
    """IPython without a terminal: errors are recorded instead of printed, and nothing is stored."""

    displayhook_class = Display
    failure: BaseException | None = None
    output: Output | None = None
    started = False

    def answer(self, text: str) -> None:
        output = self.output
        last = output.tail[-1] if output.tail else output.head[-1] if output.head else "\n"
        output.add(text if last.endswith("\n") else "\n" + text)

    def showtraceback(self, exc_tuple=None, *args, **kwargs) -> None:
        self.failure = (exc_tuple or sys.exc_info())[1]

    def showsyntaxerror(self, *args, **kwargs) -> None:
        self.failure = sys.exc_info()[1]

    def should_run_async(self, raw_cell, *, transformed_cell=None, **kwargs) -> bool:
        if transformed_cell is not None and "await" not in transformed_cell and "async" not in transformed_cell:
            return False  # without compiling the cell once more
        return super().should_run_async(raw_cell, transformed_cell=transformed_cell, **kwargs)

    def _tee(self, channel):
        return _NOTHING  # IPython would keep a copy of everything that is printed

    async def run_code(self, *args, **kwargs):
        self.started = True
        return await super().run_code(*args, **kwargs)

    def enable_gui(self, gui=None) -> None:
        pass

    def ask_exit(self) -> None:
        raise SystemExit

    def system(self, cmd):
        """`!command` and `%pip`, which IPython gives a terminal: where there is none to be had, that says nothing."""
        try:
            return super().system(cmd)
        except OSError as error:
            raise PermissionError("no program can be started here") from error


def make_shell(folder: str) -> Shell:
    """The shell that every session inherits; built and used once in the warm interpreter."""
    from traitlets.config import Config

    os.environ["IPYTHONDIR"] = folder
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    config.InteractiveShell.xmode = "Minimal"
    config.InteractiveShell.autocall = 0
    shell = Shell.instance(config=config)
    shell.display_formatter.active_types = ["text/plain"]
    cell = Cells(shell, 100)
    for code in ("x = 1", "print(x); x", "1 / 0", "def f(:", "import math\nmath.pi", "[i for i in range(3)]"):
        cell.run(code, 5.0)
    shell.reset()
    shell.execution_count = 1
    _pristine.update(_builtins)  # the shell has added names of its own
    return shell


class Cells:
    """Runs cells one after the other.

    Args:
        shell ([`Shell`]):
            The shell.
        limit (`int`):
            Characters of output to keep at either end.
        include_stderr (`bool`):
            Whether standard error counts as output.
    """

    def __init__(self, shell: Shell, limit: int, include_stderr: bool = False) -> None:
        self.shell = shell
        self.limit = limit
        self.include_stderr = include_stderr
        self.expired = self.running = False
        self.stdin = sys.stdin
        # lists of callables that run around every cell, and how long they are at the start
        hooks = [*shell.events.callbacks.values(), shell.ast_transformers, shell.input_transformers_post, gc.callbacks]
        self.hooks = [(hooks_of_a_kind, len(hooks_of_a_kind)) for hooks_of_a_kind in hooks]

    def _alarm(self, signum, frame) -> None:
        if self.running:
            self.expired = True
            raise CellTimeout

    def run(self, code: str, timeout: float) -> tuple[int, int, str, int]:
        """Returns the status, the flags, the text, and the number of characters cut out of its middle."""
        shell, output = self.shell, Output(self.limit)
        silenced = frozenset(_task_ids("/proc/self/task")) - {str(_native_id())} if _thread_count() else frozenset()
        shell.output, shell.failure, shell.started, failure, flags = output, None, False, None, 0
        self.expired = False
        try:
            try:
                sys.stdin, sys.stdout = self.stdin, Stream(output, silenced)
                sys.stderr = Stream(output if self.include_stderr else None, silenced)
                _set_handler(signal.SIGALRM, self._alarm)
                _unblock(*_MASK)
                self.running = True
                _setitimer(signal.ITIMER_REAL, timeout, _REPEAT_SECONDS)
                result = shell.run_cell(code, store_history=True)
                failure = result.error_before_exec or result.error_in_exec
                if failure is not None:
                    flags = self._blame(failure)
                failure = failure or shell.failure
                if failure is not None:
                    output = Output(self.limit)
                    output.add(describe(failure))
            finally:
                self.running = False
                _setitimer(signal.ITIMER_REAL, 0)
                _restore()
                for hooks, count in self.hooks:
                    del hooks[count:]
        except BaseException as error:
            failure, output, flags = error, Output(self.limit), self._blame(error)
            output.add(describe(error))
        if self.expired:
            return protocol.TIMEOUT, 0, "", 0
        if failure is None:
            return protocol.OK, 0, output.text().strip("\n"), output.dropped
        status = protocol.MEMORY if isinstance(failure, MemoryError) else protocol.ERROR
        return status, flags, output.text(), output.dropped

    def _blame(self, error: BaseException) -> int:
        """Flags an error that comes from the shell instead of from the cell: something has broken the shell."""
        if not self.shell.started:
            return 0 if isinstance(error, _COMPILE_ERRORS) else protocol.NOT_RUN
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals is self.shell.user_ns:
                return 0
            trace = trace.tb_next
        return 0 if isinstance(error, (CellTimeout, MemoryError, RecursionError)) else protocol.SPOILED


def describe(error: BaseException) -> str:
    """`Name: message`, also for exceptions whose own `__str__` fails."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception as second:
        text = f"<its message raises {type(second).__name__}>"
    return f"{name}: {text}" if text else name


def refuse_audit_hook(hook) -> None:
    """Stands in for `sys.addaudithook`, whose hooks nothing could remove before the next cell."""
    raise PermissionError("audit hooks are not available: they would outlive their cell")


def _restore() -> None:
    """Undoes what a cell may have done to the ground that this module and IPython stand on."""
    if _builtins != _pristine:
        missing = object.__new__(object)
        for name, value in _pristine.items():
            if _builtins.get(name, missing) is not value:
                _builtins[name] = value
    _set_switch_interval(_SWITCH_SECONDS)
    _setitimer(signal.ITIMER_PROF, 0)  # its signal kills
    _setitimer(signal.ITIMER_VIRTUAL, 0)
    sys.settrace(None)
    sys.setprofile(None)
    if sys.getrecursionlimit() < _RECURSION:
        sys.setrecursionlimit(_RECURSION)


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
        if not _thread_count():
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


def seed_generators(seed: int | None) -> None:
    """Seeds `random` and `numpy.random`, from the system's entropy unless a seed is given: forks share their state."""
    if seed is not None:  # `random` seeds itself anew in every fork
        random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        # numpy's own way to gather entropy copies dozens of pages that the session shares with its parent
        numpy.random.seed(int.from_bytes(os.urandom(4), "little") if seed is None else seed % 2**32)


def _read_request(descriptor: int) -> tuple[bytes, float, str]:
    """The next cell: its nonce, its time, its source."""
    data, size = b"", _HEADER
    while len(data) < size:
        part = _read(descriptor, 1 << 16)
        if not part:
            _exit(0)  # the client closed the session
        data += part
        if size == _HEADER <= len(data):
            size += _unpack(data)[2]
    nonce, timeout, _ = _unpack(data)
    return nonce, timeout, data[_HEADER:].decode("utf-8", "replace")


def _send(descriptor: int, frame: bytes) -> None:
    while frame:
        frame = frame[_write(descriptor, frame) :]


def report(descriptor: int, status: int, text: str = "", nonce: bytes = protocol.NO_NONCE) -> None:
    """Sends a frame without dropped characters or flags."""
    data = text.encode("utf-8", "replace")
    _send(descriptor, protocol.REPLY.pack(nonce, status, 0, 0, len(data)) + data)


def serve(descriptor: int, cells: Cells) -> None:
    """Answers cells until the client closes the socket."""
    _set_switch_interval(_SWITCH_SECONDS)
    sys.addaudithook = refuse_audit_hook
    pack, left = protocol.REPLY.pack, protocol.THREADS_LEFT
    while True:
        nonce, timeout, code = _read_request(descriptor)
        if timeout < 0:  # the client wants to know that no thread of an earlier cell has swallowed this one
            report(descriptor, protocol.READY, nonce=nonce)
        status, flags, text, dropped = cells.run(code, abs(timeout))
        if _thread_count() and end_spinning_threads():
            flags |= left
        data = text.encode("utf-8", "replace")
        _send(descriptor, pack(nonce, status, flags, dropped, len(data)) + data)
