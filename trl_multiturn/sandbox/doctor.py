"""What this machine grants, layer by layer, and what to do about what it does not: `trl-multiturn doctor`.

Nothing here is guessed from version numbers: a warm interpreter is started, and every layer is tried in a process that
is thrown away.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .config import SandboxConfig
from .forkserver import ForkServer
from .inside.confinement import landlock_abi
from .result import ToolFailure, advice


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name (`str`):
            What was looked at.
        state (`str`):
            `"ok"`; `"missing"` (strict isolation needs it); `"absent"` (an extra that is not there); `"info"`.
        detail (`str`):
            What was found, or what to do.
    """

    name: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Starts a warm interpreter without conditions and reports on it and on its surroundings."""
    findings = list(_surroundings())
    if sys.platform != "linux":
        return [*findings, Finding("fork server", "missing", "needs Linux; `backend='jupyter'` is not confined")]
    try:
        findings += _fork_server()
    except ToolFailure as error:
        findings.append(Finding("fork server", "missing", str(error)))
    return findings


def _surroundings() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    yield Finding("system", "info", system)
    if hasattr(os, "geteuid"):
        user = "root, whose capabilities sessions give up" if os.geteuid() == 0 else f"user {os.geteuid()}"
        yield Finding("user", "info", user)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "info", f"{cores}: as many cells run at the same time")
    for module, otherwise in (("IPython", "missing"), ("ipykernel", "absent"), ("jupyter_client", "absent")):
        if importlib.util.find_spec(module) is None:
            yield Finding(module, otherwise, f"`pip install {module.lower()}`")
        else:
            yield Finding(module, "ok", "installed")


def _fork_server() -> list[Finding]:
    async def try_out() -> tuple[dict[str, str], float, float]:
        # "best_effort", but silent: the report itself says what is missing
        server = ForkServer(SandboxConfig(isolation="best_effort"), quiet=True)
        try:
            await server.start()
            start = time.perf_counter()
            session = await server.spawn()
            seconds = time.perf_counter() - start
            await session.close()
            return server.layers, server.warm_up_seconds, seconds
        finally:
            await server.stop()

    layers, warm_up, seconds = asyncio.run(try_out())
    findings = [
        Finding("fork server", "ok", f"warm in {warm_up:.1f} s; a session starts in {seconds * 1000:.1f} ms"),
        Finding("resource limits", "ok", "memory, file size, descriptors, CPU time, no core dumps"),
        *_landlock(layers["landlock"]),
        _layer("seccomp", layers["seccomp"], "only listed system calls exist: no processes, programs, sockets"),
        _layer("namespaces", layers["namespaces"], "sessions are outside the machine's network and System V objects"),
    ]
    if os.geteuid() == 0:
        findings.append(Finding("thread limit", "absent", "the kernel exempts root; memory bounds threads instead"))
    return findings


def _landlock(state: str) -> list[Finding]:
    if state == "off":
        return [_layer("landlock", state, "")]
    abi = landlock_abi()
    gaps = [
        text
        for least, text in ((2, "renaming across folders"), (4, "TCP"), (6, "signals and abstract sockets"))
        if abi < least
    ]
    detail = f"{state}: the interpreter's files are read-only, all others out of reach"
    return [Finding("landlock", "ok", f"{detail}; seccomp alone guards {', '.join(gaps)}" if gaps else detail)]


def _layer(name: str, state: str, meaning: str) -> Finding:
    if state in ("off", ""):
        return Finding(name, "absent" if name == "namespaces" else "missing", advice(name))
    return Finding(name, "ok", f"{state}: {meaning}")


def main(argv: list[str] | None = None) -> int:
    """Prints the report. Returns 0 if `isolation="strict"` runs here, else 1."""
    if argv:
        print("usage: trl-multiturn doctor", file=sys.stderr)
        return 2
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:>8}  {finding.name:<{width}}  {finding.detail}")
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        print(
            f"\nWhat `isolation='strict'` (the default) needs and this machine lacks: {', '.join(missing)}.\n"
            "Follow the advice above, run in a container or virtual machine that grants it, or, where all that could\n"
            "be lost is this machine, set `isolation='best_effort'`."
        )
        return 1
    print("\n`isolation='strict'`, the default, runs here.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
