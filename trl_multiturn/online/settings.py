"""What stays the same from iteration to iteration of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..rollout.config import RolloutConfig
from ..rollout.judging import Judge
from ..rollout.provenance import behavior_of, version_of
from ..rows.selection import PAIRINGS, SAMPLINGS, PairingConfig, UnpairedConfig
from ..rows.strategies import resolve_strategy
from ..tools.base import tool_name, tool_version
from ..tools.toolbox import Toolset
from ..verify.filters import FILTERS, default_filters, resolve_filters
from .report import Samples


@dataclass
class IterationSettings:
    """Tools, judge, limits, choice of rows and of the reference; [`ToolRolloutGenerator`] describes each.

    Attributes:
        tools (`list`): what the policy may call.
        judge ([`Judge`]): what decides on a trajectory.
        rollout ([`RolloutConfig`]): sampling and limits.
        pairing ([`PairingConfig`] or [`UnpairedConfig`], *optional*): chosen by the trainer, once it stands.
        reference, history (`str`): reference policy, and whose rows an epoch trains on.
        environment_factory (`Callable`, *optional*): an environment per trajectory.
        max_policy_lag (`int`): whether rollouts overlap with the training of the iteration before. It decides which
            policy rolls out, which the revisions say, and is therefore no setting that [`describe`] compares.
        in_turns (`set[int]`): iterations that are rolled out with π_t all the same.
    """

    tools: list[Any]
    judge: Judge
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    pairing: PairingConfig | UnpairedConfig | None = None
    reference: Literal["previous", "initial"] = "previous"
    history: Literal["latest", "all"] = "latest"
    environment_factory: Any = None
    max_policy_lag: int = 0
    in_turns: set[int] = field(default_factory=set)

    def lag(self, iteration: int) -> int:
        """How many iterations older than π_t the policy is that iteration t (0-based) rolls out with."""
        return 0 if iteration in self.in_turns else min(self.max_policy_lag, iteration)

    def arguments(self) -> dict[str, Any]:
        """What [`generate_trajectories`] and [`evaluate_policy`] are told alike."""
        return {
            "tools": self.tools,
            "environment_factory": self.environment_factory,
            "config": self.rollout,
            **self.judge.arguments(),
        }

    def samples(self, iteration: int, before: Samples | None = None) -> Samples:
        """Which samples of each prompt each policy draws: the current one the first, the previous one the others.

        Args:
            iteration (`int`):
                0-based; the first has no previous policy, nor has one that rolls out with the first's policy.
            before (`Samples`, *optional*):
                Those of the same iteration before `num_generations` changed. They are kept, and others added.
        """
        explored = self.rollout.explored_generations if iteration > self.lag(iteration) else 0
        samples: Samples = {}
        unused = max((span.stop for spans in (before or {}).values() for span in spans), default=0)
        for policy, count in (("current", self.rollout.num_generations - explored), ("previous", explored)):
            kept = _first(count, (before or {}).get(policy, []))
            lacking = count - sum(map(len, kept))
            samples[policy] = [*kept, *([range(unused, unused + lacking)] if lacking else [])]
            unused += lacking
        return samples

    def complete_judge(self) -> Judge:
        """The judge, which also counts the reward of environments that own one."""
        toolset = Toolset(self.tools, self.environment_factory)
        return self.judge.with_environments(toolset, self.rollout.max_tool_failure_share)

    def choose_filters(self) -> None:
        """Settles the filters of a [`PairingConfig`] that leaves them open: which fit depends on the tools."""
        if isinstance(self.pairing, PairingConfig) and self.pairing.filters is None:
            interpreter = Toolset(self.tools, self.environment_factory).has_interpreter
            self.pairing = replace(self.pairing, filters=list(default_filters(interpreter)))

    def describe(self) -> dict[str, Any]:
        """What decides which rows an iteration finds, as JSON values (see `online.plan` for what of it may change)."""
        pairing: Any = self.pairing
        filters = [
            (f, "") if f in list(FILTERS) else (r.name, behavior_of(r.drops))
            for f, r in zip(pairing.filters, resolve_filters(pairing.filters), strict=True)
        ]
        strategy = pairing.strategy
        if strategy not in [*PAIRINGS, *SAMPLINGS]:
            strategy = behavior_of(resolve_strategy(strategy, {}))
        settings = {
            "tools": {tool_name(tool): tool_version(tool) for tool in self.tools},
            "environment_factory": self.environment_factory and version_of(self.environment_factory),
            **self.judge.describe(),
            "num_generations": self.rollout.num_generations,
            "previous_policy_generations": self.rollout.explored_generations,
            **self.rollout.sampler_settings(),
            "pairing": {"kind": type(pairing).__name__, **vars(pairing), "filters": filters, "strategy": strategy},
            "reference": self.reference,
            "history": self.history,
        }
        return json.loads(json.dumps(settings, default=str))


def _first(count: int, spans: list[range]) -> list[range]:
    """As many of the samples, from the front."""
    kept = []
    for span in spans:
        kept.append(span[: max(count, 0)])
        count -= len(span)
    return [span for span in kept if span]
