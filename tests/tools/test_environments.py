"""Environments by TRL's protocol: the same classes that GRPOTrainer takes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trl_multiturn.tools import ToolCall, ToolFailure, ToolLimits, Toolset
from trl_multiturn.tools.environments import append_observation


class Counter:
    """Counts up to a goal."""

    def reset(self, goal: int = 3, **row) -> str:
        self.count, self.goal = 0, goal
        return f"Reach {goal}."

    def increment(self, step: int) -> str:
        """
        Adds to the counter.

        Args:
            step: How much.
        """
        self.count += step
        return f"count is {self.count}"

    def get_reward(self) -> float:
        return float(self.count == self.goal)

    @property
    def done(self) -> bool:
        return self.count >= self.goal

    def _private(self):
        raise AssertionError


class Slow:
    """An environment whose tool never answers."""

    release = threading.Event()
    called = threading.Semaphore(0)

    async def reset(self, **row) -> None:  # at once, however short the limit and busy the machine
        return None

    async def look(self) -> str:
        """Looks."""
        return "nothing"

    def hang(self) -> str:
        """Hangs."""
        self.called.release()
        self.release.wait()
        return ""


def play(toolset, row, calls, **limits):
    async def main():
        toolbox = toolset.open(row, ToolLimits(**limits))
        observation = await toolbox.reset()
        results = await toolbox.call(calls)
        outcome = observation, [r.output for r in results], toolbox.done, await toolbox.reward()
        await toolbox.close()
        return outcome

    return asyncio.run(main())


def test_public_methods_are_tools_and_share_the_state_in_call_order():
    toolset = Toolset(environment_factory=Counter)
    (kind,) = toolset.environments.types.values()
    assert [schema["function"]["name"] for schema in toolset.schemas(kind)] == ["increment"]
    calls = [ToolCall("increment", {"step": s}) for s in (1, 2)]
    assert play(toolset, {"goal": 3}, calls) == ("Reach 3.", ["count is 1", "count is 3"], True, 1.0)


def test_each_trajectory_has_its_own_environment():
    toolset = Toolset(environment_factory=Counter)
    assert play(toolset, {"goal": 2}, [ToolCall("increment", {"step": 1})])[1:] == (["count is 1"], False, 0.0)
    assert play(toolset, {"goal": 2}, [ToolCall("increment", {"step": 1})])[1:] == (["count is 1"], False, 0.0)


def test_rows_choose_among_environments():
    toolset = Toolset(environment_factory={"counter": Counter, "slow": Slow})
    assert play(toolset, {"environment": "counter", "goal": 5}, [])[0] == "Reach 5."
    outcome = play(toolset, {"environment": "slow"}, [ToolCall("look", {}), ToolCall("increment", {"step": 1})])
    assert outcome == (None, ["nothing", "{'error': 'Tool increment not found.'}"], False, None)
    with pytest.raises(ValueError, match="environment='chess'"):
        toolset.open({"environment": "chess"}, None)


def test_an_environment_that_hangs_is_the_machines_failure_and_not_called_again():
    with pytest.raises(ToolFailure, match="did not answer within 0.05 seconds"):
        play(Toolset(environment_factory=Slow), {}, [ToolCall("hang", {})], timeout_seconds=0.05, retries=3)
    Slow.release.set()
    assert Slow.called.acquire(timeout=20) and not Slow.called.acquire(blocking=False)


class Careless:
    """An environment that returns what it should not."""

    def reset(self, start=None, **row):
        if start == "raise":
            raise KeyError("start")
        return start

    def get_reward(self):
        return "good"


@pytest.mark.parametrize(
    ("start", "error", "match"),
    [
        (5, TypeError, "`reset` of the environment `Careless` returned 5"),
        ("raise", KeyError, "start"),
        (None, TypeError, "`get_reward` of the environment `Careless` returned 'good'.*not a number"),
    ],
)
def test_errors_of_an_environment_name_its_method(start, error, match):
    async def play_once():
        environment = Toolset(environment_factory=Careless).environments.types[None].make()
        await environment.reset({"start": start})
        await environment.reward()

    with pytest.raises(error, match=match) as raised:
        asyncio.run(play_once())
    if start == "raise":
        assert raised.value.__notes__ == ["It was raised by `reset` of the environment `Careless`."]


def test_an_environment_without_reset_is_refused():
    class NoReset:
        pass

    with pytest.raises(TypeError, match="no `reset` method"):
        Toolset(environment_factory=NoReset)


@pytest.mark.parametrize(
    ("content", "observation", "expected"),
    [
        ("Play.", " Reach 3.", "Play. Reach 3."),
        ("Play.", None, "Play."),
        ("Play.", [{"type": "text", "text": "x"}], [{"type": "text", "text": "Play."}, {"type": "text", "text": "x"}]),
        ([{"type": "text", "text": "Play."}], "x", [{"type": "text", "text": "Play."}, {"type": "text", "text": "x"}]),
    ],
)
def test_the_first_observation_joins_the_last_message(content, observation, expected):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    result = append_observation(messages, observation)
    assert result == [{"role": "system", "content": "s"}, {"role": "user", "content": expected}]
    assert messages[-1]["content"] == content, "the row was changed"
