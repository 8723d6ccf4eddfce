"""The walls one by one: numbers of system calls, the filter's decisions on both architectures, folders, modes."""

import ctypes
import errno
import logging
import os
import re
import socket
import struct
import sys
from pathlib import Path

import pytest

from trl_multiturn.sandbox.forkserver import IsolationError
from trl_multiturn.sandbox.inside import confinement, scratch as _scratch, syscalls as _syscalls
from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")

TABLES = ("ALLOWED", "JUDGED", "NETWORK", "SERVING", "IGNORED", "UNSUPPORTED", "MISSING", "OWN")
ALL = {name: numbers for table in TABLES for name, numbers in getattr(_syscalls, table).items()}
ALLOW, EPERM, ENOSYS, KILL = "allow", errno.EPERM, errno.ENOSYS, "kill"


# ------------------------------------------------------------------------------------------------------- the table


def _header(path: str) -> dict[str, int]:
    if not os.path.exists(path):
        pytest.skip(f"{path} is not installed")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    return {match[1]: int(match[2]) for match in map(pattern.match, Path(path).read_text().splitlines()) if match}


@pytest.mark.parametrize(
    ("column", "path"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_numbers_are_those_of_the_kernels_headers(column, path):
    header = _header(path)
    if column == 1:
        header["newfstatat"] = header["fstatat"]  # 64-bit name of the same call
    for name, numbers in ALL.items():
        if name in header or numbers[column] is None:
            assert numbers[column] == header.get(name), name


def test_numbers_are_unique_and_within_the_table():
    for column in (0, 1):
        numbers = {name: pair[column] for name, pair in ALL.items() if pair[column] is not None}
        assert len(set(numbers.values())) == len(numbers)
        assert max(numbers.values()) <= _syscalls.LAST


@pytest.mark.skipif(confinement.machine() is None, reason="no table for this architecture")
def test_numbers_mean_what_they_say_on_the_running_kernel(tmp_path):
    column, libc = confinement.machine()[0], ctypes.CDLL(None, use_errno=True)

    def call(name, *args):
        return libc.syscall(ctypes.c_long(ALL[name][column]), *args)

    assert call("getpid") == os.getpid() and call("getppid") == os.getppid() and call("getuid") == os.getuid()
    path = str(tmp_path / "made").encode()
    assert call("mkdirat", -100, path, 0o700) == 0 and os.path.isdir(path)
    assert call("unlinkat", -100, path, 0x200) == 0 and not os.path.exists(path)
    assert call("kill", os.getpid(), 0) == 0 and call("tgkill", os.getpid(), os.getpid(), 0) == 0
    descriptor = call("openat", -100, b"/dev/null", os.O_RDWR)
    assert descriptor > 2 and call("write", descriptor, b"abc", ctypes.c_size_t(3)) == 3
    assert call("fcntl", descriptor, 1) == 0 and call("close", descriptor) == 0
    pair = (ctypes.c_int * 2)()
    assert call("socketpair", 1, 1, 0, pair) == 0
    assert call("sendto", pair[0], b"hi", ctypes.c_size_t(2), 0, None, 0) == 2 and os.read(pair[1], 2) == b"hi"
    os.close(pair[0])
    os.close(pair[1])
    assert call("clone3", None, ctypes.c_size_t(0)) == -1 and ctypes.get_errno() in (errno.EINVAL, errno.EPERM, ENOSYS)


# ------------------------------------------------------------------------------------------------------ the filter


def decide(program: bytes, architecture: int, number: int, *arguments: int):
    """Runs a filter as the kernel does: classic BPF over `struct seccomp_data`."""
    padded = [argument & (1 << 64) - 1 for argument in (*arguments, *[0] * 6)][:6]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x25, 0x45):
            truth = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
            at += if_true if truth else if_false
        else:
            assert code == 0x06
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(value, value & 0xFFFF)


@pytest.fixture(params=list(_syscalls.ARCHITECTURES))
def judge(request):
    column, architecture = _syscalls.ARCHITECTURES[request.param]

    def judge(name, *arguments, **kinds):
        number = {**ALL, "socket": _syscalls.SOCKET}[name][column] if isinstance(name, str) else name
        program = confinement.seccomp_program(column, architecture, **kinds)
        return decide(program, architecture, number, *arguments)

    judge.column, judge.architecture = column, architecture
    return judge


MY_PID, OTHER = confinement._MY_PID, 4242
THREAD_FLAGS = 0x3D0F00  # what the C library clones a thread with


@pytest.mark.parametrize(
    ("name", "arguments", "verdict"),
    [
        ("read", (), ALLOW),
        ("kill", (MY_PID, 9), ALLOW),
        ("kill", (OTHER, 9), EPERM),
        ("kill", (0, 9), EPERM),
        ("kill", (-1, 9), EPERM),
        ("tgkill", (MY_PID, OTHER, 9), ALLOW),
        ("tgkill", (OTHER, OTHER, 9), EPERM),
        ("clone", (THREAD_FLAGS,), ALLOW),
        ("clone", (17,), EPERM),
        ("clone", (THREAD_FLAGS | 0x10000000,), EPERM),
        ("clone3", (), ENOSYS),
        ("openat", (-100, 0, os.O_RDONLY), ALLOW),
        ("openat", (-100, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT), ALLOW),
        ("openat", (-100, 0, os.O_RDONLY | os.O_TRUNC), EPERM),
        ("openat2", (), ENOSYS),
        ("mmap", (0, 1 << 30, 3, 0x22), ALLOW),
        ("mmap", (0, 8 << 20, 0, 0x20022), ALLOW),
        ("mmap", (0, 1 << 40, 0, 0x20022), ALLOW),
        ("mmap", (0, 64 << 10, 0, 0x20022), errno.ENOMEM),
        ("fcntl", (3, 3), ALLOW),
        ("fcntl", (3, 8, OTHER), EPERM),
        ("fcntl", (3, 10, 9), EPERM),
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), errno.ENOTTY),
        ("prctl", (15, 0), ALLOW),
        ("prctl", (1, 0), EPERM),
        ("prctl", (22, 0), EPERM),
        ("prlimit64", (0, 7, 0, 1 << 40), ALLOW),
        ("prlimit64", (0, 7, 1 << 40, 0), EPERM),
        ("prlimit64", (0, 7, 16, 0), EPERM),
        ("prlimit64", (OTHER, 7, 0, 16), EPERM),
        ("socketpair", (1, 1 | 0o2000000), ALLOW),
        ("socketpair", (1, 2), EPERM),
        ("socketpair", (2, 1), EPERM),
        ("sendto", (3, 16, 2, 0, 0, 0), ALLOW),
        ("sendto", (3, 16, 2, 0, 1 << 40, 16), EPERM),
        ("socket", (1, 1), EPERM),
        ("socket", (2, 1), EPERM),
        ("connect", (3,), EPERM),
        ("fchmodat", (-100, 0, 0o777), 0),
        ("utimensat", (-100,), 0),
        ("setxattr", (), errno.EOPNOTSUPP),
        ("fallocate", (), errno.EOPNOTSUPP),
        ("seccomp", (), EPERM),
        (_syscalls.LAST + 1, (), ENOSYS),
        (0x40000000 + 39, (), ENOSYS),
    ],
)
def test_the_filter_decides(judge, name, arguments, verdict):
    assert judge(name, *arguments) == verdict


def test_the_filter_opens_the_internet_on_request_only(judge):
    assert judge("socket", 2, 1, network=True) == judge("socket", 10, 2, network=True) == ALLOW
    assert judge("socket", 1, 1, network=True) == judge("socket", 16, 3, network=True) == EPERM
    assert judge("connect", 3, network=True) == judge("sendto", 3, 16, 2, 0, 1 << 40, 16, network=True) == ALLOW
    assert judge("accept4", 3, serving=True) == ALLOW and judge("socket", 2, 1, serving=True) == EPERM


def test_every_call_outside_the_tables_is_refused(judge):
    known = {pair[judge.column] for pair in ALL.values()}
    column, architecture = judge.column, judge.architecture
    program = confinement.seccomp_program(column, architecture)
    for number in set(range(_syscalls.LAST + 1)) - known:
        assert decide(program, architecture, number) == EPERM, number


def test_a_call_of_another_architecture_kills(judge):
    program = confinement.seccomp_program(judge.column, judge.architecture)
    assert decide(program, 0x40000003, 20) == KILL


# ----------------------------------------------------------------------------------------------------- the folders


def test_quota_counts_files_bytes_depth_and_what_it_cannot_see(tmp_path):
    assert _scratch.over_quota(str(tmp_path), 1, 10) is None
    (tmp_path / "a").write_bytes(b"x" * (1 << 20))
    assert _scratch.over_quota(str(tmp_path), 2, 10) is None
    (tmp_path / "b").write_bytes(b"x" * (2 << 20))
    assert _scratch.over_quota(str(tmp_path), 2, 10) == "more than 2 MB"
    for i in range(10):
        (tmp_path / f"{i}").touch()
    assert _scratch.over_quota(str(tmp_path), 100, 10) == "more than 10 files"
    deep = tmp_path / "deep"
    for _ in range(102):
        deep.mkdir()
        deep = deep / "d"
    assert "deep" in _scratch.over_quota(str(tmp_path), 100, 1000)
    assert _scratch.over_quota(str(tmp_path / "absent"), 1, 1) is None


def test_removal_copes_with_depth_locks_and_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 20, dir_fd=here)
        following = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = following
    os.close(here)
    (folder / "locked").mkdir()
    (folder / "locked" / "x").touch()
    (folder / "locked").chmod(0)
    (folder / "out").symlink_to(outside)
    (folder / b"\xff\n".decode("utf-8", "surrogateescape")).touch()
    _scratch.remove(str(folder))
    assert not folder.exists() and (outside / "kept").exists()


# ------------------------------------------------------------------------------------------------------- the modes

# a program prefix under which some system calls do not exist, as on an older kernel or in a stricter container
_WITHOUT = """
import ctypes, os, struct, sys
numbers = [int(n) for n in sys.argv[1].split(",")]
libc = ctypes.CDLL(None)
program = struct.pack("=HBBI", 0x20, 0, 0, 0)
for n in numbers: program += struct.pack("=HBBI", 0x15, 0, 1, n) + struct.pack("=HBBI", 6, 0, 0, 0x50000 | 38)
program += struct.pack("=HBBI", 6, 0, 0, 0x7fff0000)
class Prog(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("f", ctypes.c_void_p)]
buffer = ctypes.create_string_buffer(program, len(program))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(Prog(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))), 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""


def without(*names: str) -> tuple[str, ...]:
    column = confinement.machine()[0]
    return (sys.executable, "-I", "-S", "-c", _WITHOUT, ",".join(str(_syscalls.OWN[name][column]) for name in names))


def test_strict_needs_no_namespaces():
    prefix = without()[:-1] + (str({0: 272, 1: 97}[confinement.machine()[0]]),)  # no unshare, as in Docker
    with Sandbox(SandboxConfig(launcher=prefix, preload=())) as sandbox, sandbox.open() as session:
        assert session.run("open('/etc/passwd')").output.startswith("PermissionError")
        assert sandbox._backend.layers["namespaces"] == "off"


@pytest.mark.parametrize("missing", ["landlock_create_ruleset", "seccomp"])
def test_strict_refuses_a_machine_without_a_wall_and_says_why(missing):
    with Sandbox(SandboxConfig(launcher=without(missing), preload=())) as sandbox:
        with pytest.raises(IsolationError, match=f"no {missing.split('_')[0]}.*best_effort"):
            sandbox.open()


def test_best_effort_takes_what_there_is_and_says_so_once(caplog):
    config = SandboxConfig(isolation="best_effort", launcher=without("landlock_create_ruleset"), preload=())
    with caplog.at_level(logging.WARNING), Sandbox(config) as sandbox, sandbox.open() as session, sandbox.open():
        assert session.run("import os; os.fork()").status == "error"  # seccomp still stands
        assert session.run("1 + 1").output == "2"
    assert len([record for record in caplog.records if "less isolation" in record.getMessage()]) == 1


def test_none_confines_nothing_but_still_cleans_up():
    with Sandbox(SandboxConfig(isolation="none", preload=())) as sandbox, sandbox.open() as session:
        zygote, pid = sandbox._backend.pid, session._interpreter.pid

        def children():
            return set(map(int, Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()))

        before = children()
        code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    time.sleep(600)
os.wait()
"""
        assert session.run(code).status == "ok"
        assert len(children() - before) == 1  # disowned by the session, it came to its subreaper
        session.close()
        assert children() == before - {pid}


def test_readable_paths_and_scratch_are_configurable(tmp_path):
    (tmp_path / "data").write_text("granted")
    config = SandboxConfig(readonly_paths=(str(tmp_path),), scratch_limit_mb=0, preload=())
    with Sandbox(config) as sandbox, sandbox.open() as session:
        assert session.run(f"open({str(tmp_path / 'data')!r}).read()").output == "'granted'"
        assert session.run(f"open({str(tmp_path / 'new')!r}, 'w')").output.startswith("PermissionError")
        assert session.run("open('mine', 'w')").output.startswith("PermissionError")


def test_the_network_is_there_on_request():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5).close()"
    with Sandbox(SandboxConfig(network=True, preload=())) as sandbox, sandbox.open() as session:
        assert session.run(code).status == "ok"
        assert session.run("import socket; socket.socket(socket.AF_UNIX)").status == "error"
    listener.settimeout(5)
    listener.accept()[0].close()
    listener.close()


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 5\nawait f()",
        "from concurrent.futures import ThreadPoolExecutor\nsum(ThreadPoolExecutor(2).map(int, '23'))",
        "import sqlite3; sqlite3.connect(':memory:').execute('select 2 + 3').fetchone()[0]",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: print(open(d + '/x', 'w').write('hello'))",
        "import shutil; open('a', 'w').write('x' * 5); shutil.copy2('a', 'b'); len(open('b').read())",
        "import zoneinfo; 5 if zoneinfo.ZoneInfo('UTC') else 0",
        "import sys; sys.stdout.buffer.write(b'5\\n');",
        "%%time\n5",
        "from dataclasses import dataclass\n@dataclass\nclass A: x: int\nA(5).x",
        "import pickle\nclass B: x = 5\npickle.loads(pickle.dumps(B())).x",
        "import numpy as np; int(np.linalg.norm(np.array([3.0, 4.0])))",
    ],
)
def test_honest_code_works_behind_the_walls(honest, code):
    result = honest.run(code)
    assert (result.output.splitlines()[-1:], result.status) == (["5"], "ok"), result


@pytest.fixture(scope="module")
def honest():
    with Sandbox(SandboxConfig(preload=("numpy",))) as sandbox, sandbox.open() as session:
        yield session
