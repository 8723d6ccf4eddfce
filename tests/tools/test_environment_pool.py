"""The pool of environments: how many, handed out again or not, in threads or processes; what a lost one costs."""

from __future__ import annotations

import asyncio
import functools
import os
import time

import pytest

from tests.support import byte_tokenizer
from tests.tools.mazes import Maze
from trl_multiturn import EnvironmentPool, RolloutConfig, ScriptedEngine, StopReason, Verdict, generate_trajectories
from trl_multiturn.rollout.provenance import version_of
from trl_multiturn.tools import ToolCall, ToolFailure, ToolLimits, Toolset


@pytest.fixture(autouse=True)
def counts():
    Maze.living, Maze.most, Maze.made, Maze.closed = 0, 0, 0, 0


def roll_out(ways, factory, num_generations=1, **config):
    """One trajectory per way, which is walked until the end."""

    def script(prompt_text, sampling, session):
        return f"Action: {ways[int(session.split('/')[2])]}"

    return generate_trajectories(
        [{"prompt": [{"role": "user", "content": "Walk. "}], "name": way} for way in ways],
        ScriptedEngine(script, byte_tokenizer("qwen2_5")),
        environment_factory=factory,
        config=RolloutConfig(dialect="action", num_generations=num_generations, max_tool_failure_share=1.0, **config),
        progress=False,
    )


def walk_once(pool, way, **limits):
    """One call in one environment; its answer's text."""

    async def main():
        toolbox = Toolset(environment_factory=pool).open({"name": way}, ToolLimits(**limits))
        try:
            await toolbox.reset()
            (result,) = await toolbox.call([ToolCall("walk", {"way": way})])
            return result.output
        finally:
            await toolbox.close()

    return asyncio.run(main())


def test_so_many_at_once_and_handed_out_again():
    with EnvironmentPool(Maze, max_environments=2) as pool:
        trajectories = roll_out(["on"] * 7, pool)
        assert [t.verdict for t in trajectories] == [Verdict.CORRECT] * 7
        assert (Maze.made, Maze.most, Maze.closed) == (2, 2, 0)
    assert Maze.living == 0


def test_what_does_not_say_it_is_reusable_is_made_for_each_trajectory_and_closed_after_it():
    class Once(Maze):
        reusable = False
        max_environments = 1

    roll_out(["on"] * 3, Once)
    assert (Maze.made, Maze.most, Maze.closed) == (3, 1, 3)


def test_a_plain_class_is_pooled_for_one_run_and_closed_with_it():
    roll_out(["on"] * 3, functools.partial(Maze, size=2))
    assert Maze.made == Maze.closed > 0


def test_an_environment_that_hangs_in_a_thread_is_not_handed_out_again():
    class Stuck(Maze):
        def walk(self, way: str) -> str:
            """
            Never ends.

            Args:
                way: Where to.
            """
            time.sleep(1)
            return ""

    pool = EnvironmentPool(Stuck, max_environments=1)
    for _ in range(2):
        with pytest.raises(ToolFailure, match="did not answer within 0.05 seconds"):
            walk_once(pool, "on", timeout_seconds=0.05)
    assert (Maze.made, Maze.closed) == (2, 0)


def test_a_crash_in_a_process_costs_one_trajectory():
    with EnvironmentPool(Maze, max_environments=2, isolation="process") as pool:
        trajectories = roll_out(["on", "abort", "on"], pool)
    assert [t.stop_reason.name for t in trajectories] == ["ANSWERED", "TOOL_FAILED", "ANSWERED"]
    assert "ended in the middle of a call" in trajectories[1].info["tool_failure"]
    assert Maze.made == 0, "an environment was made in this process"


def test_a_hang_in_a_process_costs_one_trajectory():
    with EnvironmentPool(Maze, max_environments=1, isolation="process") as pool:
        (hung,) = roll_out(["sleep"], pool, tool_timeout_seconds=0.5)
        (played,) = roll_out(["on"], pool)
    assert "did not answer within 0.5 seconds" in hung.info["tool_failure"]
    assert (hung.stop_reason, played.stop_reason) == (StopReason.TOOL_FAILED, StopReason.ANSWERED)


def test_processes_know_the_rollout_raise_errors_and_are_other_processes():
    class Here(Maze):  # a class of a function travels to the process, too
        isolation, max_environments = "process", 1

    with EnvironmentPool(Here) as pool:
        (first,) = roll_out(["where"], pool, max_tool_calling_iterations=1)
        pid, trajectory_id, name = first.completion[1]["content"].split()
        assert int(pid) != os.getpid()
        assert (trajectory_id, name) == ("0/current/0/0", "where")
        assert walk_once(pool, "raise") == "{'error': 'there is a wall'}"
        assert walk_once(pool, "on") == "step 1"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_factory_that_raises_in_its_process_raises_here():
    with EnvironmentPool(functools.partial(Maze, height=3), isolation="process") as pool:
        with pytest.raises(TypeError, match="unexpected keyword argument 'height'"):
            roll_out(["on"], pool)


def test_a_function_tells_in_its_process_what_its_environments_offer():
    with EnvironmentPool(lambda: Maze(2), isolation="process", reusable=True, max_environments=1) as pool:
        assert list(pool.methods.schemas) == ["walk"] and pool.methods.has_reward
        assert roll_out(["on"], pool)[0].verdict is Verdict.CORRECT


@pytest.mark.parametrize(("preload", "loaded"), [((), ""), (("colorsys", "sndhdr_that_is_not_there"), "colorsys")])
def test_what_is_preloaded_is_there_in_every_process(preload, loaded):
    with EnvironmentPool(Maze, max_environments=1, isolation="process", preload=preload) as pool:
        assert walk_once(pool, "modules") == loaded


class WithHelper(Maze):
    def render(self, colors):
        return "..."


def test_a_public_helper_is_explained():
    with pytest.raises(ValueError, match="`WithHelper.render` is public.*tool.*begin with an underscore"):
        EnvironmentPool(WithHelper)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"isolation": "vm"}, ValueError, "isolation='vm'"),
        ({"max_environments": 0}, ValueError, "at least 1, got 0"),
        ({"isolation": "process", "preload": "textworld"}, TypeError, "no list of names of modules"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        EnvironmentPool(Maze, **arguments)


def test_how_environments_are_kept_is_no_other_environment():
    pool = EnvironmentPool(Maze, max_environments=2)
    assert version_of(pool) == version_of(Maze)
    assert isinstance(pool(), Maze)
