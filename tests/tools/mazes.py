"""An environment that can be told to go wrong; imports next to nothing, as it is loaded into processes of its own."""

from __future__ import annotations

import os
import sys
import time

from trl_multiturn.tools import current_rollout


class Maze:
    """So many steps, in whatever direction."""

    reusable = True
    living, most, made, closed = 0, 0, 0, 0

    def __init__(self, size: int = 3):
        self.size = size
        Maze.living, Maze.made = Maze.living + 1, Maze.made + 1
        Maze.most = max(Maze.most, Maze.living)

    def reset(self, fault=None, **row) -> str:
        self.steps, self.fault = 0, fault
        return f"{self.size} steps to go."

    def walk(self, way: str) -> str:
        """
        Takes a step.

        Args:
            way: Where to.
        """
        if way == "abort":
            os.abort()
        if way == "sleep":
            time.sleep(600)
        if way == "raise":
            raise LookupError("there is a wall")
        if way == "modules":
            return " ".join(name for name in ("colorsys", "sndhdr_that_is_not_there") if name in sys.modules)
        if way == "where":
            return f"{os.getpid()} {current_rollout().trajectory_id} {current_rollout().row['name']}"
        self.steps += 1
        return f"step {self.steps}"

    @property
    def done(self) -> bool:
        return self.steps >= self.size

    def get_reward(self) -> float:
        return float(self.done)

    def close(self) -> None:
        Maze.living, Maze.closed = Maze.living - 1, Maze.closed + 1
