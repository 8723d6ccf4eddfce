"""Limits and isolation of a sandbox."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


BACKENDS = ("forkserver", "jupyter")
ISOLATION = ("strict", "best_effort", "none")
_LEAST = {
    "timeout_seconds": 0.01,
    "grace_seconds": 0,
    "memory_limit_mb": 1,
    "output_limit_chars": 1,
    "code_limit_chars": 1,
    "scratch_limit_mb": 0,
    "file_limit_mb": 1,
    "max_files": 0,
    "max_cells": 1,
    "cpu_limit_seconds": 1,
    "max_running_cells": 1,
}


@dataclass(frozen=True)
class SandboxConfig:
    """Limits and isolation of a [`Sandbox`]. Picklable; every limit holds per session unless it says otherwise.

    Args:
        backend (`str`, *optional*, defaults to `"forkserver"`):
            `"forkserver"`: confined sessions forked from one warm interpreter (Linux). `"jupyter"`: each session
            is a Jupyter kernel of its own (any kernelspec, any system), slower and less confined.
        isolation (`str`, *optional*, defaults to `"strict"`):
            `"strict"` refuses to start unless every layer is granted by this kernel. `"best_effort"` takes what is
            granted and logs one line about the rest. `"none"` confines nothing but time, memory and output.
        timeout_seconds (`float`, *optional*, defaults to `20.0`):
            Wall-clock limit per cell, counted from its admission to a core (20 s in the M-DPO authors' executor).
        grace_seconds (`float`, *optional*, defaults to `0.5`):
            Time between the interruption of a cell and the kill of its process.
        memory_limit_mb (`int`, *optional*, defaults to `1024`):
            Address space that a session may use on top of the warm interpreter's.
        output_limit_chars (`int`, *optional*, defaults to `4096`):
            Longer outputs keep their head and tail.
        code_limit_chars (`int`, *optional*, defaults to `100_000`):
            Longer cells are refused with an error that the policy reads.
        scratch_limit_mb (`int`, *optional*, defaults to `64`):
            Disk space in the session's folder. 0 makes the folder read-only.
        file_limit_mb (`int`, *optional*, defaults to `16`):
            Size of one file.
        max_files (`int`, *optional*, defaults to `1000`):
            Files and folders in the session's folder.
        max_cells (`int`, *optional*):
            Cells that a session accepts; later ones get an error that the policy reads.
        cpu_limit_seconds (`int`, *optional*, defaults to `600`):
            CPU time of one session process, over all its threads: the backstop when nobody is left to watch the clock.
        max_running_cells (`int`, *optional*):
            Cells that run at the same time, over all sessions of the sandbox. Defaults to the number of cores that
            this process may use.
        preload (`tuple[str, ...]`, *optional*, defaults to `("numpy", "sympy")`):
            Modules imported once, before the sessions are forked. Absent ones are skipped.
        readonly_paths (`tuple[str, ...]`, *optional*):
            Files and folders that sessions may read, beside the interpreter and its libraries.
        network (`bool`, *optional*, defaults to `False`):
            Whether sessions may open internet connections.
        environment (`dict[str, str]`, *optional*):
            Variables to add to the sessions' environment, which is otherwise all but empty.
        include_stderr (`bool`, *optional*, defaults to `False`):
            Whether the observation holds what the cell wrote to standard error (warnings, mostly).
        seed (`int`, *optional*):
            Seeds `random` and `numpy.random` at the start of every session. The addresses in `<… object at 0x7f…>` are
            then numbered as they appear, so that an observation repeats; `id(…)` still differs from run to run.
        repeats_arithmetic (`bool`, *optional*, defaults to `True`):
            Whether a session without a process answers plain arithmetic (numbers, variables, `+ - * / // %`, and
            `print`, `abs`, `round` and the like) as an earlier session with the very same cells did, or from one
            process that all such sessions share, instead of starting its own. Fork server only.
        python (`str`, *optional*):
            Interpreter of the sessions (it needs IPython); the running one by default.
        launcher (`tuple[str, ...]`, *optional*):
            Command prefix for the warm interpreter, e.g. `("bwrap", …)`: one more wall around all sessions.
        kernel_name (`str`, *optional*, defaults to `"python3"`):
            Kernelspec of the Jupyter backend.
    """

    backend: str = "forkserver"
    isolation: str = "strict"
    timeout_seconds: float = 20.0
    grace_seconds: float = 0.5
    memory_limit_mb: int = 1024
    output_limit_chars: int = 4096
    code_limit_chars: int = 100_000
    scratch_limit_mb: int = 64
    file_limit_mb: int = 16
    max_files: int = 1000
    max_cells: int | None = None
    cpu_limit_seconds: int = 600
    max_running_cells: int | None = None
    preload: tuple[str, ...] = ("numpy", "sympy")
    readonly_paths: tuple[str, ...] = ()
    network: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    include_stderr: bool = False
    seed: int | None = None
    repeats_arithmetic: bool = True
    python: str | None = None
    launcher: tuple[str, ...] = ()
    kernel_name: str = "python3"

    def __post_init__(self) -> None:
        for name, choices in (("backend", BACKENDS), ("isolation", ISOLATION)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}={getattr(self, name)!r}` does not exist. Use one of {', '.join(choices)}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}={value}` would refuse every cell or file. Give at least {least:g}.")
        for name in ("preload", "readonly_paths", "launcher"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"`{name}={value!r}` is one string. Give a list or tuple of strings.")
            object.__setattr__(self, name, tuple(value))  # lists come from YAML and argument parsers

    @property
    def running_cells(self) -> int:
        """Cells admitted at the same time: `max_running_cells`, or the cores that this process may use."""
        if self.max_running_cells is not None:
            return self.max_running_cells
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
