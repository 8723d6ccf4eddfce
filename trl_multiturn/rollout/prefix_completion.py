"""How good was a step? The policy completes the trajectory from there many times; the share of correct ends tells.

A prefix may end after a turn, whose observation is then part of it, or in the middle of one. Its recorded tokens are
kept as they are; before the policy goes on, the calls in it are run again, so that every completion has an interpreter
(or environment) of its own in the state that the prefix left it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

from datasets import Dataset

from ..engines.engine import Engine, Generation
from ..segments import path
from ..steps import StepDelimiter
from ..trajectory import Trajectory, Verdict
from ..verify.process_rewards import (
    Segment,
    hard_reward,
    prefix_rewards,
    segments,
    soft_reward,
    turn_totals,
)
from .config import RolloutConfig
from .conversation import Conversation
from .episode import Episode
from .loop import generate_trajectories
from .options import RolloutOptions
from .provenance import derive_seed
from .transcript import Transcript


Prompts: TypeAlias = Dataset | Sequence[Mapping[str, Any]]


class Prefix(NamedTuple):
    """The first `length` tokens of a trajectory's completion, up to where the policy is to go on."""

    trajectory: Trajectory
    length: int


def complete_prefixes(
    prefixes: Sequence[Prefix],
    prompts: Prompts,
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    num_completions: int = 20,
    *,
    reward_funcs: Any = None,
    **options: Unpack[RolloutOptions],
) -> list[list[Trajectory]]:
    """Completes prefixes of trajectories, each `num_completions` times. Equal prefixes are completed once.

    Args:
        prefixes (`Sequence[Prefix]`):
            Each must end where the policy samples the next token.
        prompts (`Dataset` or `list[dict]`):
            The rows that the trajectories were rolled out from; `info["prompt_index"]` finds a trajectory's.
        engine ([`Engine`]), tools (`list`, *optional*), config ([`RolloutConfig`], *optional*):
            As in [`generate_trajectories`], with the tools, dialect and template that wrote the trajectories.
        num_completions (`int`, *optional*, defaults to `20`):
            Completions of each prefix (20 in DQO).
        reward_funcs (`Callable`, `str` or list of them, *optional*):
            What decides on the completions.
        **options ([`~trl_multiturn.rollout.options.RolloutOptions`]):
            As in [`generate_trajectories`], e.g. `environment_factory`, `journal`.

    Returns:
        `list[list[Trajectory]]`: for each prefix its completions: whole trajectories that begin with it.
        `info["prefix_tokens"]` is its length, `info["replays_differ"]` the number of its turns whose tools answered
        otherwise than recorded when they were run again.

    Raises:
        `ValueError`: if a prefix does not end where the policy samples, or `config` leaves no room after it.
    """
    if not prefixes:
        return []
    config = RolloutConfig.of(config)
    for number, prefix in enumerate(prefixes):
        _refuse(number, prefix, config)
    keys = [_key(prefix) for prefix in prefixes]
    unique = dict(zip(keys, prefixes, strict=True))
    if "prompt_indices" in options:
        raise TypeError("`prompt_indices` is not for prefixes: each finds its row by its trajectory. Leave it out.")
    options.setdefault("policy", "completion")
    options["prompt_indices"] = list(unique)
    completions = generate_trajectories(
        [prompts[prefix.trajectory.info["prompt_index"]] for prefix in unique.values()],
        engine,
        tools,
        config,
        num_generations=num_completions,
        reward_funcs=reward_funcs,
        player=_PrefixPlayer(unique),
        **options,
    )
    by_key: dict[int, list[Trajectory]] = {key: [] for key in unique}
    for completion in completions:
        by_key[completion.info["prompt_index"]].append(completion)
    return [
        [_completed(completion, prefix) for completion in by_key[key]]
        for key, prefix in zip(keys, prefixes, strict=True)
    ]


def estimate_step_rewards(
    trajectories: Sequence[Trajectory],
    prompts: Prompts,
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    *,
    delimiter: StepDelimiter = "turn",
    estimate: Literal["soft", "hard"] = "soft",
    num_completions: int = 20,
    reward_funcs: Any = None,
    **options: Unpack[RolloutOptions],
) -> list[Trajectory]:
    """The reward of every step of judged trajectories: the labels of a process reward model (M-DPO, example 3).

    Args:
        trajectories (`Sequence[Trajectory]`):
            Judged. The reward of the last step is the trajectory's own verdict.
        prompts, engine, tools, config, num_completions, reward_funcs, **options:
            As in [`complete_prefixes`]; `reward_funcs` (or an environment with a reward) decide.
        delimiter (`str`, *optional*, defaults to `"turn"`):
            What a step is: `"turn"`, `"line"` or `"sentence"`.
        estimate (`str`, *optional*, defaults to `"soft"`):
            `"soft"`: the share of correct completions (eq. 2). `"hard"`: whether there is one (eq. 3).

    Returns:
        `list[Trajectory]`: the same, with `info["step_rewards"]`: `ends` (where each step ends in `completion_ids`)
        and `values` (`None` where nothing could be decided), beside the settings.
    """
    reward = {"soft": soft_reward, "hard": hard_reward}.get(estimate)
    if reward is None:
        raise ValueError(f"`estimate={estimate!r}` is unknown. Choose 'soft' or 'hard'.")
    steps = [segments(trajectory, delimiter, _tokenizer(engine, options)) for trajectory in trajectories]
    prefixes = [
        _prefix(trajectory, step) for trajectory, found in zip(trajectories, steps, strict=True) for step in found[:-1]
    ]
    completed = iter(
        complete_prefixes(
            prefixes, prompts, engine, tools, config, num_completions, reward_funcs=reward_funcs, **options
        )
    )
    settings = {"delimiter": delimiter, "estimate": estimate, "num_completions": num_completions}
    labelled = []
    for trajectory, found in zip(trajectories, steps, strict=True):
        values = [reward(completion.verdict for completion in next(completed)) for _ in found[:-1]]
        values += [reward([trajectory.verdict])] if found else []
        step_rewards = {"ends": [step.stop for step in found], "values": values, **settings}
        labelled.append(replace(trajectory, info={**trajectory.info, "step_rewards": step_rewards}))
    return labelled


def reward_longest_good_prefix(
    trajectories: Sequence[Trajectory],
    prompts: Prompts,
    engine: Engine,
    tools: Sequence[Any] | None = None,
    config: RolloutConfig | None = None,
    *,
    delimiter: StepDelimiter = "turn",
    num_completions: int = 20,
    reward_funcs: Any = None,
    **options: Unpack[RolloutOptions],
) -> list[Trajectory]:
    """DQO's process rewards (arXiv:2410.09302, section 4.4), which its trainer adds to the outcome.

    A correct trajectory of n steps gets 1/n for each. Of an incorrect one the prefixes are completed from the longest
    on; the steps of the first prefix with a correct completion get 1/n each, the others nothing. Trajectories without
    a verdict get nothing.

    Args:
        trajectories (`Sequence[Trajectory]`):
            Judged.
        prompts, engine, tools, config, num_completions, reward_funcs, **options:
            As in [`complete_prefixes`]; `reward_funcs` (or an environment with a reward) decide.
        delimiter (`str`, *optional*, defaults to `"turn"`):
            What a step is: `"turn"`, `"line"` or `"sentence"`.

    Returns:
        `list[Trajectory]`: the same, with `info["turn_rewards"]` where steps are turns, else with
        `info["process_rewards"]`, pairs of a position in `completion_ids` (a step's last token) and a reward.
        [`build_unpaired_dataset`] writes either as a column.
    """
    steps = [segments(trajectory, delimiter, _tokenizer(engine, options)) for trajectory in trajectories]
    good = [
        len(found) if trajectory.verdict is Verdict.CORRECT else 0
        for trajectory, found in zip(trajectories, steps, strict=True)
    ]
    open_counts = {  # how many steps the next prefix of each failed trajectory has
        index: len(found) - 1
        for index, (trajectory, found) in enumerate(zip(trajectories, steps, strict=True))
        if trajectory.verdict is Verdict.INCORRECT and len(found) > 1
    }
    while open_counts:
        prefixes = [_prefix(trajectories[i], steps[i][count - 1]) for i, count in open_counts.items()]
        completed = complete_prefixes(
            prefixes, prompts, engine, tools, config, num_completions, reward_funcs=reward_funcs, **options
        )
        for (index, count), completions in zip(list(open_counts.items()), completed, strict=True):
            if hard_reward(completion.verdict for completion in completions):
                good[index] = count
            if good[index] or count == 1:
                del open_counts[index]
            else:
                open_counts[index] = count - 1
    rewarded = []
    for trajectory, found, count in zip(trajectories, steps, good, strict=True):
        rewards = prefix_rewards(len(found), count)
        if delimiter == "turn":
            extra: dict[str, Any] = {"turn_rewards": turn_totals(found, rewards)}
        else:
            extra = {"process_rewards": [[step.stop - 1, r] for step, r in zip(found, rewards, strict=True)]}
        rewarded.append(replace(trajectory, info={**trajectory.info, **extra}))
    return rewarded


class _PrefixPlayer:
    """Plays trajectories that begin with recorded tokens, found by the number that stands for the prefix."""

    provenance: dict[str, Any] = {"decoding": {"completes": "prefixes"}}

    def __init__(self, prefixes: Mapping[int, Prefix]):
        self.prefixes = prefixes

    async def __call__(self, episode: Episode) -> Trajectory:
        return await episode.play(_opening(self.prefixes[episode.context.prompt_index], episode.conversation))


def _opening(prefix: Prefix, conversation: Conversation) -> Transcript:
    """What a prefix holds, read as the rollout loop read it."""
    trajectory, length = prefix
    logps = trajectory.logps or [0.0] * len(trajectory.completion_ids)

    def sampled(start: int, stop: int) -> Generation:
        return Generation(trajectory.completion_ids[start:stop], logps[start:stop], "stop")

    spans = [span for span in trajectory.turn_spans() if span[0] <= length]
    *answered, (begins, _) = spans
    transcript = Transcript(trajectory.prompt, list(trajectory.prompt_ids))
    turns = [i for i, message in enumerate(trajectory.completion) if message["role"] == "assistant"]
    for (start, stop), place, following in zip(answered, turns, turns[1:], strict=False):
        turn = conversation.read(sampled(start, stop), _read_before(trajectory, start))
        transcript.turns.append((turn, trajectory.completion[place + 1 : following]))
        transcript.malformed += turn.problem is not None
    transcript.completion = list(trajectory.completion[: turns[len(answered)]])
    transcript.completion_ids = trajectory.completion_ids[:begins]
    transcript.action_mask = trajectory.action_mask[:begins]
    transcript.logps = list(logps[:begins])
    transcript.begun = sampled(begins, length)
    transcript.branches = [branch for branch in trajectory.branches if branch[0] < len(trajectory.prompt_ids) + begins]
    return transcript


def _read_before(trajectory: Trajectory, position: int) -> list[int]:
    """All that the policy read before a position of the completion."""
    ids = trajectory.prompt_ids + trajectory.completion_ids
    return [ids[column] for column in path(trajectory.branches, len(trajectory.prompt_ids) + position)]


def _prefix(trajectory: Trajectory, step: Segment) -> Prefix:
    """The prefix that ends with `step`, or with the observation that answers it."""
    return Prefix(trajectory, trajectory.action_mask.index(1, step.stop))


def _key(prefix: Prefix) -> int:
    """A number that stands for the prefix's prompt and tokens; seeds and journals depend on it alone."""
    trajectory, length = prefix
    return derive_seed(
        trajectory.info["prompt_index"], *trajectory.prompt_ids, -1, *trajectory.completion_ids[:length]
    )


def _completed(completion: Trajectory, prefix: Prefix) -> Trajectory:
    trajectory, length = prefix
    own = {"prompt_index": trajectory.info["prompt_index"], "prefix_tokens": length}
    logps = None if trajectory.logps is None else completion.logps
    return replace(completion, logps=logps, info={**completion.info, **own})


def _tokenizer(engine: Engine, options: RolloutOptions) -> Any:
    processing_class = options.get("processing_class") or engine.processing_class
    return getattr(processing_class, "tokenizer", processing_class)


def _refuse(number: int, prefix: Prefix, config: RolloutConfig) -> None:
    trajectory, length = prefix
    mask = trajectory.action_mask
    if "prompt_index" not in trajectory.info:
        raise ValueError(
            f"Prefix {number}: the trajectory has no `info['prompt_index']`, so its row of `prompts` is unknown. Pass "
            "trajectories from `generate_trajectories`."
        )
    if not (0 <= length < len(mask) and mask[length]):
        raise ValueError(
            f"Prefix {number}: the policy samples no token after the first {length} of {len(mask)}, so there is "
            "nothing to complete. End a prefix inside a turn, or after the observation that follows one."
        )
    spans = [start for start, _ in trajectory.turn_spans() if start <= length]
    begun, total = length - spans[-1], len(path(trajectory.branches, len(trajectory.prompt_ids) + length))
    if begun >= config.max_turn_tokens or total >= config.max_trajectory_tokens:
        raise ValueError(
            f"Prefix {number} has {total} tokens, {begun} of them in its last turn: `max_trajectory_tokens="
            f"{config.max_trajectory_tokens}` and `max_turn_tokens={config.max_turn_tokens}` leave no room after it. "
            "Pass the configuration of the rollouts, or raise the limits."
        )
    if len(spans) - 1 > config.max_tool_calling_iterations:
        raise ValueError(
            f"Prefix {number} has {len(spans) - 1} answered turns, more than `max_tool_calling_iterations="
            f"{config.max_tool_calling_iterations}`. Pass the configuration of the rollouts, or raise the limit."
        )
