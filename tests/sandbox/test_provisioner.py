"""The Jupyter face: ordinary Jupyter clients get forked, confined kernels."""

import asyncio
import os
import sys
from importlib.metadata import entry_points

import pytest
from jupyter_client.manager import AsyncKernelManager

from trl_multiturn.sandbox.provisioner import ForkedKernelProvisioner, close_kernels


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    close_kernels()


class Notebook:
    """A kernel behind jupyter_client's own manager and client, neither of which knows about the fork."""

    def __init__(self, transport="tcp"):
        self.manager = AsyncKernelManager(kernel_name="python3", transport=transport)
        self.manager.provisioner = ForkedKernelProvisioner(
            kernel_id="test", kernel_spec=self.manager.kernel_spec, parent=self.manager, settings={"preload": []}
        )

    async def __aenter__(self):
        await self.manager.start_kernel()
        await self.connect()
        return self

    async def connect(self):
        self.client = self.manager.client()
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=30)

    async def __aexit__(self, *exc_info):
        self.client.stop_channels()
        await self.manager.shutdown_kernel(now=True)

    async def run(self, code, printed=None):
        """What the cell prints and returns; the event `printed` is set as soon as there is something of it."""
        texts = []

        def hook(message):
            content = message["content"]
            texts.append(content.get("text") or content.get("data", {}).get("text/plain") or content.get("ename"))
            if printed is not None and "text" in content:
                printed.set()

        await self.client.execute_interactive(code, timeout=30, output_hook=hook, allow_stdin=False)
        return "".join(text for text in texts if text and text not in ("busy", "idle"))


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_jupyter_client_works_as_ever_and_the_kernel_is_confined(transport):
    async def main():
        async with Notebook(transport) as notebook:
            assert await notebook.run("x = 20\nprint('printed')\nx + 1") == "printed\n21"
            assert await notebook.run("open('/etc/passwd')") == "PermissionError"
            assert await notebook.run("import os; os.fork()") == "PermissionError"
            assert await notebook.run("import socket; socket.socket()") == "PermissionError"
            assert await notebook.run("os.kill(os.getppid(), 9)") == "PermissionError"
            # no way back to the warm interpreter or its owner: every socket is the kernel's own
            kinds = "{os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in os.listdir('/proc/self/fd')[:-1]}"
            assert "/trl-multiturn" not in await notebook.run(kinds)
            # the walls stand on every thread of the kernel, not only on the one that runs cells
            escape = "from threading import Thread; Thread(target=lambda: print(open('/etc/passwd'))).start()"
            assert "root:" not in await notebook.run(f"{escape}; import time; time.sleep(0.1)")

    asyncio.run(main())


def test_interrupt_restart_and_shutdown():
    async def main():
        async with Notebook("ipc") as notebook:
            await notebook.run("x = 1")
            printed = asyncio.Event()
            endless = asyncio.create_task(notebook.run("print('begun', flush=True)\nwhile True: pass", printed))
            await asyncio.wait_for(printed.wait(), 30)
            await notebook.manager.interrupt_kernel()
            assert await endless == "begun\nKeyboardInterrupt"
            assert await notebook.run("x") == "1"
            first = notebook.manager.provisioner.pid
            await notebook.manager.restart_kernel(now=True)
            notebook.client.stop_channels()
            await notebook.connect()
            assert await notebook.run("x") == "NameError"
            second = notebook.manager.provisioner.pid
            sockets = notebook.manager.provisioner._sockets
            assert os.path.isdir(sockets)
            assert first != second and not os.path.exists(f"/proc/{first}")
        assert not await notebook.manager.is_alive() and not os.path.exists(f"/proc/{second}")
        assert not os.path.exists(sockets)

    asyncio.run(main())


def test_a_dead_kernel_is_noticed():
    async def main():
        async with Notebook() as notebook:
            assert await notebook.manager.is_alive()
            notebook.client.execute("import os; os._exit(3)")
            async with asyncio.timeout(20):
                while await notebook.manager.is_alive():
                    await asyncio.sleep(0.01)
            assert await notebook.manager.provisioner.poll() == 3

    asyncio.run(main())


def test_jupyter_finds_the_provisioner_by_its_entry_point():
    names = entry_points(group="jupyter_client.kernel_provisioners").names
    if "trl-multiturn" not in names:
        pytest.skip("the installed metadata is older than the entry point: install the package again")
    (entry,) = entry_points(group="jupyter_client.kernel_provisioners", name="trl-multiturn")
    assert entry.load() is ForkedKernelProvisioner
