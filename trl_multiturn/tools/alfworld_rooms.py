"""Made-up rooms for ALFWorld's engine: which furniture stands there, what lies where, and the task.

ALFWorld's own rooms are those of AI2-THOR and are not part of its wheel. These follow its tables of what may lie in
what and have its names, its six kinds of task and its goals; where things stand and lie is drawn by lot.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


# Kind of room: furniture, with the fewest and the most of it
FURNITURE: dict[str, dict[str, tuple[int, int]]] = {
    "kitchen": {
        **{"CounterTop": (1, 3), "Cabinet": (2, 6), "Drawer": (1, 5), "Fridge": (1, 1), "Microwave": (1, 1)},
        **{"SinkBasin": (1, 1), "DiningTable": (0, 1), "GarbageCan": (1, 1), "StoveBurner": (1, 4), "Shelf": (0, 3)},
        **{"CoffeeMachine": (1, 1)},
    },
    "bedroom": {
        **{"Bed": (1, 1), "Desk": (1, 2), "Drawer": (1, 5), "Shelf": (0, 4), "SideTable": (1, 2), "Dresser": (0, 1)},
        **{"GarbageCan": (1, 1), "Safe": (0, 1)},
    },
    "living room": {
        **{"Sofa": (1, 1), "ArmChair": (1, 2), "CoffeeTable": (1, 1), "SideTable": (1, 3), "Drawer": (0, 4)},
        **{"Shelf": (0, 4), "Cabinet": (0, 4), "Dresser": (1, 1), "GarbageCan": (1, 1), "Safe": (0, 1)},
    },
    "bathroom": {
        **{"CounterTop": (1, 1), "SinkBasin": (1, 2), "BathtubBasin": (0, 1), "Toilet": (1, 1), "Cabinet": (1, 4)},
        **{"Drawer": (0, 3), "Shelf": (0, 1), "GarbageCan": (1, 1), "ToiletPaperHanger": (1, 1)},
        **{"HandTowelHolder": (1, 2)},
    },
}
THINGS = {
    "kitchen": "Apple Bowl Bread ButterKnife Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce Mug Pan PepperShaker "
    "Plate Pot Potato SaltShaker SoapBottle Spatula Spoon Tomato WineBottle",
    "bedroom": "AlarmClock BaseballBat BasketBall Book Bowl CD CellPhone CreditCard KeyChain Laptop Mug Pen Pencil "
    "Pillow TennisRacket",
    "living room": "Book Box CreditCard KeyChain Laptop Newspaper Pillow Plate RemoteControl Statue TissueBox Vase "
    "Watch WateringCan",
    "bathroom": "Candle Cloth HandTowel SoapBar SoapBottle SprayBottle TissueBox ToiletPaper",
}
LAMPS = {"bedroom": ("DeskLamp", ("Desk", "SideTable")), "living room": ("FloorLamp", ("SideTable", "Dresser"))}

# Kind of task: the rooms that have what it takes
TASK_ROOMS = {
    "pick_and_place_simple": ("kitchen", "bedroom", "living room", "bathroom"),
    "look_at_obj_in_light": ("bedroom", "living room"),
    "pick_clean_then_place_in_recep": ("kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
    "pick_two_obj_and_place": ("kitchen", "bedroom", "living room", "bathroom"),
}
_TREATMENTS = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
# The domain names these itself
_RECEPTACLE_TYPES = ("FridgeType", "MicrowaveType", "SinkBasinType")
_OBJECT_TYPES = ("ButterKnifeType", "KnifeType")


@dataclass(frozen=True)
class Tables:
    """ALFWorld's tables.

    Attributes:
        holds (`dict`): furniture to what may lie in or on it.
        properties (`dict`): `Cleanable`, `Heatable`, `Coolable`, `Toggleable`, `Sliceable` to what is.
        openable (`set`): furniture with a door.
        goals (`dict`): kind of task to its goal in PDDL and its sentences.
    """

    holds: dict[str, set[str]]
    properties: dict[str, set[str]]
    openable: set[str]
    goals: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Room:
    """A room without things.

    Attributes:
        kind (`str`): of [`FURNITURE`].
        furniture (`tuple[str, ...]`): types, one for each piece.
    """

    kind: str
    furniture: tuple[str, ...]

    @classmethod
    def draw(cls, kind: str, number: int, furniture: float = 1.0) -> Room:
        """Room `number` of its kind: always the same.

        Args:
            kind (`str`):
                Of [`FURNITURE`].
            number (`int`):
                Which one.
            furniture (`float`, *optional*, defaults to `1.0`):
                How much of it, as a share of the usual.
        """
        rng = random.Random(f"room {kind} {number}")
        pieces: list[str] = []
        for name, (fewest, most) in FURNITURE[kind].items():
            pieces += [name] * max(min(fewest, 1), round(furniture * rng.randint(fewest, most)))
        return cls(kind, tuple(pieces))


@dataclass(frozen=True)
class HouseTask:
    """A room with things in it, and what is to be done.

    Attributes:
        room (`Room`): where.
        kind (`str`): of [`TASK_ROOMS`].
        target (`str`), receptacle (`str`): the type of the thing, and of what it is to be put into, if anything.
        places (`tuple[tuple[str, int], ...]`): every thing's type, and the piece of furniture in or on which it lies.
    """

    room: Room
    kind: str
    target: str
    receptacle: str
    places: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, room: Room, kind: str, seed: int, tables: Tables, num_things: int = 12) -> HouseTask:
        """Draws what is to be done with what, and where things lie. No task is done from the start."""
        rng = random.Random(f"task {room.kind} {room.furniture} {kind} {seed}")
        choices = _choices(room, kind, tables)
        target = rng.choice(sorted({target for target, _ in choices}))
        receptacle = rng.choice(sorted({place for thing, place in choices if thing == target}))
        others = [thing for thing in THINGS[room.kind].split() if thing != target]
        things = [target] * (2 if kind == "pick_two_obj_and_place" else 1)
        things += [rng.choice(others) for _ in range(num_things - len(things))]
        places = []
        for thing in things:
            fitting = [i for i, piece in enumerate(room.furniture) if thing in tables.holds[piece]]
            if thing == target:
                fitting = [i for i in fitting if room.furniture[i] != receptacle] or fitting
            if fitting:
                places.append((thing, rng.choice(fitting)))
        if room.kind in LAMPS:
            lamp, stands = LAMPS[room.kind]
            places.append((lamp, next(i for i, piece in enumerate(room.furniture) if piece in stands)))
        return cls(room, kind, target, receptacle, tuple(places))

    def sentence(self, tables: Tables, rng: random.Random) -> str:
        """The task in one of ALFWorld's sentences."""
        words = {name: word.lower() for name, word in self._words().items()}
        return rng.choice(tables.goals[self.kind]["templates"]).format(**words)

    def problem(self, tables: Tables) -> str:
        """The task as a problem in PDDL, for ALFWorld's domain."""
        pieces = _numbered(self.room.furniture, _piece_name)
        things = _numbered([thing for thing, _ in self.places], _thing_name)
        places = [f"loc_bar_{i}" for i in range(len(pieces) + 1)]  # the last: the middle of the room
        objects = [("agent1", "agent"), *((place, "location") for place in places)]
        objects += [*((name, "receptacle") for name in pieces), *((name, "object") for name in things)]
        objects += [
            (name, "rtype") for name in sorted({f"{t}Type" for t in self.room.furniture} | {*_RECEPTACLE_TYPES})
        ]
        objects += [(name, "otype") for name in sorted({f"{t}Type" for t, _ in self.places} | {*_OBJECT_TYPES})]
        facts: list[tuple[str, ...]] = [("atLocation", "agent1", places[-1])]
        for name, kind, place in zip(pieces, self.room.furniture, places, strict=False):
            facts += [("receptacleAtLocation", name, place), ("receptacleType", name, f"{kind}Type")]
            facts += [("openable", name)] if kind in tables.openable else []
        for name, (kind, at) in zip(things, self.places, strict=True):
            facts += [("objectType", name, f"{kind}Type"), ("inReceptacle", name, pieces[at])]
            facts += [("objectAtLocation", name, places[at])]
            facts += [(each.lower(), name) for each, kinds in sorted(tables.properties.items()) if kind in kinds]
            facts += [] if kind in tables.properties["Toggleable"] else [("pickupable", name)]
        for kind in sorted(set(self.room.furniture)):
            lying = sorted(tables.holds[kind] & {thing for thing, _ in self.places})
            facts += [("canContain", f"{kind}Type", f"{thing}Type") for thing in lying]
        goal = tables.goals[self.kind]["pddl"].format(**self._words()).replace(" # ", " - ")
        return (
            "(define (problem made_up)\n(:domain alfred)\n(:objects\n"
            + "".join(f"{name} - {kind}\n" for name, kind in objects)
            + ")\n(:init\n(= (total-cost) 0)\n"
            + "".join(f"({' '.join(fact)})\n" for fact in facts)
            + f")\n{goal}"
        )

    def _words(self) -> dict[str, str]:
        return {
            "obj": self.target,
            "recep": self.receptacle,
            "toggle": LAMPS[self.room.kind][0] if self.room.kind in LAMPS else "",
            "mrecep": "",
        }


def _choices(room: Room, kind: str, tables: Tables) -> list[tuple[str, str]]:
    """Things and furniture with which a kind of task can be set in a room: the thing may lie elsewhere, too."""
    things = THINGS[room.kind].split()
    treatment, device = _TREATMENTS.get(kind, (None, None))
    if treatment is not None:
        things = [thing for thing in things if thing in tables.properties[treatment]]
    if kind == "look_at_obj_in_light":
        return [(thing, "") for thing in things if _holders(room, thing, tables)]
    return [
        (thing, place)
        for thing in things
        for place in sorted(set(_holders(room, thing, tables)) - {device})
        if set(_holders(room, thing, tables)) - {place}
    ]


def _holders(room: Room, thing: str, tables: Tables) -> list[str]:
    return [piece for piece in room.furniture if thing in tables.holds[piece]]


def _numbered(kinds: Iterable[str], name: Any) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
        names.append(name(kind, counts[kind]))
    return names


# ALFWorld reads `cabinet 1` out of names with `_bar_` in them, `sinkbasin 1` only out of `Sink_bar_…_bar_SinkBasin`


def _piece_name(kind: str, number: int) -> str:
    base, basin, _ = kind.partition("Basin")
    return f"{base}_bar_{number:02d}" + (f"_bar_{kind}" if basin else "")


def _thing_name(kind: str, number: int) -> str:
    return f"{kind}_bar_{number:02d}"


def rooms_of(split: str, kinds: Sequence[str], num_rooms: int) -> list[tuple[str, int]]:
    """Kind and number of the rooms of a split: those of training are seen again in `valid_seen` alone."""
    first = num_rooms if split == "valid_unseen" else 0
    return [(kind, first + number) for kind in kinds for number in range(num_rooms)]
