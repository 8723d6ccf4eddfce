"""Walls around a process of model-written code: resource limits, Landlock, seccomp, capabilities, namespaces.

None of them needs root, Docker or an executable on the machine. The layers complement each other:

- resource limits bound memory, file sizes, descriptors and CPU time, and forbid core dumps;
- Landlock bounds which *paths* can be opened, created or removed (by root, too) and keeps sessions from each other;
- seccomp bounds which *system calls* exist at all: no new process, no program, no socket, no signal to anybody else,
  none of the calls that Landlock does not govern, and none that a future kernel adds.

Needs only the standard library and no other module but `syscalls`: the warm interpreter loads this file on its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence

from . import syscalls


libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

# --- Landlock access rights, by the version of the interface (ABI) that brought them
FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1 << 1, 1 << 2, 1 << 3
FS_MAKE_CHAR, FS_MAKE_SOCK, FS_MAKE_FIFO, FS_MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
FS_TRUNCATE, FS_IOCTL_DEV = 1 << 14, 1 << 15
_FS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FILE_RIGHTS = 1 | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE | FS_IOCTL_DEV
_READ = FS_READ_FILE | FS_READ_DIR

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SYSTEM = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/usr/share",
           "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/localtime", "/proc/meminfo", "/proc/cpuinfo",
           "/sys/devices/system/cpu")  # fmt: skip
_OWN_FILES = (
    "maps",
    "stat",
    "statm",
    "status",
    "limits",
)  # of /proc/self, which also tells about the machine's network
_NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/services", "/etc/gai.conf", "/etc/ssl")


def machine() -> tuple[int, int] | None:
    """The running architecture's column in the tables and its audit number; `None` where there is no table."""
    return syscalls.ARCHITECTURES.get(platform.machine()) if sys.platform == "linux" else None


def _call(name: str, *args: object) -> int:
    column = (machine() or (0, 0))[0]
    return libc.syscall(ctypes.c_long(syscalls.OWN[name][column]), *args)


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


# ------------------------------------------------------------------------------------------------- resource limits


def limit_resources(memory_mb: int, file_mb: int, cpu_seconds: int, descriptors: int, tasks: int | None) -> None:
    """Sets soft and hard limits of this process.

    Args:
        memory_mb (`int`):
            Address space on top of what the process has mapped already.
        file_mb (`int`):
            Size of any file that it writes.
        cpu_seconds (`int`):
            CPU time, over all threads; the kernel kills at the limit.
        descriptors (`int`):
            Open files.
        tasks (`int`, *optional*):
            Threads and processes of this user, everywhere on the machine. The kernel exempts root.
    """
    statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # a file object would copy more shared pages
    mapped = int(os.read(statm, 256).split()[0]) * resource.getpagesize()
    os.close(statm)
    limits = {
        resource.RLIMIT_AS: mapped + (memory_mb << 20),
        resource.RLIMIT_FSIZE: file_mb << 20,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_NOFILE: descriptors,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if tasks is not None:
        limits[resource.RLIMIT_NPROC] = tasks
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_capabilities() -> None:
    """Gives up every capability, root's included; there is no way back, since nothing can be executed."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    if libc.capset(header, ctypes.create_string_buffer(24)):
        raise _error("capset")


# -------------------------------------------------------------------------------------------------------- Landlock


def landlock_abi() -> int:
    """The version of Landlock that the kernel grants; 0 if it has none or has it switched off."""
    if machine() is None:
        return 0
    return max(0, _call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def readable_paths(extra: Iterable[str] = (), network: bool = False) -> list[str]:
    """What a session may read: the interpreter, its libraries, `extra`. Never the trainer's code or home folder."""
    paths = {*_SYSTEM, *extra, *(_NETWORK_FILES if network else ())}
    # A prefix such as /usr holds more than Python; its library folders are named above and below.
    paths |= {sys.prefix, sys.base_prefix, sys.exec_prefix} - {"/", "/usr", "/usr/local"}
    paths |= {
        path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    paths |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages", "lib-dynload")}
    real = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    return [path for path in real if not any(path.startswith(other.rstrip("/") + "/") for other in real)]


class LandlockPaths:
    """Read-only paths, opened once, so that confining a session costs one small call per path.

    Args:
        paths (`Iterable[str]`):
            Files and folders to grant for reading. Those that cannot be opened are left out.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.abi = landlock_abi()
        self.paths: list[str] = []
        self._rules: list[tuple[int, int]] = []
        for path in paths:
            self._add(path, _READ)
        for path in _DEVICES:
            self._add(path, FS_READ_FILE | (FS_WRITE_FILE if path == "/dev/null" else 0))

    def _add(self, path: str, rights: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        self.paths.append(path)
        self._rules.append((descriptor, self._rights(descriptor, rights)))

    def _rights(self, descriptor: int, rights: int) -> int:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        return rights & self.handled

    @property
    def handled(self) -> int:
        """Every right on files that this kernel can withhold."""
        return _FS_BY_ABI[max((abi for abi in _FS_BY_ABI if abi <= self.abi), default=1)]

    def restrict(self, writable: Sequence[str] = (), network: bool = False, sockets: bool = False) -> None:
        """Confines this thread (and what it starts) to the paths, for good.

        Args:
            writable (`Sequence[str]`):
                Folders in which it may also create, write, rename and remove.
            network (`bool`):
                Whether TCP stays possible (Landlock withholds it from ABI 4 on, seccomp everywhere).
            sockets (`bool`):
                Whether sockets may be created inside the writable folders.
        """
        attributes = struct.pack("=Q", self.handled)
        if self.abi >= 4:
            attributes += struct.pack("=Q", 0 if network else 3)
        if self.abi >= 6:
            attributes += struct.pack("=Q", 3)  # abstract sockets and signals stay within the session
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        ruleset = _call("landlock_create_ruleset", buffer, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
        if ruleset < 0:
            raise _error("landlock_create_ruleset")
        own = [(f"/proc/self/{name}", FS_READ_FILE) for name in _OWN_FILES]
        own += [(f"/proc/self/{name}", FS_READ_DIR) for name in ("fd", "task")]
        refused = FS_MAKE_CHAR | FS_MAKE_BLOCK | FS_MAKE_FIFO | FS_IOCTL_DEV | 1 | (0 if sockets else FS_MAKE_SOCK)
        own += [(path, self.handled & ~refused) for path in writable]
        try:
            for descriptor, rights in self._rules:
                self._grant(ruleset, descriptor, rights)
            for path, rights in own:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                self._grant(ruleset, descriptor, self._rights(descriptor, rights))
                os.close(descriptor)
            no_new_privileges()
            if _call("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0)):
                raise _error("landlock_restrict_self")
        finally:
            os.close(ruleset)

    @staticmethod
    def _grant(ruleset: int, descriptor: int, rights: int) -> None:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor), 12)
        if _call("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0)):
            raise _error("landlock_add_rule")

    def close(self) -> None:
        """Closes the opened paths; a confined process must not keep them."""
        for descriptor, _ in self._rules:
            os.close(descriptor)
        self._rules.clear()


def no_new_privileges() -> None:
    """Forbids this process to gain privileges by executing anything."""
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _error("prctl(PR_SET_NO_NEW_PRIVS)")


# --------------------------------------------------------------------------------------------------------- seccomp

_LOAD, _AND, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_MY_PID = 0x7FFFFFF1  # stands for the process's own id until the filter is set
_PR_OPTIONS = (3, 15, 16, 23, 0x53564D41)  # read dumpable, name a thread, read its name, read a bound, name a mapping
_FCNTL_REFUSED = (
    8,
    10,
    15,
    1024,
    1026,
)  # owner, signal, owner_ex: signals to others; lease and notify: files of others
_IOCTLS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # isatty, window size, bytes waiting, (non-)blocking, cloexec
_CLONE_THREAD, _CLONE_NAMESPACES = 0x10000, 0x7E020080
_MAP_STACK, _MIN_STACK = 0x20000, 512 << 10
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _fail(code: int) -> bytes:
    return _statement(_RETURN, _ERRNO | code)


def _low(argument: int) -> bytes:
    return _statement(_LOAD, 16 + 8 * argument)


def _high(argument: int) -> bytes:
    return _statement(_LOAD, 20 + 8 * argument)


_PERMIT, _REFUSE = _statement(_RETURN, _ALLOW), _fail(errno.EPERM)


def _one_of(argument: int, values: Sequence[int], inside: bytes = _PERMIT, outside: bytes = _REFUSE) -> list[bytes]:
    """`inside` if the argument's low half is one of the values, else `outside`."""
    tests = [_jump(_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [_low(argument), *tests, outside, inside]


def _judgements(network: bool) -> dict[str, list[bytes]]:
    """What decides about each call in `syscalls.JUDGED`: BPF that ends in a return on every path."""
    # O_RDONLY with O_TRUNC empties a file for which only reading was granted, on kernels before Landlock ABI 3
    flags = _statement(_AND, os.O_TRUNC | 3)
    no_truncating_read = [flags, _jump(_EQUAL, os.O_TRUNC, 0, 1), _REFUSE, _PERMIT]
    return {
        "open": [_low(1), *no_truncating_read],
        "openat": [_low(2), *no_truncating_read],
        # thousands of threads with tiny stacks would fit the memory limit
        "mmap": [
            *(_low(3), _jump(_ANY_BIT, _MAP_STACK, 0, 4)),
            *(_high(1), _jump(_EQUAL, 0, 0, 2), _low(1), _jump(_ABOVE, _MIN_STACK - 1, 0, 1)),
            *(_PERMIT, _fail(errno.ENOMEM)),
        ],
        "clone": [
            *(_low(0), _jump(_ANY_BIT, _CLONE_NAMESPACES, 2, 0), _jump(_ANY_BIT, _CLONE_THREAD, 0, 1)),
            *(_PERMIT, _REFUSE),
        ],
        "fcntl": _one_of(1, _FCNTL_REFUSED, _REFUSE, _PERMIT),
        "ioctl": _one_of(1, _IOCTLS, _PERMIT, _fail(errno.ENOTTY)),
        "prctl": _one_of(0, _PR_OPTIONS),
        # reading one's own limits only
        "prlimit64": [
            *(_low(0), _jump(_EQUAL, 0, 0, 5), _low(2), _jump(_EQUAL, 0, 0, 3)),
            *(_high(2), _jump(_EQUAL, 0, 0, 1), _PERMIT, _REFUSE),
        ],
        "kill": _one_of(0, (_MY_PID,)),
        "tgkill": _one_of(0, (_MY_PID,)),
        # a datagram pair could be sent on to anybody's socket
        "socketpair": [
            *(_low(0), _jump(_EQUAL, _AF_UNIX, 0, 4)),
            *(_low(1), _statement(_AND, 0xF), _jump(_EQUAL, 1, 0, 1), _PERMIT, _REFUSE),
        ],
        "sendto": [_PERMIT]
        if network
        else [*(_low(4), _jump(_EQUAL, 0, 0, 3), _high(4), _jump(_EQUAL, 0, 0, 1)), *(_PERMIT, _REFUSE)],
    }


def seccomp_program(column: int, architecture: int, network: bool = False, serving: bool = False) -> bytes:
    """The filter as BPF instructions, with a placeholder for the process's own id.

    Args:
        column (`int`):
            Column of the tables in `_syscalls`: 0 for x86-64, 1 for aarch64.
        architecture (`int`):
            Its audit number; calls of any other architecture (32-bit, x32) kill.
        network (`bool`):
            Whether internet sockets may be opened and used.
        serving (`bool`):
            Whether connections may be accepted on sockets that are already open (Jupyter kernels).
    """
    allowed = [numbers[column] for numbers in syscalls.ALLOWED.values()]
    special: dict[int, list[bytes]] = {}
    for name, block in _judgements(network or serving).items():
        special[syscalls.JUDGED[name][column]] = block
    for table, code in (
        (syscalls.IGNORED, 0),
        (syscalls.UNSUPPORTED, errno.EOPNOTSUPP),
        (syscalls.MISSING, errno.ENOSYS),
    ):
        special |= {numbers[column]: [_fail(code)] for numbers in table.values()}
    if network:
        allowed += [numbers[column] for numbers in syscalls.NETWORK.values()]
        special[syscalls.SOCKET[column]] = _one_of(0, (_AF_INET, _AF_INET6))
    if serving:
        allowed += [numbers[column] for numbers in syscalls.SERVING.values()]
    special.pop(None, None)
    program = [
        *(_statement(_LOAD, 4), _jump(_EQUAL, architecture, 1, 0), _statement(_RETURN, _KILL)),
        *(_statement(_LOAD, 0), _jump(_ABOVE, syscalls.LAST, 0, 1), _fail(errno.ENOSYS)),  # x32 numbers, too
    ]
    for number, block in sorted(special.items()):
        program += [_jump(_EQUAL, number, 0, len(block)), *block]
    numbers = sorted({number for number in allowed if number is not None})
    program += [_jump(_EQUAL, number, len(numbers) - i, 0) for i, number in enumerate(numbers)]
    return b"".join([*program, _REFUSE, _PERMIT])


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def set_seccomp(program: bytes, all_threads: bool = False) -> None:
    """Installs a filter made by [`seccomp_program`] for this thread (or for all of the process), for good."""
    program = program.replace(struct.pack("=I", _MY_PID), struct.pack("=I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    no_new_privileges()
    if _call("seccomp", ctypes.c_uint(1), ctypes.c_uint(1 if all_threads else 0), ctypes.byref(header)):
        raise _error("seccomp")


# ------------------------------------------------------------------------------------------------------ namespaces

_NEWUSER, _NEWIPC, _NEWNET = 0x10000000, 0x08000000, 0x40000000


def enter_namespaces(network: bool) -> str:
    """Leaves the machine's network and System V objects behind, where the kernel allows it: an extra, not a must.

    Returns what was entered, e.g. `"user, ipc, net"`; an empty string where nothing was allowed.
    """
    kinds, names = _NEWIPC | (0 if network else _NEWNET), "ipc" + ("" if network else ", net")
    if libc.unshare(kinds) == 0:
        return names
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEWUSER | kinds):
        return ""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return "user, " + names
