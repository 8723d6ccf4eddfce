"""Real processes that meet although one is much later than a collective operation would bear."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time

import pytest
import torch.distributed as dist

from trl_multiturn.distributed.pace import at_own_pace


LIMIT_SECONDS = 5


def work(rank, folder, late_rank_dies, ready, outcomes):
    ready.wait()  # importing may take one of them longer
    timeout = datetime.timedelta(seconds=LIMIT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=2, rank=rank, timeout=timeout)
    ready.wait()  # one process's connection stands a moment before the other's, which a death in between would break
    try:
        with at_own_pace(LIMIT_SECONDS):
            if rank == 1:
                if late_rank_dies:
                    os._exit(9)
                time.sleep(1.75 * LIMIT_SECONDS)
        dist.barrier()
        with at_own_pace(LIMIT_SECONDS):  # a later meeting is another one
            pass
        outcomes.put("met")
    except RuntimeError as error:
        outcomes.put(str(error))


def run_two(folder, late_rank_dies):
    context = multiprocessing.get_context("spawn")
    ready, outcomes = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=work, args=(rank, str(folder), late_rank_dies, ready, outcomes)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [outcomes.get(timeout=120) for _ in range(1 if late_rank_dies else 2)]
    for process in processes:
        process.join(60)
    return found


@pytest.mark.slow
def test_a_process_that_is_much_later_is_waited_for(tmp_path):
    assert run_two(tmp_path, late_rank_dies=False) == ["met", "met"]


@pytest.mark.slow
def test_a_process_that_died_is_not(tmp_path):
    (message,) = run_two(tmp_path, late_rank_dies=True)
    assert "Process 1 has given no sign of life for 5 seconds" in message and "same command" in message


def test_one_process_waits_for_nobody():
    with at_own_pace(1):
        pass
