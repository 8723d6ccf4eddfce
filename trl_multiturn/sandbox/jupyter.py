"""The plain-kernel backend: one Jupyter kernel per session, from any kernelspec, through `jupyter_client`.

Slower by far than the fork server and confined only by limits on time, memory, files and output: use it for other
languages, other systems, and as the reference that the fork server is compared with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import re
import shutil
import subprocess
import tempfile
import time

from .backend import Reply
from .config import SandboxConfig
from .observation import error_message, timeout_message
from .result import IsolationError, ToolFailure


logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "JUPYTER_PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "PATHEXT", "TEMP", "TMP")
_READY_SECONDS = 60.0
_REPLY_SECONDS = 1.0  # it is sent before the cell is reported as done
_CUT = re.compile("\0(\\d+)\0")

# Runs silently in a Python kernel before the first cell. Output is cut inside the kernel, because 300 MB of prints
# would otherwise take the trainer to 900 MB.
_PYTHON_SETUP = """
def _trl_multiturn_setup(head, tail, seed):
    import sys
    shell = get_ipython()
    shell.colors = "nocolor"
    def bound(stream):
        write, state = stream.write, {"kept": 0, "tail": "", "dropped": 0}
        def bounded_write(text):
            text = str(text)
            room = max(0, head - state["kept"])
            if room:
                write(text[:room])
                state["kept"] += min(room, len(text))
            rest = text[room:]
            if rest:
                joined = state["tail"] + rest
                state["dropped"] += max(0, len(joined) - tail)
                state["tail"] = joined[-tail:] if tail else ""
            return len(text)
        def flush_tail(*_):
            if state["dropped"]:
                write("\\0%d\\0" % state["dropped"])
            write(state["tail"])
            state.update(kept=0, tail="", dropped=0)
        stream.write = bounded_write
        shell.events.register("post_run_cell", flush_tail)
    bound(sys.stdout)
    bound(sys.stderr)
    if seed is not None:
        import random
        random.seed(seed)
        try:
            import numpy
        except ImportError:
            pass
        else:
            numpy.random.seed(seed % 2**32)
_trl_multiturn_setup({head}, {tail}, {seed})
del _trl_multiturn_setup
"""


class JupyterBackend:
    """Starts one kernel per session.

    Args:
        config ([`SandboxConfig`]):
            `kernel_name` names the kernelspec; `timeout_seconds`, `memory_limit_mb`, `file_limit_mb` and
            `output_limit_chars` are enforced.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self._folder = ""

    async def start(self) -> None:
        if self.config.isolation == "strict":
            raise IsolationError(
                "A Jupyter kernel is an ordinary process of this user, which `isolation='strict'` forbids. Use "
                "`backend='forkserver'` (Linux), or accept the risk with `isolation='best_effort'`."
            )
        if self.config.isolation == "best_effort":
            logger.warning("The sandbox's Jupyter kernels are limited in time, memory and output, but not confined.")
        self._folder = tempfile.mkdtemp(prefix="trl-multiturn-")

    async def spawn(self) -> JupyterInterpreter:
        interpreter = JupyterInterpreter(self.config, tempfile.mkdtemp(dir=self._folder))
        try:
            await interpreter.start()
        except BaseException:
            await interpreter.close()
            raise
        return interpreter

    async def stop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class JupyterInterpreter:
    """One kernel process and the client that talks to it."""

    def __init__(self, config: SandboxConfig, folder: str) -> None:
        self.config = config
        self.folder = folder
        self._manager = None
        self._client = None

    async def start(self) -> None:
        from jupyter_client.kernelspec import NoSuchKernel
        from jupyter_client.manager import AsyncKernelManager

        config = self.config
        self._manager = AsyncKernelManager(kernel_name=config.kernel_name)
        if os.name == "posix":
            # sockets in the session's own folder: no port to guess, nothing for other users to connect to
            self._manager.transport, self._manager.ip = "ipc", os.path.join(self.folder, "kernel")
        try:
            await self._manager.start_kernel(
                cwd=self.folder,
                env=self._environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except NoSuchKernel as error:
            raise ToolFailure(
                f"There is no Jupyter kernel named {config.kernel_name!r}, so no session can start. Install its "
                "kernelspec (for Python: `pip install ipykernel`), or set `kernel_name`."
            ) from error
        self._client = self._manager.client()
        self._client.start_channels()
        try:
            await self._client.wait_for_ready(timeout=_READY_SECONDS)
        except RuntimeError as error:
            raise ToolFailure(f"The Jupyter kernel {config.kernel_name!r} does not start: {error}") from error
        if self._manager.kernel_spec.language.lower() == "python":
            limit = config.output_limit_chars
            # a little more than the limit on either side, so that the cut is made (and announced) here
            setup = _PYTHON_SETUP.replace("{head}", str(limit)).replace("{tail}", str(limit))
            await self._request(setup.replace("{seed}", repr(config.seed)), _READY_SECONDS, silent=True)
        self._limit_resources()

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        return {
            **kept,
            "HOME": self.folder,
            "IPYTHONDIR": os.path.join(self.folder, ".ipython"),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **self.config.environment,
        }

    def _limit_resources(self) -> None:
        """Caps the running kernel: its own start, however large, is not counted."""
        pid = getattr(self._manager.provisioner, "pid", None)
        try:
            import resource

            with open(f"/proc/{pid}/statm") as statm:
                size = int(statm.read().split()[0]) * resource.getpagesize()
            prlimit = resource.prlimit
        except (ImportError, AttributeError, OSError):
            return  # not Linux: only time and output are limited
        limit = size + (self.config.memory_limit_mb << 20)
        prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        prlimit(pid, resource.RLIMIT_FSIZE, (self.config.file_limit_mb << 20,) * 2)
        prlimit(pid, resource.RLIMIT_CPU, (self.config.cpu_limit_seconds,) * 2)

    async def execute(self, code: str, timeout: float) -> Reply:
        return await self._request(code, timeout)

    async def _request(self, code: str, timeout: float, silent: bool = False) -> Reply:
        cell = _Cell(self._client.execute(code, silent=silent, allow_stdin=False, stop_on_error=False), self.config)
        deadline = time.monotonic() + timeout
        while not cell.idle and not cell.flooded:
            now = time.monotonic()
            if now >= deadline:
                if cell.interrupted:
                    return Reply(timeout_message(timeout), "timeout", alive=False)
                cell.interrupted, deadline = True, now + self.config.grace_seconds
                await self._manager.interrupt_kernel()
            try:
                message = await self._client.get_iopub_msg(timeout=min(_POLL_SECONDS, max(0.001, deadline - now)))
            except queue.Empty:
                if not await self._manager.is_alive():
                    return Reply("RuntimeError: the interpreter died and was restarted", "crashed", alive=False)
            except Exception:  # a snippet wrote garbage to the kernel's sockets: bad signature, bad JSON, bad parts
                return Reply("RuntimeError: the interpreter's protocol broke", "crashed", alive=False)
            else:
                cell.take(message)
        return await self._conclude(cell, timeout)

    async def _conclude(self, cell: _Cell, timeout: float) -> Reply:
        if cell.flooded:
            return Reply("RuntimeError: the cell printed too much", "crashed", alive=False)
        if cell.interrupted:
            return Reply(timeout_message(timeout), "timeout")
        if cell.error is None:
            cell.error = await self._error(cell.request)
        return Reply(*cell.outcome())

    async def _error(self, request: str) -> tuple[str, str] | None:
        """What the kernel's reply says of an error that it has shown to nobody: of a magic, of a group of errors."""
        with contextlib.suppress(queue.Empty):
            while (reply := await self._client.get_shell_msg(timeout=_REPLY_SECONDS)) is not None:
                if reply["parent_header"].get("msg_id") == request:
                    content = reply["content"]
                    return _error(content) if content.get("status") == "error" else None
        return None

    async def close(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
        if self._manager is not None and self._manager.has_kernel:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._manager.shutdown_kernel(now=True), 10.0)
        if self._manager is not None:
            self._manager.cleanup_connection_file()
            self._manager.context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _error(content: dict) -> tuple[str, str]:
    return str(content.get("ename", "Error")), str(content.get("evalue", ""))


class _Cell:
    """Collects the messages that belong to one cell."""

    def __init__(self, request: str, config: SandboxConfig) -> None:
        self.request = request
        self.config = config
        self.idle = False
        self.interrupted = False
        self.parts: list[str] = []
        self.size = 0
        self.error: tuple[str, str] | None = None

    @property
    def flooded(self) -> bool:
        """Far beyond what a bounded Python kernel sends: an unbounded kernel of another language."""
        return self.size > 64 * self.config.output_limit_chars + 1_000_000

    def take(self, message: dict) -> None:
        if message.get("parent_header", {}).get("msg_id") != self.request:
            return  # an earlier cell's thread is still printing
        kind, content = message["msg_type"], message["content"]
        if kind == "status":
            self.idle = content["execution_state"] == "idle"
        elif kind == "stream" and (content["name"] == "stdout" or self.config.include_stderr):
            self._add(content["text"])
        elif kind in ("execute_result", "display_data"):
            text = content["data"].get("text/plain", "")
            if self.parts and not self.parts[-1].endswith("\n"):
                text = "\n" + text
            self._add(text if kind == "execute_result" else text + "\n")
        elif kind == "error":
            self.error = _error(content)

    def _add(self, text: str) -> None:
        self.size += len(text)
        if not self.flooded:
            self.parts.append(text)

    def outcome(self) -> tuple[str, str, bool, int]:
        if self.error is None:
            text = "".join(self.parts)
            dropped = sum(int(count) for count in _CUT.findall(text))
            return _CUT.sub("", text).strip("\n"), "ok", True, dropped
        name, value = self.error
        return error_message(name, value), "memory" if name.endswith("MemoryError") else "error", True, 0
