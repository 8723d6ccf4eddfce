"""How good a policy is: pass@1, pass@k and maj@n on held-out prompts, each with a standard error.

Every metric is a mean over prompts of an unbiased per-prompt estimate `x_i`, so its standard error has the closed form
`sqrt(Σ (x_i − mean)² / (m (m − 1)))` over the `m` prompts: prompts are drawn independently, and the spread of `x_i`
already contains the sampling noise inside a prompt. For greedy pass@1, where `x_i` is 0 or 1, this is
`sqrt(p (1 − p) / (m − 1))`. Nothing is bootstrapped.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from .completions.choice import CompletionPicker
from .completions.logger import log_completions as show_completions
from .engines.engine import Engine
from .journal.export import write_trajectories
from .rollout.config import RolloutConfig
from .rollout.guided.estimates import Estimate as Estimate
from .rollout.guided.search_comparison import SearchComparison, compare_search, correctness, elected, samples_for
from .rollout.loop import generate_trajectories
from .rollout.options import RolloutOptions
from .rollout.scoring import Score
from .trajectory import Trajectory, Verdict
from .verify.answers import canonical_answer, final_answer


logger = logging.getLogger(__name__)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples is correct, from `n` samples of which `c` are.

    `1 − C(n − c, k) / C(n, k)` (Chen et al. 2021, arXiv:2107.03374, eq. 1): the share of the subsets of size `k` that
    hold a correct sample.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(answers: Iterable[str | None]) -> list[str]:
    """The answers with the most votes in canonical form: one, several in a tie, none where nothing was answered.

    Answers vote together where they are plainly equal ([`~trl_multiturn.verify.canonical_answer`]).
    """
    votes = Counter(canonical_answer(answer) for answer in answers if answer)
    most = max(votes.values(), default=0)
    return sorted(answer for answer, count in votes.items() if count == most)


@dataclass(frozen=True)
class EvaluationResult:
    """What [`evaluate_policy`] measured.

    Attributes:
        greedy ([`Estimate`]): pass@1 with greedy decoding, or with the `search` that took its place.
        pass_at_k (`dict[int, Estimate]`): unbiased pass@k of the samples, for every `k` up to `n`; empty with `n=1`.
        majority ([`Estimate`], *optional*): maj@n; `None` with `n=1` and where no sample gave an answer to vote with.
        n (`int`): samples per prompt.
        counts (`Counter`): trajectories by verdict (`"correct"`, …) and by stop reason (`"stop:answered"`, …).
        trajectories (`list[Trajectory]`): all of them: one greedy trajectory per prompt, then `n` samples per prompt.
        comparison ([`SearchComparison`], *optional*): the search beside greedy decoding, samples and votes at the same
            number of sampled tokens; `None` without a `search`, and with `n=1`.
    """

    greedy: Estimate
    pass_at_k: dict[int, Estimate]
    majority: Estimate | None
    n: int
    counts: Counter[str]
    trajectories: list[Trajectory] = field(repr=False)
    comparison: SearchComparison | None = None

    @property
    def pass_at_1(self) -> float:
        """Greedy pass@1."""
        return self.greedy.value

    def save(self, path: str | os.PathLike) -> None:
        """Writes the trajectories to a `.jsonl` or `.parquet` file, which `trl-multiturn view` opens."""
        write_trajectories(self.trajectories, Path(path))

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log: `pass@1` (greedy), and with samples `mean@n` (the share of correct samples, which is
        pass@1 under sampling), `pass@k` for powers of two and `n`, `maj@n`; each with `…_se`; and `undecided`."""
        estimates = {"pass@1": self.greedy}
        if self.pass_at_k:
            estimates[f"mean@{self.n}"] = self.pass_at_k[1]
        for k, estimate in self.pass_at_k.items():
            if k > 1 and (k == self.n or k.bit_count() == 1):
                estimates[f"pass@{k}"] = estimate
        if self.majority is not None:
            estimates[f"maj@{self.n}"] = self.majority
        flat: dict[str, float] = {}
        for name, estimate in estimates.items():
            flat |= {name: estimate.value, f"{name}_se": estimate.standard_error}
        if self.comparison is not None:
            flat |= self.comparison.metrics()
        return {**flat, "undecided": float(self.counts[Verdict.UNDECIDED.value])}


def evaluate_policy(
    prompts: Any,
    engine: Engine,
    tools: Sequence[Any] | None = None,
    reward_funcs: Any = None,
    n: int = 1,
    temperature: float = 0.7,
    config: RolloutConfig | None = None,
    answer: Callable[[Trajectory], str | None] | None = None,
    search: Callable[..., list[Trajectory]] | None = None,
    log_completions: bool = False,
    num_completions_to_print: int = 5,
    **options: Unpack[RolloutOptions],
) -> EvaluationResult:
    r"""Evaluates a policy on held-out prompts: pass@1 with greedy decoding and, for `n > 1`, pass@k and maj@n.

    A trajectory without a verdict (the verifier timed out, a tool's machine failed) is not a wrong one: it leaves the
    estimates, and is counted. A prompt enters pass@k with the samples that were decided, if these are `k` at least.

    Args:
        prompts (`Dataset` or `list[dict]`):
            Rows with `prompt` messages and the columns that the reward functions need.
        engine ([`Engine`]):
            The policy.
        tools (`list`, *optional*):
            What it may call.
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            What decides; a reward of 0.5 or more is correct (`correct_threshold` changes that).
        n (`int`, *optional*, defaults to `1`):
            Samples per prompt beside the greedy one; 1 means greedy alone.
        temperature (`float`, *optional*, defaults to `0.7`):
            Of the samples (M-DPO paper, figure 4).
        config ([`RolloutConfig`], *optional*):
            Limits and dialect. Its temperature and number of generations are not used.
        answer (`Callable[[Trajectory], str | None]`, *optional*):
            The answer with which a trajectory votes in maj@n; by default the last `\boxed{}` of its last turn.
        search (`Callable`, *optional*):
            Decodes in place of greedy decoding, and at `config`'s temperature, e.g.
            `functools.partial(value_guided_search, score=value_model.score, beam=7)`. With `n > 1` it is also compared
            with greedy decoding and with as many samples as take its number of sampled tokens (`comparison`).
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print a few trajectories, chosen as by [`CompletionPicker`], and to log them to the runs of W&B
            and trackio that are under way in this process.
        num_completions_to_print (`int`, *optional*, defaults to `5`):
            How many, at most.
        **options ([`~trl_multiturn.rollout.options.RolloutOptions`]):
            As in [`generate_trajectories`], e.g. `environment_factory`, `reward_weights`, `progress`.

    Returns:
        [`EvaluationResult`]
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    if n > 1 and temperature <= 0:
        raise ValueError(
            f"`temperature={temperature}` makes all {n} samples of a prompt the same, so pass@{n} would only repeat "
            "pass@1. Pass a positive temperature, or `n=1`."
        )
    config = RolloutConfig.of(config)

    def labelled(policy: str) -> RolloutOptions:
        return {**options, "policy": options.get("policy", policy)}

    def roll_out(count: int, at: float, label: str, first: int = 0) -> list[Trajectory]:
        own: RolloutOptions = labelled(label)
        if first:
            own = {**own, "sample_offset": first}
        return generate_trajectories(
            prompts,
            engine,
            tools,
            replace(config, temperature=at, temperature_variants=[]),
            reward_funcs=reward_funcs,
            num_generations=count,
            **own,
        )

    if search is None:
        greedy = roll_out(1, 0.0, "evaluation-greedy")
    else:
        own = labelled("evaluation-search")
        greedy = search(prompts, engine, tools, config=config, reward_funcs=reward_funcs, **own)
    samples = roll_out(n, temperature, "evaluation-samples") if n > 1 else []
    result = summarize(greedy, samples, answer)
    if search is not None and samples:
        size = samples_for(greedy, samples)
        more = roll_out(size - n, temperature, "evaluation-samples", first=n) if size > n else []
        decoded = roll_out(1, 0.0, "evaluation-greedy")
        result = replace(result, comparison=_compared(search, greedy, decoded, samples + more, size, answer))
    _warn_about_undecided(result)
    if log_completions:
        picker = CompletionPicker(num_completions_to_print).see_all(result.trajectories)
        show_completions(picker.picks(), "Evaluation", report_to="all", name="eval_completions")
    return result


def _warn_about_undecided(result: EvaluationResult) -> None:
    undecided = result.counts[Verdict.UNDECIDED.value]
    if undecided:
        logger.warning("%d of %d evaluation trajectories have no verdict.", undecided, len(result.trajectories))


def _compared(
    search: Callable[..., list[Trajectory]],
    found: list[Trajectory],
    greedy: list[Trajectory],
    pool: list[Trajectory],
    size: int,
    answer: Callable[[Trajectory], str | None] | None,
) -> SearchComparison:
    """The search beside the first `size` samples of each prompt, weighed by its own score where it has one."""
    told: dict[str, Any] = getattr(search, "keywords", {})
    score: Score | None = told.get("score")
    taken: Counter[int] = Counter()
    samples = []
    for trajectory in pool:
        taken[trajectory.info["prompt_index"]] += 1
        if taken[trajectory.info["prompt_index"]] <= size:
            samples.append(trajectory)
    answer = answer or (lambda trajectory: final_answer(trajectory.completion))
    return compare_search(found, greedy, samples, score, answer, told.get("score_at", "state"))


def summarize(
    greedy: Sequence[Trajectory],
    samples: Sequence[Trajectory] = (),
    answer: Callable[[Trajectory], str | None] | None = None,
) -> EvaluationResult:
    """The estimates from judged trajectories: one greedy one per prompt, and the same number of samples of each.

    Args:
        greedy (`Sequence[Trajectory]`), samples (`Sequence[Trajectory]`, *optional*):
            Judged trajectories, with `info["prompt_index"]`.
        answer (`Callable`, *optional*):
            As in [`evaluate_policy`].
    """
    answer = answer or (lambda trajectory: final_answer(trajectory.completion))
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in samples:
        groups.setdefault(trajectory.info["prompt_index"], []).append(trajectory)
    n = len(next(iter(groups.values()))) if groups else 1
    if any(len(group) != n for group in groups.values()):
        raise ValueError(
            "The prompts have different numbers of samples, so maj@n is not one number. Give each prompt the same."
        )

    verdicts = [[trajectory.verdict for trajectory in group] for group in groups.values()]
    trajectories = [*greedy, *samples]
    counts = Counter(trajectory.verdict.value for trajectory in trajectories)
    counts.update(f"stop:{trajectory.stop_reason.value}" for trajectory in trajectories)
    votes = any(answer(trajectory) for trajectory in samples)
    return EvaluationResult(
        greedy=Estimate.of(correctness([trajectory]) for trajectory in greedy),
        pass_at_k={k: Estimate.of(_pass_at_k(row, k) for row in verdicts) for k in range(1, n + 1)} if groups else {},
        majority=Estimate.of(elected(group, [1.0] * n, answer) for group in groups.values()) if votes else None,
        n=n,
        counts=counts,
        trajectories=trajectories,
    )


def _pass_at_k(verdicts: Sequence[Verdict], k: int) -> float | None:
    counts = Counter(verdicts)
    n = counts[Verdict.CORRECT] + counts[Verdict.INCORRECT]
    return pass_at_k(n, counts[Verdict.CORRECT], k) if n >= k else None
