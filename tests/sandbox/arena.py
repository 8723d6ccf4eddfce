"""Where hostile cells are let loose: a process of its own, so that a wall which fails hurts neither tests nor machine.

Reads one JSON request per line (`{"name": …}`), runs that attack in a fresh session, looks at everything the attack
could have touched, and answers with what it found. Where the kernel allows it, the arena lives in its own process-id
namespace; where not, the attacks that signal everybody send signal 0. It looks for left-behind processes only among
the descendants of its own sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any


_SECONDS, _PATIENT_SECONDS = 0.6, 20.0  # for what may run out of time, and for what must not on any machine
_NEWPID, _NEWUSER, _NEWNS = 0x20000000, 0x10000000, 0x00020000
_TOKEN = "canary-7f3a9c"


def isolate_processes() -> bool:
    """Moves the process into a pid namespace with a /proc of its own; it goes on in the namespace's first process."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEWPID | _NEWNS):
        if libc.unshare(_NEWUSER | _NEWPID | _NEWNS):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None)  # private, recursively
    if libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(0), None):
        raise OSError(ctypes.get_errno(), "cannot mount /proc in the arena's namespace")
    return True


class Arena:
    """The host's side of every attack: canaries, listeners, a sibling session, a bystander."""

    def __init__(self, deadly: int) -> None:
        from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig

        self.folder = tempfile.mkdtemp(prefix="arena-")
        self.secret = os.path.join(self.folder, "secret")
        with open(self.secret, "w") as file:
            file.write(_TOKEN)
        os.mkdir(os.path.join(self.folder, "empty"))
        with contextlib.suppress(OSError):
            os.setxattr(self.secret, "user.canary", b"x")
        self.memory = ctypes.create_string_buffer(_TOKEN.encode(), 64)
        self.listeners = self._listen()
        self.bystander = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(3600)"])
        config = SandboxConfig(timeout_seconds=_PATIENT_SECONDS, grace_seconds=0.2, memory_limit_mb=512)
        self.sandbox = Sandbox(config)
        self.sibling = self.sandbox.open()
        self.sibling.run("treasure = 41; open('mine', 'w').write('kept')")
        self.server = self.sandbox._backend
        self.processes = set(_descendants(self.server.pid))
        sibling = self.sibling._interpreter
        self.host = {
            "client": os.getpid(),
            "sibling": sibling.pid,
            "sibling_folder": sibling.folder,
            "bystander": self.bystander.pid,
            "deadly": deadly,
            "address": ctypes.addressof(self.memory),
            "secret": self.secret,
            "folder": self.folder,
            "source": os.path.abspath(__file__),
            "home": os.path.expanduser("~"),
            **{name: listener[1] for name, listener in self.listeners.items()},
        }
        self.before = self.look()

    def _listen(self) -> dict[str, tuple[socket.socket, object]]:
        found = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, os.path.join(self.folder, "stream")),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0arena-{os.getpid()}-{time.time_ns()}"),
            ("datagram", socket.AF_UNIX, socket.SOCK_DGRAM, os.path.join(self.folder, "datagram")),
        ):
            listener = socket.socket(family, kind)
            listener.bind(address)
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            found[name] = (listener, listener.getsockname()[1] if family == socket.AF_INET else address.strip("\0"))
        return found

    def look(self) -> dict[str, object]:
        """Everything about the host that no cell may change."""
        import json as library

        files = {}
        for path in (self.secret, library.__file__, self.folder, os.path.dirname(library.__file__)):
            info = os.stat(path)
            files[path] = [info.st_mode, info.st_uid, info.st_nlink, info.st_size, info.st_mtime]
        with open(self.secret) as file:
            content = file.read()
        processes = {"client": os.getpid(), "bystander": self.bystander.pid}
        shares = sorted(os.listdir("/dev/shm"))
        return {
            "files": files,
            "secret": content,
            "folder": sorted(os.listdir(self.folder)),
            "shared memory": [name for name in shares if name.startswith("trl-multiturn")],
            "priorities": [os.getpriority(os.PRIO_PROCESS, pid) for pid in processes.values()],
            "affinities": [sorted(os.sched_getaffinity(pid)) for pid in processes.values()],
            "schedulers": [os.sched_getscheduler(pid) for pid in processes.values()],
            "limits": [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in processes.values()],
            "host name": socket.gethostname(),
            "bystander": self.bystander.poll(),
            "warm interpreter": self.sandbox._backend.pid,
        }

    def attack(self, attack: Any) -> dict[str, object]:
        """Runs one cell and reports what became of the cell, of the next one, and of the host."""
        session = self.sandbox.open()
        session.run("mine = 40")
        config = session._config
        if "timeout" in attack.statuses:
            session._config = dataclasses.replace(config, timeout_seconds=_SECONDS)
        start = time.monotonic()
        result = session.run(f"host = {self.host!r}\n{attack.code}")
        seconds = time.monotonic() - start
        session._config = config
        following = session.run("print(mine + 2)")
        if "NameError" in following.output:  # the attack broke its own past: the session started empty, as documented
            following = session.run("print(40 + 2)")
        interpreter = session._interpreter
        session.close()
        problems = [name for name, value in self.look().items() if value != self.before[name]]
        problems += [f"{name} was reached" for name, (listener, _) in self.listeners.items() if _reached(listener)]
        if self.sibling.run("treasure + len(open('mine').read())").output != "45":
            problems.append("the sibling session suffered")
        if "ESCAPED" in result.output or _TOKEN in result.output or "arena-secret" in result.output:
            problems.append(f"it got through: {result.output[:200]}")
        problems += self._left_behind(interpreter)
        return {
            "status": result.status,
            "output": result.output[:300],
            "next": [following.status, following.output],
            "seconds": round(seconds, 3),
            "problems": problems,
        }

    def _left_behind(self, interpreter: object) -> list[str]:
        problems = []
        strays = set(_descendants(self.server.pid)) - self.processes
        if strays:
            problems.append(f"processes left behind: {sorted(strays)}")
        if interpreter is not None and os.path.exists(interpreter.folder):
            problems.append("its folder is left behind")
        return problems

    def close(self) -> None:
        self.sandbox.close()
        self.bystander.kill()
        self.bystander.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _reached(listener: socket.socket) -> bool:
    try:
        listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
    except BlockingIOError:
        return False
    return True


def _descendants(ancestor: int) -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                fields = file.read().rsplit(")", 1)[1].split()
                if fields[0] != "Z":
                    parents[int(name)] = int(fields[1])
    found, frontier = [], [ancestor]
    while frontier:
        parent = frontier.pop()
        children = [pid for pid, its_parent in parents.items() if its_parent == parent]
        found += children
        frontier += children
    return found


def main() -> None:
    user = int(sys.argv[1])
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # changing the user hides /proc/self, which the arena needs
    os.environ["ARENA_SECRET"] = "arena-secret"
    if not os.access(os.path.expanduser("~"), os.R_OK):
        os.environ["HOME"] = tempfile.gettempdir()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    alone = isolate_processes()
    from attacks import ATTACKS

    attacks = {attack.name: attack for attack in ATTACKS}
    arena = Arena(int(signal.SIGKILL) if alone else 0)
    print(json.dumps({"alone": alone, "user": os.geteuid(), "layers": arena.server.layers}), flush=True)
    try:
        for line in sys.stdin:
            print(json.dumps(arena.attack(attacks[json.loads(line)["name"]])), flush=True)
    finally:
        arena.close()


if __name__ == "__main__":
    main()
