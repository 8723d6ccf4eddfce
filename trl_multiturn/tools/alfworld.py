"""ALFWorld: household tasks as text, in its own engine, with made-up rooms or with its data.

Needs the extra `alfworld`. The wheel brings the rules, the words and the goals. Its rooms are those of AI2-THOR, a
download of their own; without them, `make_alfworld_games` makes rooms up (see `alfworld_rooms`). Results on made-up
rooms are no results on ALFWorld.

```python
rows = make_alfworld_games("games", seeds=range(100))  # or alfworld_games("train"), with ALFWorld's data
trajectories = generate_trajectories(
    rows, engine, environment_factory=ALFWorldEnvironment,
    config=RolloutConfig(dialect="action", max_tool_calling_iterations=40),
)
```
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .alfworld_rooms import TASK_ROOMS, HouseTask, Room, Tables, rooms_of
from .textworld import TextWorldEnvironment


_DEMANGLER = "alfworld.agents.environment.alfred_tw_env"
TASK_TYPES = tuple(TASK_ROOMS)
SPLITS = ("train", "valid_seen", "valid_unseen")

INSTRUCTION = """\
You are in a house and have a task to do. Every turn, answer with one line that begins with `Action:` and holds one \
command. The commands are:
go to (receptacle), open (receptacle), close (receptacle), take (object) from (receptacle), move (object) to \
(receptacle), heat (object) with (receptacle), cool (object) with (receptacle), clean (object) with (receptacle), \
use (object), examine (something), inventory, look
Where a command is not possible, nothing happens.

"""


class ALFWorldEnvironment(TextWorldEnvironment):
    """One ALFWorld game: each turn is a command, the reward is 1 where the task is done.

    Rows carry the path of a `.tw-pddl` game in the column `game`: one of ALFWorld's data, or a made-up one. As is
    customary, the first observation is what is seen and the task, an episode has 40 commands, and a command that is
    not possible is answered by `Nothing happens.`

    Args:
        max_steps (`int`, *optional*, defaults to `40`):
            Commands per episode; then it is over and lost.
        admissible_commands (`bool`, *optional*, defaults to `False`):
            Whether observations list the possible commands.
    """

    preload = (*TextWorldEnvironment.preload, "textworld.envs.pddl", "alfworld.gen", _DEMANGLER)

    def __init__(self, max_steps: int = 40, admissible_commands: bool = False):
        _alfworld()
        super().__init__(max_steps, admissible_commands, wrappers=[_demangler()])
        self._loaded = ""

    def reset(self, game: str, **row: Any) -> str:
        """Starts the game; what is seen, and the task."""
        return super().reset(game, **row)

    def _load(self, game: str) -> None:
        # One engine for all games: each engine opens a copy of its library, which it never closes
        if self._game is not None and game == self._loaded:
            return
        self._loaded = ""
        if self._game is None:
            super()._load(game)
        else:
            self._game.load(game)
        self._quicken(self._game)
        self._loaded = game

    def _quicken(self, game: Any) -> None:
        # The engine spells out every possible command after every step, which is two thirds of its work. Its grammar
        # is private to it: where there is none of that name, games are as they were, and slower
        logic = getattr(game.unwrapped, "_logic", None)
        if logic is not None and hasattr(logic, "grammar"):
            logic.grammar = _WordsOnce(logic.grammar)

    def _opening(self, state: Any) -> str:
        text: str = state["feedback"]
        return text.split("\n\n", 1)[-1] if text.startswith("-=") else text  # the banner


def make_alfworld_games(
    folder: str | Path,
    seeds: Iterable[int],
    split: str = "train",
    *,
    task_types: Sequence[str] = TASK_TYPES,
    num_rooms: int = 20,
    num_things: int = 12,
    furniture: float = 1.0,
    instruction: str = INSTRUCTION,
) -> list[dict[str, Any]]:
    """Makes games up, each about a second's work; one that is in the folder already is not made again.

    The rooms are not those of AI2-THOR: furniture and things are drawn by lot, from ALFWorld's tables of what may lie
    where.

    Args:
        folder (`str` or `Path`):
            Where the games are kept.
        seeds (`Iterable[int]`):
            One game for each; the kinds of task take turns.
        split (`str`, *optional*, defaults to `"train"`):
            `"valid_seen"` has other games in the rooms of `"train"`, `"valid_unseen"` other rooms.
        task_types (`Sequence[str]`, *optional*):
            Of ALFWorld's six (`TASK_TYPES`).
        num_rooms (`int`, *optional*, defaults to `20`):
            Rooms of each kind (kitchen, bedroom, living room, bathroom) in a split.
        num_things (`int`, *optional*, defaults to `12`), furniture (`float`, *optional*, defaults to `1.0`):
            How many things lie in a room, and how much furniture there is, as a share of the usual.
        instruction (`str`, *optional*):
            The user message, to which the game's first observation is appended.

    Returns:
        `list[dict]`: rows for [`generate_trajectories`] with `prompt`, `game` (path), `task_type`, `room` and
        `walkthrough` (the planner's commands, which knows where things lie).

    Raises:
        `ImportError`: if `alfworld` is not installed.
        `ValueError`: if a split or a kind of task is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"`split={split!r}` is none of {', '.join(map(repr, SPLITS))}.")
    if unknown := [kind for kind in task_types if kind not in TASK_TYPES]:
        raise ValueError(f"`task_types` has {unknown[0]!r}, which is none of {', '.join(map(repr, TASK_TYPES))}.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    size = [list(task_types), num_rooms, num_things, furniture]
    name = hashlib.sha256(json.dumps(size).encode()).hexdigest()[:8]
    rows = []
    for seed in seeds:
        path = Path(folder, f"{split}-{name}-{seed}.tw-pddl").absolute()
        if not path.exists():
            kind = task_types[seed % len(task_types)]
            rooms = rooms_of(split, TASK_ROOMS[kind], num_rooms)
            room = Room.draw(*random.Random(f"{split} {seed}").choice(rooms), furniture)
            _write_game(path, HouseTask.draw(room, kind, seed, _tables(), num_things), seed)
        game = json.loads(path.read_text(encoding="utf-8"))
        rows.append(_row(path, instruction, game["task_type"], game["walkthrough"]) | {"room": game["room"]})
    return rows


def alfworld_games(split: str, data: str | Path | None = None, instruction: str = INSTRUCTION) -> list[dict[str, Any]]:
    """The games of ALFWorld's own data, as `alfworld-download` puts them.

    Args:
        split (`str`):
            `"train"`, `"valid_seen"` or `"valid_unseen"`.
        data (`str` or `Path`, *optional*):
            The data's folder; by default the environment variable `ALFWORLD_DATA`.
        instruction (`str`, *optional*):
            The user message, to which the game's first observation is appended.

    Returns:
        `list[dict]`: rows as of [`make_alfworld_games`], without `room`; games that are not solvable are left out.

    Raises:
        `FileNotFoundError`: if there are no games.
    """
    folder = data or os.environ.get("ALFWORLD_DATA")
    rows = []
    for path in sorted(Path(folder).glob(f"*/{split}/**/game.tw-pddl")) if folder else ():
        game = json.loads(path.read_text(encoding="utf-8"))
        task = next((kind for kind in TASK_TYPES if path.parts[-3].startswith(f"{kind}-")), None)
        if game.get("solvable", True) and task is not None:  # movable receptacles and slices: not ALFWorld's games
            rows.append(_row(path.absolute(), instruction, task, game.get("walkthrough") or []))
    if not rows:
        raise FileNotFoundError(
            f"There are no games of ALFWorld's split {split!r} in {folder or 'ALFWORLD_DATA, which is not set'}, so "
            "there is nothing to play. Run `alfworld-download` and set ALFWORLD_DATA to its folder, or make rooms up "
            "with `make_alfworld_games`."
        )
    return rows


def _row(path: Path, instruction: str, task: str, walkthrough: Sequence[str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "game": str(path),
        "task_type": task,
        "walkthrough": list(walkthrough),
    }


def _write_game(path: Path, task: HouseTask, seed: int) -> None:
    """Writes a game in ALFWorld's form with the planner's solution; it is at `path` only when it is complete."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    grammar = Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8")
    game = {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8"),
        "grammar": grammar.replace("UNKNOWN GOAL", task.sentence(_tables(), random.Random(seed))),
        "pddl_problem": task.problem(_tables()),
        "task_type": task.kind,
        "room": task.room.kind,
    }
    partial = path.with_suffix(f".{os.getpid()}.tw-pddl")
    partial.write_text(json.dumps(game), encoding="utf-8")
    walkthrough = _plan(partial)
    partial.write_text(json.dumps({**game, "solvable": True, "walkthrough": walkthrough}), encoding="utf-8")
    os.replace(partial, path)


def _plan(path: Path) -> list[str]:
    import textworld

    wanted = textworld.EnvInfos(policy_commands=True)
    game = textworld.start(str(path), wanted, wrappers=[_demangler()])
    try:
        return list(game.reset()["policy_commands"])
    finally:
        game.close()


def _tables() -> Tables:
    _alfworld()
    from alfworld.gen import constants, goal_library

    return Tables(
        constants.VAL_RECEPTACLE_OBJECTS,
        constants.VAL_ACTION_OBJECTS,
        set(constants.OPENABLE_CLASS_LIST),
        goal_library.gdict,
    )


def _demangler() -> Any:
    """ALFWorld's names of things (`cabinet 1`); a new one for each game, since it holds the game."""
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    return AlfredDemangler()


class _WordsOnce:
    """A game's grammar that spells out each command once: its words depend on what it names, which never changes."""

    def __init__(self, grammar: Any):
        self._grammar = grammar
        self._known: dict[Any, str] = {}

    def derive(self, start: str, context: Any) -> str:
        if start.startswith("#"):  # what is seen, which does change
            return str(self._grammar.derive(start, context))
        key = (start, frozenset((name, entity.id) for name, entity in context["variables"].items()))
        if key not in self._known:
            self._known[key] = self._grammar.derive(start, context)
        return self._known[key]


def _alfworld() -> None:
    try:
        import alfworld.gen  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ALFWorld's games need its package, which is not installed. Run `pip install trl-multiturn[alfworld]`."
        ) from error
