"""Starts modules of the tests in several processes, by the launchers that users have."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
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


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's folder; the caller looks at how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_LIMIT_SECONDS)


def run_module(launcher: list[str], module: str, *arguments: object) -> None:
    """Runs a module by a launcher, and fails with what it said if it fails."""
    done = run([*launcher, "-m", module, *map(str, arguments)], TQDM_DISABLE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
