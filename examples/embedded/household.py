"""Players of ALFWorld games, who know the planner's solution, but search for things and hesitate on the way."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any


LISTED = "\n\nAdmissible commands: "
# What a player does who hesitates: for the most part it looks around
USELESS = (*["look"] * 4, "inventory")
# Before these commands every player hesitates so often at least: more often than not
RELUCTANCE = {"open cabinet": 0.7}

# Pieces of the games' texts for `tiny_policy.build_tokenizer`: a word with the blank before it and with the number
# after it, so that what is read and what is written are the same tokens; a few phrases are one piece each
PIECES = (
    r"(?:system|user|assistant|tool)\n|Action: [a-z]+(?: to)?|\n+|You are in the middle of a room|Looking quickly "
    r"around you|You arrive at|\. On the|\. The| is closed|You open the| is open\. In it|Your task is to:|"
    r",? you see|,(?: and)? an?(?= )| ?[A-Za-z]+(?: \d+)?|\s|[^\s\w]|\w"
)


class Player:
    """Plays a game by the planner's commands, but searches for the things; now and then does something of no use.

    The planner knows where things lie. A player looks for them in one place after the other, as the room lists them.

    Args:
        walkthrough (`Sequence[str]`):
            The planner's commands.
        hesitation (`float`):
            How often a command of no use is played; before some doors all players hesitate more (`RELUCTANCE`).
        rng (`random.Random`):
            Chooses.
    """

    def __init__(self, walkthrough: Sequence[str], hesitation: float, rng: random.Random):
        self.left = list(walkthrough)
        self.hesitation, self.rng = hesitation, rng
        self.places: list[str] = []
        self.contents: dict[str, list[str]] = {}
        self.here = ""
        self.goal_place = ""  # where the planner is by now
        self.postponed: str | None = None

    def choose(self, seen: str, possible: Sequence[str]) -> str:
        """The next of the possible commands, after what was seen last."""
        self._note(seen)
        command = self.postponed or self._find(possible) or self._go_on(possible)
        share = next((share for start, share in RELUCTANCE.items() if command.startswith(start)), 0.0)
        if self.rng.random() < max(share, self.hesitation):
            self.postponed = command
            return self.rng.choice(USELESS)
        self.postponed = None
        return command

    def _note(self, seen: str) -> None:
        if not self.places:
            self.places = things_in(seen)
        if arrival := re.match(r"You arrive at ([a-z]+ \d+)\.", seen):
            self.here = arrival[1]
        if "On the" in seen or "In it" in seen:
            self.contents[self.here] = things_in(seen)

    def _find(self, possible: Sequence[str]) -> str | None:
        """A command that leads to the thing that is to be taken next; `None` if nothing is, or it is not searched."""
        take = next((command for command in self.left if not command.startswith(("go to", "open"))), "")
        if not take.startswith("take"):
            return None
        kind, planned = take.split()[1], " ".join(take.split()[1:3])
        for command in possible:
            if command.startswith(f"take {kind} ") and self.here != self._put_at():
                taken = " ".join(command.split()[1:3])
                later = self.left[self.left.index(take) + 1 :]
                self.left = [swapped(each, planned, taken) for each in later]
                self.contents[self.here].remove(taken)
                return command
        for place in self.places:
            known = self.contents.get(place)
            if known is None or (place != self._put_at() and any(thing.split()[0] == kind for thing in known)):
                return f"go to {place}" if place != self.here else f"open {place}"
        return None

    def _put_at(self) -> str:
        """Where the thing that is taken next is to be put: what lies there already is done."""
        return next((command.rpartition(" to ")[2] for command in self.left if command.startswith("move")), "")

    def _go_on(self, possible: Sequence[str]) -> str:
        while self.left:
            command = self.left[0]
            if command.startswith("go to"):
                self.goal_place = command
            if command in possible:
                self.left.pop(0)
                return command
            if command.startswith(("go to", "open")) and self.goal_place not in possible:
                self.left.pop(0)  # the player is there, and it is open
            elif self.goal_place in possible:
                return self.goal_place  # back to where the plan goes on
            else:
                break
        opened = [command for command in possible if command.startswith("open")]  # was closed again
        return opened[0] if opened else "look"


def things_in(text: str) -> list[str]:
    """Names of what a text lists: `a mug 1, and a pen 2`."""
    return re.findall(r"\ban? ([a-z]+ \d+)", text)


def names_in(texts: Iterable[str]) -> list[str]:
    """All kinds of things and furniture that texts list, alone and with the numbers 1 to 3, as the pieces they are."""
    kinds = sorted({name.split()[0] for text in texts for name in things_in(text)})
    return [f" {kind}{number}" for kind in kinds for number in ("", " 1", " 2", " 3")]


def begin_alike(model: Any, tokenizer: Any, names: Sequence[str], seed: int) -> None:
    """Lets the embedding of ` mug 1` begin as 0.8 times that of ` mug`, and the rest as what stands for ` 1`.

    A pretrained policy knows that a mug 1 is a mug; one that begins at nothing would learn it for each name alone.
    """
    import torch

    table = model.get_input_embeddings().weight.data
    rng = torch.Generator().manual_seed(seed)
    numbers = {number: table.std() * torch.randn(table.shape[1], generator=rng) for number in ("1", "2", "3")}
    for name in names:
        kind, _, number = name.rpartition(" ")
        if number in numbers:
            whole, alone = (tokenizer(text)["input_ids"][0] for text in (name, kind))
            table[whole] = 0.8 * table[alone] + 0.6 * numbers[number]


def without_hesitation(row: dict[str, Any]) -> dict[str, Any]:
    """An episode without the commands that change nothing, and without what they were answered."""
    idle = tuple(f"Action: {verb}" for verb in ("look", "inventory", "examine"))
    turns = [row["completion"][start : start + 2] for start in range(0, len(row["completion"]), 2)]
    kept = [message for turn in turns if not turn[0]["content"].startswith(idle) for message in turn]
    return {**row, "completion": kept[:-1] if kept and kept[-1]["role"] == "user" else kept}


def renamed(rows: Sequence[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The rows with names in each other's place, of things and of furniture, in each row other ones.

    What follows from what is seen stays as it is, so that to copy names is all that helps in every row.
    """
    furniture = {name.split()[0] for row in rows for name in things_in(_first_line(row))}
    texts = (message["content"] for row in rows for message in row["completion"] if message["role"] == "user")
    things = {name.split()[0] for text in texts for name in things_in(text)} - furniture
    return [_exchange(row, [sorted(furniture), sorted(things)], rng) for row in rows]


def _first_line(row: dict[str, Any]) -> str:
    text: str = row["prompt"][-1]["content"]
    return text[text.index("You are in the middle") :].split("\n")[0]


def _exchange(row: dict[str, Any], groups: Sequence[list[str]], rng: random.Random) -> dict[str, Any]:
    names = {word: other for group in groups for word, other in zip(group, rng.sample(group, len(group)), strict=True)}

    def rename(message: dict[str, str]) -> dict[str, str]:
        return {**message, "content": re.sub(r"[a-z]+", lambda word: names.get(word[0], word[0]), message["content"])}

    return {**row, **{part: [rename(message) for message in row[part]] for part in ("prompt", "completion")}}


def swapped(command: str, one: str, other: str) -> str:
    """A command with two names in each other's place."""
    names = {one: other, other: one}
    return re.sub(rf"{re.escape(one)}\b|{re.escape(other)}\b", lambda match: names[match[0]], command)


async def play(player: Player, game: dict[str, Any], host: Any) -> dict[str, Any]:
    """One episode as a row of messages with its `reward`; the policy does not see which commands are possible."""
    from trl_multiturn.tools.environments import append_observation

    seen, _, possible = (await host.call("reset", game)).partition(LISTED)
    prompt, completion = append_observation(game["prompt"], seen), []
    while True:
        command = player.choose(seen, possible.split(", "))
        completion.append({"role": "assistant", "content": f"Action: {command}"})
        seen, _, possible = (await host.call("act", {"command": command})).partition(LISTED)
        if host.done:
            break
        completion.append({"role": "user", "content": seen})
    return {"prompt": prompt, "completion": completion, "reward": await host.call("get_reward", {})}


def episodes(
    games: Sequence[dict[str, Any]], hesitation: Sequence[float], max_steps: int
) -> list[list[dict[str, Any]]]:
    """For each game the episode of a player for each number in `hesitation`."""
    import functools

    from trl_multiturn import EnvironmentPool
    from trl_multiturn.concurrency import run_coroutine
    from trl_multiturn.tools import ALFWorldEnvironment

    factory = functools.partial(ALFWorldEnvironment, max_steps=max_steps, admissible_commands=True)

    async def play_game(pool: Any, index: int, game: dict[str, Any]) -> list[dict[str, Any]]:
        host = await pool.acquire()  # for all episodes of the game: to start it again is quicker than to load another
        try:
            rows = []
            for number, share in enumerate(hesitation):
                player = Player(game["walkthrough"], share, random.Random(f"{index} {number}"))
                rows.append(await play(player, game, host))
            return rows
        finally:
            await pool.release(host)

    async def play_all(pool: Any) -> list[list[dict[str, Any]]]:
        return list(await asyncio.gather(*(play_game(pool, index, game) for index, game in enumerate(games))))

    with EnvironmentPool(factory, max_environments=4) as pool:
        return run_coroutine(play_all(pool))
