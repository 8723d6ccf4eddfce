"""
The sandbox and its peers, side by side in one run: start, cells, memory, recovery, and whether the outputs agree.

    python benchmarks/sandbox.py                                    # the table, a few minutes on two cores
    python benchmarks/sandbox.py --only forkserver --sessions 200   # some rows, more repetitions
    python benchmarks/sandbox.py --output benchmarks/results/sandbox.md
    python benchmarks/sandbox.py --attacks                          # the tests' hostile cells: how many are contained
    python benchmarks/sandbox.py --soak 100000                      # that many cells, 5 % hostile, looking for leaks

Each run ends with the project's targets, what was measured, and whether they are met.

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
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sandbox_peers import SYSTEMS

from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig


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
HANG = "0 in __import__('itertools').repeat(1)"  # in C: no signal reaches it
SYMPY_CELL = "import sympy\nz = sympy.symbols('z')\nsympy.solve(z**2 - 3*z + 2, z)"


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def quantiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 99th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]


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
        # a history that is run again grows with every cell, and so does the time of the benchmark
        repeats = 5 if name == "rerun" else 20
        warms += [milliseconds(lambda opened=opened: opened[0].run("x + 1")) for _ in range(repeats)]
        opened[0].close()
    row |= {"start": quantiles(starts), "first": quantiles(firsts), "cell": quantiles(warms)}
    row["recovery"] = recovery(name, system, sessions)
    row["unhung"] = recovery_from_hang(name, max(3, sessions // 8))
    row["memory"] = memory(name, system, min(sessions, 32))
    outputs, seconds, count = workload(name, system, sessions)
    row["cells"] = count / seconds
    row["starts"] = concurrent_starts(name, system, sessions)
    pairs = [pair for two in zip(outputs, reference or outputs, strict=True) for pair in zip(*two, strict=True)]
    agree = [ours == jupyters for ours, jupyters in pairs]
    row["agree"] = f"{sum(agree)}/{len(agree)}"
    return row, outputs


def recovery(name: str, system: Any, sessions: int) -> tuple[float, float] | None:
    """From a crash to the answer of the next cell, two earlier cells replayed."""
    if name not in ("forkserver", "jupyter"):
        return None
    times = []
    for _ in range(max(3, sessions // 2)):
        session = system.open()
        session.run("x = 1")
        session.run("y = 2")
        session.run("import os; os._exit(1)")
        times.append(milliseconds(lambda session=session: session.run("x + y")))
        session.close()
    return quantiles(times)


def recovery_from_hang(name: str, sessions: int) -> tuple[float, float] | None:
    """The same after a cell that no signal interrupts: it is killed when its time and the grace are over."""
    if name != "forkserver":
        return None
    times = []
    with Sandbox(SandboxConfig(timeout_seconds=0.2, grace_seconds=0.1)) as sandbox:
        sandbox.open().close()
        for _ in range(sessions):
            with sandbox.open() as session:
                session.run("x = 1")
                session.run("y = 2")
                session.run(HANG)
                times.append(milliseconds(lambda session=session: session.run("x + y")))
    return quantiles(times)


def memory(name: str, system: Any, sessions: int) -> tuple[float, float] | None:
    if name not in ("forkserver", "jupyter"):
        return None
    opened = [system.open() for _ in range(sessions)]
    idle = statistics.mean(pss_mb(system.pid(session)) for session in opened)
    for session in opened:
        session.run(SYMPY_CELL)
    after = statistics.mean(pss_mb(system.pid(session)) for session in opened)
    for session in opened:
        session.close()
    return idle, after


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


def concurrent_starts(name: str, system: Any, sessions: int) -> float | None:
    if name not in ("forkserver", "jupyter"):
        return None

    async def main() -> float:
        start = time.perf_counter()
        opened = await asyncio.gather(*(system.sandbox.aopen() for _ in range(sessions)))
        seconds = time.perf_counter() - start
        await asyncio.gather(*(session.aclose() for session in opened))
        return seconds

    return sessions / asyncio.run(main())


COLUMNS = {
    "start": "session start p50 (p99), ms",
    "first": "first cell, ms",
    "cell": "trivial cell, ms",
    "recovery": "recovery after a crash, ms",
    "unhung": "after a hang, ms",
    "memory": "memory per session idle (after sympy), MB",
    "starts": "sessions started per second, all at once",
    "cells": "workload cells per second",
    "agree": "outputs agree",
}


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{shown(value[0])} ({shown(value[1])})"
    return (
        "–"
        if value is None
        else value
        if isinstance(value, str)
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def table(rows: dict[str, dict]) -> Iterator[str]:
    yield "| system | " + " | ".join(COLUMNS.values()) + " |"
    yield "| --- " * (len(COLUMNS) + 1) + "|"
    for name, row in rows.items():
        yield f"| {SYSTEMS[name][0]} | " + " | ".join(shown(row[column]) for column in COLUMNS) + " |"


def targets(rows: dict[str, dict]) -> Iterator[str]:
    """The fork server's targets, each beside what this run has measured."""
    row = rows["forkserver"]
    cores = len(os.sched_getaffinity(0))
    measured = [
        ("session start, p50", row["start"][0], "≤", 10, "ms"),
        ("session start, p99", row["start"][1], "≤", 25, "ms"),
        ("trivial cell, p50", row["cell"][0], "≤", 0.6, "ms"),
        ("workload cells per second and core", row["cells"] / cores, "≥", 60, ""),
        ("memory per session, idle", row["memory"][0], "≤", 5, "MB"),
        ("memory per session, after sympy", row["memory"][1], "≤", 15, "MB"),
        ("recovery after a crash, p50", row["recovery"][0], "≤", 20, "ms"),
        ("recovery after a crash, p99", row["recovery"][1], "≤", 50, "ms"),
        ("recovery after a hang, p50", row["unhung"][0], "≤", 20, "ms"),
        ("recovery after a hang, p99", row["unhung"][1], "≤", 50, "ms"),
    ]
    if "jupyter" in rows:
        ratio = rows["jupyter"]["start"][0] / row["start"][0]
        measured.insert(2, ("session start, times faster than a Jupyter kernel, p50", ratio, "≥", 30, ""))
    yield from verdicts(measured)


def verdicts(measured: list[tuple[str, float, str, float, str]]) -> Iterator[str]:
    yield "| target | asked for | measured | |"
    yield "| --- | --- | --- | --- |"
    for what, value, relation, limit, unit in measured:
        met = value <= limit if relation == "≤" else value >= limit
        yield f"| {what} | {relation} {limit:g} {unit} | {shown(value)} {unit} | {'met' if met else '**missed**'} |"


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
    "import os; os.abort()": ("crashed",),
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
    grown = [b - a for a, b in zip(before, after, strict=True)]
    names = ("client MB", "warm interpreter MB", "client descriptors", "warm interpreter descriptors", "folders")
    yield f"{cells} cells in {cells // 20} sessions, 5 % hostile, {seconds:.0f} s; wrong answers: {len(wrong)}"
    yield f"the warm interpreter {'is still the same process' if survived else 'was replaced'}"
    yield "; ".join(f"{name} {a} → {b}" for name, a, b in zip(names, before, after, strict=True))
    yield ""
    yield from verdicts(
        [
            ("wrong answers or errors in the client", len(wrong), "≤", 0, ""),
            ("restarts of the warm interpreter", int(not survived), "≤", 0, ""),
            ("memory grown in the client", grown[0], "≤", 16, "MB"),
            ("memory grown in the warm interpreter", grown[1], "≤", 16, "MB"),
            ("descriptors and folders left", sum(max(0, grow) for grow in grown[2:]), "≤", 0, ""),
        ]
    )
    yield from wrong[:20]


# ------------------------------------------------------------------------------------------------------------- attacks


def attacks() -> Iterator[str]:
    """Lets the hostile cells of the tests loose, in the process that the tests keep for it."""
    folder = Path(__file__).resolve().parents[1] / "tests" / "sandbox"
    sys.path.insert(0, str(folder))
    from attacks import ATTACKS

    process = subprocess.Popen(
        [sys.executable, str(folder / "arena.py"), str(os.geteuid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=folder,
        start_new_session=True,
    )
    with process:
        hello = json.loads(process.stdout.readline())
        wrong = []
        for attack in ATTACKS:
            process.stdin.write(json.dumps({"name": attack.name}) + "\n")
            process.stdin.flush()
            report = json.loads(process.stdout.readline())
            if report["problems"] or report["status"] not in attack.statuses or report["next"] != ["ok", "42"]:
                wrong.append(f"{attack.name}: {report}")
        process.stdin.close()
    yield f"{len(ATTACKS)} hostile cells as user {hello['user']}, behind {hello['layers']}"
    yield ""
    yield from verdicts([("attacks not contained", len(wrong), "≤", 0, "")])
    yield from wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="rows to measure")
    parser.add_argument("--sessions", type=int, default=200, help="sessions of the fork server")
    parser.add_argument("--slow_sessions", type=int, default=16, help="sessions of every other system")
    parser.add_argument("--attacks", action="store_true", help="instead of the table: the hostile cells of the tests")
    parser.add_argument("--soak", type=int, default=0, help="instead of the table: cells to run, looking for leaks")
    parser.add_argument("--output", type=Path, help="Markdown file to append to")
    arguments = parser.parse_args()
    lines = [f"`python benchmarks/sandbox.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {hardware()}", ""]
    if arguments.soak:
        lines += soak(arguments.soak)
    elif arguments.attacks:
        lines += attacks()
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
        if "forkserver" in rows:
            lines += ["", *targets(rows)]
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
