"""Turns a forked process into a confined Jupyter kernel. Loaded by the warm interpreter, after the fork."""

from __future__ import annotations

import json
import os

from . import child, confinement, protocol


def run(zygote, descriptor: int, folder: str, kernel: dict) -> None:
    """Serves a kernel until it is shut down.

    The order matters. Landlock holds for a thread and those that it starts, so it comes before the kernel's threads.
    The kernel must bind its sockets before seccomp forbids to make any; that filter reaches every thread at once.

    Args:
        zygote (`Zygote`):
            The warm interpreter's state, of which this process is a copy.
        descriptor (`int`):
            Socket on which the client waits for the first frame.
        folder (`str`):
            The session's folder.
        kernel (`dict`):
            `connection`: what a connection file holds; `sockets`: the folder of its `ipc` sockets, if it has any.
    """
    from ipykernel.kernelapp import IPKernelApp

    connection = os.path.join(folder, "kernel.json")
    with open(connection, "w") as file:
        json.dump(kernel["connection"], file)
    if zygote.landlock is not None:
        writable = [*zygote.writable(folder), *filter(None, [kernel["sockets"]])]
        zygote.landlock.restrict(writable, network=True, sockets=True)
    zygote.close_all_but(descriptor)
    app = IPKernelApp.instance()
    app.config.HistoryManager.enabled = False
    app.config.IPKernelApp.log_level = 50
    app.initialize(["-f", connection])
    if zygote.program is not None:
        program = confinement.seccomp_program(*confinement.machine(), serving=True)
        confinement.set_seccomp(program, all_threads=True)
    child.seed_generators(zygote.settings["seed"])
    child.report(descriptor, protocol.READY)
    os.close(descriptor)
    app.start()
    os._exit(0)
