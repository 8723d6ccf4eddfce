"""ALFWorld's engine on made-up rooms: kinds of task, prompt habits, many episodes at once, its data's layout."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import byte_tokenizer, needs
from trl_multiturn import RolloutConfig, ScriptedEngine, Verdict, generate_trajectories
from trl_multiturn.tools.alfworld import (
    INSTRUCTION,
    TASK_TYPES,
    ALFWorldEnvironment,
    _WordsOnce,
    alfworld_games,
    make_alfworld_games,
)
from trl_multiturn.tools.alfworld_rooms import HouseTask, Room, Tables, rooms_of


TABLES = Tables(
    holds={
        **dict.fromkeys(("Bed", "Dresser", "Safe", "GarbageCan"), set()),
        **{"Desk": {"Book", "Pen"}, "Drawer": {"Book", "Pen"}, "Shelf": {"Book"}, "SideTable": {"Pen"}},
    },
    properties={"Toggleable": {"DeskLamp"}, "Cleanable": set()},
    openable={"Drawer"},
    goals={
        "pick_and_place_simple": {
            "pddl": "(:goal (in {obj}Type {recep}Type)))",
            "templates": ["put {obj} in {recep}"],
        }
    },
)


def draw(seed):
    room = Room.draw("bedroom", 3, furniture=0.5)
    return HouseTask.draw(room, "pick_and_place_simple", seed, TABLES, num_things=4)


def test_a_task_is_drawn_from_its_seed_and_not_done_from_the_start():
    assert draw(1) == draw(1) != draw(2)
    for seed in range(30):
        task = draw(seed)
        assert task.target in TABLES.holds[task.receptacle]
        lying = [task.room.furniture[place] for thing, place in task.places if thing == task.target]
        assert lying and task.receptacle not in lying


def test_a_problem_names_everything_that_it_speaks_of():
    task = draw(4)
    problem = task.problem(TABLES)
    objects, facts = re.fullmatch(r".*\(:objects\n(.*?)\)\n\(:init\n(.*?)\)\n\(:goal.*", problem, re.S).groups()
    declared = {line.split()[0] for line in objects.splitlines()}
    spoken_of = {word for fact in facts.splitlines()[1:] for word in fact.strip("()").split()[1:]}
    assert spoken_of <= declared
    assert problem.count("(") == problem.count(")")
    assert task.sentence(TABLES, random.Random(0)) == f"put {task.target} in {task.receptacle}".lower()


def test_unseen_rooms_are_other_rooms():
    train, seen, unseen = (set(rooms_of(split, ["kitchen"], 5)) for split in ("train", "valid_seen", "valid_unseen"))
    assert train == seen and len(unseen) == 5 and not train & unseen


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"split": "test"}, "split='test'"), ({"task_types": ["dance"]}, "has 'dance'.*pick_and_place_simple")],
)
def test_what_there_is_not_is_refused(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        make_alfworld_games(tmp_path, [0], **arguments)


def test_where_the_data_is_missing_the_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="alfworld-download.*make_alfworld_games"):
        alfworld_games("train")


# In the engine


def in_the_engine(test):
    return pytest.mark.slow(pytest.mark.environments(test))


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    needs("alfworld")
    return make_alfworld_games(tmp_path_factory.mktemp("games"), range(6), furniture=0.3, num_things=5)


def play(games, script, **options):
    return generate_trajectories(
        games,
        ScriptedEngine(script, byte_tokenizer("qwen2_5")),
        environment_factory=ALFWorldEnvironment,
        config=RolloutConfig(
            dialect="action",
            max_tool_calling_iterations=40,
            max_trajectory_tokens=32768,
            tool_timeout_seconds=None,
            **options,
        ),
        progress=False,
    )


@in_the_engine
def test_the_planner_wins_all_six_kinds_of_task_at_the_same_time(games):
    assert [row["task_type"] for row in games] == list(TASK_TYPES)

    def script(prompt_text, sampling, session):
        step, index = prompt_text.count("<|im_start|>assistant") - 1, int(session.split("/")[2])
        return f"Action: {games[index]['walkthrough'][step]}"

    trajectories = play(games, script, num_generations=2)
    assert [t.verdict for t in trajectories] == [Verdict.CORRECT] * 12
    assert [t.num_turns for t in trajectories[::2]] == [len(row["walkthrough"]) for row in games]
    seen = r"You are in the middle of a room\. .*, you see a .*\.\n\nYour task is to: .*\."
    assert re.fullmatch(re.escape(INSTRUCTION) + seen, trajectories[0].prompt[0]["content"])


@in_the_engine
def test_a_command_that_is_not_possible_is_answered_as_alfworld_does_and_forty_end_the_episode(games):
    (trajectory,) = play(games[:1], lambda *_: "Action: put book 1 in/on desk 1", num_generations=1)
    assert (trajectory.num_turns, trajectory.verdict, trajectory.stop_reason.name) == (
        40,
        Verdict.INCORRECT,
        "ANSWERED",
    )
    assert {message["content"] for message in trajectory.completion[1::2]} == {"Nothing happens."}


@in_the_engine
def test_games_in_the_layout_of_alfworlds_data_are_found(games, tmp_path):
    for split, row in zip(("train", "valid_unseen", "train"), games, strict=False):
        folder = tmp_path / "json_2.1.1" / split / f"{row['task_type']}-Book-None-Desk-301" / "trial_T2019"
        folder.mkdir(parents=True)
        shutil.copy(row["game"], folder / "game.tw-pddl")
    found = alfworld_games("train", tmp_path)
    assert sorted(row["task_type"] for row in found) == sorted([games[0]["task_type"], games[2]["task_type"]])
    assert {tuple(row["walkthrough"]) for row in found} == {tuple(games[i]["walkthrough"]) for i in (0, 2)}
    assert all(Path(row["game"]).name == "game.tw-pddl" for row in found)


@in_the_engine
def test_spelling_out_each_command_once_changes_no_word(games, monkeypatch):
    def observations():
        environment = ALFWorldEnvironment(admissible_commands=True)
        first = environment.reset(**games[5])
        return [first, *(environment.act(command) for command in games[5]["walkthrough"])]

    quick = observations()
    monkeypatch.setattr(ALFWorldEnvironment, "_quicken", lambda self, game: None)
    assert observations() == quick and "Admissible commands: " in quick[1]


@in_the_engine
def test_textworlds_engine_has_the_grammar_that_is_asked_once(games):
    """Upstream: without it games are played all the same, at a third of the speed."""
    import textworld
    from textworld.envs.pddl.textgen import ContextSensitiveGrammar

    engine = textworld.start(games[0]["game"])
    assert isinstance(engine._logic.grammar, ContextSensitiveGrammar)
    engine._logic.grammar = _WordsOnce(engine._logic.grammar)
    engine.reset()
    assert engine._logic.grammar._known


def test_an_engine_of_another_make_is_played_as_it_is():
    game = SimpleNamespace(unwrapped=SimpleNamespace(_rules=1))
    ALFWorldEnvironment._quicken(ALFWorldEnvironment, game)
    assert vars(game.unwrapped) == {"_rules": 1}


@in_the_engine
def test_an_environment_plays_one_game_after_another_as_if_each_was_its_first(games):
    kept = ALFWorldEnvironment(max_steps=3)
    for game in (games[0], games[2], games[2]):
        new = ALFWorldEnvironment(max_steps=3)
        for environment in (kept, new):
            environment.reset(**game)
        commands = [*game["walkthrough"][:2], "inventory"]
        assert [kept.act(command) for command in commands] == [new.act(command) for command in commands]
    assert not kept.won
