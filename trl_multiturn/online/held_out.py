"""Evaluating the policy under training on held-out prompts, and what a run knows of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from ..distributed.main_process import on_main
from ..distributed.sharding import weights_of
from ..engines.engine import Engine
from ..evaluation import evaluate_policy, summarize
from ..journal.evaluations import write_evaluation
from ..journal.run_folder import RunFolder
from ..rollout.provenance import fingerprint
from ..trainer.loop.policy_weights import policy_revision
from .report import IterationReport, load_start, save_start
from .sampling import ready_to_sample
from .settings import IterationSettings
from .shown import ShownCompletions


@dataclass
class HeldOut:
    """Held-out prompts, and how often each is answered.

    Attributes:
        prompts (`Dataset`): what the policy is not trained on.
        generations (`int`): samples per prompt besides the greedy answer; 1 means greedy only.
    """

    prompts: Dataset
    generations: int = 1

    def key(self, settings: IterationSettings) -> str:
        """A hash of what decides an evaluation beside the policy: only evaluations of one key can be compared."""
        sampler = settings.rollout.sampler_settings()
        return fingerprint([self.prompts.to_list(), self.generations, settings.complete_judge().versions(), sampler])

    def evaluate(
        self,
        trainer: Any,
        engine: Engine,
        settings: IterationSettings,
        run: RunFolder,
        iterations: int,
        shown: ShownCompletions | None = None,
    ) -> dict[str, float]:
        """Evaluates the policy as it is now, after so many iterations; the trajectories are kept in the run's folder.

        With several processes each evaluates its share of the prompts. `shown` logs a few trajectories.
        """
        args = trainer.args
        share = range(args.process_index, len(self.prompts), args.world_size)
        trajectories = []
        with ready_to_sample(engine, trainer, run):
            if share:
                trajectories = evaluate_policy(
                    self.prompts.select(share),
                    engine,
                    **{**settings.arguments(), "prompt_indices": list(share)},
                    n=self.generations,
                    progress=args.process_index == 0 and not args.disable_tqdm,
                ).trajectories
        parts = [(trajectories[: len(share)], trajectories[len(share) :])]
        if args.world_size > 1:
            parts = gather_object(parts)
        greedy, samples = ([t for part in parts for t in part[i]] for i in range(2))
        on_main(lambda: write_evaluation(run, iterations, [*greedy, *samples]))
        if shown is not None:
            shown.log_evaluation(trainer, iterations, [*greedy, *samples])
        return summarize(greedy, samples).metrics()


@dataclass
class Evaluations:
    """The evaluations of a run: made once, kept with the reports, logged under `eval_…`.

    Attributes:
        held_out ([`HeldOut`]): what is asked.
        trainer, engine, settings, run: as in [`HeldOut.evaluate`].
        shown ([`ShownCompletions`], *optional*): logs a few trajectories.
    """

    held_out: HeldOut
    trainer: Any
    engine: Engine
    settings: IterationSettings
    run: RunFolder
    shown: ShownCompletions | None

    def evaluate_start(self) -> None:
        """Evaluates the initial policy, unless that is known."""
        revision, key = policy_revision(weights_of(self.trainer)), self._key()
        known = on_main(lambda: load_start(self.run.path))
        if known is None or (known["policy_revision"], known.get("evaluated_by", key)) != (revision, key):
            evaluation = self._evaluate(0)
            start = {"policy_revision": revision, "evaluation": evaluation, "evaluated_by": key}
            on_main(lambda: save_start(self.run.path, start))
            self.trainer.log(_prefixed(evaluation))

    def evaluate_after(self, report: IterationReport, reports: Sequence[IterationReport]) -> None:
        """Evaluates the policy as it is after an iteration, unless that is known.

        Args:
            report ([`IterationReport`]): of the iteration; the evaluation is written there.
            reports (`Sequence[IterationReport]`): those of the run so far.
        """
        key = self._key()
        if report.evaluation is None or report.evaluated_by not in (None, key):
            started = time.perf_counter()
            known = self._of_unchanged(report, reports, key)
            report.evaluation = known or self._evaluate(report.iteration + 1)
            report.evaluated_by = key
            report.eval_seconds = time.perf_counter() - started
            on_main(lambda: report.save(self.run.iteration(report.iteration).path))
        elif any(_prefixed(report.evaluation).keys() <= entry.keys() for entry in self._logged_now()):
            return
        self.trainer.log(_prefixed(report.evaluation))

    def best(self, reports: Sequence[IterationReport]) -> int | None:
        """Number of iterations after which the policy was best; of equals the earlier one."""
        key, start = self._key(), load_start(self.run.path) or {}
        evaluations = [(start.get("evaluation"), start.get("evaluated_by"))]
        evaluations += [(report.evaluation, report.evaluated_by) for report in reports]
        scores = {
            i: e["pass@1"]
            for i, (e, by) in enumerate(evaluations)
            if e and by in (None, key) and not math.isnan(e["pass@1"])
        }
        return max(scores, key=lambda i: scores[i]) if scores else None

    def _key(self) -> str:
        return self.held_out.key(self.settings)

    def _evaluate(self, iterations: int) -> dict[str, float]:
        return self.held_out.evaluate(self.trainer, self.engine, self.settings, self.run, iterations, self.shown)

    def _of_unchanged(
        self, report: IterationReport, reports: Sequence[IterationReport], key: str
    ) -> dict[str, float] | None:
        """What is known of the policy already, if the iteration has not changed it."""
        before_training = report.starting_revision or report.policy_revision
        if report.trained_rows or policy_revision(weights_of(self.trainer)) != before_training:
            return None
        before = [earlier for earlier in reports if earlier.iteration < report.iteration]
        if before:
            return before[-1].evaluation if before[-1].evaluated_by == key else None
        start = load_start(self.run.path) or {}
        return start.get("evaluation") if start.get("evaluated_by") == key else None

    def _logged_now(self) -> list[dict[str, float]]:
        state = self.trainer.state
        return [entry for entry in state.log_history if entry.get("step") == state.global_step]


def _prefixed(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in evaluation.items()}
