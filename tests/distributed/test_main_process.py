"""What processes do together at their end."""

from __future__ import annotations

import gc
import weakref

import torch.distributed as dist

from trl_multiturn.distributed.main_process import outlive_trainer


def test_a_destroyed_process_group_is_still_referred_to(tmp_path):
    """DDP's reducer must not hold the last reference: it would join gloo's threads under the interpreter's lock."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    outlive_trainer()
    dist.destroy_process_group()
    gc.collect()
    assert group() is not None and not dist.is_initialized()
