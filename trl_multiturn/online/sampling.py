"""Sampling from the policy that is being trained: the engine gets its weights, and the device is shared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..distributed.pace import at_own_pace
from ..distributed.sharding import gathered_for_sampling, whole_state_dict
from ..engines.engine import Engine, Sleeps
from ..journal.run_folder import RunFolder


def unwrapped_policy(trainer: Any) -> Any:
    """The policy itself, without the wrapper of a distributed backend."""
    return trainer.accelerator.unwrap_model(trainer.model)


@contextmanager
def ready_to_sample(engine: Engine, trainer: Any, run: RunFolder) -> Iterator[None]:
    """
    The engine samples from the policy as it is now; sharded weights are gathered in place for as long as needed.

    An engine that sleeps while the policy is trained sleeps again afterwards.
    """
    refresh(engine, trainer, run)
    in_place = nullcontext() if engine.weights == "own" else gathered_for_sampling(trainer)
    try:
        with in_place, at_own_pace(trainer.args.ddp_timeout):  # rollouts take one process longer than another
            yield
    finally:
        rest(engine)


def rest(engine: Engine) -> None:
    """Frees the device for training, where the engine offers that."""
    if isinstance(engine, Sleeps) and engine.sleeps_while_training:
        engine.sleep()


def refresh(engine: Engine, trainer: Any, run: RunFolder) -> None:
    """Tells the engine that the policy's weights changed, and wakes it; one with weights of its own gets a checkpoint
    to load."""
    if isinstance(engine, Sleeps) and engine.sleeps_while_training:
        engine.wake_up()
    if engine.weights == "shared":
        engine.refresh()
        return
    # Each process has an engine of its own. The last checkpoint stays: an engine may load an adapter when it is used.
    process = trainer.args.process_index
    earlier, checkpoint = run.engine_checkpoints(process), run.next_engine_checkpoint(process)
    unwrapped_policy(trainer).save_pretrained(checkpoint, state_dict=whole_state_dict(trainer))
    engine.refresh(str(checkpoint))
    for folder in earlier:
        shutil.rmtree(folder, ignore_errors=True)
