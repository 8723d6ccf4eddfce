"""Sampling from the policy that is being trained: the engine gets its weights, and the device is shared."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from ..distributed.main_process import on_main_at_own_pace
from ..distributed.pace import at_own_pace
from ..distributed.sharding import gathered_for_sampling, weights_of, whole_state_dict
from ..engines.engine import Engine, SamplesBeside, Sleeps
from ..journal.run_folder import RunFolder
from ..trainer.loop.policy_weights import policy_revision


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
    load_checkpoint(engine, save_checkpoint(trainer, run))


def save_checkpoint(trainer: Any, run: RunFolder) -> Path:
    """Writes the policy as it is now to a folder that the engines of all processes can load. All call this together.

    The main process writes it: `save_pretrained` of transformers leaves an empty folder on the others, whatever its
    `is_main_process` says.
    """
    weights = whole_state_dict(trainer)
    trainer.accelerator.wait_for_everyone()  # nobody loads an earlier one any more, which `load_checkpoint` deletes

    def write() -> Path:
        checkpoint = run.next_engine_checkpoint()
        unwrapped_policy(trainer).save_pretrained(checkpoint, state_dict=weights)
        return checkpoint

    return on_main_at_own_pace(write, trainer.args.ddp_timeout)


def load_checkpoint(engine: Engine, checkpoint: Path, first_needed: Path | None = None) -> None:
    """Has an engine load a folder, and deletes those before it, or before the first one that is needed besides. The
    last one stays: an adapter may be loaded late."""
    engine.refresh(str(checkpoint))
    for folder in RunFolder(checkpoint.parent).engine_checkpoints():
        if folder < (first_needed or checkpoint):
            shutil.rmtree(folder, ignore_errors=True)


def samples_beside(engine: Engine, trainer: Any) -> bool:
    """Whether the engine can sample from the policy and an earlier one at once: it has room for both adapters."""
    return isinstance(engine, SamplesBeside) and engine.samples_beside and is_peft_model(unwrapped_policy(trainer))


@dataclass(frozen=True)
class EarlierPolicy:
    """The previous policy as an adapter on the disk, for an engine that samples from it beside the present one.

    Attributes:
        folder (`Path`): what the engine loads.
        revision (`str`): what identifies its weights.
    """

    folder: Path
    revision: str

    @classmethod
    def save(cls, engine: Engine, trainer: Any, run: RunFolder) -> EarlierPolicy | None:
        """
        Saves the adapter that the policy holds now. `None` where the engine cannot hold two policies, or the policy is
        no adapter: then both sample one after the other.
        """
        if not samples_beside(engine, trainer):
            return None
        folder = run.earlier_adapter(trainer.args.process_index)
        unwrapped_policy(trainer).save_pretrained(folder, state_dict=whole_state_dict(trainer))
        return cls(folder, policy_revision(weights_of(trainer)))

    @contextmanager
    def engine(self, engine: Engine) -> Iterator[Engine]:
        """The engine of this policy, once `engine` was refreshed."""
        assert isinstance(engine, SamplesBeside)
        yield engine.beside(str(self.folder))
        shutil.rmtree(self.folder, ignore_errors=True)


async def together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Awaits all; where one fails, the others are cancelled and its error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
