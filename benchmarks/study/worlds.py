"""Tasks that tell the methods apart, generated, and small enough for two cores.

Each world is a text environment in which every turn is one word. What is right depends on the errand of the prompt and
on the sign that was read last, and an imperfect teacher mistakes each such pair at its own rate. Where it is wrong in
the majority, a policy that imitates it answers greedily wrong and finds the right way when it samples, as in
`examples/embedded/word_problems.py`.

- `noisy`: long tool outputs between the actions, which tell the next sign and betray whether the last was right.
- `late`: four actions, and one reward at the end.
- `uncertain`: a gamble whose luck the policy does not control, against a certain reward.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


ERRANDS = ("wash", "mend", "paint", "weigh")
SIGNS = ("amber", "blue", "coral", "green", "ivory", "olive")
ACTIONS = ("call", "lift", "open", "push", "turn", "wait")
CALM = ("steady", "normal", "clear", "ready", "level", "even", "quiet", "warm")
ALARM = ("fault", "trace", "abort", "stack", "broken", "retry", "panic", "dump")
ERROR_RATES = (0.1, 0.2, 0.3, 0.35, 0.55, 0.6)
SHOWS = "sign"

# The uncertain world: chances of a win of 1, and certain rewards, by errand
CHANCES = {"wash": 0.35, "mend": 0.4, "paint": 0.6, "weigh": 0.65}
CERTAIN = {"wash": 0.2, "mend": 0.6, "paint": 0.8, "weigh": 0.4}
GAMBLE, KEEP = "gamble", "keep"


@dataclass(frozen=True)
class Rule:
    """What one errand asks for at one sign: the right action, the one it is mistaken for, and how often."""

    right: str
    wrong: str
    error_rate: float


def make_rules(seed: int = 7) -> dict[tuple[str, str], Rule]:
    """The rules of all errands and signs; the same in every run of the study, whatever its seed."""
    rng = random.Random(seed)
    rules = {}
    for errand in ERRANDS:
        rates = rng.sample(ERROR_RATES, len(ERROR_RATES))
        for sign, rate in zip(SIGNS, rates, strict=True):
            right, wrong = rng.sample(ACTIONS, 2)
            rules[errand, sign] = Rule(right, wrong, rate)
    return rules


RULES = make_rules()


@dataclass(frozen=True)
class World:
    """A task.

    Attributes:
        name (`str`): of the results.
        steps (`int`): actions of an episode.
        noise (`int`): words of a tool output beside the sign.
        errands (`int`): how many different ones.
        gamble (`bool`): whether the first action chooses between a gamble and a certain reward; the others then depend
            on the sign alone.
    """

    name: str
    steps: int
    noise: int
    errands: int = 2
    gamble: bool = False

    def rule(self, errand: str, sign: str) -> Rule:
        """What is right at a sign."""
        return RULES[ERRANDS[0] if self.gamble else errand, sign]

    def problems(self, count: int, seed: int, split: str) -> Dataset:
        """Draws prompts; those of `"test"` and `"train"` are never the same errand with the same signs.

        Args:
            count (`int`): how many, different ones.
            seed (`int`): of the draw.
            split (`str`): `"train"` or `"test"`; a quarter of all is for tests.

        Raises:
            `ValueError`: if there are not so many.
        """
        rng = random.Random(f"{self.name} {seed} {split}")
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for _ in range(100 * count):
            if len(rows) == count:
                return Dataset.from_list(list(rows.values()))
            errand, signs = rng.choice(ERRANDS[: self.errands]), [rng.choice(SIGNS) for _ in range(self.steps)]
            held_out = (ERRANDS.index(errand) + sum(map(SIGNS.index, signs))) % 4 == 0
            name = rng.randrange(100)  # so that there are enough different prompts where there are few signs
            if held_out == (split == "test"):
                prompt = [{"role": "user", "content": f"case {name} {errand} {SHOWS} {signs[0]}"}]
                rows[errand, name, *signs] = {"prompt": prompt, "errand": errand, "signs": signs}
        raise ValueError(f"The world {self.name!r} has no {count} different prompts. Ask for fewer.")

    def environment(self) -> Station:
        """One episode's environment; a factory for rollouts."""
        return Station(self)

    def fair_environment(self) -> Station:
        """The same for evaluations: a gamble pays its expected value, so that luck does not blur the result."""
        return Station(self, fair=True)


WORLDS = {
    world.name: world
    for world in (
        World("noisy", steps=3, noise=16),
        World("late", steps=4, noise=2),
        World("uncertain", steps=2, noise=1, errands=4, gamble=True),
        World("tiny", steps=1, noise=0, errands=4),  # decides nothing: for tests of the study itself
    )
}


class Station:
    """One episode: an action per sign, and a reward at the end."""

    def __init__(self, world: World, fair: bool = False):
        self._world, self._fair = world, fair
        self.done = False

    def reset(self, errand: str, signs: list[str], luck: int | None = None, **row: Any) -> None:
        """Starts a case; its luck and its noise come from the rollout's own seed."""
        from trl_multiturn import current_rollout

        self._errand, self._signs, self._step = errand, signs, 0
        self._rng = random.Random(current_rollout().seed if luck is None else luck)
        self._all_right, self._value, self.done = True, 1.0, False

    def act(self, action: str) -> str:
        """
        Takes an action.

        Args:
            action: One word.
        """
        if self._world.gamble and self._step == 0:
            outcome = self._settle(action)
        else:
            right = action == self._world.rule(self._errand, self._signs[self._step]).right
            self._all_right &= right
            outcome = CALM if right or self._world.name == "late" else ALARM
        self._step += 1
        self.done = self._step == self._world.steps
        if self.done:
            return "done"
        words = [self._rng.choice(outcome) for _ in range(self._world.noise)]
        return " ".join([*words, SHOWS, self._signs[self._step]])

    def get_reward(self) -> float:
        """The value of the case where every action was right, else 0; also where it was not brought to its end."""
        return self._value * self._all_right * self.done

    def _settle(self, action: str) -> tuple[str, ...]:
        """Gambles or keeps; anything else loses."""
        chance = CHANCES[self._errand]
        if action == GAMBLE:
            won = self._rng.random() < chance
            self._value = chance if self._fair else float(won)
            return CALM[:1] if won else ALARM[:1]
        self._value = CERTAIN[self._errand] if action == KEEP else 0.0
        return CALM[1:2]


def demonstrations(world: World, count: int, seed: int) -> Dataset:
    """The imperfect teacher's conversations: `messages`, one episode per row."""
    rng = random.Random(f"teacher {world.name} {seed}")
    problems = world.problems(count, seed, "train")
    return Dataset.from_list([{"messages": demonstrate(world, problem, rng)} for problem in problems])


def demonstrate(world: World, problem: dict[str, Any], rng: random.Random) -> list[dict[str, str]]:
    """One episode of the teacher, who gambles in half of the cases."""
    station, messages = world.environment(), list(problem["prompt"])
    station.reset(problem["errand"], problem["signs"], luck=rng.getrandbits(32))
    for step, sign in enumerate(problem["signs"]):
        rule = world.rule(problem["errand"], sign)
        action = rule.wrong if rng.random() < rule.error_rate else rule.right
        if world.gamble and step == 0:
            action = rng.choice((GAMBLE, KEEP))
        messages.append({"role": "assistant", "content": action})
        observation = station.act(action)
        if not station.done:
            messages.append({"role": "user", "content": observation})
    return messages


def texts() -> list[str]:
    """Texts with every word of the worlds as it stands at the start of a turn and inside one."""
    words = (*ERRANDS, *SIGNS, *ACTIONS, *CALM, *ALARM, GAMBLE, KEEP, SHOWS, "case", "done")
    return [*words, " ".join(["", *words])]
