"""Rollouts of the next iteration while this one trains: by the policy with which its training began."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..concurrency import BackgroundCoroutine
from ..distributed.main_process import on_main
from ..distributed.pace import at_own_pace
from ..distributed.sharding import weights_of
from ..engines.engine import Engine, SamplesBeside, SamplesFromCopies, Sleeps
from ..journal.journal import Journal
from ..journal.run_folder import RunFolder
from ..rollout.loop import agenerate_trajectories
from ..trainer.loop.policy_copy import copy_for_sampling, refuse_spread
from ..trainer.loop.policy_weights import load_policy_weights, policy_revision, policy_weights, snapshot_revision
from .plan import Beginning, plan_iteration, write_beginning
from .report import IterationReport, Samples
from .sampling import load_checkpoint, samples_beside, save_checkpoint, together, unwrapped_policy
from .settings import IterationSettings


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What one process rolls out of an iteration.

    Attributes:
        iteration (`int`): 0-based.
        prompts (`Dataset`): those of all processes.
        indices (`range`): which of them are this process's.
        samples (`Samples`): by policy, which samples of each prompt it draws.
        settings ([`IterationSettings`]): tools, judge, limits.
        journal ([`Journal`]): where trajectories go the moment they finish.
        progress (`bool`): whether to show a progress bar for the current policy.
    """

    iteration: int
    prompts: Dataset
    indices: range
    samples: Samples
    settings: IterationSettings
    journal: Journal
    progress: bool = False

    async def sample(self, label: str, engine: Engine, revision: str) -> None:
        """Draws the samples of one policy."""
        lag = self.settings.lag(self.iteration)
        for span in self.samples[label] if self.indices else ():
            await agenerate_trajectories(
                self.prompts.select(self.indices),
                engine,
                **self.settings.arguments(),
                num_generations=len(span),
                sample_offset=span.start,
                prompt_indices=list(self.indices),
                policy=label,
                policy_revision=revision,
                iteration=self.iteration,
                policy_lag=lag + 1 if lag and label == "previous" else lag,
                journal=self.journal,
                collect=False,  # the main process reads those of all from the journal
                progress=self.progress and label == "current",
            )


def share_of(
    iteration: int,
    prompts: Dataset,
    trainer: Any,
    settings: IterationSettings,
    samples: Samples,
    journal: Journal,
    shows_progress: bool = True,
) -> Share:
    """One process's share: every `world_size`-th prompt."""
    args = trainer.args
    indices = range(args.process_index, len(prompts), args.world_size)
    progress = shows_progress and args.process_index == 0 and not args.disable_tqdm
    return Share(iteration, prompts, indices, samples, settings, journal, progress)


@dataclass(frozen=True)
class HeldPolicy:
    """An earlier policy, to be sampled from whatever the policy becomes meanwhile.

    Attributes:
        label (`str`): `"current"` or `"previous"`, its part in the iteration's samples.
        revision (`str`): what identifies its weights.
        load (`Callable`): gives its weights to an engine, which it returns; blocks.
        checkpoint (`Path`, *optional*): where its weights are on the disk, for an engine that loads them from there.
    """

    label: str
    revision: str
    load: Callable[[], Engine]
    checkpoint: Path | None = None


def hold_policies(engine: Engine, trainer: Any, run: RunFolder, snapshots: dict[str, Path]) -> list[list[HeldPolicy]]:
    """
    Holds the policies of some snapshots. Those in one list are loaded one by one, and then sample together.

    For an engine that shares the policy's weights that is one copy in memory; for another one a checkpoint each on the
    disk, which all processes write together. One that has room for two adapters samples from both policies at once.

    Args:
        engine, trainer, run: as in [`run_iteration`].
        snapshots (`dict[str, Path]`):
            By policy, its weights; that of the current policy is the last.
    """
    revisions = [snapshot_revision(path) for path in snapshots.values()]
    if engine.weights == "shared":
        assert isinstance(engine, SamplesFromCopies)
        copied = copy_for_sampling(trainer)
        over = engine.over(copied)
        loads = [_of_copy(over, copied, path) for path in snapshots.values()]
        return [[HeldPolicy(*held)] for held in zip(snapshots, revisions, loads, strict=True)]
    folders = [_checkpoint_of(trainer, run, path) for path in snapshots.values()]
    loads = [_of_checkpoint(engine, path, folders[0]) for path in folders]
    policies = [HeldPolicy(*held) for held in zip(snapshots, revisions, loads, folders, strict=True)]
    if not samples_beside(engine, trainer):
        return [[policy] for policy in policies]
    assert isinstance(engine, SamplesBeside)
    *earlier, current = policies
    return [[current, *(replace(policy, load=partial(engine.beside, str(policy.checkpoint))) for policy in earlier)]]


def _of_copy(engine: Engine, copied: nn.Module, snapshot: Path) -> Callable[[], Engine]:
    def load() -> Engine:
        load_policy_weights(copied, snapshot, values=False)
        engine.refresh()
        return engine

    return load


def _of_checkpoint(engine: Engine, checkpoint: Path, first_needed: Path) -> Callable[[], Engine]:
    def load() -> Engine:
        load_checkpoint(engine, checkpoint, first_needed)  # another process may have yet to load the one before
        return engine

    return load


def _checkpoint_of(trainer: Any, run: RunFolder, snapshot: Path) -> Path:
    with policy_weights(weights_of(trainer), snapshot):
        return save_checkpoint(trainer, run)


class RolloutsAhead:
    """
    An iteration's rollouts, on a thread of their own, while the iteration before trains.

    Args:
        share ([`Share`]): what to roll out; its journal is closed here.
        policies (`list[list[HeldPolicy]]`): what samples: those of a list together, one list after another.

    Attributes:
        iteration (`int`): whose rollouts they are.
        seconds (`float`): wall time that they took.
        waited_seconds (`float`): how much of it was waited for after training.
    """

    def __init__(self, share: Share, policies: list[list[HeldPolicy]]) -> None:
        self.iteration = share.iteration
        self.seconds = self.waited_seconds = 0.0
        self._share, self._policies = share, policies
        self._background: BackgroundCoroutine[None] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Rolls out beside the body. Where the body raises, the rollouts are cancelled; what finished is kept."""
        self._background = BackgroundCoroutine(self._roll_out(), "trl-multiturn-rollouts")
        try:
            yield
        finally:
            self._background.cancel()
            self._policies = []  # the memory of the copy

    def finish(self, silence_limit_seconds: float) -> None:
        """
        Waits for this process's rollouts, and for those of the others.

        Raises:
            What the rollouts raised.
        """
        assert self._background is not None
        started = time.perf_counter()
        with at_own_pace(silence_limit_seconds):
            self._background.result()
        self._forget_all_but_the_last()
        self.waited_seconds = time.perf_counter() - started

    def _forget_all_but_the_last(self) -> None:
        """Deletes the checkpoints that no process needs any more: an engine goes on with the last one."""
        folders = sorted(held.checkpoint for together in self._policies for held in together if held.checkpoint)
        for folder in folders[:-1]:
            shutil.rmtree(folder, ignore_errors=True)

    async def _roll_out(self) -> None:
        started = time.perf_counter()
        try:
            with self._share.journal:
                for policies in self._policies:
                    loaded = [(policy.label, policy.load(), policy.revision) for policy in policies]
                    await together(*(self._share.sample(*each) for each in loaded))
        except Exception as error:
            logger.warning(
                "The rollouts of iteration %d, which run while iteration %d trains, have failed (%s: %s). The "
                "training goes on to the end of its iteration; then the error is raised. What finished is kept.",
                *(self.iteration + 1, self.iteration, type(error).__name__, error),
            )
            raise
        finally:
            self.seconds = time.perf_counter() - started


def begin_ahead(
    trainer: Any,
    engine: Engine,
    settings: IterationSettings,
    run: RunFolder,
    iteration: int,
    prompts: Dataset,
    described: dict[str, Any],
) -> RolloutsAhead | None:
    """
    Prepares the rollouts of an iteration, to be run while the one before trains. All processes call it together.

    `None` where they are on the disk, from an earlier run.

    Args:
        trainer, engine, settings, run: as in [`run_iteration`].
        iteration (`int`):
            0-based.
        prompts (`Dataset`):
            Its prompts.
        described (`dict`):
            The settings that decide which rows it finds.

    Raises:
        `ValueError`: if it was begun with other settings.
    """
    revision, first_step = sampling_revision(trainer, run, settings, iteration), trainer.iteration_last_step
    beginning, folder = Beginning(iteration, False, described, revision, first_step), run.iteration(iteration)
    plan = on_main(lambda: plan_iteration(folder, beginning))
    if plan.action == "load":
        return None
    if plan.action == "set aside":
        on_main(lambda: run.set_aside(iteration))
    _, samples = write_beginning(beginning, settings, run)
    share = share_of(iteration, prompts, trainer, settings, samples, Journal(folder.journal), shows_progress=False)
    drawn_from = iteration - settings.lag(iteration)
    snapshots = {
        label: run.iteration(number).policy
        for label, number in (("previous", drawn_from - 1), ("current", drawn_from))  # the engine goes on with this
        if samples[label]
    }
    return RolloutsAhead(share, hold_policies(engine, trainer, run, snapshots))


def sampling_revision(
    trainer: Any, run: RunFolder, settings: IterationSettings, iteration: int, present: str | None = None
) -> str:
    """What identifies the policy that an iteration's rollouts are to be drawn with; `present`: the present one."""
    if lag := settings.lag(iteration):
        return snapshot_revision(run.iteration(iteration - lag).policy)
    return present or policy_revision(weights_of(trainer))


def goes_on_in_turns(settings: IterationSettings, run: RunFolder, iteration: int, present: tuple[str, int]) -> bool:
    """
    Whether an iteration is rolled out with the present policy, which is younger than `max_policy_lag` allows.

    So it is where `max_policy_lag` was raised between two starts: what the present policy has rolled out stays, and
    snapshots of older ones may be gone.

    Args:
        settings, run, iteration: as in [`begin_ahead`].
        present (`tuple[str, int]`):
            Revision of the present policy, and optimizer steps so far.
    """
    if not (lag := settings.lag(iteration)):
        return False
    report = IterationReport.load(run.iteration(iteration).path)
    if report is not None:
        return report.policy_lag == 0 and (report.policy_revision, report.first_step) == present
    oldest = iteration - lag - bool(settings.samples(iteration)["previous"])
    return not run.iteration(oldest).policy.exists()


def refuse_impossible_lag(max_policy_lag: int) -> None:
    """Refuses a lag that the loop does not have.

    Raises:
        `ValueError`: naming those it has.
    """
    if isinstance(max_policy_lag, bool) or max_policy_lag not in (0, 1):
        raise ValueError(
            f"`max_policy_lag={max_policy_lag!r}` is neither 0 (rollouts and training take turns) nor 1 (the next "
            "iteration's rollouts run while this one trains). Policies that are older gain no time: rollouts wait for "
            "nothing but the weights of the iteration before."
        )


def refuse_overlap(engine: Engine, trainer: Any) -> None:
    """Refuses `max_policy_lag=1` where the engine, split weights or the loss do not allow it.

    Raises:
        `ValueError`: naming the remedy.
    """
    name, because = type(engine).__name__, None
    shared, split = engine.weights == "shared", trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    if isinstance(engine, Sleeps) and engine.sleeps_while_training:
        because = (
            f"the engine {name} sleeps while the policy is trained (`enable_sleep_mode`), so it cannot sample "
            "meanwhile. Give it a device of its own, without sleep mode"
        )
    elif shared and not isinstance(engine, SamplesFromCopies):
        because = (
            f"the engine {name} samples with the weights that are being trained and has no `over(model)`, which "
            "would build it over a copy of them. Use a `TransformersEngine` or a `VLLMServerEngine`"
        )
    elif shared and split:
        because = (
            f"FSDP or DeepSpeed ZeRO-3 splits the weights over processes, so the engine {name} cannot be built over "
            "a copy of them. Train with DDP, or sample with vLLM (`VLLMServerEngine`) on other devices"
        )
    elif trainer.needs_reference_samples:
        because = (
            f"`baseline={trainer.args.baseline!r}` takes the reference for the policy that sampled the rows, which it "
            "then is not. Set `behavior_reference=True` (OAPL), or use `baseline='variance'`"
        )
    if because is not None:
        raise ValueError(f"`max_policy_lag=1`, but {because}; or leave `max_policy_lag` at 0.")
    if shared:
        refuse_spread(unwrapped_policy(trainer))


def sampling_weights(trainer: Any, run: RunFolder, iteration: int, lag: int) -> AbstractContextManager[None]:
    """Runs the body with the weights in the policy that the current policy of an iteration's rollouts has."""
    return policy_weights(weights_of(trainer), run.iteration(iteration - lag).policy) if lag else nullcontext()
