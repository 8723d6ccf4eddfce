"""The warm interpreter: imports once, then forks a confined process for every session it is asked for.

Started by `forkserver.ForkServer` as a program of its own (`start.py`), never imported by the trainer. It is
single-threaded, never waits for a session, and ends, with all sessions and their folders, as soon as its owner is
gone. Messages on the control socket are small JSON objects; a session's own socket comes along with the message that
asks for it, so that no session can reach another's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time

from . import child as sessions, confinement, event_loop, preload, processes, protocol, refusals, scratch


_WATCH_SECONDS = 0.02
_UNLINKED_FACTOR = 4  # bytes written may exceed the quota this many times (rewritten, deleted) before it counts


class Child:
    """One session's process, as the zygote sees it."""

    def __init__(self, number: int, pid: int, folder: str) -> None:
        self.number = number
        self.pid = pid
        self.folder = folder
        self.reason = ""
        self.watched = False


class Zygote:
    """Forks sessions, watches them, and removes what they leave.

    Args:
        control (`socket.socket`):
            Connection to the owner.
        settings (`dict`):
            The owner's first message: limits and isolation as plain values.
    """

    def __init__(self, control: socket.socket, settings: dict) -> None:
        self.control = control
        self.settings = settings
        self.pid = os.getpid()
        self.children: dict[int, Child] = {}  # by session number
        self.by_pid: dict[int, Child] = {}
        self.backlog: list[bytes] = []
        self.owner: int | None = None
        self.cleaner: tuple[int, int] | None = None  # process that removes folders, and the pipe that names them
        self.layers: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------- start

    def prepare(self) -> None:
        """Imports what sessions need and finds out which walls this kernel grants."""
        settings = self.settings
        preload.import_modules(settings["preload"], settings["kernels"])
        sys.dont_write_bytecode = True  # of a module that a cell writes twice within a second, the first would run
        os.chdir(settings["root"])
        os.mkdir("trash", 0o700)
        if not settings["kernels"]:  # a kernel makes a shell of its own kind
            self.shell = sessions.make_shell(os.path.join(settings["root"], "ipython"))
        preload.warm_up()
        readable = confinement.readable_paths(settings["readonly_paths"], settings["network"])
        # modules of the owner's own projects (editable installs) are not for sessions
        sys.path[:] = [p for p in sys.path if any(os.path.realpath(p) == r or p.startswith(r + "/") for r in readable)]
        self._find_layers(readable)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("900")  # inherited: when the machine runs out of memory, a session goes first
        self.tasks = None if os.geteuid() == 0 else processes.count_tasks() + 4096
        with contextlib.suppress(OSError):
            confinement.libc.prctl(confinement.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        gc.collect()
        gc.freeze()

    def _find_layers(self, readable: list[str]) -> None:
        """Builds each wall and tries it in a process that is thrown away."""
        mode = self.settings["isolation"]
        self.landlock = self.program = None
        self.layers = {"landlock": "off", "seccomp": "off", "namespaces": "off"}
        if mode == "none":
            return
        self.landlock = confinement.LandlockPaths(readable)
        machine = confinement.machine()
        if machine is not None:
            self.program = confinement.seccomp_program(*machine, network=self.settings["network"])
        if self.settings["namespaces"] and self._trial(lambda: confinement.enter_namespaces(self.settings["network"])):
            self.layers["namespaces"] = confinement.enter_namespaces(self.settings["network"])
        folder, outside = os.path.join(self.settings["root"], "trial"), os.path.join(self.settings["root"], "outside")
        os.mkdir(folder)
        os.mkdir(outside)

        def try_landlock() -> bool:
            self.landlock.restrict([folder])
            return _refused(lambda: os.listdir(outside)) and not _refused(lambda: os.mkdir(os.path.join(folder, "in")))

        def try_seccomp() -> bool:
            confinement.set_seccomp(self.program)
            return _refused(os.fork) and _refused(lambda: os.kill(os.getppid(), 0)) and _refused(lambda: os.nice(1))

        if self.landlock.abi and self._trial(try_landlock):
            self.layers["landlock"] = f"ABI {self.landlock.abi}"
        else:
            self.landlock = None
        if self.program is not None and self._trial(try_seccomp):
            self.layers["seccomp"] = "allow-list"
        else:
            self.program = None
        scratch.remove(folder)
        scratch.remove(outside)

    @staticmethod
    def _trial(attempt) -> bool:
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = 0 if attempt() else 1
            os._exit(code)
        return os.waitpid(pid, 0)[1] == 0

    # -------------------------------------------------------------------------------------------------- loop

    def serve(self) -> None:
        """Works until the owner is gone."""
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        self.private = (woken, waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        poll = select.poll()
        self._start_broom()
        poll.register(woken, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        if self.owner is not None:
            poll.register(self.owner, select.POLLIN)
        while True:
            watched = [child for child in self.children.values() if child.watched]
            poll.modify(self.control, select.POLLIN | (select.POLLOUT if self.backlog else 0))
            for descriptor, _ in poll.poll(_WATCH_SECONDS * 1000 if watched else None):
                if descriptor == self.owner:
                    return
                if descriptor == woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
            self._reap()
            self._flush()
            if not self._receive():
                return
            for child in watched:
                self._check_quota(child)

    def _receive(self) -> bool:
        """Handles every waiting message; `False` when the owner has closed the connection."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.control, 4096, 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            message = json.loads(data)
            if message["op"] == "spawn":
                self._spawn(message, descriptors[0])
                continue
            child = self.children.get(message["id"])
            if child is None:
                continue
            if message["op"] == "kill":
                self._kill(child)
            elif message["op"] == "signal":
                self._signal(child, message["number"])
            elif message["op"] == "watch":
                child.watched = message["on"]

    def _send(self, **message) -> None:
        self.backlog.append(json.dumps(message).encode())
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.backlog:
                try:
                    self.control.send(self.backlog[0])
                except (BrokenPipeError, ConnectionError):
                    pass  # the owner is gone; the next poll says so
                self.backlog.pop(0)

    # ---------------------------------------------------------------------------------------------- sessions

    def _spawn(self, message: dict, descriptor: int) -> None:
        folder = os.path.join(self.settings["root"], f"{message['id']}")
        try:
            os.mkdir(folder, 0o700)
            pid = os.fork()
        except OSError as error:  # no processes, memory or disk left just now
            os.close(descriptor)
            self._sweep(folder)
            self._send(op="refused", id=message["id"], reason=str(error))
            return
        if pid == 0:
            try:
                self._become_session(descriptor, folder, message.get("kernel"))
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    sessions.report(descriptor, protocol.FAILED, f"{type(error).__name__}: {error}")
            finally:
                os._exit(70)
        os.close(descriptor)
        child = Child(message["id"], pid, folder)
        self.children[child.number] = self.by_pid[pid] = child
        self._send(op="spawned", id=child.number, pid=pid, folder=folder)

    def _become_session(self, descriptor: int, folder: str, kernel: dict | None) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler if kernel else signal.SIG_IGN)
        confinement.libc.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self.pid:
            os._exit(0)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        os.chdir(folder)
        # one by one: `update` asks abstract base classes, which copies a third of a megabyte of shared pages
        os.environ["HOME"] = os.environ["TMPDIR"] = os.environ["MPLCONFIGDIR"] = folder
        os.environ["IPYTHONDIR"] = f"{folder}/.ipython"
        for name, value in self.settings["environment"].items():
            os.environ[name] = value
        self._limit()
        if kernel is not None:
            from . import kernel as kernels  # only where ipykernel is wanted

            kernels.run(self, descriptor, folder, kernel)
            return
        if self.landlock is not None:
            self.landlock.restrict(self.writable(folder), network=self.settings["network"])
        if self.program is not None:
            confinement.set_seccomp(self.program)
            refusals.install()
        self.close_all_but(descriptor)
        event_loop.install()
        sys.path.insert(0, "")  # what a cell writes can be imported
        sessions.seed_generators(self.settings["seed"])
        cells = sessions.Cells(self.shell, self.settings["output_limit_chars"], self.settings["include_stderr"])
        sessions.report(descriptor, protocol.READY)
        sessions.serve(descriptor, cells)

    @staticmethod
    def close_all_but(descriptor: int) -> None:
        """A session keeps its own socket: neither the control connection nor the opened read-only paths."""
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, 1 << 20)

    def _limit(self) -> None:
        settings = self.settings
        confinement.limit_resources(
            settings["memory_limit_mb"],
            settings["file_limit_mb"],
            settings["cpu_limit_seconds"],
            descriptors=256,
            tasks=self.tasks,
        )
        if settings["isolation"] != "none":
            confinement.drop_capabilities()
            confinement.no_new_privileges()

    def writable(self, folder: str) -> list[str]:
        """Where a session may write."""
        return [folder] if self.settings["scratch_limit_mb"] else []

    def _check_quota(self, child: Child) -> None:
        limit = self.settings["scratch_limit_mb"]
        excess = scratch.over_quota(child.folder, limit, self.settings["max_files"])
        if excess is None and processes.bytes_written(child.pid) > _UNLINKED_FACTOR * (limit << 20):
            excess = f"more than {limit} MB"
        if excess is not None:
            child.reason = f"quota: {excess}"
            self._kill(child)

    @staticmethod
    def _signal(child: Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)

    def _kill(self, child: Child) -> None:
        # the group: without seccomp a session may have forked (it leads a group of its own from its first moment on)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        self._signal(child, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.by_pid.pop(pid, None)
            if child is not None:
                self._bury(child, os.waitstatus_to_exitcode(status))

    def _bury(self, child: Child, code: int) -> None:
        del self.children[child.number]
        if self.program is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            self._kill_orphans()
        self._sweep(child.folder)
        self._send(op="exit", id=child.number, code=code, reason=child.reason)

    def _start_broom(self) -> None:
        """Forks a process that removes folders: a few thousand files may take seconds, and nobody should wait."""
        names, pipe = os.pipe()
        pid = os.fork()
        if pid:
            os.close(names)
            os.set_blocking(pipe, False)
            self.cleaner = (pid, pipe)
            return
        try:
            confinement.libc.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            signal.set_wakeup_fd(-1)
            os.nice(5)
            os.dup2(names, 3)
            os.closerange(4, 1 << 20)
            with open(3) as lines:
                for line in lines:
                    scratch.remove(line.rstrip("\n"))
        finally:
            os._exit(0)

    def _sweep(self, folder: str) -> None:
        trash = os.path.join(self.settings["root"], "trash", os.path.basename(folder))
        with contextlib.suppress(OSError):
            os.rename(folder, trash)
        for _ in range(2):
            try:
                os.write(self.cleaner[1], trash.encode() + b"\n")
                return
            except BlockingIOError:
                return  # it is far behind; what it misses goes at the end
            except OSError:
                os.close(self.cleaner[1])
                self._start_broom()

    def _kill_orphans(self) -> None:
        """Processes that sessions left behind come to this one, their subreaper."""
        own = {self.cleaner[0], *(child.pid for child in self.children.values())}
        while True:
            strays = [pid for pid in processes.children_of(os.getpid()) if pid not in own]
            if not strays:
                return
            for pid in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in strays:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def end(self) -> None:
        """Ends every session, then removes every folder."""
        for child in self.children.values():
            self._kill(child)
        with contextlib.suppress(ProcessLookupError, ChildProcessError, TypeError):
            os.kill(self.cleaner[0], signal.SIGKILL)
            os.waitpid(self.cleaner[0], 0)
        while self.children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.children.popitem()[1].pid, 0)
        if self.program is None:
            self._kill_orphans()
        scratch.remove(self.settings["root"])


def _refused(action) -> bool:
    try:
        action()
    except OSError:
        return True
    return False


def main() -> None:
    start = time.monotonic()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(control.recv(65536))
    control.setblocking(False)
    zygote = Zygote(control, settings)
    with contextlib.suppress(OSError, AttributeError):
        zygote.owner = os.pidfd_open(settings["owner"]) if settings["owner"] else None
    try:
        zygote.prepare()
    except Exception as error:
        zygote._send(op="failed", reason=f"{type(error).__name__}: {error}")
        shutil.rmtree(settings["root"], ignore_errors=True)
        raise
    zygote._send(op="ready", pid=os.getpid(), layers=zygote.layers, seconds=time.monotonic() - start)
    try:
        zygote.serve()
    finally:
        zygote.end()
