"""Which judged trajectories become training rows: filters, duplicates, pairs, balanced samples.

The selection depends on the trajectories and the seed only, not on the order in which they arrived, so a run that was
interrupted and resumed selects what an undisturbed one does.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..trajectory import Trajectory, Verdict
from ..verify.filters import apply_filters, default_filters, resolve_filters, used_interpreter
from .strategies import Strategy, check_choice, resolve_strategy


@dataclass
class PairingConfig:
    """How winners meet losers. Defaults are those of the M-DPO paper (arXiv:2409.02392, section 3.1).

    It is a plain dataclass, so [`~trl.TrlParser`] reads it from a command line or a YAML file; [`RolloutConfig`] says
    how, beside a trainer's configuration, which has a `seed`, too.
    """

    # Parsers of command lines take a union's second member, if one of the others is `None`
    strategy: Strategy | str | None = field(
        default="random",
        metadata={
            "help": "`random`: a random correct and a random incorrect trajectory of the prompt. `best_worst`: the "
            "highest against the lowest reward, the second highest against the second lowest, and so on. `step`: a "
            "correct and an incorrect trajectory that share their first turns; these become part of the prompt, so "
            "that the pair compares the turns where the two part. `siblings`: any two that do so, whatever they "
            "earned, for regression on the difference. Also the dotted path of a function of your own; in Python the "
            "function, too (see `trl_multiturn.rows.strategies.Strategy`)."
        },
    )
    max_pairs_per_prompt: int = field(
        default=1, metadata={"help": "Most pairs per prompt. A trajectory is in one pair at most."}
    )
    filters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Filters by name (`trl_multiturn.verify.FILTERS`); in Python also `Filter` objects. By default "
            "the paper's: `over_length` and, where the tools include an interpreter, `error_before_answer` and "
            "`turn_without_code`."
        },
    )
    deduplicate: bool = field(
        default=True, metadata={"help": "Keep one of several trajectories of a prompt with the same tokens."}
    )
    min_reward_gap: float = field(
        default=0.0,
        metadata={"help": "Smallest difference in reward between the sides; equal rewards are never a pair."},
    )
    min_shared_turns: int = field(
        default=1, metadata={"help": "Assistant turns that the sides of a `step` or `siblings` pair share at least."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random choices."})

    def __post_init__(self) -> None:
        resolve_filters(self.filters or ())
        resolve_strategy(self.strategy, PAIRINGS)
        if self.max_pairs_per_prompt < 1:
            raise ValueError(f"`max_pairs_per_prompt` must be at least 1, got {self.max_pairs_per_prompt}.")
        if self.min_reward_gap < 0:
            raise ValueError(f"`min_reward_gap` must be at least 0, got {self.min_reward_gap}.")
        if self.min_shared_turns < 0:
            raise ValueError(f"`min_shared_turns` must be at least 0, got {self.min_shared_turns}.")


@dataclass
class UnpairedConfig:
    """Which trajectories become unpaired rows. Defaults are those of the OREO paper (arXiv:2412.16145, appendix A).

    It is a plain dataclass, so [`~trl.TrlParser`] reads it from a command line or a YAML file; [`RolloutConfig`] says
    how, beside a trainer's configuration, which has a `seed`, too.
    """

    strategy: Strategy | str | None = field(
        default="balanced",
        metadata={
            "help": "`balanced`: at most `max_positives` correct and `max_negatives` incorrect trajectories per "
            "prompt, and no more correct than incorrect ones, but one if there is any. `winners`: at most "
            "`max_positives` correct ones (RAFT). `all`: everything that the filters keep."
        },
    )
    max_positives: int = field(default=4, metadata={"help": "Most correct trajectories per prompt."})
    max_negatives: int = field(default=4, metadata={"help": "Most incorrect trajectories per prompt."})
    filters: list[str] = field(
        default_factory=list,
        metadata={"help": "Filters by name (`trl_multiturn.verify.FILTERS`); in Python also `Filter` objects."},
    )
    deduplicate: bool = field(
        default=True, metadata={"help": "Keep one of several trajectories of a prompt with the same tokens."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random choices."})

    def __post_init__(self) -> None:
        resolve_filters(self.filters)
        resolve_strategy(self.strategy, SAMPLINGS)
        if self.max_positives < 1 or self.max_negatives < 1:
            raise ValueError(
                f"`max_positives` and `max_negatives` must be at least 1, got {self.max_positives} and "
                f"{self.max_negatives}."
            )


@dataclass(frozen=True)
class Pair:
    """Two trajectories of one prompt.

    Attributes:
        chosen ([`Trajectory`]), rejected ([`Trajectory`]): the two sides.
        shared_tokens (`int`): completion tokens that belong to the prompt of the pair: 0 but for `strategy="step"` and
            `"siblings"`.
        shared_turns (`int`): assistant turns among them.
    """

    chosen: Trajectory
    rejected: Trajectory
    shared_tokens: int = 0
    shared_turns: int = 0


@dataclass(frozen=True)
class Selection:
    """What was selected, and what became of the rest.

    Attributes:
        pairs (`list[Pair]`): the pairs; empty for an [`UnpairedConfig`].
        trajectories (`list[Trajectory]`): the selected trajectories, correct and incorrect ones of a prompt in turns.
        dropped (`Counter`): trajectories left out before selection, by reason: `"tool_failed"`, `"undecided"`, the
            name of a filter, `"duplicate"`, `"contradictory"` (the same tokens judged both ways).
        reasons (`list[str | None]`): the same per input trajectory; `None` where it took part in the selection.
        unused (`list[str | None]`): per input trajectory that took part and is in no row, why: `"no_correct_one"` or
            `"no_incorrect_one"` among those of its prompt, `"in_no_pair"` (others were, or the rewards are too close),
            `"not_drawn"` (the limits of an [`UnpairedConfig`]); `None` for the others.
        counts (`Counter`): `trajectories`, `correct`, `incorrect`, `undecided`, `kept`, `prompts`,
            `prompts_without_correct`, `prompts_without_incorrect` (both after dropping), `pairs`, `rows`.
    """

    pairs: list[Pair]
    trajectories: list[Trajectory]
    dropped: Counter[str] = field(default_factory=Counter)
    reasons: list[str | None] = field(default_factory=list)
    unused: list[str | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def select(trajectories: Sequence[Trajectory], config: PairingConfig | UnpairedConfig | None = None) -> Selection:
    """Filters, deduplicates and selects judged trajectories; [`PairingConfig`] by default."""
    config = check_pairing(config) or PairingConfig()
    reasons = _drop(trajectories, config)
    groups: dict[Any, list[Trajectory]] = {}
    for trajectory, reason in zip(trajectories, reasons, strict=True):
        group = groups.setdefault(_group_key(trajectory), [])
        if reason is None:
            group.append(trajectory)

    pairs: list[Pair] = []
    chosen: list[Trajectory] = []
    for key in sorted(groups):
        group = sorted(groups[key], key=_arrival_free_key)
        rng = random.Random(f"{config.seed} {key}")  # a string seeds by its SHA-512: equal in every process
        if isinstance(config, UnpairedConfig):
            chosen.extend(_sample(group, config, rng))
        else:
            found = _pair(group, config, rng)
            pairs.extend(found)
            chosen.extend(side for pair in found for side in (pair.chosen, pair.rejected))

    taken = {id(trajectory) for trajectory in chosen}
    unused = [
        None if reason is not None or id(trajectory) in taken else _why_unused(groups[_group_key(trajectory)], config)
        for trajectory, reason in zip(trajectories, reasons, strict=True)
    ]
    counts = Counter(trajectory.verdict.value for trajectory in trajectories)
    counts.update(
        trajectories=len(trajectories),
        kept=sum(map(len, groups.values())),
        prompts=len(groups),
        prompts_without_correct=sum(not _with(Verdict.CORRECT, group) for group in groups.values()),
        prompts_without_incorrect=sum(not _with(Verdict.INCORRECT, group) for group in groups.values()),
        pairs=len(pairs),
        rows=len(pairs) if isinstance(config, PairingConfig) else len(chosen),
    )
    return Selection(pairs, chosen, Counter(r for r in reasons if r is not None), reasons, unused, counts)


def check_pairing(config: Any) -> PairingConfig | UnpairedConfig | None:
    """The configuration, if it is one.

    Raises:
        `TypeError`: saying how a strategy or a filter of one's own is passed.
    """
    if config is None or isinstance(config, (PairingConfig, UnpairedConfig)):
        return config
    remedy = "Pass a `PairingConfig` or an `UnpairedConfig`"
    if callable(config) or isinstance(config, str):
        remedy += f", with a strategy of your own as `PairingConfig(strategy={getattr(config, '__name__', config)})`"
    raise TypeError(f"`pairing` is a {type(config).__name__}, which does not say how rows are chosen. {remedy}.")


def _pair(group: list[Trajectory], config: PairingConfig, rng: random.Random) -> list[Pair]:
    pairs = list(resolve_strategy(config.strategy, PAIRINGS)(group, config, rng))
    for pair in pairs:
        if not isinstance(pair, Pair):
            raise TypeError(
                f"`strategy={config.strategy!r}` returned a {type(pair).__name__} among its pairs. Return a list of "
                "`trl_multiturn.rows.selection.Pair(chosen, rejected)`."
            )
    check_choice(config.strategy, [side for pair in pairs for side in (pair.chosen, pair.rejected)], group)
    return pairs[: config.max_pairs_per_prompt]


def _sample(group: list[Trajectory], config: UnpairedConfig, rng: random.Random) -> list[Trajectory]:
    chosen = list(resolve_strategy(config.strategy, SAMPLINGS)(group, config, rng))
    check_choice(config.strategy, chosen, group)
    return chosen


def select_by_prompt(
    groups: Iterable[Sequence[Trajectory]], config: PairingConfig | UnpairedConfig | None = None
) -> Iterator[tuple[Sequence[Trajectory], Selection]]:
    """[`select`] prompt by prompt, so that memory holds one prompt's trajectories; together it is the same selection.

    What is dropped, deduplicated, paired or balanced is decided within a prompt, and so are the random choices.

    Args:
        groups (`Iterable[Sequence[Trajectory]]`):
            All trajectories of a `prompt_index` together, and the groups in its order; [`Journal.read_by_prompt`]
            brings them so.
        config ([`PairingConfig`] or [`UnpairedConfig`], *optional*):
            As for [`select`].

    Returns:
        Each group with its selection.

    Raises:
        `ValueError`: if a group holds several prompts, or comes out of order.
    """
    last = None
    for group in groups:
        indices = {_group_key(trajectory)[0] for trajectory in group}
        if len(indices) != 1 or (last is not None and min(indices) <= last):
            raise ValueError(
                f"A group with the `prompt_index` {sorted(indices)} came after {last}: rows would depend on the order "
                "of the groups. Pass all trajectories of one prompt in each group, with rising `prompt_index`."
            )
        last = min(indices)
        yield group, select(group, config)


def _drop(trajectories: Sequence[Trajectory], config: PairingConfig | UnpairedConfig) -> list[str | None]:
    filters = default_filters(used_interpreter(trajectories)) if config.filters is None else config.filters
    reasons = apply_filters(trajectories, filters).reasons
    kept = sorted(
        (i for i, reason in enumerate(reasons) if reason is None), key=lambda i: _arrival_free_key(trajectories[i])
    )
    same: dict[Any, list[int]] = {}
    for i in kept:
        same.setdefault((_group_key(trajectories[i]), tuple(trajectories[i].completion_ids)), []).append(i)
    for copies in same.values():
        if len({trajectories[i].verdict for i in copies}) > 1:
            # the same tokens won and lost: an unsteady verifier, whose pair would push them both ways
            for i in copies:
                reasons[i] = "contradictory"
        elif config.deduplicate:
            for i in copies[1:]:
                reasons[i] = "duplicate"
    return reasons


def _why_unused(group: Sequence[Trajectory], config: PairingConfig | UnpairedConfig) -> str:
    """Why a trajectory that took part is in no row; `group` are those of its prompt that did."""
    if isinstance(config, UnpairedConfig):
        return "not_drawn"
    if not _with(Verdict.CORRECT, group):
        return "no_correct_one"
    return "in_no_pair" if _with(Verdict.INCORRECT, group) else "no_incorrect_one"


def _group_key(trajectory: Trajectory) -> tuple[int, tuple[int, ...]]:
    # Both: two rows of a dataset may ask the same question with different gold answers, and the index of a row means
    # another prompt in another iteration's dataset.
    return trajectory.info.get("prompt_index", -1), tuple(trajectory.prompt_ids)


def _arrival_free_key(trajectory: Trajectory) -> tuple[Any, ...]:
    return trajectory.completion_ids, trajectory.action_mask, json.dumps(trajectory.info, sort_keys=True, default=str)


def _with(verdict: Verdict, group: Iterable[Trajectory]) -> list[Trajectory]:
    return [trajectory for trajectory in group if trajectory.verdict is verdict]


def terminal_reward(trajectory: Trajectory) -> float:
    """The reward; where only a verdict is known (rows judged elsewhere), 1.0 for a correct one and 0.0 otherwise."""
    return float(trajectory.verdict is Verdict.CORRECT) if trajectory.reward is None else trajectory.reward


def _wide_enough(chosen: Trajectory, rejected: Trajectory, config: PairingConfig) -> bool:
    gap = terminal_reward(chosen) - terminal_reward(rejected)
    return gap > 0 and gap >= config.min_reward_gap


def _random_pairs(group: list[Trajectory], config: PairingConfig, rng: random.Random) -> list[Pair]:
    winners, losers = _with(Verdict.CORRECT, group), _with(Verdict.INCORRECT, group)
    rng.shuffle(winners)
    rng.shuffle(losers)
    pairs = []
    for winner in winners:
        loser = next((loser for loser in losers if _wide_enough(winner, loser, config)), None)
        if loser is not None:
            losers.remove(loser)
            pairs.append(Pair(winner, loser))
    return pairs


def _best_worst_pairs(group: list[Trajectory], config: PairingConfig, rng: random.Random) -> list[Pair]:
    ranked = list(group)
    rng.shuffle(ranked)  # equal rewards are ranked at random: sorting is stable
    ranked.sort(key=terminal_reward, reverse=True)
    pairs = zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
    return [Pair(best, worst) for best, worst in pairs if _wide_enough(best, worst, config)]


def _step_pairs(group: list[Trajectory], config: PairingConfig, rng: random.Random) -> list[Pair]:
    sides = itertools.product(_with(Verdict.CORRECT, group), _with(Verdict.INCORRECT, group))
    return _parting_pairs([pair for pair in sides if _wide_enough(*pair, config)], config, rng)


def _sibling_pairs(group: list[Trajectory], config: PairingConfig, rng: random.Random) -> list[Pair]:
    """Not chosen by what they earned; the side that earned more is the chosen one."""
    sides = (sorted(pair, key=terminal_reward, reverse=True) for pair in itertools.combinations(group, 2))
    return _parting_pairs([(better, worse) for better, worse in sides], config, rng)


def _parting_pairs(
    candidates: list[tuple[Trajectory, Trajectory]], config: PairingConfig, rng: random.Random
) -> list[Pair]:
    """Those that share enough turns, the longest common way first; each trajectory once."""
    parting = [Pair(one, other, *reversed(_shared_prefix(one, other))) for one, other in candidates]
    parting = [pair for pair in parting if pair.shared_turns >= config.min_shared_turns]
    rng.shuffle(parting)
    parting.sort(key=lambda pair: pair.shared_turns, reverse=True)
    used: set[int] = set()
    pairs = []
    for pair in parting:
        if used.isdisjoint((id(pair.chosen), id(pair.rejected))):
            used.update((id(pair.chosen), id(pair.rejected)))
            pairs.append(pair)
    return pairs


PAIRINGS: dict[str, Strategy] = {
    "random": _random_pairs,
    "best_worst": _best_worst_pairs,
    "step": _step_pairs,
    "siblings": _sibling_pairs,
}
"""Every strategy of a [`PairingConfig`] by name."""


def _shared_prefix(one: Trajectory, other: Trajectory) -> tuple[int, int]:
    """Number of whole turns, and of tokens before the next turn, that two trajectories share.

    Both must act after the prefix: what follows it is what the pair compares.
    """
    shared = (0, 0)
    for turn, ((start, _), (other_start, _)) in enumerate(zip(one.turn_spans(), other.turn_spans(), strict=False)):
        same_tokens = one.completion_ids[:start] == other.completion_ids[:other_start]
        if not same_tokens or one.action_mask[:start] != other.action_mask[:other_start]:
            break
        shared = (turn, start)
    return shared


def _balanced(group: list[Trajectory], config: UnpairedConfig, rng: random.Random) -> list[Trajectory]:
    winners, losers = _shuffled_sides(group, rng)
    losers = losers[: config.max_negatives]
    return _in_turns(winners[: min(config.max_positives, max(len(losers), 1))], losers)


def _winners(group: list[Trajectory], config: UnpairedConfig, rng: random.Random) -> list[Trajectory]:
    return _shuffled_sides(group, rng)[0][: config.max_positives]


def _all(group: list[Trajectory], config: UnpairedConfig, rng: random.Random) -> list[Trajectory]:
    return _in_turns(*_shuffled_sides(group, rng))


SAMPLINGS: dict[str, Strategy] = {"balanced": _balanced, "winners": _winners, "all": _all}
"""Every strategy of an [`UnpairedConfig`] by name."""


def _shuffled_sides(group: list[Trajectory], rng: random.Random) -> tuple[list[Trajectory], list[Trajectory]]:
    winners, losers = _with(Verdict.CORRECT, group), _with(Verdict.INCORRECT, group)
    rng.shuffle(winners)
    rng.shuffle(losers)
    return winners, losers


def _in_turns(one: list[Trajectory], other: list[Trajectory]) -> list[Trajectory]:
    """One, other, one, other, …: KTO reads its rows in order, and a batch of one label has nothing to compare."""
    short = min(len(one), len(other))
    mixed = [trajectory for both in zip(one[:short], other[:short], strict=True) for trajectory in both]
    return mixed + one[short:] + other[short:]
