#!/usr/bin/env bash
# alfworld 0.4.2 with textworld 1.7.0 (2026-11-28): three things of ALFWorld's text engine that agents and trainers meet.
#
# 1. The task says "put a mug in desk", and prompts published for ALFWorld teach `put mug 1 in/on desk 1`. The engine
#    answers "Nothing happens." to that: the command is `move mug 1 to desk 1` now. A policy that follows an older prompt
#    loses every game in which something is to be put somewhere, without any error.
# 2. To load a game replaces the program's `sys.argv` by ['translate.py', 'domain', 'task'] (fast_downward's `pddl2sas`).
# 3. Every game that is started opens a copy of the engine's library, which `close()` leaves open: a process that plays
#    one game after another by `textworld.start` grows, about a MB a game. `env.load(other_game)` opens none.
#
# The wheel brings ALFWorld's rules and words, so that no data is downloaded: the room here is made up.
#
# Output seen:
#   > go to shelf 1: You arrive at shelf 1. On the shelf 1, you see a mug 1.
#   > take mug 1 from shelf 1: You pick up the mug 1 from the shelf 1.
#   > go to desk 1: You arrive at desk 1. On the desk 1, you see nothing.
#   > put mug 1 in/on desk 1: Nothing happens.
#   > move mug 1 to desk 1: You move the mug 1 to the desk 1.
#   won: True
#   sys.argv: ['translate.py', 'domain', 'task']
#   libraries open after 5 games were started and closed: 5; after 5 more by `load`: 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q alfworld==0.4.2 textworld==1.7.0
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH


PROBLEM = """(define (problem room)
(:domain alfred)
(:objects agent1 - agent loc_bar_0 loc_bar_1 loc_bar_2 - location Shelf_bar_01 Desk_bar_01 - receptacle
  Mug_bar_01 - object ShelfType DeskType FridgeType MicrowaveType SinkBasinType - rtype
  MugType ButterKnifeType KnifeType - otype)
(:init (= (total-cost) 0) (atLocation agent1 loc_bar_2)
  (receptacleAtLocation Shelf_bar_01 loc_bar_0) (receptacleType Shelf_bar_01 ShelfType)
  (receptacleAtLocation Desk_bar_01 loc_bar_1) (receptacleType Desk_bar_01 DeskType)
  (objectType Mug_bar_01 MugType) (inReceptacle Mug_bar_01 Shelf_bar_01) (objectAtLocation Mug_bar_01 loc_bar_0)
  (pickupable Mug_bar_01) (canContain ShelfType MugType) (canContain DeskType MugType))
(:goal (and (exists (?r - receptacle) (exists (?o - object)
  (and (inReceptacle ?o ?r) (objectType ?o MugType) (receptacleType ?r DeskType)))))))"""

grammar = Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", "put a mug in desk")
game = {"pddl_domain": Path(ALFRED_PDDL_PATH).read_text(), "grammar": grammar, "pddl_problem": PROBLEM}
Path("room.tw-pddl").write_text(json.dumps(game))


def start():
    infos = textworld.EnvInfos(feedback=True, won=True)
    return textworld.start("room.tw-pddl", infos, wrappers=[AlfredDemangler()])


env = start()
env.reset()
answers = {}
for command in (
    "go to shelf 1",
    "take mug 1 from shelf 1",
    "go to desk 1",
    "put mug 1 in/on desk 1",
    "move mug 1 to desk 1",
):
    state, _, _ = env.step(command)
    answers[command] = state.feedback.strip()
    print(f"> {command}: {answers[command]}")
print("won:", state["won"])
assert answers["put mug 1 in/on desk 1"] == "Nothing happens." and state["won"], "no longer so"

print("sys.argv:", sys.argv)
assert sys.argv == ["translate.py", "domain", "task"], "no longer so"


def open_libraries():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[5] for line in lines if "libdownward.so" in line})


before = open_libraries()
for _ in range(5):
    env = start()
    env.close()
started = open_libraries() - before
env = start()
for _ in range(5):
    env.load("room.tw-pddl")
print(f"libraries open after 5 games were started and closed: {started}; after 5 more by `load`:", open_libraries() - before)
assert started == 5 and open_libraries() - before == 6, "no longer so"
PYTHON
