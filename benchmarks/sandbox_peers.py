"""The systems that `sandbox.py` measures: this package's backends, and the ways that others run model-written code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from trl_multiturn.sandbox.sandbox import Sandbox, SandboxConfig


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
            return Rerun.Result(_last_paragraph(re.sub(r"(?m)^Out\[\d+\]: ?\n?", "", done.stdout).strip()))

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
                return Rerun.Result(_last_paragraph(str(error)))
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


def _last_paragraph(text: str) -> str:
    """What the paper's executor keeps of a traceback."""
    return re.split(r"\n\s*\n", text.rstrip())[-1]
