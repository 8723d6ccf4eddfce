"""TextWorld games, generated and compiled here, played through the rollout loop."""

from __future__ import annotations

import functools

import pytest

from tests.support import byte_tokenizer, needs
from trl_multiturn import StopReason, Verdict
from trl_multiturn.rollout import RolloutConfig, ScriptedEngine, generate_trajectories


needs("textworld")
pytestmark = [pytest.mark.slow, pytest.mark.environments]  # a game compiles in a few seconds

from trl_multiturn.tools.textworld import TextWorldEnvironment, clean_feedback, make_games  # noqa: E402


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    (row,) = make_games(tmp_path_factory.mktemp("games"), [7], num_rooms=2, num_objects=4, quest_length=2)
    return row


def test_the_walkthrough_wins(game):
    environment = TextWorldEnvironment()
    first = environment.reset(**game)
    assert "Admissible commands: " in first and "$$" not in first
    for command in game["walkthrough"]:
        assert not environment.done and environment.get_reward() == 0.0
        observation = environment.act(command)
    assert environment.done and environment.get_reward() == 1.0 and "The End" in observation
    assert environment.act("look") == "The game is over."


def test_an_episode_ends_after_its_steps_and_is_lost(game):
    environment = TextWorldEnvironment(max_steps=3, admissible_commands=False)
    assert "Admissible" not in environment.reset(**game)
    for _ in range(3):
        assert not environment.done
        environment.act("dance")
    assert environment.done and environment.get_reward() == 0.0
    environment.reset(**game)
    assert not environment.done


@pytest.mark.parametrize("command", ["go \x00 north", "\x00", "\x1b[A\x07", "look\n\nlook", "", "é日本", "a" * 5000])
def test_no_text_of_a_policy_crashes_the_engine(game, command):
    """A NUL in a command used to end the training process."""
    environment = TextWorldEnvironment()
    environment.reset(**game)
    assert environment.act(command) and not environment.done
    assert "Admissible commands: " in environment.act("look")


@pytest.mark.parametrize("command", ["save", "Script", "look. save", "look, then transcript", "restart", "quit"])
def test_commands_to_the_engine_write_no_file_and_leave_no_game(game, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = TextWorldEnvironment(max_steps=2)
    environment.reset(**game)
    assert environment.act(command) == "That is not part of the game." and not environment.done
    assert not list(tmp_path.iterdir())
    environment.act(command)
    assert environment.done and environment.get_reward() == 0.0


def test_a_game_is_made_once_and_depends_on_its_seed_alone(game, tmp_path):
    folder = game["game"].rpartition("/")[0]
    size = dict(num_rooms=2, num_objects=4, quest_length=2)
    assert make_games(folder, [7], **size) == [game]
    (again,) = make_games(tmp_path, [7], **size)
    assert again["walkthrough"] == game["walkthrough"]
    assert TextWorldEnvironment().reset(**again) == TextWorldEnvironment().reset(**game)


def test_policies_play_side_by_side(game):
    def script(prompt_text, sampling, session):
        step = prompt_text.count("<|im_start|>assistant") - 1
        wins = session.endswith("/0")
        return f"Action: {game['walkthrough'][step]}" if wins else "Action: dance"

    trajectories = generate_trajectories(
        [game],
        ScriptedEngine(script, byte_tokenizer("qwen2_5")),
        environment_factory=functools.partial(TextWorldEnvironment, max_steps=5),
        config=RolloutConfig(num_generations=8, dialect="action", max_trajectory_tokens=8192),
        progress=False,
    )
    assert [t.verdict for t in trajectories] == [Verdict.CORRECT] + [Verdict.INCORRECT] * 7
    assert [t.num_turns for t in trajectories] == [len(game["walkthrough"])] + [5] * 7
    assert {t.stop_reason for t in trajectories} == {StopReason.ANSWERED}
    assert trajectories[1].completion[1]["content"].startswith("That's not a verb I recognise.")


def test_a_missing_game_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.z8.*make_games"):
        TextWorldEnvironment().reset(game="nowhere.z8")


def test_feedback_is_cleaned():
    status = "\n>                               -= Bedroom =-0/1"
    assert clean_feedback(f"\nYou arrive at loc 12. On the desk, you see a cup.\n\n\n\nTaken.  {status}") == (
        "On the desk, you see a cup.\n\nTaken."
    )
