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
import gc
import os
import random
import signal
import sys

from IPython.core.displayhook import DisplayHook
from IPython.core.interactiveshell import InteractiveShell

from . import event_loop, protocol
from .output import Output, Stream
from .refusals import PROGRAMS
from .threads import end_spinning_threads, threads_at_work


class CellTimeout(BaseException):
    """Raised in the main thread when the cell's time is over, again and again until it stops."""


_read, _write, _exit = os.read, os.write, os._exit
# without the conversions to enumerations that `signal` makes, which cost more than the system calls
_setitimer, _set_handler, _unblock = _signal.setitimer, _signal.signal, _signal.pthread_sigmask
_MASK = (int(signal.SIG_UNBLOCK), {int(signal.SIGALRM)})
_thread_count, _getcwd = _thread._count, os.getcwd
_pristine = dict(vars(builtins))
_builtins = vars(builtins)
_HEADER, _unpack = protocol.REQUEST.size, protocol.REQUEST.unpack_from
_COMPILE_ERRORS = (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError, CellTimeout)
_REPEAT_SECONDS = 0.05
_PLAIN = frozenset((bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple))
_NOTHING = contextlib.nullcontext()
_RECURSION = sys.getrecursionlimit()
_set_switch_interval, _SWITCH_SECONDS = sys.setswitchinterval, 0.0005  # do not wait long for spinning threads


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
        output.add(f"{text}\n" if last.endswith("\n") else f"\n{text}\n")

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
            raise PermissionError(PROGRAMS) from error


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
        self.stdout, self.stderr = Stream("<stdout>"), Stream("<stderr>")
        self.loop = event_loop.SessionLoop()
        # lists of callables that run around every cell, and how long they are at the start
        hooks = [*shell.events.callbacks.values(), shell.ast_transformers, shell.input_transformers_post, gc.callbacks]
        self.hooks = [(hooks_of_a_kind, len(hooks_of_a_kind)) for hooks_of_a_kind in hooks]

    def _alarm(self, signum, frame) -> None:
        if self.running:
            self.expired = True
            raise CellTimeout

    def run(self, code: str, timeout: float) -> tuple[int, int, str, int]:
        """Returns the status, the flags, the text, and the number of characters cut out of its middle."""
        output, failure, flags = Output(self.limit), None, 0
        self.expired = False
        try:
            try:
                self._begin(timeout)
                failure = self._run(code, output)
                flags = 0 if failure is None else self._blame(failure)
                failure = failure or self.shell.failure
            finally:
                self._end()
        except BaseException as error:
            failure, flags = error, self._blame(error)
        if self.expired:
            return protocol.TIMEOUT, 0, "", 0
        if failure is None or _ends_quietly(failure):
            return protocol.OK, 0, output.text().strip("\n"), output.dropped
        output = Output(self.limit)
        output.add(describe(failure))
        status = protocol.MEMORY if isinstance(failure, MemoryError) else protocol.ERROR
        return status, flags, output.text(), output.dropped

    def _begin(self, timeout: float) -> None:
        self.shell.started = False
        sys.stdin, sys.stdout, sys.stderr = self.stdin, self.stdout, self.stderr
        with contextlib.suppress(OSError):  # a file that a cell has written is to be found by the next one
            sys.path_importer_cache.pop(_getcwd(), None)
        if not self.loop.usable:
            self.loop = event_loop.SessionLoop()
        _set_handler(signal.SIGALRM, self._alarm)
        _unblock(*_MASK)
        self.running = True
        _setitimer(signal.ITIMER_REAL, timeout, _REPEAT_SECONDS)

    def _run(self, code: str, output: Output) -> BaseException | None:
        """Runs a cell, its output going to `output`; how it failed, if it did."""
        shell = self.shell
        shell.output = output
        with event_loop.counts_as_running(self.loop):
            self.loop.get_on()  # what tasks of earlier cells print now belongs to no cell
            shell.failure = None
            silenced = threads_at_work()
            self.stdout.switch(output, silenced)
            self.stderr.switch(output if self.include_stderr else None, silenced)
            result = shell.run_cell(code, store_history=True)
            self.loop.get_on()
        return result.error_before_exec or result.error_in_exec

    def _end(self) -> None:
        self.running = False
        _setitimer(signal.ITIMER_REAL, 0)
        self.stdout.switch(None)
        self.stderr.switch(None)
        _restore()
        for hooks, count in self.hooks:
            del hooks[count:]

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


def _ends_quietly(error: BaseException) -> bool:
    """Whether an exception is the end of a script that went well: `exit()`."""
    return isinstance(error, SystemExit) and type(error.code) in (type(None), bool, int) and not error.code


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
