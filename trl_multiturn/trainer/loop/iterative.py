"""Lets a TRL trainer train on rows that arrive iteration by iteration, one epoch each.

A `transformers.Trainer` fixes the number of steps per epoch and the learning-rate schedule before the first epoch, and
keeps its dataloader in a local variable: a shorter round silently drops steps and a longer one is cut. The mixin
re-reads both at the start of every epoch, so that an iteration trains exactly one pass over the rows it found,
whatever their number. Checkpoints, logging, evaluation and resuming stay the parent's.
"""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, Trainer, set_seed

from ...distributed.main_process import outlive_collectives
from ...distributed.sharding import weights_of
from ..host import TrainerHost, constructor_arguments
from .checkpoints import being_written, checkpoint_to_resume
from .policy_weights import is_finite_or_half, refuse_diverged


@runtime_checkable
class TrainingRowSource(Protocol):
    """A callback that supplies the training rows of each epoch, such as [`ToolRolloutGenerator`]."""

    lr_schedule: Literal["run", "iteration"]

    def attach(self, trainer: Any) -> None:
        """Called once, when the trainer stands."""
        ...

    def begin_iteration(self, iteration: int, resumed_inside: bool) -> Dataset:
        """The rows of an iteration, on every process; `resumed_inside` if some of them are trained on already."""
        ...

    def position(self, global_step: int) -> tuple[int, int]:
        """`(iteration, its first global step)` at which a run goes on that stopped after `global_step` steps."""
        ...


@runtime_checkable
class RunningRowSource(TrainingRowSource, Protocol):
    """A source that also wants to know when a run begins and ends, and when an iteration's checkpoint stands."""

    def running(self) -> AbstractContextManager[None]:
        """Entered around [`train`]: the source locks what it keeps, and finds what would go wrong later."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Entered around the optimizer steps of an iteration."""
        ...

    def end_iteration(self) -> None:
        """Called after an iteration's epoch, once its checkpoint is written."""
        ...


class IterativeTrainerMixin(TrainerHost):
    """Mixed in before a TRL trainer: accepts a [`TrainingRowSource`] among the `callbacks`.

    Without such a callback nothing changes. With one, `train_dataset` is omitted, `num_train_epochs` is the number of
    iterations, and reference log-probabilities come as columns of the rows, so that no reference model is kept.
    """

    _sides: tuple[tuple[str, str], ...]  # the trainer's (ids, mask) columns, see `TokenRowsMixin`
    _row_source: TrainingRowSource | None = None
    _rows_come_later = False
    _resumed_inside = False
    iteration_first_step = 0  # global steps before the iteration under way, and after it
    iteration_last_step = 0

    if not TYPE_CHECKING:  # checkers read the TRL trainer's signature

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = constructor_arguments(self, args, kwargs)
            sources = [c for c in given.get("callbacks") or [] if isinstance(c, TrainingRowSource)]
            self._rows_come_later = bool(sources)
            if sources:
                self._expect_rows_from(sources, given)
            _refuse_no_rows(given)
            super().__init__(**given)
            if sources:
                self._row_source = sources[0]
                self._row_source.attach(self)

    def _expect_rows_from(self, sources: list[TrainingRowSource], arguments: dict[str, Any]) -> None:
        name = type(sources[0]).__name__
        if len(sources) > 1:
            raise ValueError(
                f"{len(sources)} callbacks supply training rows, but an epoch has one training set. Keep one "
                f"`{name}` and give it all prompts."
            )
        if arguments.get("train_dataset") is not None:
            raise ValueError(
                f"`train_dataset` and a `{name}` were both passed, but each iteration trains on the rows that the "
                f"`{name}` finds. Omit `train_dataset`, or drop the callback to train offline."
            )
        if arguments.get("args") is None:
            raise ValueError(f"Pass `args` with a `{name}`: its `num_train_epochs` is the number of iterations.")
        if missing := [seam for seam in ("_run_epoch", "_init_training_state") if not hasattr(Trainer, seam)]:
            raise ImportError(
                f"This version of transformers has no `Trainer.{missing[0]}`, on which iterations rely. Install "
                "`transformers>=5.17`."
            )
        for name, remedy in (
            ("ref_model", "Choose the generator's `reference`: its log-probabilities become columns of the rows"),
            ("eval_dataset", "Give the generator `eval_prompts`: a fixed set would keep the first reference"),
        ):
            if arguments.get(name) is not None:
                raise ValueError(f"`{name}` has no part in training with a `{type(sources[0]).__name__}`. {remedy}.")
        if arguments["args"].dataloader_drop_last:
            raise ValueError(
                "`dataloader_drop_last=True` would leave rows out, but an iteration is one pass over all it found. "
                "Leave it off."
            )
        # The rows bring their reference log-probabilities: with this flag the parent keeps no second model.
        arguments["args"] = copy.copy(arguments["args"])
        arguments["args"].precompute_ref_log_probs = True
        arguments["train_dataset"] = self.placeholder_rows()

    @property
    def row_format(self) -> Literal["preference", "unpaired"]:
        """Which rows this trainer takes."""
        return "preference" if len(self._sides) == 2 else "unpaired"

    @classmethod
    def placeholder_rows(cls) -> Dataset:
        """One token row: the parent's constructor wants a training set. No epoch reads it."""
        columns = {"prompt_ids": [[0]], "label": [True], "reward": [1.0]}
        for token, (ids, mask) in enumerate(cls._sides):
            columns |= {ids: [[token]], mask: [[1]]}
        return Dataset.from_dict(columns)

    @property
    def needs_reference_samples(self) -> bool:
        """Whether the loss takes the reference for the policy that sampled the rows."""
        return False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's. With a [`TrainingRowSource`], `resume_from_checkpoint=True` goes on from the last complete
        checkpoint, and starts from the beginning where there is none yet: the same command starts a run and takes it
        up again."""
        if self._row_source is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        with self._row_source.running() if isinstance(self._row_source, RunningRowSource) else nullcontext():
            if resume_from_checkpoint:
                resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        if self._rows_come_later:  # and bring theirs; the parent's constructor asks for the placeholder's
            return dataset
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._row_source is None:
            super()._run_epoch(**kwargs)
            self._has_finite_weights()
            return
        iteration = kwargs["epoch"]
        inside, self._resumed_inside = self._resumed_inside, False
        self.iteration_first_step = (
            self._row_source.position(self.state.global_step)[1] if inside else self.state.global_step
        )
        self.train_dataset = self._row_source.begin_iteration(iteration, inside)
        # The order of the rows and dropout depend on the iteration, not on what was drawn while rolling out (or not
        # drawn, where the rows were on disk): a run that was stopped trains as an undisturbed one does.
        set_seed(self.args.seed)
        dataloader = self.get_train_dataloader() if len(self.train_dataset) else ()
        updates = math.ceil(len(dataloader) / self.args.gradient_accumulation_steps)
        self.iteration_last_step = self.iteration_first_step + updates
        if updates:
            self._plan_steps(iteration, updates)
            kwargs.update(
                train_dataloader=dataloader, steps_in_epoch=len(dataloader), num_update_steps_per_epoch=updates
            )
            self.callback_handler.train_dataloader = dataloader
            if not inside:
                set_seed(self.args.seed + iteration)
                kwargs["resume_from_checkpoint"] = None  # of which the parent would take the random state
            with self._row_source.training() if isinstance(self._row_source, RunningRowSource) else nullcontext():
                super()._run_epoch(**kwargs)
            refuse_diverged(weights_of(self))
        else:  # nothing found: the iteration ends here, the run goes on
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        if isinstance(self._row_source, RunningRowSource):
            self._row_source.end_iteration()
        # With `max_steps` the parent counts epochs of its placeholder; the number of iterations is ours to keep
        if iteration + 1 >= math.ceil(self.args.num_train_epochs):
            self.control.should_training_stop = True

    def _plan_steps(self, iteration: int, updates: int) -> None:
        """Re-plans the run now that this iteration's number of optimizer steps is known.

        The later iterations are taken to be as long as this one. The schedule is rebuilt for the new total and set to
        the present step, so that warm-up counts real steps and the decay ends with the last iteration.
        """
        first_step = self.iteration_first_step
        total = first_step + updates * (math.ceil(self.args.num_train_epochs) - iteration)
        self.state.max_steps = min(total, self.args.max_steps) if self.args.max_steps > 0 else total
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = self.state.max_steps
                callback.training_bar.refresh()

        if not (self._created_lr_scheduler and isinstance(self.lr_scheduler, LambdaLR)):
            return  # the user's own scheduler, or one that cannot be set to a step
        per_iteration = self._row_source.lr_schedule == "iteration"
        done = self.state.global_step - (first_step if per_iteration else 0)
        self.lr_scheduler = None
        self.create_scheduler(num_training_steps=updates if per_iteration else self.state.max_steps)
        if done:
            self.lr_scheduler.last_epoch = done - 1
            with warnings.catch_warnings():  # right after resuming, torch misses a call of `optimizer.step()`
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.lr_scheduler.step()
        self.callback_handler.lr_scheduler = self.lr_scheduler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        iteration, batches_done = super()._init_training_state(*args, **kwargs)
        self._resumed_inside = False
        if self._row_source is None or self.state.global_step == 0:
            return iteration, batches_done
        # The parent divides by a constant number of steps per epoch; ours differs from iteration to iteration.
        iteration, first_step = self._row_source.position(self.state.global_step)
        self._resumed_inside = self.state.global_step > first_step
        if self.args.ignore_data_skip:
            return iteration, 0
        return iteration, (self.state.global_step - first_step) * self.args.gradient_accumulation_steps

    def end(self) -> None:
        """Finishes the trackers and destroys the process group: the last call of a script, on every process."""
        outlive_collectives()
        end = getattr(super(), "end", self.accelerator.end_training)  # transformers < 5.18 has none
        end()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self._has_finite_weights():  # so that no good checkpoint makes room for a bad one
            return
        if self._row_source is None:
            super()._save_checkpoint(model, trial)
            return
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with being_written(self, folder):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As in the parent.

        Raises:
            [`DivergedError`]: if weights of this process are not finite.
        """
        if not _internal_call:
            refuse_diverged(weights_of(self), everywhere=False)  # a script may save on its first process alone
        super().save_model(output_dir, _internal_call)

    def _has_finite_weights(self) -> bool:
        """Whether the weights can be kept. Offline, float16 weights that overflow end the run without an error.

        Raises:
            [`DivergedError`]: where other weights, or those of the online loop, are not finite.
        """
        if self._row_source is not None:
            refuse_diverged(weights_of(self))
        elif not is_finite_or_half(weights_of(self)):
            self.control.should_training_stop = True
            return False
        return True


def _refuse_no_rows(arguments: dict[str, Any]) -> None:
    evaluation = arguments.get("eval_dataset")
    parts = {"train_dataset": arguments.get("train_dataset")}
    parts.update(
        {f"eval_dataset[{name!r}]": part for name, part in evaluation.items()}
        if isinstance(evaluation, dict)
        else {"eval_dataset": evaluation}
    )
    for name, rows in parts.items():
        if isinstance(rows, Dataset) and len(rows) == 0:
            raise ValueError(
                f"`{name}` has no rows, so there is nothing to prepare. Look at what filtered or split it, or leave "
                "the argument out."
            )
