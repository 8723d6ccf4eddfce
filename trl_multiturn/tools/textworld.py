"""Text games as environments: TextWorld, and what runs on its engine, such as ALFWorld.

Needs the extra `textworld` (Linux x86-64 and macOS). Games are generated and compiled on this machine; nothing is
downloaded.

```python
rows = make_games("games", seeds=range(20), num_rooms=3, num_objects=6, quest_length=3)
trajectories = generate_trajectories(
    rows, engine, environment_factory=TextWorldEnvironment,
    config=RolloutConfig(dialect="action", max_tool_calling_iterations=40),
)
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..sandbox.result import ToolFailure


INSTRUCTION = """\
You play a text game. Answer every observation with one line that begins with `Action:` and holds one command.

"""

# Commands to the engine rather than to the game, at the start of one or after another: they write files (`save`,
# `script`), or leave the game that is judged
_OF_THE_ENGINE = re.compile(
    r"(?:^|[.,]|\bthen\b)\s*(?:save|restore|script|unscript|transcript|record\w*|replay|restart|quit|q|undo)\b", re.I
)


class TextWorldEnvironment:
    """One game, by TRL's `environment_factory` protocol: each turn is a command, the reward is 1 for a won game.

    Rows carry the path of a game in the column `game`. To change an option pass
    `functools.partial(TextWorldEnvironment, max_steps=20)`.

    Args:
        max_steps (`int`, *optional*, defaults to `40`):
            Commands per episode; then the episode is over and lost (40 in the OREO paper's ALFWorld runs).
        admissible_commands (`bool`, *optional*, defaults to `True`):
            Whether observations list the commands that the game accepts, as ALFWorld agents are given them.
        wrappers (`Sequence`, *optional*):
            TextWorld wrappers around the game, e.g. ALFWorld's `AlfredDemangler` for its `.tw-pddl` games.

    Raises:
        `ImportError`: if `textworld` is not installed.
    """

    # What plays the games is a C library, or (PDDL) a parser with module-global state
    isolation = "process"
    reusable = True
    max_environments = 64
    preload: tuple[str, ...] = ("textworld", "textworld.generator")

    def __init__(self, max_steps: int = 40, admissible_commands: bool = True, wrappers: Sequence[Any] = ()):
        if max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
        _textworld()
        self._max_steps = max_steps
        self._list_commands = admissible_commands
        self._wrappers = list(wrappers)
        self._game: Any = None
        self._steps = 0
        self.won = False
        self.done = False

    def reset(self, game: str, **row: Any) -> str:
        """Starts the game; the objective and what is seen first."""
        if not Path(game).exists():
            raise FileNotFoundError(
                f"The game {game!r} does not exist, so its row cannot be played. Make games with `make_games`, or fix "
                "the column `game`."
            )
        try:
            self._load(game)
            state = self._game.reset()
        except OSError as error:
            self._close()
            raise ToolFailure(f"The game {game!r} does not start: {error}.") from error
        self._steps, self.won, self.done = 0, False, False
        return self._observation(self._opening(state), state)

    def act(self, command: str) -> str:
        """
        Plays one command.

        Args:
            command: The command, e.g. `open box`.
        """
        if self.done:
            return "The game is over."
        self._steps += 1
        # The engine is a C library, in which a NUL ends the line before its line break: it would read on, and crash
        command = "".join(character if character.isprintable() else " " for character in command)
        if _OF_THE_ENGINE.search(command):
            self.done = self._steps >= self._max_steps
            return "That is not part of the game."
        state, _, over = self._game.step(command)
        self.won = bool(state.get("won"))
        self.done = bool(over) or self._steps >= self._max_steps
        return self._observation(state["feedback"], state)

    def get_reward(self) -> float:
        """1.0 for a won game, else 0.0."""
        return float(self.won)

    def _load(self, game: str) -> None:
        self._close()
        textworld = _textworld()
        wanted = textworld.EnvInfos(
            feedback=True, description=True, objective=True, won=True, lost=True, admissible_commands=True
        )
        self._game = textworld.start(game, wanted, wrappers=self._wrappers)

    def _opening(self, state: Any) -> str:
        # The first feedback opens with a banner; games of other engines come without the other two
        first = [text.strip() for text in (state.get("objective"), state.get("description")) if text]
        return "\n\n".join(first) or state["feedback"]

    def _observation(self, text: str, state: Any) -> str:
        text = clean_feedback(text)
        commands = state.get("admissible_commands")
        if not self._list_commands or not commands or self.done:
            return text
        return f"{text}\n\nAdmissible commands: {', '.join(sorted(commands))}"

    def _close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None

    def __del__(self) -> None:
        self._close()


def make_games(
    folder: str | Path,
    seeds: Iterable[int],
    *,
    num_rooms: int = 3,
    num_objects: int = 6,
    quest_length: int = 3,
    instruction: str = INSTRUCTION,
) -> list[dict[str, Any]]:
    """Generates games, each a few seconds' work; one that is in the folder already is not made again.

    Args:
        folder (`str` or `Path`):
            Where the games are kept.
        seeds (`Iterable[int]`):
            One game for each. Disjoint seeds give disjoint games for training and evaluation.
        num_rooms (`int`), num_objects (`int`), quest_length (`int`):
            Size of a game; `quest_length` is the number of commands of its shortest solution.
        instruction (`str`, *optional*):
            The user message, to which the game's first observation is appended.

    Returns:
        `list[dict]`: rows for [`generate_trajectories`] with `prompt`, `game` (path) and `walkthrough` (the commands
        of a solution, for supervised warm starts).
    """
    textworld = _textworld()
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        options = textworld.GameOptions()
        options.seeds, options.nb_rooms, options.nb_objects = seed, num_rooms, num_objects
        options.quest_length = quest_length
        size = hashlib.sha256(json.dumps([num_rooms, num_objects, quest_length]).encode()).hexdigest()[:8]
        path = Path(folder, f"game-{size}-{seed}.z8").absolute()
        if not path.exists():
            _compile(options, path)
        rows.append(
            {
                "prompt": [{"role": "user", "content": instruction}],
                "game": str(path),
                "walkthrough": _walkthrough(path.with_suffix(".json")),
            }
        )
    return rows


def clean_feedback(text: str) -> str:
    """A game's feedback without prompt, status line, runs of blank lines, and ALFWorld's numbers of places."""
    text = re.sub(r"\n>[^\n]*\Z", "", text)
    text = re.sub(r"You arrive at loc \d+\. ?", "", text)
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _compile(options: Any, path: Path) -> None:
    """Makes a game; it is at `path` only when it is complete."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        options.path = str(Path(folder, path.name))
        _textworld().make(options)
        for suffix in (".json", ".z8"):
            os.replace(Path(folder, path.name).with_suffix(suffix), path.with_suffix(suffix))


def _walkthrough(path: Path) -> list[str]:
    return list(_textworld().Game.load(str(path)).metadata["walkthrough"])


def _textworld() -> Any:
    try:
        import textworld
        import textworld.generator
    except ImportError as error:
        raise ImportError(
            "Text games need TextWorld, which is not installed. Run `pip install trl-multiturn[textworld]`."
        ) from error
    return textworld
