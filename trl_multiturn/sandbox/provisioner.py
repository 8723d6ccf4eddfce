"""A Jupyter kernel provisioner: any Jupyter client gets kernels that are forked from a warm interpreter and confined.

`jupyter_client` finds it by its entry point. A kernelspec asks for it with

```json
{"metadata": {"kernel_provisioner": {"provisioner_name": "trl-multiturn", "config": {"settings": {"seed": 0}}}}}
```

and `JUPYTER_DEFAULT_PROVISIONER_NAME=trl-multiturn` makes it the choice for every kernelspec without one. Only Python
kernels can be forked: the kernelspec's command is not run.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import tempfile
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import Dict

from ._loop import LoopThread
from .config import SandboxConfig
from .forked import ForkedInterpreter
from .forkserver import ForkServer
from .inside import scratch


class _Kernels:
    """The warm interpreter of one configuration, shared by all kernels of this process."""

    def __init__(self, config: SandboxConfig) -> None:
        self.thread = LoopThread("trl-multiturn-kernels")
        self.server = ForkServer(config, kernels=True)
        self.lock = asyncio.Lock()
        self.started = False

    async def spawn(self, kernel: dict[str, Any]) -> ForkedInterpreter:
        async with self.lock:
            if not self.started:
                await self.server.start()
                self.started = True
        return await self.server.spawn(kernel)

    def close(self) -> None:
        if self.thread.usable:
            self.thread.run(self.server.stop())
            self.thread.stop()


_kernels: dict[str, _Kernels] = {}


@atexit.register
def close_kernels() -> None:
    """Ends every forked kernel of this process."""
    while _kernels:
        _kernels.popitem()[1].close()


class ForkedKernelProvisioner(KernelProvisionerBase):
    """Starts an ipykernel in a confined, forked process (see the module's docstring)."""

    settings = Dict(help="Fields of `SandboxConfig`: limits and isolation of the kernel's process.").tag(config=True)

    _process: ForkedInterpreter | None = None
    _sockets = ""

    @property
    def _shared(self) -> _Kernels:
        key = json.dumps([os.getpid(), self.settings], sort_keys=True, default=str)
        if key not in _kernels:
            _kernels[key] = _Kernels(SandboxConfig(**self.settings))
        return _kernels[key]

    @property
    def has_process(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The kernel's process id, while it has one."""
        return None if self._process is None else self._process.pid

    async def poll(self) -> int | None:
        if self._process is None:
            return 0
        return self._process.exit_code()

    async def wait(self) -> int | None:
        while (code := await self.poll()) is None:
            await asyncio.sleep(0.02)
        await self._release()
        return code

    async def send_signal(self, signum: int) -> None:
        if self._process is not None:
            self._shared.thread.call(self._process.signal, signum)

    async def kill(self, restart: bool = False) -> None:
        if self._process is not None:
            self._shared.thread.call(self._process.kill)

    async def terminate(self, restart: bool = False) -> None:
        await self.kill(restart)

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        manager = self.parent
        if manager is not None:
            if manager.transport == "ipc":
                # sockets in a folder that the kernel may write to, and nobody else may enter
                self._sockets = self._sockets or tempfile.mkdtemp(prefix="trl-multiturn-")
                manager.ip = os.path.join(self._sockets, "s")
            manager.write_connection_file()
            self.connection_info = manager.get_connection_info()
        return await super().pre_launch(cmd=["(forked)"], **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        info = {
            key: value.decode() if isinstance(value, bytes) else value for key, value in self.connection_info.items()
        }
        shared = self._shared
        self._process = await shared.thread.wait(shared.spawn({"connection": info, "sockets": self._sockets}))
        return self.connection_info

    async def cleanup(self, restart: bool = False) -> None:
        await self._release()
        if self._sockets and not restart:
            scratch.remove(self._sockets)
            self._sockets = ""

    async def _release(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await self._shared.thread.wait(process.close())
