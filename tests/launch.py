"""Starts modules of the tests in several processes, by the launchers that users have."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
_LIMIT_SECONDS = 500  # of what takes less than a minute: a busy machine is no failure, a deadlock is one


def free_port() -> int:
    """A port for somebody who binds it in a while.

    It lies below those that the kernel gives to whoever asks for any: one of these may be another's by then.
    """
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(path.read_text().split()[0]) if path.exists() else 32768
    for port in [*random.SystemRandom().sample(range(10_000, end), 20), 0] if end > 10_100 else [0]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("unreachable: the kernel gives a port to whoever asks for any")


def accelerate_launch(processes: int) -> list[str]:
    """The beginning of a command line, before a script or `-m` and a module.

    `--multi_gpu` is the flag that starts several processes; `use_cpu` in the training arguments then picks gloo.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--main_process_port", str(free_port()), "--num_cpu_threads_per_process", "1"]


def torchrun(processes: int) -> list[str]:
    """The beginning of a command line, before `-m` and a module."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def ranks(count: int) -> list[dict[str, str]]:
    """What tells each of several processes which one it is, as the launchers do."""
    if count == 1:
        return [{}]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(count)} for i in range(count)]


def _environment(variables: dict[str, str]) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return environment | {"PYTHONPATH": str(ROOT), **variables}


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's folder; the caller looks at how it ended."""
    return subprocess.run(
        command, cwd=ROOT, env=_environment(variables), capture_output=True, text=True, timeout=_LIMIT_SECONDS
    )


class ForkServer:
    """`tests/fork_server.py` in a process of its own, which starts runs without their imports."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fork_server"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env=_environment({}), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self._server.stdin.close)

    def run(
        self, target: str, *arguments: object, processes: int = 1, **variables: str
    ) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            err.touch()
            request = {"target": target, "arguments": [*map(str, arguments)], "folder": str(ROOT)}
            request |= {"environment": _environment(variables), "ranks": ranks(processes)}
            codes = self._answer(request | {"out": str(out), "err": str(err)})
            said = [path.read_text("utf-8", errors="replace") for path in (out, err)]
            return subprocess.CompletedProcess([target, *arguments], next(filter(None, codes), 0), *said)

    def _answer(self, request: dict[str, object]) -> list[int]:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], _LIMIT_SECONDS)[0]:
            os.killpg(self._server.pid, signal.SIGKILL)
            fork_server.cache_clear()
            raise subprocess.TimeoutExpired(str(request["target"]), _LIMIT_SECONDS)
        return json.loads(self._server.stdout.readline())


@functools.cache
def fork_server() -> ForkServer:
    """One for all tests of this process."""
    return ForkServer()


def run_forked(target: str, *arguments: object, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """As [`run`] runs `python`, with a script or a module, in one process or several that find each other."""
    return fork_server().run(target, *arguments, processes=processes, **variables)


def run_module(launcher: list[str], module: str, *arguments: object) -> None:
    """Runs a module by a launcher, and fails with what it said if it fails."""
    _succeeded(run([*launcher, "-m", module, *map(str, arguments)], TQDM_DISABLE="1"))


def run_module_forked(module: str, *arguments: object) -> None:
    """Runs a module in two processes without a launcher, and fails with what they said if one fails."""
    _succeeded(run_forked(module, *arguments, processes=2))


def _succeeded(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
