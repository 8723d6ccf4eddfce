"""Players of ALFWorld games who know the solution: one plays it, others go astray on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any


LISTED = "\n\nAdmissible commands: "
# What a player who goes astray may do instead of going on
ASTRAY = ("go to", "go to", "go to", "open", "close", "examine", "look", "inventory")


class Player:
    """Plays the planner's commands, and a command of no use now and then.

    Args:
        walkthrough (`Sequence[str]`):
            The planner's commands.
        astray (`float`):
            How often another command is played.
        rng (`random.Random`):
            Chooses.
    """

    def __init__(self, walkthrough: Sequence[str], astray: float, rng: random.Random):
        self.left = list(walkthrough)
        self.goal_place = ""  # where the planner is by now
        self.astray, self.rng = astray, rng

    def choose(self, possible: Sequence[str]) -> str:
        """The next of the possible commands."""
        if self.rng.random() < self.astray:
            kind = self.rng.choice(ASTRAY)
            if useless := [command for command in possible if command.startswith(kind)]:
                return self.rng.choice(useless)
        while self.left:
            command = self.left[0]
            if command.startswith("go to"):
                self.goal_place = command
            if command in possible:
                self.left.pop(0)
                return command
            if command.startswith(("go to", "open")) and self._is_there(possible):
                self.left.pop(0)  # it is done already
            elif self.goal_place in possible:
                return self.goal_place  # back to where the plan goes on
            else:
                break
        opened = [command for command in possible if command.startswith("open")]  # was closed again
        return opened[0] if opened else "look"

    def _is_there(self, possible: Sequence[str]) -> bool:
        return self.goal_place not in possible


async def play(game: dict[str, Any], astray: float, pool: Any, seed: str) -> dict[str, Any]:
    """One episode as a row of messages with its `reward`; the policy does not see which commands are possible."""
    from trl_multiturn.tools.environments import append_observation

    player, host = Player(game["walkthrough"], astray, random.Random(seed)), await pool.acquire()
    try:
        seen, _, possible = (await host.call("reset", game)).partition(LISTED)
        prompt, completion = append_observation(game["prompt"], seen), []
        while True:
            command = player.choose(possible.split(", "))
            completion.append({"role": "assistant", "content": f"Action: {command}"})
            seen, _, possible = (await host.call("act", {"command": command})).partition(LISTED)
            if host.done:
                break
            completion.append({"role": "user", "content": seen})
        return {"prompt": prompt, "completion": completion, "reward": await host.call("get_reward", {})}
    finally:
        await pool.release(host)


def episodes(games: Sequence[dict[str, Any]], astray: Sequence[float], max_steps: int) -> list[list[dict[str, Any]]]:
    """For each game an episode of each player; how far players go astray is in `astray`."""
    import functools

    from trl_multiturn import EnvironmentPool
    from trl_multiturn.concurrency import run_coroutine
    from trl_multiturn.tools import ALFWorldEnvironment

    factory = functools.partial(ALFWorldEnvironment, max_steps=max_steps, admissible_commands=True)

    async def play_all(pool: Any) -> list[list[dict[str, Any]]]:
        async def play_game(index: int, game: dict[str, Any]) -> list[dict[str, Any]]:
            plays = (play(game, share, pool, f"{index} {number}") for number, share in enumerate(astray))
            return list(await asyncio.gather(*plays))

        return list(await asyncio.gather(*(play_game(index, game) for index, game in enumerate(games))))

    with EnvironmentPool(factory, max_environments=4) as pool:
        return run_coroutine(play_all(pool))
