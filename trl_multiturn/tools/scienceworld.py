"""ScienceWorld: experiments of a primary school as text, each game in a Java machine of its own.

Needs the extra `scienceworld` and Java (a JRE of version 8 or later on the path). A machine takes seconds to start and
half a GB; the pool keeps four, and hands them out again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..sandbox.result import ToolFailure


INSTRUCTION = """\
You do an experiment in a text game. Answer every observation with one line that begins with `Action:` and holds one \
command, such as `open door to kitchen`, `go to kitchen`, `look around`, `pick up thermometer`, `focus on water`, \
`use thermometer on water`, `move cup to stove`, `activate stove`, `wait`. Where a command could mean several things, \
you are shown a list; answer with a number of it.

"""
# A Java machine left to itself takes up to a quarter of the memory before it tidies up
JAVA_OPTIONS = "-Xmx400m -XX:+UseSerialGC"
SPLITS = ("train", "dev", "test")


class ScienceWorldEnvironment:
    """One experiment: each turn is a command, the reward is the final score as a share, 0 for a failed one.

    Rows have `task` and `variation`. The score counts steps on the way, so a reward may lie between 0 and 1; a failed
    experiment (a wrong `focus`) has ScienceWorld's score of -100 and the reward 0.

    Args:
        max_steps (`int`, *optional*, defaults to `100`):
            Commands per episode; then it is over.
        simplifications (`str`, *optional*, defaults to `""`):
            ScienceWorld's, e.g. `"easy"`, which opens doors and teleports.
        java_options (`str`, *optional*, defaults to `"-Xmx400m -XX:+UseSerialGC"`):
            Of the Java machine: its heap.

    Raises:
        `ImportError`: if `scienceworld` is not installed.
        [`ToolFailure`]: if Java does not start.
    """

    isolation = "process"
    reusable = True
    max_environments = 4

    def __init__(self, max_steps: int = 100, simplifications: str = "", java_options: str = JAVA_OPTIONS):
        self._max_steps, self._simplifications = max_steps, simplifications
        self._game = _start(max_steps, java_options)
        self._steps = 0
        self.score = 0
        self.done = False

    def reset(self, task: str, variation: int = 0, **row: Any) -> str:
        """Starts an experiment; the task, and what is seen first."""
        self._game.load(task, int(variation), self._simplifications)
        seen, info = self._game.reset()
        self._steps, self.score, self.done = 0, info["score"], False
        return f"{self._game.get_task_description()}\n\n{seen}"

    def act(self, command: str) -> str:
        """
        Plays one command.

        Args:
            command: The command, e.g. `open door to kitchen`.
        """
        if self.done:
            return "The experiment is over."
        self._steps += 1
        # Not the package's own `step`: that lists all possible commands every time, nearly all of its work
        seen: str = self._game.server.step(" ".join(command.split()))
        self.score = round(100 * self._game.server.getScore())
        self.done = bool(self._game.server.getCompleted()) or self.score < 0 or self._steps >= self._max_steps
        return seen

    def get_reward(self) -> float:
        """The score as a share."""
        return max(0, self.score) / 100

    def __del__(self) -> None:
        if hasattr(self, "_game"):
            self._game.close()


def scienceworld_rows(
    tasks: Sequence[str] | None = None,
    split: str = "train",
    variations_per_task: int = 10,
    *,
    seed: int = 0,
    instruction: str = INSTRUCTION,
) -> list[dict[str, Any]]:
    """Rows of ScienceWorld's tasks, as its splits have them; starts a Java machine to ask, and ends it.

    Args:
        tasks (`Sequence[str]`, *optional*):
            Names of tasks, e.g. `"boil"`; all 30 by default.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"dev"` or `"test"`.
        variations_per_task (`int`, *optional*, defaults to `10`):
            Most variations of a task, drawn by lot.
        seed (`int`, *optional*, defaults to `0`):
            Of the draw.
        instruction (`str`, *optional*):
            The user message, to which the first observation is appended.

    Returns:
        `list[dict]`: rows with `prompt`, `task` and `variation`.

    Raises:
        `ValueError`: if a split or a task is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"`split={split!r}` is none of {', '.join(map(repr, SPLITS))}.")
    game, rng = _start(1), random.Random(seed)
    try:
        known = game.get_task_names()
        if unknown := [task for task in tasks or () if task not in known]:
            raise ValueError(f"`tasks` has {unknown[0]!r}, which is none of {', '.join(map(repr, known))}.")
        rows = []
        for task in tasks or known:
            game.load(task, 0)
            variations = sorted(getattr(game, f"get_variations_{split}")())
            for variation in sorted(rng.sample(variations, min(variations_per_task, len(variations)))):
                prompt = [{"role": "user", "content": instruction}]
                rows.append({"prompt": prompt, "task": task, "variation": variation})
        return rows
    finally:
        game.close()


def _start(max_steps: int, java_options: str = JAVA_OPTIONS) -> Any:
    try:
        from scienceworld import ScienceWorldEnv
    except ImportError as error:
        raise ImportError(
            "ScienceWorld's experiments need its package, which is not installed. Run "
            "`pip install trl-multiturn[scienceworld]`, and install Java."
        ) from error
    try:
        with _java_options(java_options):
            return ScienceWorldEnv("", envStepLimit=max_steps)
    except Exception as error:  # py4j's, where Java is missing or gives no port
        raise ToolFailure(
            f"ScienceWorld's Java machine does not start ({type(error).__name__}: {error}). Check that "
            "`java -version` works, and that there is memory for `max_environments` machines of half a GB."
        ) from error


@contextmanager
def _java_options(options: str) -> Iterator[None]:
    """Java machines that are started in the block have these options beside those of the environment variable."""
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{options} {before or ''}".strip()  # the last of two counts
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before
