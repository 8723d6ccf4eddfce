"""The online iterative loop, one iteration at a time (M-DPO paper 2409.02392, Algorithm 1): the table of contents.

[`run_iteration`] reads like the algorithm. What it calls lives in a part of the package of its own, and what it finds
is on disk before the next step starts, so that a run that was stopped anywhere goes on where it was. The trainer's
next epoch is one pass over the rows it returns.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from datasets import Dataset, concatenate_datasets, load_from_disk

from .data.truncation import NoRowsLeftError
from .distributed.main_process import on_main
from .distributed.pace import at_own_pace
from .distributed.sharding import gathered_for_sampling, weights_of, whole_state_dict
from .engines.engine import Engine
from .journal.export import dropped_writer
from .journal.journal import Journal
from .report import IterationReport
from .rollout.config import RolloutConfig
from .rollout.loop import generate_trajectories
from .rollout.provenance import version_of
from .rows.row_files import forget_caches, save_rows, write_rows
from .rows.selection import PairingConfig, Selection, UnpairedConfig, select_by_prompt
from .tools.base import tool_name, tool_version
from .trainer.loop.policy_weights import policy_revision, policy_weights, save_policy_weights
from .verify.rewards import reward_name


logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class IterationSettings:
    """What stays the same from iteration to iteration; [`ToolRolloutGenerator`] describes each field."""

    tools: list[Any]
    reward_funcs: list[Callable]
    rollout: RolloutConfig
    pairing: PairingConfig | UnpairedConfig | None = None  # chosen by the trainer, once it stands
    reference: Literal["previous", "initial"] = "previous"
    history: Literal["latest", "all"] = "latest"
    reward_weights: list[float] | None = None
    environment_factory: Any = None
    correct_threshold: float = 0.5
    missing_reward: Literal["undecided", "skip"] = "undecided"
    reward_timeout_seconds: float | None = None

    def arguments(self) -> dict[str, Any]:
        """What [`generate_trajectories`] and [`evaluate_policy`] are told alike."""
        return {
            "tools": self.tools,
            "environment_factory": self.environment_factory,
            "config": self.rollout,
            "reward_funcs": self.reward_funcs or None,  # an environment may own its reward
            "reward_weights": self.reward_weights,
            "correct_threshold": self.correct_threshold,
            "missing_reward": self.missing_reward,
            "reward_timeout_seconds": self.reward_timeout_seconds,
        }

    def describe(self) -> dict[str, Any]:
        """What decides which rows an iteration finds, as JSON values."""
        filters = [(f, "") if isinstance(f, str) else (f.name, version_of(f.drops)) for f in self.pairing.filters]
        settings = {
            "tools": {tool_name(tool): tool_version(tool) for tool in self.tools},
            "environment_factory": self.environment_factory and version_of(self.environment_factory),
            "reward_funcs": [(reward_name(func), version_of(func)) for func in self.reward_funcs],
            "reward_weights": self.reward_weights,
            "correct_threshold": self.correct_threshold,
            "missing_reward": self.missing_reward,
            "num_generations": self.rollout.num_generations,
            "previous_policy_generations": self.rollout.explored_generations,
            **self.rollout.sampler_settings(),
            "pairing": {"kind": type(self.pairing).__name__, **vars(self.pairing), "filters": filters},
            "reference": self.reference,
            "history": self.history,
        }
        return json.loads(json.dumps(settings, default=str))


def run_iteration(
    iteration: int, prompts: Dataset, trainer: Any, engine: Engine, settings: IterationSettings, run_folder: Path
) -> tuple[Dataset, IterationReport]:
    """Prompts in, the training rows of one iteration out: lines 3 to 7 of Algorithm 1.

    The outer `for t = 1…T` is the trainer's loop over epochs ([`IterativeTrainerMixin`]), which calls this at the
    start of each ([`ToolRolloutGenerator.begin_iteration`]) and trains on what it returns. Several processes run it
    together and wait for each other where something is written to disk.

    Args:
        iteration (`int`):
            0-based.
        prompts (`Dataset`):
            The iteration's prompts: `prompt` messages and the columns that the rewards need.
        trainer:
            The trainer; its model is the policy π_t.
        engine ([`Engine`]):
            What samples.
        settings ([`IterationSettings`]):
            Tools, rewards, limits, pairing, choice of reference.
        run_folder (`Path`):
            Where the run keeps its `iteration_*` folders.

    Returns:
        `(rows, report)`: token rows with the reference's log-probabilities, and the iteration's counts.
    """
    started = time.perf_counter()
    folder = iteration_folder(run_folder, iteration)

    # π_t is kept: the next iteration explores with it, and it may turn out to be the best of all.
    revision = keep_policy(trainer, iteration, run_folder)

    # Roll out with π_t and, for exploration, with the previous policy; every answer is verified on the way.
    roll_out(iteration, prompts, trainer, engine, settings, run_folder)

    # Filter and pair, prompt by prompt.
    report = on_main_at_own_pace(lambda: find_rows(folder, settings.pairing, trainer.row_format), trainer)
    rows = load_from_disk(folder / "rows")

    # Train on these rows, or on all so far, against the reference of this iteration.
    prepared = rows if settings.history == "latest" else with_history(rows, iteration, run_folder)
    prepared = with_reference(prepared, trainer, settings.reference, run_folder)
    on_main_at_own_pace(lambda: save_rows(prepared, folder / "training_rows"), trainer)
    forget_caches(prepared, run_folder)  # what was computed on the way, beside the rows
    training_rows = load_from_disk(folder / "training_rows")

    report.iteration, report.first_step, report.policy_revision = iteration, trainer.state.global_step, revision
    report.rows, report.trained_rows = len(rows), len(training_rows)
    report.rollout_seconds = time.perf_counter() - started
    return training_rows, report


def roll_out(
    iteration: int,
    prompts: Dataset,
    trainer: Any,
    engine: Engine,
    settings: IterationSettings,
    run_folder: Path,
) -> None:
    """Rolls out with the current and, after the first iteration, the previous policy (mixture sampling, section 3.1).

    Every finished trajectory is in the iteration's journal the moment it finishes. With several processes each rolls
    out its share of the prompts; what all have rolled out is on the disk when it returns.
    """
    config, policy = settings.rollout, weights_of(trainer)
    folder = iteration_folder(run_folder, iteration)
    explore = config.explored_generations if iteration else 0
    share = range(trainer.args.process_index, len(prompts), trainer.args.world_size)

    def sample(label: str, num_generations: int, sample_offset: int) -> None:
        revision = policy_revision(policy)  # like the next line on every process, also on one without a prompt
        with ready_to_sample(engine, trainer, run_folder):
            if not share:
                return
            generate_trajectories(
                prompts.select(share),
                engine,
                **settings.arguments(),
                num_generations=num_generations,
                sample_offset=sample_offset,
                prompt_indices=list(share),
                policy=label,
                policy_revision=revision,
                iteration=iteration,
                journal=journal,
                collect=False,  # the main process reads those of all from the journal
                progress=trainer.args.process_index == 0 and not trainer.args.disable_tqdm,
            )

    with Journal(folder / "journal") as journal:
        if explore:  # first, so that the engine goes on with the present policy
            with policy_weights(policy, policy_file(run_folder, iteration - 1)):
                sample("previous", explore, sample_offset=config.num_generations - explore)
        sample("current", config.num_generations - explore, sample_offset=0)
    trainer.accelerator.wait_for_everyone()


def find_rows(
    folder: Path, pairing: PairingConfig | UnpairedConfig | None, row_format: Literal["preference", "unpaired"]
) -> IterationReport:
    """Selects an iteration's rows from its journal and writes them, prompt by prompt: memory holds one prompt's
    trajectories, and of the others nothing but counts.

    Returns:
        The counts of the iteration's report that come from its trajectories.
    """
    report = IterationReport(iteration=0)

    def selections() -> Iterator[Selection]:
        for group, selection in select_by_prompt(Journal(folder / "journal").read_by_prompt(), pairing):
            for trajectory, reason in zip(group, selection.reasons, strict=True):
                report.count(trajectory, reason)
                if reason:
                    write_dropped(trajectory, reason)
            yield selection

    with dropped_writer(folder) as write_dropped:
        write_rows(selections(), folder / "rows", row_format)
    return report


def with_history(rows: Dataset, iteration: int, run_folder: Path) -> Dataset:
    """The rows of all iterations so far (`D ← D ∪ D_t`)."""
    earlier = [load_from_disk(iteration_folder(run_folder, t) / "rows") for t in range(iteration)]
    return concatenate_datasets([*earlier, rows])


def with_reference(
    rows: Dataset, trainer: Any, reference: Literal["previous", "initial"], run_folder: Path
) -> Dataset:
    """Prepares rows for the trainer and adds the reference's log-probabilities, so that no second model is kept.

    `"previous"`: the policy that has just rolled out (eq. 15), so every margin starts the iteration at 0 (to rounding,
    where a batch is padded to another length).
    `"initial"`: the policy before the first iteration (eq. 14), whose weights are put into the model for the moment.
    """
    if len(rows) == 0:
        return rows
    try:
        rows = trainer.prepare_rows(rows)
    except NoRowsLeftError as error:
        logger.warning("%s", error)
        return rows.select([])
    with reference_weights(trainer, reference, run_folder):
        return trainer.compute_reference_columns(rows, reference="policy")


def restore_reference(trainer: Any, reference: Literal["previous", "initial"], run_folder: Path) -> None:
    """Gives a trainer that resumes before an iteration's first step the reference of the iteration's rows.

    Rows on disk carry its log-probabilities. A loss that reads whole distributions (OREO's KL) needs the reference
    itself, and the checkpoint of the iteration before holds the one before.
    """
    if getattr(trainer, "_needs_reference_distributions", False):
        with reference_weights(trainer, reference, run_folder):
            trainer.refresh_reference()


def reference_weights(
    trainer: Any, reference: Literal["previous", "initial"], run_folder: Path
) -> AbstractContextManager[None]:
    """Runs the body with the reference's weights in the policy: its present ones, or the initial ones."""
    if reference == "previous":
        return nullcontext()
    return policy_weights(weights_of(trainer), policy_file(run_folder, 0))


# Where things lie, and who writes them


def iteration_folder(run_folder: Path, iteration: int) -> Path:
    """The folder of one iteration."""
    return run_folder / f"iteration_{iteration:03d}"


def policy_file(run_folder: Path, iteration: int) -> Path:
    """The snapshot of π_t, the policy with which iteration t starts; file 0 is the initial policy."""
    return iteration_folder(run_folder, iteration) / "policy.safetensors"


def unwrapped_policy(trainer: Any) -> Any:
    """The policy itself, without the wrapper of a distributed backend."""
    return trainer.accelerator.unwrap_model(trainer.model)


def keep_policy(trainer: Any, iteration: int, run_folder: Path) -> str:
    """Writes the snapshot of π_t and returns its revision."""
    policy = weights_of(trainer)
    save_policy_weights(policy, policy_file(run_folder, iteration))
    return policy_revision(policy)


@contextmanager
def ready_to_sample(engine: Engine, trainer: Any, run_folder: Path) -> Iterator[None]:
    """
    The engine samples from the policy as it is now; sharded weights are gathered in place for as long as needed.

    An engine that sleeps while the policy is trained sleeps again afterwards.
    """
    refresh(engine, trainer, run_folder)
    loads_checkpoints = getattr(engine, "loads_checkpoints", False)
    in_place = nullcontext() if loads_checkpoints else gathered_for_sampling(trainer)
    try:
        with in_place, at_own_pace(trainer.args.ddp_timeout):  # rollouts take one process longer than another
            yield
    finally:
        rest(engine)


def rest(engine: Engine) -> None:
    """Frees the device for training, where the engine offers that."""
    if getattr(engine, "sleeps_while_training", False):
        engine.sleep()


def refresh(engine: Engine, trainer: Any, run_folder: Path) -> None:
    """Tells the engine that the policy's weights changed, and wakes it; one with weights of its own gets a checkpoint
    to load."""
    if getattr(engine, "sleeps_while_training", False):
        engine.wake_up()
    if not getattr(engine, "loads_checkpoints", False):
        engine.refresh()
        return
    # Each process has an engine of its own. The last checkpoint stays: an engine may load an adapter when it is used.
    earlier = sorted(run_folder.glob(f"engine_{trainer.args.process_index}_*"))
    number = 1 + int(earlier[-1].name.rpartition("_")[2]) if earlier else 0
    checkpoint = run_folder / f"engine_{trainer.args.process_index}_{number:06d}"
    unwrapped_policy(trainer).save_pretrained(checkpoint, state_dict=whole_state_dict(trainer))
    engine.refresh(str(checkpoint))
    for folder in earlier:
        shutil.rmtree(folder, ignore_errors=True)


def on_main_at_own_pace(do: Callable[[], T], trainer: Any) -> T:
    """[`on_main`] for what may take the main process longer than a collective operation waits."""
    done: Future[T] = Future()
    with at_own_pace(trainer.args.ddp_timeout):
        if trainer.accelerator.is_main_process:
            try:
                done.set_result(do())
            except Exception as error:
                done.set_exception(error)
    return on_main(done.result)
