"""What processes do together at their end."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import torch.distributed as dist

from trl_multiturn.distributed.main_process import outlive_collectives


def test_a_destroyed_process_group_is_still_referred_to(tmp_path):
    """DDP's reducer must not hold the last reference: it would join gloo's threads under the interpreter's lock."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    outlive_collectives()
    dist.destroy_process_group()
    gc.collect()
    assert group() is not None and not dist.is_initialized()


AT_EXIT = """
import sys, threading
import torch.distributed as dist
import trl_multiturn.distributed.main_process

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
done = threading.Event()
threading.Thread(target=lambda: (done.wait(), print("let go", flush=True)), daemon=True).start()
sys.setswitchinterval(1000)  # the main thread keeps the interpreter's lock until it waits for something
done.set()
"""


def test_threads_get_the_interpreter_once_more_before_a_script_ends(tmp_path):
    """As gloo's do, which drop a collective operation's tensors a moment after it is done."""
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "store")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert ended.stdout == "let go\n"
