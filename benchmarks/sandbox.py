"""
The sandbox and its peers, side by side in one run: start, cells, memory, recovery, and whether the outputs agree.

    python benchmarks/sandbox.py                                    # the table, a few minutes on two cores
    python benchmarks/sandbox.py --only forkserver --sessions 200   # some rows, more repetitions
    python benchmarks/sandbox.py --output benchmarks/results/sandbox.md
    python benchmarks/sandbox.py --soak 100000                      # that many cells, 5 % hostile, looking for leaks

Peers: a fresh Jupyter kernel per trajectory; one Jupyter kernel cleared by `%reset -f` between trajectories (no
isolation); a process per call that runs the whole history again, as the M-DPO and ToRA executors do (quadratic in the
turns); smolagents' `LocalPythonExecutor`, if it is installed (an interpreter inside the training process).

The workload is trajectories of three cells: sympy, numpy, loops, itertools and two errors. "agree" counts cells whose
output equals that of a fresh Jupyter kernel. Times are wall-clock; memory is the proportional share (PSS) per session.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trl_multiturn.tools.observation import last_paragraph
from trl_multiturn.tools.sandbox import Sandbox, SandboxConfig


TRAJECTORIES = [
    ["from sympy import symbols, solve\nx = symbols('x')", "roots = solve(x**2 - 5*x + 6, x)\nroots", "sum(roots)"],
    ["import numpy as np\na = np.arange(12).reshape(3, 4)", "(a @ a.T).trace()", "print(a.mean(axis=0))"],
    ["total = 0\nfor i in range(20000):\n    total += i * i", "print(total)", "total % 1000007"],
    ["from itertools import permutations", "p = [q for q in permutations(range(5)) if q[0] < q[-1]]", "len(p)"],
    ["price = 12.5", "print('cost', price * undefined_count)", "price * 3"],
    ["from sympy import *\nn = symbols('n')", "simplify((n + 1)**2 - n**2)", "summation(n**2, (n, 1, 10))"],
    ["def f(k):\n    return 1 if k < 2 else k * f(k - 1)", "f(20)", "f('a')"],
    ["from fractions import Fraction\nh = Fraction(1, 3)", "h + Fraction(1, 6)", "float(h)"],
]
SYMPY_CELL = "import sympy\nz = sympy.symbols('z')\nsympy.solve(z**2 - 3*z + 2, z)"


class Ours:
    """Sessions of this package's sandbox, whatever the backend."""

    def __init__(self, **config: Any) -> None:
        self.sandbox = Sandbox(SandboxConfig(timeout_seconds=20.0, output_limit_chars=4096, **config))
        self.sandbox.open().close()  # the warm interpreter is started once per training run

    def open(self) -> Any:
        return self.sandbox.open()

    def pid(self, session: Any) -> int:
        interpreter = session._interpreter
        return interpreter.pid if hasattr(interpreter, "pid") else interpreter._manager.provisioner.pid

    def close(self) -> None:
        self.sandbox.close()


class Reset:
    """One Jupyter kernel for everybody, cleared in between. State leaks (threads, patches): for speed only."""

    class Session:
        def __init__(self, session: Any) -> None:
            self.session = session
            session.run("%reset -f")

        def run(self, code: str) -> Any:
            return self.session.run(code)

        def close(self) -> None:
            pass

    def __init__(self) -> None:
        self.jupyter = Ours(backend="jupyter", isolation="none")
        self.only = self.jupyter.open()

    def open(self) -> Any:
        return self.Session(self.only)

    def close(self) -> None:
        self.jupyter.close()


class Rerun:
    """A process per call, in which the whole history is run again."""

    PROGRAM = """
import io, json, sys, contextlib
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
config = Config(); config.HistoryManager.enabled = False; config.InteractiveShell.colors = "NoColor"
shell = InteractiveShell.instance(config=config)
for code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = shell.run_cell(code, store_history=True)
error = result.error_before_exec or result.error_in_exec
print(f"{type(error).__name__}: {error}" if error else out.getvalue())
"""

    class Result:
        def __init__(self, output: str) -> None:
            self.output = output

    class Session:
        def __init__(self) -> None:
            self.history: list[str] = []

        def run(self, code: str) -> Any:
            self.history.append(code)
            command = [sys.executable, "-c", Rerun.PROGRAM]
            done = subprocess.run(command, input=json.dumps(self.history), capture_output=True, text=True, timeout=60)
            return Rerun.Result(last_paragraph(done.stdout.strip()))

        def close(self) -> None:
            pass

    def open(self) -> Any:
        return self.Session()

    def close(self) -> None:
        pass


class Smolagents:
    """smolagents' interpreter of the syntax tree, in this process."""

    class Session:
        def __init__(self, executor: Any) -> None:
            self.executor = executor

        def run(self, code: str) -> Any:
            try:
                answer = self.executor(code)
            except Exception as error:
                return Rerun.Result(last_paragraph(str(error)))
            value = "" if answer.output is None else repr(answer.output)
            return Rerun.Result((answer.logs + value).strip())

        def close(self) -> None:
            pass

    def open(self) -> Any:
        from smolagents.local_python_executor import LocalPythonExecutor

        executor = LocalPythonExecutor(additional_authorized_imports=["*"])
        executor.send_tools({})
        return self.Session(executor)

    def close(self) -> None:
        pass


SYSTEMS: dict[str, tuple[str, Callable[[], Any]]] = {
    "forkserver": ("**fork server (default)**", Ours),
    "jupyter": ("a Jupyter kernel per trajectory", lambda: Ours(backend="jupyter", isolation="none")),
    "reset": ("one Jupyter kernel, `%reset -f`", Reset),
    "rerun": ("a process per call, history run again", Rerun),
    "smolagents": ("smolagents `LocalPythonExecutor`", Smolagents),
}


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.3g} ({ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]:.3g})"


def pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(name: str, system: Any, sessions: int, reference: list[list[str]] | None) -> tuple[dict, list[list[str]]]:
    row: dict[str, Any] = {}
    starts, firsts, warms = [], [], []
    for _ in range(sessions):
        opened: list[Any] = []
        starts.append(milliseconds(lambda opened=opened: opened.append(system.open())))
        firsts.append(milliseconds(lambda opened=opened: opened[0].run("x = 1")))
        warms += [milliseconds(lambda opened=opened: opened[0].run("x + 1")) for _ in range(5)]
        opened[0].close()
    row |= {"start": quantiles(starts), "first": quantiles(firsts), "cell": quantiles(warms)}
    row["recovery"] = recovery(name, system, sessions)
    row["memory"] = memory(name, system, min(sessions, 32))
    outputs, seconds, count = workload(name, system, sessions)
    row["cells"] = f"{count / seconds:.3g}"
    row["starts"] = concurrent_starts(name, system, sessions)
    pairs = [pair for two in zip(outputs, reference or outputs, strict=True) for pair in zip(*two, strict=True)]
    agree = [ours == jupyters for ours, jupyters in pairs]
    row["agree"] = f"{sum(agree)}/{len(agree)}"
    return row, outputs


def recovery(name: str, system: Any, sessions: int) -> str:
    """From a crash to the answer of the next cell, two earlier cells replayed."""
    if name not in ("forkserver", "jupyter"):
        return "–"
    times = []
    for _ in range(max(3, sessions // 2)):
        session = system.open()
        session.run("x = 1")
        session.run("y = 2")
        session.run("import os; os._exit(1)")
        times.append(milliseconds(lambda session=session: session.run("x + y")))
        session.close()
    return quantiles(times)


def memory(name: str, system: Any, sessions: int) -> str:
    if name not in ("forkserver", "jupyter"):
        return "–"
    opened = [system.open() for _ in range(sessions)]
    idle = statistics.mean(pss_mb(system.pid(session)) for session in opened)
    for session in opened:
        session.run(SYMPY_CELL)
    after = statistics.mean(pss_mb(system.pid(session)) for session in opened)
    for session in opened:
        session.close()
    return f"{idle:.1f} / {after:.1f}"


def workload(name: str, system: Any, sessions: int) -> tuple[list[list[str]], float, int]:
    """Trajectories, four in flight; returns the outputs of one pass, the seconds, and the number of cells."""
    trajectories = [TRAJECTORIES[i % len(TRAJECTORIES)] for i in range(max(sessions, len(TRAJECTORIES)))]

    def run(cells: list[str]) -> list[str]:
        session = system.open()
        try:
            return [session.run(cell).output for cell in cells]
        finally:
            session.close()

    at_once = 1 if name in ("reset", "smolagents") else 4  # neither has more than one place to run in
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        outputs = list(pool.map(run, trajectories))
    return outputs[: len(TRAJECTORIES)], time.perf_counter() - start, 3 * len(trajectories)


def concurrent_starts(name: str, system: Any, sessions: int) -> str:
    if name not in ("forkserver", "jupyter"):
        return "–"

    async def main() -> float:
        start = time.perf_counter()
        opened = await asyncio.gather(*(system.sandbox.aopen() for _ in range(sessions)))
        seconds = time.perf_counter() - start
        await asyncio.gather(*(session.aclose() for session in opened))
        return seconds

    return f"{sessions / asyncio.run(main()):.3g}"


COLUMNS = {
    "start": "session start p50 (p99), ms",
    "first": "first cell, ms",
    "cell": "trivial cell, ms",
    "recovery": "recovery after a crash, ms",
    "memory": "memory per session idle / after sympy, MB",
    "starts": "sessions started per second, all at once",
    "cells": "workload cells per second",
    "agree": "outputs agree",
}


def table(rows: dict[str, dict]) -> Iterator[str]:
    yield "| system | " + " | ".join(COLUMNS.values()) + " |"
    yield "| --- " * (len(COLUMNS) + 1) + "|"
    for name, row in rows.items():
        yield f"| {SYSTEMS[name][0]} | " + " | ".join(str(row[column]) for column in COLUMNS) + " |"


def hardware() -> str:
    model = "unknown processor"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{cores} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}, load {load}"


# ---------------------------------------------------------------------------------------------------------------- soak

HOSTILE = {
    "while True: pass": ("timeout",),
    "import os; os._exit(3)": ("crashed",),
    "import ctypes; ctypes.string_at(0)": ("crashed",),
    "x = bytearray(4 << 30)": ("memory",),
    "import os; os.fork()": ("error",),
    "import os; os.kill(os.getppid(), 9)": ("error",),
    "for i in range(20000): open(f'{i}', 'w').close()": ("error", "timeout"),
    "print('x' * (64 << 20))": ("ok",),
    "import sys; sys.stdout = None": ("ok",),
    "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()": ("ok",),
    "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 99)\n    except OSError: pass": ("crashed",),
}


def soak(cells: int) -> Iterator[str]:
    """Runs cells in sessions of twenty, 5 % of them hostile, and compares what the processes hold before and after."""
    config = SandboxConfig(timeout_seconds=1.0, grace_seconds=0.2, memory_limit_mb=512)
    hostile = list(HOSTILE.items())
    wrong: list[str] = []

    async def trajectory(sandbox: Sandbox, number: int) -> None:
        session = await sandbox.aopen()
        async with session:
            await session.arun("x = 0")
            for i in range(1, 20):
                if i == 10:
                    code, verdicts = hostile[number % len(hostile)]
                    result = await session.arun(code)
                    if result.status not in verdicts:
                        wrong.append(f"{code!r} ended with {result.status}: {result.output[:80]}")
                else:
                    result = await session.arun("x += 1; x")
                    if result.output != str(i if i < 10 else i - 1):
                        wrong.append(f"an honest cell answered {result.status}: {result.output[:80]}")

    async def main(sandbox: Sandbox, trajectories: range) -> None:
        places = asyncio.Semaphore(2 * config.running_cells)

        async def one(number: int) -> None:
            async with places:
                await trajectory(sandbox, number)

        for first in range(trajectories.start, trajectories.stop, 1000):
            await asyncio.gather(*(one(i) for i in range(first, min(first + 1000, trajectories.stop))))

    def held(sandbox: Sandbox) -> list[int]:
        pids, root = ("self", sandbox._backend.pid), sandbox._backend.root
        page = os.sysconf("SC_PAGE_SIZE") >> 10
        memory = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page >> 10 for pid in pids]
        return [*memory, *(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids), len(os.listdir(root))]

    with Sandbox(config) as sandbox:
        asyncio.run(main(sandbox, range(2 * len(hostile))))
        before, zygote, start = held(sandbox), sandbox._backend.pid, time.perf_counter()
        asyncio.run(main(sandbox, range(cells // 20)))
        seconds = time.perf_counter() - start
        after, survived = held(sandbox), sandbox._backend.pid == zygote
    names = ("client MB", "warm interpreter MB", "client descriptors", "warm interpreter descriptors", "folders")
    yield f"{cells} cells in {cells // 20} sessions, 5 % hostile, {seconds:.0f} s; wrong answers: {len(wrong)}"
    yield f"the warm interpreter {'is still the same process' if survived else 'was replaced'}"
    yield "; ".join(f"{name} {a} → {b}" for name, a, b in zip(names, before, after, strict=True))
    yield from wrong[:20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="rows to measure")
    parser.add_argument("--sessions", type=int, default=200, help="sessions of the fork server")
    parser.add_argument("--slow_sessions", type=int, default=16, help="sessions of every other system")
    parser.add_argument("--soak", type=int, default=0, help="instead of the table: cells to run, looking for leaks")
    parser.add_argument("--output", type=Path, help="Markdown file to append to")
    arguments = parser.parse_args()
    lines = [f"`python benchmarks/sandbox.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {hardware()}", ""]
    if arguments.soak:
        lines += soak(arguments.soak)
    else:
        rows: dict[str, dict] = {}
        reference = None
        # Jupyter first: the others' outputs are compared with its
        for name in sorted(arguments.only, key=lambda name: name != "jupyter"):
            if name == "smolagents" and not _installed("smolagents"):
                print("smolagents is not installed: `pip install smolagents` adds its row", file=sys.stderr)
                continue
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            system = SYSTEMS[name][1]()
            try:
                sessions = arguments.sessions if name == "forkserver" else arguments.slow_sessions
                rows[name], outputs = measure(name, system, sessions, reference)
            finally:
                system.close()
            reference = outputs if name == "jupyter" else reference
        lines += table({name: rows[name] for name in arguments.only if name in rows})
    print("\n".join(lines))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("a") as file:
            file.write("\n".join(lines) + "\n\n")


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    main()
