"""What a world gives to every arm alike: prompts, tools, limits and sizes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from .worlds import WORLDS, World, demonstrations, texts


EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the same for all arms of a world.

    Attributes:
        demonstrations (`int`): conversations of the teacher that the starting policy imitates.
        hidden_size (`int`): of the policy, which has two layers.
        prompts (`int`): training prompts of an offline arm, and of each iteration of an online one.
        generations (`int`): rollouts per prompt.
        steps (`int`): optimizer steps of an offline arm.
        batch (`int`): trajectories of a step.
        iterations (`int`): of an online arm.
        validation (`int`): prompts on which an online arm chooses its best iteration.
        held_out (`int`): prompts of the evaluation.
        many (`int`): of these, prompts of the evaluations that sample or search.
    """

    demonstrations: int = 4000
    hidden_size: int = 64
    prompts: int = 100
    generations: int = 12
    steps: int = 40
    batch: int = 16
    iterations: int = 3
    validation: int = 100
    held_out: int = 300
    many: int = 60


SIZES = {
    "noisy": Sizes(),
    "late": Sizes(),
    "uncertain": Sizes(),
    "words": Sizes(demonstrations=12000, hidden_size=128, prompts=250),
}
QUICK = Sizes(
    demonstrations=1600, hidden_size=32, prompts=12, steps=2, iterations=1, validation=4, held_out=16, many=2
)


@dataclass(frozen=True)
class Setting:
    """One world at one size.

    Attributes:
        name (`str`): of the world: one of [`worlds.WORLDS`], or `"words"`, the embedded default of the examples.
        sizes ([`Sizes`]): how much.
    """

    name: str
    sizes: Sizes

    @classmethod
    def of(cls, name: str, quick: bool = False) -> Setting:
        """The setting of a world; `quick` shrinks it to what a test affords, and decides nothing."""
        return cls(name, QUICK if quick else SIZES[name])

    @property
    def world(self) -> World | None:
        """The text environment; `None` for the word problems."""
        return WORLDS.get(self.name)

    def problems(self, count: int, seed: int, split: str) -> Dataset:
        """Prompts of a split; those of `"test"` never train."""
        if self.world is not None:
            return self.world.problems(count, seed, split)
        return _embedded().word_problems.make_problems(count, seed, split)

    def demonstrations(self, seed: int) -> Dataset:
        """What the starting policy imitates."""
        count = self.sizes.demonstrations
        if self.world is not None:
            return demonstrations(self.world, count, seed)
        return _embedded().default_job.demonstrations(count, seed)

    def texts(self) -> list[str]:
        """Texts with every word of the world, for its tokenizer."""
        return texts() if self.world is not None else _embedded().word_problems.texts()

    def rollout_config(self, seed: int, **overrides: Any) -> Any:
        """How trajectories are sampled."""
        from trl_multiturn import RolloutConfig

        config = RolloutConfig(
            num_generations=self.sizes.generations,
            previous_policy_generations=self.sizes.generations // 3,
            dialect="fenced",
            max_turn_tokens=80,
            max_trajectory_tokens=256,
            seed=seed,
        )
        if self.world is not None:
            config = replace(config, dialect="action", action_prefix="", max_turn_tokens=4)
            config = replace(config, max_tool_calling_iterations=self.world.steps)
        return replace(config, **overrides)

    def tools(self, fair: bool = False) -> dict[str, Any]:
        """Tools and rewards as [`generate_trajectories`] takes them; `fair` where luck must not blur a result."""
        from trl_multiturn import PythonTool
        from trl_multiturn.verify import math_reward

        if self.world is None:
            return {"tools": [PythonTool()], "reward_funcs": [math_reward]}
        return {"environment_factory": self.world.fair_environment if fair else self.world.environment}

    def pairing(self) -> Any:
        """How pairs are found: at random, or by reward where rewards are more than right and wrong."""
        from trl_multiturn import PairingConfig

        gamble = self.world is not None and self.world.gamble
        return PairingConfig(max_pairs_per_prompt=4, strategy="best_worst" if gamble else "random")

    def unpaired(self) -> Any:
        """Which trajectories train OREO and DQO: balanced, or all where luck would choose them."""
        from trl_multiturn import UnpairedConfig

        gamble = self.world is not None and self.world.gamble
        return UnpairedConfig(strategy="all" if gamble else "balanced")


def _embedded() -> Any:
    """The examples' own modules."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import embedded.default_job
    import embedded.word_problems

    return embedded
