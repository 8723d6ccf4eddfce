"""Evaluating the policy under training on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from ..distributed.main_process import on_main
from ..engines.engine import Engine
from ..evaluation import evaluate_policy, summarize
from ..journal.evaluations import write_evaluation
from ..journal.run_folder import RunFolder
from ..rollout.provenance import fingerprint
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
