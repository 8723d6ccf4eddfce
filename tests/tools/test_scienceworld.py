"""ScienceWorld in its Java machine: a solution scores, a wrong focus fails, machines are handed out again."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.support import needs
from trl_multiturn.tools.scienceworld import ScienceWorldEnvironment, scienceworld_rows


needs("scienceworld")
pytestmark = [
    pytest.mark.slow,  # Java starts in seconds
    pytest.mark.environments,
    pytest.mark.skipif(
        shutil.which("java") is None and "EXTRAS_REQUIRED" not in os.environ,
        reason="needs Java",
    ),
]

SOLUTION = ["go to kitchen", "go to outside", "look around", "focus on butterfly", "pick up butterfly"]


@pytest.fixture(scope="module")
def environment():
    return ScienceWorldEnvironment(max_steps=20, simplifications="easy")


def test_steps_of_a_solution_score_and_a_reset_starts_anew(environment):
    for _ in range(2):
        assert "find a(n) living thing" in environment.reset(task="find-living-thing", variation=0)
        before = environment.get_reward()
        for command in SOLUTION:
            assert not environment.done
            environment.act(command)
        assert environment.get_reward() > before


def test_a_wrong_focus_fails_the_experiment(environment):
    environment.reset(task="find-living-thing", variation=0)
    environment.act("focus on picture")
    assert environment.done and environment.score == -100 and environment.get_reward() == 0.0
    assert environment.act("look around") == "The experiment is over."


def test_an_episode_ends_after_its_steps(environment):
    environment.reset(task="find-living-thing", variation=0)
    for _ in range(20):
        assert not environment.done
        environment.act("look around")
    assert environment.done


def test_rows_are_of_the_split_and_an_unknown_task_is_named():
    rows = scienceworld_rows(["find-plant"], "test", 2)
    assert [row["task"] for row in rows] == ["find-plant"] * 2 and len({row["variation"] for row in rows}) == 2
    with pytest.raises(ValueError, match="has 'fly'.*boil"):
        scienceworld_rows(["fly"])
