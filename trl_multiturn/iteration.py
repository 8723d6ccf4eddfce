"""The online iterative loop, one iteration at a time (M-DPO paper 2409.02392, Algorithm 1): the table of contents.

[`run_iteration`] reads like the algorithm. What it calls lives in a part of the package of its own, and what it finds
is on disk before the next step starts, so that a run that was stopped anywhere goes on where it was. The trainer's
next epoch is one pass over the rows it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from .concurrency import run_coroutine
from .distributed.main_process import on_main_at_own_pace
from .distributed.sharding import weights_of
from .engines.engine import Engine
from .errors import JournalError
from .journal.export import dropped_writer
from .journal.journal import Journal, Places
from .journal.run_folder import IterationFolder, RunFolder
from .online.agreement import SamplerAgreement
from .online.arrivals import await_trajectories
from .online.overlap import sampling_weights, share_of
from .online.plan import found_otherwise
from .online.reference import with_reference
from .online.report import IterationReport, Samples
from .online.sampling import EarlierPolicy, ready_to_sample, together
from .online.settings import IterationSettings
from .rollout.judging import judge_again
from .rows.row_files import forget_caches, load_rows, save_rows, write_rows
from .rows.selection import PairingConfig, Selection, UnpairedConfig, select_by_prompt
from .trainer.loop.policy_weights import policy_revision, policy_weights, save_policy_weights, snapshot_revision
from .trajectory import Trajectory


def run_iteration(
    iteration: int,
    prompts_of: Callable[[int], Dataset],
    trainer: Any,
    engine: Engine,
    settings: IterationSettings,
    run: RunFolder,
    samples: Samples | None = None,
    see: Callable[[Trajectory, str | None], None] | None = None,
    is_rolled_out: bool = False,
) -> tuple[Dataset, IterationReport]:
    """Prompts in, the training rows of one iteration out: lines 3 to 7 of Algorithm 1.

    The outer `for t = 1…T` is the trainer's loop over epochs ([`IterativeTrainerMixin`]), which calls this at the
    start of each ([`ToolRolloutGenerator.begin_iteration`]) and trains on what it returns. Several processes run it
    together and wait for each other where something is written to disk.

    Args:
        iteration (`int`):
            0-based.
        prompts_of (`Callable[[int], Dataset]`):
            The prompts of an iteration: `prompt` messages and the columns that the rewards need.
        trainer:
            The trainer; its model is the policy π_t.
        engine ([`Engine`]):
            What samples.
        settings ([`IterationSettings`]):
            Tools, rewards, limits, pairing, choice of reference.
        run ([`RunFolder`]):
            Where the run keeps what it finds.
        samples (`Samples`, *optional*):
            Which samples each policy draws (see [`IterationSettings.samples`]).
        see (`Callable`, *optional*):
            Called on the main process with every trajectory and the name of the filter that dropped it.
        is_rolled_out (`bool`, *optional*, defaults to `False`):
            Whether this run has rolled out already, while the iteration before was trained (`max_policy_lag`).

    Returns:
        `(rows, report)`: token rows with the reference's log-probabilities, and the iteration's counts.
    """
    started = time.perf_counter()
    trainer.row_statistics = None
    folder, patience = run.iteration(iteration), trainer.args.ddp_timeout

    # π_t is kept: the next iteration explores with it, and it may turn out to be the best of all.
    policy, lag = weights_of(trainer), settings.lag(iteration)
    save_policy_weights(policy, folder.policy)

    # Roll out with π_t and, for exploration, with the previous policy; every answer is verified on the way.
    prompts = prompts_of(iteration)
    samples = samples or settings.samples(iteration)
    places = Places(range(len(prompts)), {f"{iteration}/{policy}": spans for policy, spans in samples.items()})
    if is_rolled_out:
        trainer.accelerator.wait_for_everyone()
    else:
        roll_out(iteration, prompts, trainer, engine, settings, run, samples)
    if (processes := trainer.args.world_size) > 1:
        on_main_at_own_pace(lambda: await_trajectories(Journal(folder.journal), places, processes), patience)

    # Filter and pair, prompt by prompt. On the way: did the engine sample from the policy that is trained?
    def select_rows() -> IterationReport:
        agreement = SamplerAgreement(settings.rollout, see)
        found = find_rows(folder.journal, folder, places, settings.pairing, trainer.row_format, agreement.see)
        found.agreement = agreement.measure(trainer, sampling_weights(trainer, run, iteration, lag) if lag else None)
        return found

    report = on_main_at_own_pace(select_rows, patience)
    rows = load_rows(folder.rows)

    # Train on these rows, or on all so far, against the reference of this iteration.
    prepared = rows
    if settings.history == "all":
        earlier = on_main_at_own_pace(
            lambda: earlier_rows(iteration, prompts_of, settings, trainer.row_format, run), patience
        )
        prepared = concatenate_datasets([*map(load_rows, earlier), rows])
    prepared = with_reference(prepared, trainer, settings.reference, run)
    on_main_at_own_pace(lambda: save_rows(prepared, folder.training_rows), patience)
    forget_caches(prepared, run.path)  # what was computed on the way, beside the rows
    training_rows = load_rows(folder.training_rows)

    report.iteration, report.first_step = iteration, trainer.state.global_step
    report.starting_revision, report.policy_lag = policy_revision(policy), lag
    sampled_by = snapshot_revision(run.iteration(iteration - lag).policy) if lag else report.starting_revision
    report.policy_revision = sampled_by
    report.rows, report.trained_rows = len(rows), len(training_rows)
    report.row_statistics = dict(trainer.row_statistics or {})
    report.rollout_seconds = time.perf_counter() - started
    return training_rows, report


def roll_out(
    iteration: int,
    prompts: Dataset,
    trainer: Any,
    engine: Engine,
    settings: IterationSettings,
    run: RunFolder,
    samples: Samples,
) -> None:
    """Rolls out with the current and, after the first iteration, the previous policy (mixture sampling, section 3.1).

    Every finished trajectory is in the iteration's journal the moment it finishes. With several processes each rolls
    out its share of the prompts; what all have rolled out is on the disk when it returns.
    """
    policy, lag = weights_of(trainer), settings.lag(iteration)
    with Journal(run.iteration(iteration).journal) as journal:
        share = share_of(iteration, prompts, trainer, settings, samples, journal)
        earlier = None
        if samples["previous"]:
            with policy_weights(policy, run.iteration(iteration - lag - 1).policy):
                earlier = EarlierPolicy.save(engine, trainer, run)
                if earlier is None:  # first, so that the engine goes on with the present policy
                    revision = policy_revision(policy)  # on every process, also on one without a prompt
                    with ready_to_sample(engine, trainer, run):
                        run_coroutine(share.sample("previous", engine, revision))
        with sampling_weights(trainer, run, iteration, lag):
            revision = policy_revision(policy)
            with ready_to_sample(engine, trainer, run):
                current = share.sample("current", engine, revision)
                if earlier is None:
                    run_coroutine(current)
                else:
                    with earlier.engine(engine) as beside:
                        run_coroutine(together(share.sample("previous", beside, earlier.revision), current))
    trainer.accelerator.wait_for_everyone()


def find_rows(
    journal: Path,
    folder: IterationFolder,
    places: Places | None,
    pairing: PairingConfig | UnpairedConfig | None,
    row_format: Literal["preference", "unpaired"],
    see: Callable[[Trajectory, str | None], None] | None = None,
) -> IterationReport:
    """Selects an iteration's rows from its journal and writes them, prompt by prompt: memory holds one prompt's
    trajectories, and of the others nothing but counts.

    Args:
        journal (`Path`):
            The iteration's journal.
        folder ([`IterationFolder`]):
            Where the rows go.
        places ([`Places`], *optional*):
            Which trajectories, where earlier settings may have left others there.
        pairing ([`PairingConfig`] or [`UnpairedConfig`], *optional*):
            How to select.
        row_format (`"preference"` or `"unpaired"`):
            Which rows to write.
        see (`Callable`, *optional*):
            Called with every trajectory and the name of the filter that dropped it.

    Returns:
        The counts of the iteration's report that come from its trajectories.

    Raises:
        [`JournalError`]: if trajectories are missing; no row was written.
    """
    report = IterationReport(iteration=0)

    def selections() -> Iterator[Selection]:
        for group, selection in select_by_prompt(Journal(journal).read_by_prompt(places), pairing):
            for trajectory, reason, unused in zip(group, selection.reasons, selection.unused, strict=True):
                report.count(trajectory, reason, unused)
                if reason:
                    write_dropped(trajectory, reason)
                if see is not None:
                    see(trajectory, reason)
            yield selection
        if places is not None:
            refuse_missing(folder, places, report.trajectories)

    with dropped_writer(folder.dropped) as write_dropped:
        write_rows(selections(), folder.rows, row_format)
    return report


def refuse_missing(folder: IterationFolder, places: Places, found: int) -> None:
    """Raises where the journal holds fewer trajectories than were rolled out."""
    if found != places.count:
        raise JournalError(
            f"{folder.journal} holds {found} of the {places.count} trajectories of iteration {folder.number + 1}, so "
            "its rows would come from a part of them. Restore the missing files, or start again with the same "
            "command: what is missing is rolled out."
        )


def earlier_rows(
    iteration: int,
    prompts_of: Callable[[int], Dataset],
    settings: IterationSettings,
    row_format: Literal["preference", "unpaired"],
    run: RunFolder,
) -> list[Path]:
    """The folders with the rows of the iterations before one (`D ← D ∪ D_t`).

    Where an iteration's rows were judged or selected by other settings than the present ones, its trajectories are
    judged and selected anew, so that rows of both never mix. What it trained on stays as it was.
    """
    folders = []
    for earlier in map(run.iteration, range(iteration)):
        report = IterationReport.load(earlier.path)
        if report is None or not found_otherwise(report, settings.describe()):
            folders.append(earlier.rows)
            continue
        with Journal(earlier.journal) as journal:
            judge_again(journal, prompts_of(earlier.number), settings.complete_judge())
        anew = run.iteration(iteration).found_anew(earlier.number)
        find_rows(earlier.journal, anew, None, settings.pairing, row_format)
        folders.append(anew.rows)
    return folders
