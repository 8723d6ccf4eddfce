"""`ToolRolloutGenerator`: the callback that turns a TRL trainer's epochs into the iterations of online training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .distributed.main_process import on_main
from .distributed.preemption import Preemption
from .distributed.sharding import weights_of
from .engines.engine import Engine, check_engine, is_engine_factory
from .iteration import run_iteration
from .journal.journal import Journal
from .journal.run_folder import RunFolder
from .online.arguments import refuse_mistakes, refuse_planned_learning_rate, refuse_unknown_choices, warn_of_cut_rows
from .online.diagnosis import diagnose
from .online.endings import alone_in, where_to_look
from .online.held_out import Evaluations, HeldOut
from .online.overlap import (
    RolloutsAhead,
    begin_ahead,
    goes_on_in_turns,
    refuse_impossible_lag,
    refuse_overlap,
    sampling_revision,
)
from .online.plan import Beginning, plan_iteration, refuse_other_layout, set_aside_others, step_layout, write_beginning
from .online.reference import restore_reference
from .online.report import IterationReport, load_reports, load_start, print_iterations
from .online.sampling import refresh, rest, unwrapped_policy
from .online.settings import IterationSettings
from .online.shown import ShownCompletions
from .rollout.config import RolloutConfig
from .rollout.judging import Judge
from .rollout.provenance import fingerprint
from .rows.row_files import load_rows
from .rows.selection import PairingConfig, UnpairedConfig, check_pairing
from .tools.toolbox import Toolset
from .trainer.loop.policy_weights import load_policy_weights, policy_revision, refuse_diverged, save_policy_weights
from .trainer.outcomes.outcome_based import OutcomeBasedTrainer


logger = logging.getLogger(__name__)


class ToolRolloutGenerator(TrainerCallback):
    """Refreshes the training rows and the reference at the start of every epoch: one epoch is one iteration.

    Pass it in `callbacks=` of [`MultiTurnDPOTrainer`], [`MultiTurnKTOTrainer`], [`OREOTrainer`], [`DQOTrainer`],
    [`GroupRegressionTrainer`] or [`StepRegressionTrainer`] instead of a `train_dataset`. At each epoch's start the
    policy rolls out on `prompts` with the tools, the rewards judge, filters and pairing select rows, the reference's
    log-probabilities are computed, and the epoch is exactly one pass over the rows found. Everything an iteration
    finds is kept under `<output_dir>/rollouts`, so that a run that was stopped anywhere goes on where it was (M-DPO
    paper 2409.02392, Algorithm 1).

    Args:
        prompts (`Dataset`):
            `prompt` (messages) and whatever columns the rewards need, such as `answer`.
        tools (`list`, *optional*):
            What the policy may call: [`PythonTool`] and other session tools, or the plain callables that
            [`~trl.GRPOTrainer`] takes.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions with TRL's signature, such as [`math_reward`]. `None` for a row means undecided, and
            undecided rollouts are never trained on. Not needed where the environment has a `get_reward`.
        config ([`RolloutConfig`], *optional*):
            Sampling and limits.
        pairing ([`PairingConfig`] or [`UnpairedConfig`], *optional*):
            Filters, and how rows are chosen. By default that of the trainer's paper: random pairs for M-DPO and M-KTO,
            balanced trajectories for OREO and DQO.
        reference (`str`, *optional*, defaults to `"previous"`):
            `"previous"`: each iteration's reference is the policy that its training starts from, which (without
            `max_policy_lag`) rolled it out (eq. 15, better in domain); `"initial"`: it stays the policy before the
            first iteration (eq. 14).
        history (`str`, *optional*, defaults to `"latest"`):
            `"latest"` trains on the iteration's rows, `"all"` on the rows of all iterations so far.
        prompts_per_iteration (`int`, *optional*):
            Prompts of one iteration, taken in order and from the front again when they run out; the paper's iterations
            use disjoint prompts. By default every iteration uses all.
        eval_prompts (`Dataset`, *optional*):
            Held-out prompts. With them the policy is evaluated before the first and after every iteration, and the
            best one is loaded into the model at the end.
        eval_generations (`int`, *optional*, defaults to `1`):
            Samples per held-out prompt for pass@n and maj@n besides the greedy one; 1 means greedy only.
        max_policy_lag (`int`, *optional*, defaults to `0`):
            How many iterations older than the policy that trains on rows the one may be that rolled them out. 0:
            rollouts and training take turns, as in the paper. 1: while an iteration trains, the next one's prompts are
            rolled out with the policy with which this training began, so that rollouts cost no time of their own where
            engine and tools do not need the trainer's device. The reference stays that of `reference`.
        lr_schedule (`str`, *optional*, defaults to `"run"`):
            One learning-rate schedule over the whole run, or one per `"iteration"` (warm-up included).
        reward_weights (`list[float]`, *optional*):
            Weights of the reward functions.
        environment_factory (`Callable`, *optional*):
            As in [`~trl.GRPOTrainer`].
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest reward of a correct rollout.
        missing_reward (`str`, *optional*, defaults to `"undecided"`):
            What a reward function's `None` means beside the values of others: no verdict, or (`"skip"`) that it does
            not apply to this row.
        reward_timeout_seconds (`float`, *optional*):
            Limit on each call of a reward function; one that is late decides nothing. By default a function that hangs
            holds up no rollout, but the end of the iteration.
        engine ([`Engine`] or `Callable`, *optional*):
            What samples, or a function of the model and the tokenizer that builds it; by default a
            [`TransformersEngine`] on the model that is being trained.
        run_folder (`str`, *optional*):
            Defaults to `<output_dir>/rollouts`.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a few trajectories of each iteration and evaluation ([`CompletionPicker`] chooses), and to
            log them to the trackers of `report_to`.
        num_completions_to_print (`int`, *optional*, defaults to `5`):
            How many, at most.
    """

    def __init__(
        self,
        prompts: Dataset,
        tools: list[Any] | None = None,
        reward_funcs: Callable | list[Callable] | None = None,
        config: RolloutConfig | None = None,
        pairing: PairingConfig | UnpairedConfig | None = None,
        reference: Literal["previous", "initial"] = "previous",
        history: Literal["latest", "all"] = "latest",
        *,
        prompts_per_iteration: int | None = None,
        eval_prompts: Dataset | None = None,
        eval_generations: int = 1,
        max_policy_lag: int = 0,
        lr_schedule: Literal["run", "iteration"] = "run",
        reward_weights: list[float] | None = None,
        environment_factory: Any = None,
        correct_threshold: float = 0.5,
        missing_reward: Literal["undecided", "skip"] = "undecided",
        reward_timeout_seconds: float | None = None,
        engine: Engine | Callable[[Any, Any], Engine] | None = None,
        run_folder: str | None = None,
        log_completions: bool = False,
        num_completions_to_print: int = 5,
    ):
        judge = Judge(reward_funcs or None, reward_weights, correct_threshold, reward_timeout_seconds, missing_reward)
        Toolset(tools, environment_factory)  # raises for what is no tool
        check_pairing(pairing)
        if engine is not None and not is_engine_factory(engine):
            check_engine(engine)
        refuse_mistakes(prompts, eval_prompts, judge, environment_factory, prompts_per_iteration)
        refuse_unknown_choices(reference=reference, history=history, lr_schedule=lr_schedule)
        refuse_impossible_lag(max_policy_lag)
        self.prompts = prompts
        self.held_out = None if eval_prompts is None else HeldOut(eval_prompts, eval_generations)
        self.shown = ShownCompletions(num_completions_to_print) if log_completions else None
        self.prompts_per_iteration = prompts_per_iteration or len(prompts)
        self.lr_schedule = lr_schedule
        self.engine: Any = engine
        self.settings = IterationSettings(
            tools=list(tools or []),
            judge=judge,
            rollout=RolloutConfig.of(config),
            pairing=pairing,
            reference=reference,
            history=history,
            environment_factory=environment_factory,
            max_policy_lag=max_policy_lag,
        )
        self.run_folder = Path(run_folder) if run_folder else None
        self.run = RunFolder(Path(run_folder or "."))  # until the trainer says where
        self._preemption = Preemption()
        self.trainer: Any = None
        self._report: Any = None  # of the iteration under way
        self._ahead: RolloutsAhead | None = None  # the next one's rollouts, or this one's, where they are done
        self._epoch_started = 0.0

    # What the trainer asks (see `trainer.iterative.TrainingRowSource`)

    def attach(self, trainer: Any) -> None:
        """Binds the trainer; its constructor calls this."""
        refuse_planned_learning_rate(trainer)
        warn_of_cut_rows(self.settings.rollout, trainer.args.max_length)
        self.trainer = trainer
        if self.settings.pairing is None:
            unpaired = isinstance(trainer, OutcomeBasedTrainer)
            self.settings.pairing = UnpairedConfig(**trainer.default_sampling) if unpaired else PairingConfig()
        self.settings.choose_filters()
        self.run_folder = self.run_folder or Path(trainer.args.output_dir, "rollouts")
        self.run = RunFolder(self.run_folder)
        if self.engine is None:
            from .engines.transformers.engine import TransformersEngine as engine_class

            self.engine = engine_class(unwrapped_policy(trainer), trainer.processing_class)
        elif is_engine_factory(self.engine):
            self.engine = self.engine(unwrapped_policy(trainer), trainer.processing_class)
        check_engine(self.engine, unwrapped_policy(trainer))
        if self.settings.max_policy_lag:
            refuse_overlap(self.engine, trainer)

    def begin_iteration(self, iteration: int, resumed_inside: bool) -> Dataset:
        """Rolls out, or takes up what the iteration has found already; the rows that its epoch trains on.

        Args:
            iteration (`int`):
                0-based.
            resumed_inside (`bool`):
                Whether a part of the iteration's rows is trained on already, so that they must be on disk.

        Raises:
            `ValueError`: if the iteration was begun with other settings or, before the first step, from another
                policy; or if its rows are gone. Nothing is overwritten.
        """
        folder = self.run.iteration(iteration)
        starting, first_step = policy_revision(weights_of(self.trainer)), self.trainer.state.global_step
        if on_main(lambda: goes_on_in_turns(self.settings, self.run, iteration, (starting, first_step))):
            self.settings.in_turns.add(iteration)
        beginning = Beginning(
            iteration,
            resumed_inside,
            settings=self._described(iteration),
            policy_revision=sampling_revision(self.trainer, self.run, self.settings, iteration, starting),
            first_step=first_step,
            starting_revision=starting,
        )
        plan = on_main(lambda: plan_iteration(folder, beginning))
        if plan.notice and self.trainer.args.process_index == 0 and not self._is_rolled_out(iteration):
            tqdm.write(plan.notice)
        if plan.action == "set aside":
            on_main(lambda: self.run.set_aside(iteration))
            self._ahead = None
        if plan.action == "load":
            rest(self.engine)
            self._report = IterationReport.load(folder.path)
            if resumed_inside:
                refuse_other_layout(self._report, step_layout(self.trainer.args), beginning.first_step)
            rows = load_rows(folder.training_rows)
            self.trainer.row_statistics = self._report.row_statistics or None
            if not resumed_inside:  # the checkpoint is of the iteration before
                restore_reference(self.trainer, self.settings.reference, self.run)
        else:
            rows = self._find_rows(beginning)
        if len(rows) == 0 and self.trainer.args.process_index == 0:
            groups = Journal(folder.journal).read_by_prompt()
            has_tools = bool(self.settings.tools or self.settings.environment_factory)
            logger.warning("%s", diagnose(groups, self._report, self.settings.rollout, has_tools))
        if not resumed_inside:
            self._report.step_layout = step_layout(self.trainer.args)
            self._save(self._report)
        # What an earlier run has come to after these rows need not be what this one will come to
        self._report.last_step = self._report.evaluation = None
        self.trainer.log(self._report.metrics())
        self._epoch_started = time.perf_counter()
        return rows

    def _find_rows(self, beginning: Beginning) -> Dataset:
        """Rolls out what is missing, judges and selects."""
        iteration = beginning.iteration
        begun, samples = write_beginning(beginning, self.settings, self.run)
        see, is_rolled_out = self.shown.see if self.shown else None, self._is_rolled_out(iteration)
        rows, report = run_iteration(
            iteration,
            self._prompts_of,
            self.trainer,
            self.engine,
            self.settings,
            self.run,
            samples,
            see,
            is_rolled_out,
        )
        if self.shown:
            self.shown.log_iteration(self.trainer, iteration)
        report.settings, report.samples = begun.settings, begun.samples
        if is_rolled_out and self._ahead is not None:
            report.overlapped_seconds = self._ahead.seconds
            report.rollout_seconds += self._ahead.waited_seconds
        self._report = report
        self._save(report)
        return rows

    def _is_rolled_out(self, iteration: int) -> bool:
        """Whether this run has rolled an iteration out while the one before was trained."""
        return self._ahead is not None and self._ahead.iteration == iteration

    def _overlaps(self, iteration: int) -> bool:
        """Whether an iteration follows the one that is about to train, and is rolled out beside it."""
        args, last_step = self.trainer.args, self.trainer.iteration_last_step
        ends = iteration >= math.ceil(args.num_train_epochs) or 0 < args.max_steps <= last_step
        return self.settings.max_policy_lag > 0 and not ends

    def _begin_ahead(self, iteration: int) -> RolloutsAhead | None:
        prompts, described = self._prompts_of(iteration), self._described(iteration)
        return begin_ahead(self.trainer, self.engine, self.settings, self.run, iteration, prompts, described)

    def _described(self, iteration: int) -> dict[str, Any]:
        """The settings that decide which rows an iteration finds."""
        return {"prompts": self._prompts_fingerprint(iteration), **self.settings.describe()}

    def position(self, global_step: int) -> tuple[int, int]:
        """`(iteration, its first global step)` of a run that stopped after `global_step` optimizer steps."""
        first_step = 0
        for report in self.reports:
            if report.last_step is None or global_step < report.last_step:
                return report.iteration, report.first_step
            first_step = report.last_step
        # After the last iteration on disk; or inside one whose folder is gone, which `begin_iteration` then tells
        return len(self.reports), first_step

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the run: one folder that all processes share, one run in it, and SIGTERM ends it cleanly."""
        with self._preemption.watched(), alone_in(self.run, self.trainer.args):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around an epoch: SIGTERM waits for the end of the step, whose checkpoint is then written.

        With `max_policy_lag` the next iteration's rollouts run beside the body, and are waited for.
        """
        self._ahead = None
        following = self._report.iteration + 1
        ahead = self._begin_ahead(following) if self._overlaps(following) else None
        with nullcontext() if ahead is None else ahead.running():
            with nullcontext() if self.trainer.args.world_size > 1 else self._preemption.deferred():
                yield  # several processes would stop at different steps
            self._preemption.raise_if_arrived()
            if ahead is not None and not self.trainer.control.should_training_stop:
                ahead.finish(self.trainer.args.ddp_timeout)
                self._ahead = ahead

    def end_iteration(self) -> None:
        """Evaluates the policy after an iteration. Its checkpoint stands, so that a failure here loses no training."""
        if self._report.last_step is not None:
            self._evaluate_after(self._report)
            self._forget_policies(self._report.iteration + 1)

    # The trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.held_out is None:
            return
        if state.global_step > 0:
            ended = [report for report in self.reports if report.last_step == state.global_step]
            if ended:  # stopped right after an iteration, perhaps before its evaluation
                self._evaluate_after(ended[-1])
            return
        self._evaluations(self.held_out).evaluate_start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._preemption.arrived:
            control.should_save, control.should_training_stop = args.save_strategy != SaveStrategy.NO, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        report = self._report
        if state.global_step < self.trainer.iteration_last_step:
            return  # stopped inside the iteration (`max_steps`): its other rows are still to be trained on
        report.train_seconds = time.perf_counter() - self._epoch_started
        report.last_step = state.global_step
        # The policy after this iteration is the one with which the next would start; kept now, in case it is the best.
        policy, following = weights_of(self.trainer), report.iteration + 1
        refuse_diverged(policy)
        sampled_by = sampling_revision(self.trainer, self.run, self.settings, following)
        on_main(lambda: set_aside_others(self.run, following, sampled_by, state.global_step))
        save_policy_weights(policy, self.run.iteration(following).policy)
        self._save(report)
        control.should_save = args.save_strategy != SaveStrategy.NO  # so that a stopped run loses no iteration

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = self.best_policy
        if best is not None and best != len(self.reports):
            load_policy_weights(weights_of(self.trainer), self.run.iteration(best).policy)
            refresh(self.engine, self.trainer, self.run)
        if self.reports:  # a finished run that is started again trains on nothing; what it did can still be seen
            self.trainer.train_dataset = load_rows(self.run.iteration(self.reports[-1].iteration).training_rows)
        if args.process_index == 0:
            print_iterations(self.reports, self.start_evaluation)
            print(where_to_look(self.run, str(args.output_dir)))

    # What the run has found so far

    @property
    def reports(self) -> list[IterationReport]:
        """The reports of the iterations so far."""
        last = math.inf if self._report is None else self._report.iteration  # later ones are of an earlier, longer run
        return [report for report in load_reports(self.run.path) if report.iteration <= last]

    @property
    def start_evaluation(self) -> dict[str, float] | None:
        """The evaluation of the policy before the first iteration."""
        start = load_start(self.run.path)
        return start and start["evaluation"]

    @property
    def best_policy(self) -> int | None:
        """Number of iterations after which the policy was best on the held-out prompts (0 is the initial policy).

        `None` without `eval_prompts`. Of equals the earlier one is best, being nearer to the initial policy. Where the
        reward function or the prompts changed between two starts, evaluations from before are left out.
        """
        if self.held_out is None:
            return None
        return self._evaluations(self.held_out).best(self.reports)

    def _prompts_of(self, iteration: int) -> Dataset:
        """The iteration's share of the prompts: consecutive ones, from the front again when they run out."""
        first = iteration * self.prompts_per_iteration
        return self.prompts.select([(first + i) % len(self.prompts) for i in range(self.prompts_per_iteration)])

    def _prompts_fingerprint(self, iteration: int) -> str:
        return fingerprint(self._prompts_of(iteration).to_list())

    def _evaluate_after(self, report: IterationReport) -> None:
        if self.held_out is not None:
            self._evaluations(self.held_out).evaluate_after(report, self.reports)

    def _evaluations(self, held_out: HeldOut) -> Evaluations:
        return Evaluations(held_out, self.trainer, self.engine, self.settings, self.run, self.shown)

    # Files

    def _save(self, report: IterationReport) -> None:
        on_main(lambda: report.save(self.run.iteration(report.iteration).path))

    def _forget_policies(self, current: int) -> None:
        """Deletes the snapshots that nothing needs any more: all but the last two, the best and the initial one.

        Where rollouts lag, the last three: a run that is taken up draws with the last but one and the one before.
        """
        keep = {*range(current - 1 - self.settings.max_policy_lag, current + 1), self.best_policy, 0}
        on_main(lambda: self.run.forget_policies(current, keep))
