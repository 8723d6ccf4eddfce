# ruff: noqa: E501 (a cell reads best on one line)
# fmt: off
"""Hostile cells, by family. A cell that gets away with it prints ESCAPED (or a secret); `host` holds what it may aim at.

Every cell is bounded (so many processes, so many megabytes), so that a wall which fails cannot hurt the machine that
runs the tests. A cell needs no wall to be harmless, but the checks in `arena.py` need one to pass. None of them sets off
a fault of Python or of a library: where such a fault would spin, crash or fill the memory, the cell does so by itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """One cell: its name, its source, and the verdicts that count as contained."""

    name: str
    code: str
    statuses: tuple[str, ...]


_LIBC = "import ctypes, os, platform\nlibc = ctypes.CDLL(None, use_errno=True)\narm = platform.machine() == 'aarch64'\n"
REFUSED = ("error", "ok")  # refused inside the cell, which may or may not have caught the exception
ENDED = ("crashed", "timeout", "error", "memory", "ok")
_ATTACKS: list[Attack] = []


def _family(statuses: tuple[str, ...], **cells: str) -> None:
    _ATTACKS.extend(Attack(name, code, statuses) for name, code in cells.items())


# ---------------------------------------------------------------------------------------- time, in Python and in C
_family(
    ("timeout",),
    loop="while True: pass",
    loop_in_c="sum(range(10**12))",
    loop_with_sympy="from sympy import symbols\nx = symbols('x')\nwhile True: x = -x",
    signals_ignored="""
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0)
while True: pass""",
    signals_blocked="""
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: pass""",
    every_exception_swallowed="""
import time
while True:
    try: time.sleep(100)
    except BaseException: pass""",
    timer_disarmed="import signal, time; signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(100)",
    sleep="import time; time.sleep(100)",
    endless_destructor="class A:\n    def __del__(self):\n        while True: pass\na = A(); del a",
    stopped_by_itself="import os, signal, time; os.kill(os.getpid(), signal.SIGSTOP); time.sleep(100)",
    deadlock="import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    endless_generator="list(x for x in iter(int, 1) if x)",
    lock_held_by_c_call="import ctypes; ctypes.PyDLL(None).pause()",
    endless_str="""
class Endless(Exception):
    def __str__(self):
        while True: pass
raise Endless""",
    endless_repr="""
class Endless:
    def __repr__(self):
        while True: pass
Endless()""",
)
_family(
    ("timeout", "memory", "error"),
    hanging_numpy="import numpy as np; a = np.random.rand(3000, 3000)\nfor _ in range(10000): a = a @ a",
)

# ----------------------------------------------------------------------------------------------- memory in every form
_family(
    ("memory", "error", "crashed", "timeout"),
    heap_at_once="x = bytearray(4 << 30); print('ESCAPED')",
    heap_in_steps="x = []\nfor _ in range(4096): x.append(bytearray(b'a' * (1 << 20)))\nprint('ESCAPED')",
    heap_list="x = [0] * (1 << 30); print('ESCAPED')",
    shared_mapping="import mmap; x = mmap.mmap(-1, 4 << 30); x[:] = b'a' * len(x); print('ESCAPED')",
    memory_file="""
import os
fd = os.memfd_create('x')
for _ in range(2048): os.write(fd, b'a' * (1 << 20))
print('ESCAPED')""",
    memory_file_secret=_LIBC + "assert libc.syscall(447, 0) >= 0; print('ESCAPED')",
    numpy_memory="import numpy; x = numpy.ones((1 << 15, 1 << 15)); print('ESCAPED')",
    huge_string="x = 'a' * (4 << 30); print('ESCAPED')",
    huge_repr="[['x' * 10**8] * 100] * 100\n'x' * 10**9",
)
_family(
    REFUSED,
    system_v_memory=_LIBC + "i = libc.shmget(0, 1 << 30, 0o1600); print('ESCAPED' if i >= 0 else 'refused')",
    system_v_queue=_LIBC + "print('ESCAPED' if libc.msgget(0, 0o1600) >= 0 else 'refused')",
    system_v_semaphore=_LIBC + "print('ESCAPED' if libc.semget(0, 1, 0o1600) >= 0 else 'refused')",
    posix_shared_memory="from multiprocessing import shared_memory; shared_memory.SharedMemory(create=True, size=1 << 20); print('ESCAPED')",
    dev_shm="open('/dev/shm/trl-multiturn-attack', 'w').write('x'); print('ESCAPED')",
    memory_locked=_LIBC + "print('ESCAPED' if libc.mlockall(3) == 0 else 'refused')",
)

# ------------------------------------------------------------------------------------------------------------ output
_family(
    ("ok", "timeout", "memory", "error", "crashed"),
    stdout_spoiled="import sys; sys.stdout.write = sys.stdout.buffer = sys.stdout.name = None; vars(sys.stdout).pop('_output', 0); vars(sys.stdout)['_own'] = {}",
    flood_print="for _ in range(10**7): print('x' * 100)",
    flood_print_at_once="print('x' * (200 << 20))",
    flood_stdout_descriptor="import os\nfor _ in range(2000): os.write(1, b'x' * (1 << 20))",
    flood_stderr_descriptor="import os\nfor _ in range(2000): os.write(2, b'x' * (1 << 20))",
    flood_every_descriptor="""
import os
for _ in range(50):
    for fd in range(3, 64):
        try: os.write(fd, b'x' * (1 << 16))
        except OSError: pass""",
    flood_error="raise ValueError('x' * (100 << 20))",
    odd_characters="print('\\ud800', '\\x00', '\\x1b[31m', chr(0x10ffff))",
    stdout_none="import sys; sys.stdout = sys.stderr = sys.stdin = None",
    stdout_closed="import sys; sys.stdout.close(); sys.stderr.close(); sys.stdin.close()",
    stdout_replaced="""
import sys
class Bad:
    def __getattr__(self, name): raise RuntimeError(name)
sys.stdout = sys.stderr = sys.__stdout__ = Bad()""",
    stdout_deleted="import sys; del sys.stdout, sys.stderr, sys.displayhook, sys.excepthook",
)

# --------------------------------------------------------------------------------------------- crashes, exits, stacks
_family(
    ("crashed",),
    exit_at_once="import os; os._exit(0)",
    abort="import os; os.abort()",
    segmentation_fault="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    illegal_instruction="import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    own_signal="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    crash_deep_inside="import os, sys; sys.setrecursionlimit(10**9)\ndef f(n): f(n - 1) if n else os.abort()\nf(5000)",
    descriptors_closed="import os; os.closerange(0, 1 << 16)",
)
_family(("error",), audit_hook="import sys, time; sys.addaudithook(lambda *_: time.sleep(100))")
_family(("ok",), exit_politely="import sys; sys.exit(0)", exit_by_name="exit()", quit_by_name="quit()")
_family(("error",), exit_in_anger="import sys; sys.exit(1)", interrupted="raise KeyboardInterrupt")
_family(
    ENDED,
    hooks_left="import gc, time\nf = lambda *_: time.sleep(100)\nfor n in ('pre_execute', 'pre_run_cell', 'post_execute', 'post_run_cell'): get_ipython().events.register(n, f)\nget_ipython().input_transformers_post.append(f); get_ipython().ast_transformers.append(f); gc.callbacks.append(f)",
    recursion="def f(): f()\nf()",
    recursion_limit_huge="import sys; sys.setrecursionlimit(10**9)\ndef f(n): return n and f(n - 1)\nf(5000)",
    recursion_limit_tiny="import sys\ntry: sys.setrecursionlimit(60)\nexcept RecursionError: pass",
    memory_error_raised="raise MemoryError('no more')",
    collected_late="import gc; [gc.collect() for _ in range(3)]; gc.freeze(); gc.disable()",
)

# -------------------------------------------------------------------------------------------------- processes, threads
_family(
    REFUSED,
    fork_bomb="import os\nfor _ in range(200):\n    if os.fork() == 0:\n        import time; time.sleep(30); os._exit(0)\nprint('ESCAPED')",
    fork_raw=_LIBC + "n = libc.syscall(220, 17, 0, 0, 0, 0) if arm else libc.syscall(57)\nif n == 0: os._exit(0)\nprint('ESCAPED' if n > 0 else 'refused')",
    fork_vfork=_LIBC + "if not arm:\n    n = libc.syscall(56, 0x4111, 0, 0, 0, 0)\n    if n == 0: os._exit(0)\n    print('ESCAPED' if n > 0 else 'refused')",
    clone3=_LIBC + "a = (ctypes.c_uint64 * 11)(); a[4] = 17\nn = libc.syscall(435, a, 88)\nif n == 0: os._exit(0)\nprint('ESCAPED' if n > 0 else 'refused')",
    multiprocessing="import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print); p.start(); print('ESCAPED')",
    daemon="import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(30)\n    os._exit(0)\nprint('ESCAPED')",
    own_session="import os; os.setsid(); print('ESCAPED')",
    own_group="import os; os.setpgid(0, 0); print('ESCAPED' if os.getpgid(0) == os.getpid() and False else 'no matter')",
)
_family(
    ("error", "memory", "timeout", "crashed", "ok"),
    thread_bomb="""
import threading, time
threads = []
try:
    for _ in range(5000):
        t = threading.Thread(target=time.sleep, args=(30,), daemon=True); t.start(); threads.append(t)
    print('ESCAPED')
except RuntimeError: print(len(threads))""",
    thread_bomb_small_stacks="""
import threading, time
threading.stack_size(32 << 10)
threads = []
try:
    for _ in range(5000):
        t = threading.Thread(target=time.sleep, args=(30,), daemon=True); t.start(); threads.append(t)
    print('ESCAPED')
except RuntimeError: print(len(threads))""",
)
_family(
    ("ok",),
    thread_spinning="import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()",
    thread_spinning_stubborn="""
import threading
def spin():
    while True:
        try:
            while True: pass
        except BaseException: pass
for _ in range(3): threading.Thread(target=spin, daemon=True).start()""",
    thread_printing="""
import threading, time
def chatter():
    while True: print('NOISE'); time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()""",
    thread_printing_to_old_stdout="""
import sys, threading, time
def chatter(out):
    while True: out.write('NOISE'); time.sleep(0.001)
threading.Thread(target=chatter, args=(sys.stdout,), daemon=True).start()""",
    timer_left="import threading; threading.Timer(0.05, print, ['NOISE']).start()",
    alarm_left="import signal; signal.signal(signal.SIGALRM, lambda *_: print('NOISE')); signal.alarm(1)",
    killer_left="import os, threading; threading.Timer(0.05, os._exit, [1]).start()",
    killer_left_in_c="import faulthandler; faulthandler.dump_traceback_later(0.2, exit=True, file=open('x', 'w'))",
    profiling_timer_left="import signal; signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)",
    switches_off="import sys; sys.setswitchinterval(1e6)",
    profile_left="import sys, threading; f = lambda *_: f; sys.settrace(f); sys.setprofile(f); threading.settrace(f)",
)

# ------------------------------------------------------------------------------------------------- killing and tracing
_family(
    REFUSED,
    kill_parent="import os; os.kill(os.getppid(), 9); print('ESCAPED')",
    kill_client="import os; os.kill(host['client'], 9); print('ESCAPED')",
    kill_sibling="import os; os.kill(host['sibling'], 9); print('ESCAPED')",
    kill_bystander="import os; os.kill(host['bystander'], 15); print('ESCAPED')",
    kill_everything="import os; os.kill(-1, host['deadly']); print('ESCAPED')",
    kill_group="import os; os.kill(0, host['deadly']); print('ESCAPED')",
    kill_parents_group="import os; os.killpg(os.getpgid(os.getppid()), host['deadly']); print('ESCAPED')",
    probe_pids="import os\nfor pid in (1, host['client'], host['sibling']): os.kill(pid, 0); print('ESCAPED')",
    kill_by_thread=_LIBC + "n = 131 if arm else 234\nprint('ESCAPED' if libc.syscall(n, host['client'], host['client'], 9) == 0 else 'refused')",
    kill_by_tkill=_LIBC + "n = 130 if arm else 200\nprint('ESCAPED' if libc.syscall(n, host['sibling'], 9) == 0 else 'refused')",
    kill_by_queue=_LIBC + "n = 138 if arm else 129\ni = (ctypes.c_int * 32)(9, 0, -1)\nprint('ESCAPED' if libc.syscall(n, host['bystander'], 9, i) == 0 else 'refused')",
    kill_by_pidfd="import os, signal; fd = os.pidfd_open(host['bystander']); signal.pidfd_send_signal(fd, 9); print('ESCAPED')",
    kill_by_owner="""
import fcntl, os
r, w = os.pipe()
fcntl.fcntl(r, fcntl.F_SETOWN, host['bystander']); fcntl.fcntl(r, 10, 9)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x'); print('ESCAPED')""",
    trace_client=_LIBC + "print('ESCAPED' if libc.ptrace(16, host['client'], 0, 0) == 0 else 'refused')",
    trace_sibling=_LIBC + "print('ESCAPED' if libc.ptrace(16, host['sibling'], 0, 0) == 0 else 'refused')",
    read_memory_by_call=_LIBC + """
buffer = ctypes.create_string_buffer(64)
class Vec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
local, remote = Vec(ctypes.addressof(buffer), 64), Vec(host['address'], 64)
n = libc.process_vm_readv(host['client'], ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
print('ESCAPED' if n > 0 else 'refused')""",
    read_memory_by_file="f = open(f\"/proc/{host['client']}/mem\", 'rb', 0); f.seek(host['address']); print('ESCAPED', f.read(64))",
    write_own_memory_file="f = open('/proc/self/mem', 'r+b', 0); print('ESCAPED')",
    read_sibling_memory="print('ESCAPED', open(f\"/proc/{host['sibling']}/maps\").read(10))",
    read_client_environment="print('ESCAPED', open(f\"/proc/{host['client']}/environ\").read())",
    read_parent_environment="import os; print('ESCAPED', open(f'/proc/{os.getppid()}/environ').read())",
    read_client_command="print('ESCAPED', open(f\"/proc/{host['client']}/cmdline\").read())",
    own_environment="import os; print(dict(os.environ)); print(open('/proc/self/environ').read())",
    steal_descriptor=_LIBC + "n = libc.syscall(438, 3, 0, 0); fd = libc.syscall(434, host['client'], 0); print('ESCAPED' if fd >= 0 else 'refused')",
    compare_processes=_LIBC + "n = 272 if arm else 312\nprint('ESCAPED' if libc.syscall(n, host['client'], os.getpid(), 0, 0, 0) >= 0 else 'refused')",
    other_descriptors="import os; print('ESCAPED', os.listdir(f\"/proc/{host['client']}/fd\"))",
)

# ------------------------------------------------------------------------------------------------------ files outside
_family(
    REFUSED,
    read_secret="print('ESCAPED', open(host['secret']).read())",
    read_passwords="print('ESCAPED', open('/etc/passwd').read())",
    read_home="import os; print('ESCAPED', os.listdir(host['home']))",
    read_source="print('ESCAPED', open(host['source']).read(20))",
    list_outside="import os; print('ESCAPED', os.listdir(host['folder']))",
    list_root="import os; print('ESCAPED', os.listdir('/'))",
    write_outside="open(host['folder'] + '/new', 'w').write('x'); print('ESCAPED')",
    append_outside="open(host['secret'], 'a').write('x'); print('ESCAPED')",
    write_library="import json; open(json.__file__, 'a').write('# x'); print('ESCAPED')",
    write_beside_library="import json; open(json.__file__ + '.attack', 'w').write('x'); print('ESCAPED')",
    remove_outside="import os; os.remove(host['secret']); print('ESCAPED')",
    remove_tree="import shutil; shutil.rmtree(host['folder']); print('ESCAPED')",
    make_folder="import os; os.mkdir(host['folder'] + '/new'); print('ESCAPED')",
    remove_folder="import os; os.rmdir(host['folder'] + '/empty'); print('ESCAPED')",
    rename_out="import os; open('mine', 'w').write('x'); os.rename('mine', host['folder'] + '/mine'); print('ESCAPED')",
    rename_in="import os; os.rename(host['secret'], 'stolen'); print('ESCAPED', open('stolen').read())",
    rename_outside="import os; os.rename(host['secret'], host['secret'] + '2'); print('ESCAPED')",
    exchange=_LIBC + "open('mine', 'w').write('x')\nn = 276 if arm else 316\nprint('ESCAPED' if libc.syscall(n, -100, b'mine', -100, host['secret'].encode(), 2) == 0 else 'refused')",
    link_in="import os; os.link(host['secret'], 'stolen'); print('ESCAPED', open('stolen').read())",
    link_out="import os; open('mine', 'w').write('x'); os.link('mine', host['folder'] + '/mine'); print('ESCAPED')",
    link_library="import json, os; os.link(json.__file__, 'mine'); open('mine', 'a').write('# x'); print('ESCAPED')",
    rename_library="import json, os; os.rename(json.__file__, 'mine'); print('ESCAPED')",
    lock_library="import fcntl, json; fcntl.flock(open(json.__file__), fcntl.LOCK_EX); print('ESCAPED')",
    read_network_state="print('ESCAPED', open('/proc/self/net/tcp').read(), open('/proc/net/tcp').read())",
    read_mounts="print('ESCAPED', open('/proc/self/mountinfo').read())",
    symlink_read="import os; os.symlink(host['secret'], 'stolen'); print('ESCAPED', open('stolen').read())",
    symlink_write="import os; os.symlink(host['secret'], 'stolen'); open('stolen', 'w').write('x'); print('ESCAPED')",
    symlink_out="import os; os.symlink('/etc', host['folder'] + '/link'); print('ESCAPED')",
    truncate_outside="import os; os.truncate(host['secret'], 0); print('ESCAPED')",
    truncate_by_reading="import os; os.open(host['secret'], os.O_RDONLY | os.O_TRUNC); print('ESCAPED')",
    truncate_library="import json, os; os.open(json.__file__, os.O_RDONLY | os.O_TRUNC); print('ESCAPED')",
    open_path_then_more="import os; fd = os.open(host['secret'], os.O_PATH); print('ESCAPED', open(f'/proc/self/fd/{fd}').read())",
    open_by_openat2=_LIBC + "h = (ctypes.c_uint64 * 3)(0, 0, 0)\nfd = libc.syscall(437, -100, host['secret'].encode(), h, 24)\nprint('ESCAPED' if fd >= 0 else 'refused')",
    open_by_handle=_LIBC + "n = 264 if arm else 303\nprint('ESCAPED' if libc.syscall(n, -100, host['secret'].encode(), ctypes.create_string_buffer(256), ctypes.byref(ctypes.c_int()), 0) == 0 else 'refused')",
    root_by_proc="print('ESCAPED', open('/proc/self/root' + host['secret']).read())",
    cwd_by_proc="import os; print('ESCAPED', os.listdir(f\"/proc/{host['client']}/cwd\"))",
    chmod_outside="import os; os.chmod(host['secret'], 0o777)",
    chown_outside="import os; os.chown(host['secret'], 1, 1); print('ESCAPED')",
    utime_outside="import os; os.utime(host['secret'], (1, 1))",
    attribute_outside="import os; os.setxattr(host['secret'], 'user.attack', b'x'); print('ESCAPED')",
    attribute_read="import os; print('ESCAPED', os.getxattr(host['secret'], 'user.canary'))",
    watch_outside=_LIBC + "fd = libc.inotify_init1(0); print('ESCAPED' if fd >= 0 else 'refused')",
    watch_by_fcntl="import fcntl, os; fd = os.open('.', os.O_RDONLY); fcntl.fcntl(fd, 1026, 0xf); print('ESCAPED')",
    lease="import fcntl, json, os; fd = os.open(json.__file__, os.O_RDONLY); fcntl.fcntl(fd, 1024, 0); print('ESCAPED')",
    sibling_scratch_read="import os; print('ESCAPED', os.listdir(host['sibling_folder']))",
    sibling_scratch_write="open(host['sibling_folder'] + '/x', 'w'); print('ESCAPED')",
    scratch_parent="import os; print('ESCAPED', os.listdir('..'))",
    scratch_moved="import os; os.rename(os.getcwd(), os.getcwd() + '2'); print('ESCAPED')",
    scratch_removed="import os; d = os.getcwd(); os.chdir('/'); os.rmdir(d); print('ESCAPED')",
    device_made="import os, stat; os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); print('ESCAPED')",
    device_read="print('ESCAPED', open('/dev/mem', 'rb').read(1))",
    terminal_read="print('ESCAPED', open('/dev/tty', 'rb').read(1))",
    kernel_log=_LIBC + "n = 116 if arm else 103\nprint('ESCAPED' if libc.syscall(n, 3, ctypes.create_string_buffer(99), 99) > 0 else 'refused')",
    kernel_settings="open('/proc/sys/vm/drop_caches', 'w').write('1'); print('ESCAPED')",
    oom_score="open('/proc/self/oom_score_adj', 'w').write('-1000'); print('ESCAPED')",
    change_root="import os; os.mkdir('jail'); os.chroot('jail'); print('ESCAPED')",
)

# ------------------------------------------------------------------------------------------------------------ sockets
_family(
    REFUSED,
    tcp_connect="import socket; socket.create_connection(('127.0.0.1', host['tcp']), 1); print('ESCAPED')",
    tcp_listen="import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print('ESCAPED')",
    udp_send="import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', host['udp'])); print('ESCAPED')",
    ipv6="import socket; socket.socket(socket.AF_INET6); print('ESCAPED')",
    unix_path="import socket; s = socket.socket(socket.AF_UNIX); s.connect(host['unix']); print('ESCAPED')",
    unix_abstract="import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + host['abstract']); print('ESCAPED')",
    unix_datagram_pair="import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b'x', host['datagram']); print('ESCAPED')",
    unix_stream_pair_elsewhere="import socket; a, b = socket.socketpair(); a.sendto(b'x', host['datagram']); print('ESCAPED')",
    pair_reconnected="import socket; a, b = socket.socketpair(); a.connect(host['unix']); print('ESCAPED')",
    netlink="import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); print('ESCAPED')",
    packet="import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    vsock="import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); print('ESCAPED')",
    crypto_socket="import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET); print('ESCAPED')",
    every_family="import socket\nfor family in range(46):\n    for kind in (1, 2, 3, 5):\n        try: socket.socket(family, kind); print('ESCAPED', family)\n        except OSError: pass",
    descriptor_passed="import array, socket; a, b = socket.socketpair(); a.sendmsg([b'x'], [(1, 1, array.array('i', [0]))]); print('ESCAPED')",
    download="import urllib.request; urllib.request.urlopen('http://127.0.0.1:%d' % host['tcp'], timeout=1); print('ESCAPED')",
)

# ---------------------------------------------------------------------------------- programs, namespaces, the kernel
_family(
    REFUSED,
    exec_program="import os; os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    exec_python="import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    exec_at=_LIBC + "n = 281 if arm else 322\nfd = os.open('/usr/lib/os-release', os.O_PATH)\nprint('ESCAPED' if libc.syscall(n, fd, b'', None, None, 0x1000) == 0 else 'refused')",
    subprocess_run="import subprocess; print('ESCAPED', subprocess.run(['echo', 'x'], capture_output=True))",
    os_system="import os; print('ESCAPED' if os.system('true') == 0 else 'refused')",
    os_popen="import os; print('ESCAPED', os.popen('echo x').read())",
    posix_spawn="import os; os.posix_spawn('/bin/true', ['true'], {}); print('ESCAPED')",
    shell_magic="x = !echo ESCAPED-$((1+1))\nprint([line for line in x if 'ESCAPED-2' in line] and 'ESCAPED')",
    new_namespaces=_LIBC + "print('ESCAPED' if libc.unshare(0x10000000) == 0 else 'refused')",
    join_namespace=_LIBC + "print('ESCAPED' if libc.setns(0, 0) == 0 or ctypes.get_errno() != 1 else 'refused')",
    clone_namespace=_LIBC + "n = libc.syscall(220 if arm else 56, 0x10000011, 0, 0, 0, 0)\nif n == 0: os._exit(0)\nprint('ESCAPED' if n > 0 else 'refused')",
    mount=_LIBC + "print('ESCAPED' if libc.mount(b'none', b'.', b'tmpfs', 0, None) == 0 else 'refused')",
    mount_new=_LIBC + "print('ESCAPED' if libc.syscall(430, b'tmpfs', 0) >= 0 else 'refused')",
    io_uring=_LIBC + "print('ESCAPED' if libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0 else 'refused')",
    bpf=_LIBC + "n = 280 if arm else 321\nprint('ESCAPED' if libc.syscall(n, 0, ctypes.create_string_buffer(128), 128) >= 0 else 'refused')",
    perf=_LIBC + "n = 241 if arm else 298\na = (ctypes.c_uint32 * 32)(1, 128)\nprint('ESCAPED' if libc.syscall(n, a, 0, -1, -1, 0) >= 0 else 'refused')",
    userfaultfd=_LIBC + "n = 282 if arm else 323\nprint('ESCAPED' if libc.syscall(n, 1) >= 0 else 'refused')",
    keyring=_LIBC + "n = 217 if arm else 248\nprint('ESCAPED' if libc.syscall(n, b'user', b'x', b'x', 1, -2) >= 0 else 'refused')",
    reboot=_LIBC + "print('ESCAPED' if libc.syscall(142 if arm else 169, 0xfee1dead, 672274793, 0, None) == 0 else 'refused')",
    set_clock="import time; time.clock_settime(time.CLOCK_REALTIME, time.time()); print('ESCAPED')",
    set_host_name="import socket; socket.sethostname('attacked'); print('ESCAPED')",
    become_root="import os; os.setresuid(0, 0, 0); print('ESCAPED')",
    become_nobody="import os; os.setgroups([]); print('ESCAPED')",
    capabilities=_LIBC + "h = (ctypes.c_uint32 * 2)(0x20080522, 0); d = (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)\nprint('ESCAPED' if libc.capset(h, d) == 0 else 'refused')",
    filter_removed=_LIBC + "print('ESCAPED' if libc.prctl(22, 0, 0, 0, 0) == 0 else 'refused')",
    outlive_parent=_LIBC + "print('ESCAPED' if libc.prctl(1, 0, 0, 0, 0) == 0 else 'refused')",
    thirty_two_bit=_LIBC + "print('ESCAPED' if libc.syscall(0x40000000 + 39) >= 0 else 'refused')",
    unknown_calls=_LIBC + "print('ESCAPED' if any(libc.syscall(n, 0, 0, 0, 0, 0, 0) >= 0 for n in range(463, 600)) else 'refused')",
)
_family(
    ENDED,
    thirty_two_bit_code="""
import ctypes, mmap, platform
assert platform.machine() == 'x86_64'
m = mmap.mmap(-1, 4096, prot=7)
m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # mov eax, 20 (getpid of i386); int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
print('ESCAPED' if call() > 0 else 'refused')""",
)

# ---------------------------------------------------------------------------------- limits and priorities of others
_family(
    REFUSED,
    limits_of_client="import resource; resource.prlimit(host['client'], resource.RLIMIT_NOFILE, (64, 64)); print('ESCAPED')",
    limits_of_client_read="import resource; print('ESCAPED', resource.prlimit(host['client'], resource.RLIMIT_NOFILE))",
    limits_raised="import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('ESCAPED')",
    priority_of_client="import os; os.setpriority(os.PRIO_PROCESS, host['client'], 19); print('ESCAPED')",
    priority_of_user="import os; os.setpriority(os.PRIO_USER, os.getuid(), 19); print('ESCAPED')",
    affinity_of_client="import os; os.sched_setaffinity(host['client'], [0]); print('ESCAPED')",
    scheduler_of_client="import os; os.sched_setscheduler(host['client'], os.SCHED_IDLE, os.sched_param(0)); print('ESCAPED')",
    io_priority=_LIBC + "n = 30 if arm else 251\nprint('ESCAPED' if libc.syscall(n, 1, host['client'], 0x6007) == 0 else 'refused')",
    pages_moved=_LIBC + "n = 239 if arm else 279\nprint('ESCAPED' if libc.syscall(n, host['client'], 0, None, None, None, 0) == 0 else 'refused')",
)

# ------------------------------------------------------------------------------------------------------------ protocol
_PATCH = "import builtins, sys\n"
_family(
    ENDED,
    garbage="""
import os
for fd in range(3, 64):
    try: os.write(fd, b'garbage' * 100)
    except OSError: pass""",
    garbage_flood="""
import os
for fd in range(3, 64):
    try:
        while True: os.write(fd, b'\\xff' * (1 << 16))
    except OSError: pass""",
    forged_reply="""
import os, struct
for fd in range(3, 64):
    try: os.write(fd, struct.pack('!8sBBQI', bytes(8), 0, 0, 0, 7) + b'ESCAPED')
    except OSError: pass""",
    forged_size="""
import os, struct
for fd in range(3, 64):
    try: os.write(fd, struct.pack('!8sBBQI', bytes(8), 0, 0, 0, 2**32 - 1))
    except OSError: pass""",
    socket_shut="""
import os, socket
for fd in range(3, 64):
    try: socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_RDWR)
    except OSError: pass""",
    socket_swallowed="""
import os, threading
def swallow(fd):
    try:
        while os.read(fd, 1 << 16): pass
    except OSError: pass
for fd in range(3, 64): threading.Thread(target=swallow, args=(fd,), daemon=True).start()""",
    descriptors_replaced="import os\nfor fd in range(3, 64): os.dup2(0, fd)",
    descriptors_exchanged="import os, socket\na, b = socket.socketpair()\nfor fd in range(3, 64):\n    if fd not in (a.fileno(), b.fileno()): os.dup2(a.fileno(), fd)",
    descriptors_exhausted="import os\nx = []\ntry:\n    while True: x.append(os.open('/dev/null', os.O_RDONLY))\nexcept OSError: print(len(x))",
    builtins_cleared=_PATCH + "for n in list(vars(builtins)): setattr(builtins, n, None)",
    builtins_len=_PATCH + "builtins.len = builtins.isinstance = builtins.print = builtins.__import__ = None",
    builtins_by_print="vars(print.__self__).clear()",
    modules_cleared=_PATCH + "sys.modules.clear()",
    modules_patched="import json, os, struct, signal, time, io, _thread\nfor m in (json, os, struct, signal, time, io, _thread):\n    for n in list(vars(m)):\n        if not n.startswith('__'): setattr(m, n, None)",
    shell_broken="get_ipython().run_cell = get_ipython().displayhook = get_ipython().compile = None",
    shell_by_collector="""
import gc
for x in gc.get_objects():
    if type(x).__name__ in ('Cells', 'Output', 'Stream', 'Zygote', 'Struct'):
        try: vars(x).clear()
        except TypeError: pass""",
    frames_changed="""
import sys
f = sys._getframe()
while f is not None:
    f.f_globals.clear(); f = f.f_back""",
    path_cleared="import sys; sys.path.clear(); sys.meta_path.clear(); sys.path_hooks.clear()",
)

# ---------------------------------------------------------------------------------------------------------------- disk
_family(
    ("error", "timeout", "ok"),
    one_file="f = open('x', 'wb')\nfor _ in range(1000): f.write(b'x' * (1 << 20)); f.flush()",
    many_files="for i in range(20000): open(f'{i}', 'w').close()",
    many_bytes="for i in range(64):\n    with open(f'{i}', 'wb') as f: f.write(b'x' * (15 << 20))",
    many_bytes_unlinked="""
import os
held = []
for i in range(64):
    f = open('x', 'wb'); f.write(b'x' * (15 << 20)); f.flush(); os.unlink('x'); held.append(f)
import time; time.sleep(100)""",
    preallocated="import os\nfor i in range(64): os.posix_fallocate(os.open(f'{i}', os.O_CREAT | os.O_WRONLY), 0, 15 << 20)",
    preallocated_beyond="import os\n" + _LIBC + "fd = os.open('x', os.O_CREAT | os.O_WRONLY)\nprint('ESCAPED' if libc.fallocate(fd, 1, ctypes.c_long(0), ctypes.c_long(1 << 30)) == 0 else 'refused')",
    deep_tree="import os\nfor _ in range(5000):\n    os.mkdir('d'); os.chdir('d')",
    deep_tree_long_names="import os\nn = 'd' * 250\nfor _ in range(900):\n    os.mkdir(n); os.chdir(n)",
    unreadable_folder="import os; os.mkdir('locked'); open('locked/x', 'w').close(); os.chmod('locked', 0); os.mkdir('born_locked', 0)",
    loop_of_links="import os; os.symlink('.', 'loop'); os.symlink('a', 'b'); os.symlink('b', 'a'); os.symlink('/', 'root')",
    odd_names="import os\nfor n in (b'\\xff\\xfe', b'a\\nb', b' ', b'-rf', b'*'): open(n, 'w').close()",
    sparse_file="import os\nwith open('x', 'wb') as f: f.truncate(10 << 20)",
)

ATTACKS = tuple(_ATTACKS)
