"""Tools and the toolbox: schemas, order, concurrency, and whose mistake a failure is."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest
from transformers.utils import get_json_schema

from trl_multiturn.tools import ToolCall, ToolFailure, ToolLimits, ToolResult, Toolset, current_rollout
from trl_multiturn.tools.base import RolloutContext, enter_rollout, tool_version


def add(a: int, b: int) -> int:
    """
    Adds.

    Args:
        a: First.
        b: Second.
    """
    return a + b


async def wait_for(name: str) -> str:
    """
    Waits until all expected calls have arrived.

    Args:
        name: Anything.
    """
    await wait_for.barrier.wait()
    return f"done {name}"


class Notebook:
    """A session tool: remembers what it was given."""

    name = "note"
    version = "notebook-1"
    schema = {
        "type": "function",
        "function": {
            "name": "note",
            "description": "Notes.",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        },
    }

    def __init__(self, failures: int = 0):
        self.opened = []
        self.failures = failures

    def open(self):
        session = Session(self)
        self.opened.append(session)
        return session


class Session:
    def __init__(self, tool):
        self.tool, self.notes, self.closed, self.busy = tool, [], False, False

    async def arun(self, text):
        assert not self.busy, "two calls ran in one session at the same time"
        self.busy = True
        await asyncio.sleep(0)
        self.busy = False
        if self.tool.failures:
            self.tool.failures -= 1
            raise ToolFailure("the machine is on fire")
        self.notes.append(text)
        return ToolResult(" ".join(self.notes))

    def run(self, text):
        raise AssertionError("arun is preferred")

    def close(self):
        self.closed = True


def run(toolset, calls, row=None, **limits):
    async def main():
        toolbox = toolset.open(row or {}, ToolLimits(**limits))
        try:
            await toolbox.reset()
            return await toolbox.call(calls)
        finally:
            await toolbox.close()

    return asyncio.run(main())


def test_schemas_are_those_of_trl():
    assert Toolset([add]).schemas() == [get_json_schema(add)]
    assert Toolset([Notebook()]).schemas() == [Notebook.schema]


@pytest.mark.parametrize(
    ("tools", "error", "words"),
    [
        ([functools.partial(add, 1)], TypeError, "Wrap|wrap"),
        ([lambda x: x], ValueError, "type hint"),
        ([add, add], ValueError, "Rename"),
        (add, TypeError, "Pass a list"),
    ],
)
def test_a_tool_that_cannot_be_offered_raises_at_once(tools, error, words):
    with pytest.raises(error, match=words):
        Toolset(tools)


@pytest.mark.parametrize(
    ("call", "output"),
    [
        (ToolCall("add", {"a": 2, "b": 3}), "5"),
        (ToolCall("add", '{"a": 2, "b": 3}'), "5"),
        (ToolCall("multiply", {}), "{'error': 'Tool multiply not found.'}"),
        (ToolCall("add", {"a": 2}), "{'error': 'Missing argument(s): b.'}"),
        (ToolCall("add", {"a": 1, "b": 2, "c": 3}), "{'error': 'Unknown argument(s): c. Expected: a, b.'}"),
        (ToolCall("add", [1, 2]), "{'error': 'The arguments must be an object of names and values, got list.'}"),
        (ToolCall("add", {"a": 1, "b": "x"}), "{'error': \"unsupported operand type(s) for +: 'int' and 'str'\"}"),
    ],
)
def test_the_policys_mistakes_are_text(call, output):
    (result,) = run(Toolset([add]), [call])
    assert result.output == output
    assert result.status == ("ok" if output == "5" else "error")


def test_calls_of_a_turn_run_together_and_answer_in_order():
    wait_for.barrier = asyncio.Barrier(3)  # passes only if all three calls run at the same time
    calls = [ToolCall("wait_for", {"name": c}) for c in "xyz"]
    calls.insert(1, ToolCall("add", {"a": 1, "b": 1}))
    results = run(Toolset([add, wait_for]), calls)
    assert [r.output for r in results] == ["done x", "2", "done y", "done z"]


def test_a_blocked_synchronous_tool_blocks_nobody():
    second = threading.Event()

    def first() -> str:
        """Waits for the other."""
        assert second.wait(30)
        return "first"

    def other() -> str:
        """Frees the first."""
        second.set()
        return "other"

    results = run(Toolset([first, other]), [ToolCall("first", {}), ToolCall("other", {})])
    assert [r.output for r in results] == ["first", "other"]


def test_a_session_runs_one_call_at_a_time_and_ends_with_the_trajectory():
    tool = Notebook()
    results = run(Toolset([tool]), [ToolCall("note", {"text": c}) for c in "abc"])
    assert [r.output for r in results] == ["a", "a b", "a b c"]
    assert len(tool.opened) == 1 and tool.opened[0].closed


def test_no_session_is_opened_for_a_trajectory_that_calls_nothing():
    tool = Notebook()
    assert run(Toolset([tool]), []) == []
    assert tool.opened == []


def test_the_machines_failure_is_tried_again_and_then_leaves_the_toolbox():
    (result,) = run(Toolset([Notebook(failures=2)]), [ToolCall("note", {"text": "a"})], retries=2)
    assert result.output == "a"
    tool = Notebook(failures=3)
    with pytest.raises(ToolFailure, match="on fire"):
        run(Toolset([tool]), [ToolCall("note", {"text": "a"})], retries=2)
    assert tool.opened[0].closed


def test_a_call_that_hangs_is_answered_by_the_clock():
    release = threading.Event()

    def hang() -> str:
        """Hangs."""
        release.wait()
        return "late"

    async def own() -> str:
        """Raises its own TimeoutError."""
        raise TimeoutError("the server is slow")

    calls = [ToolCall("hang", {}), ToolCall("own", {})]
    hung, raised = run(Toolset([hang, own]), calls, timeout_seconds=0.05)
    release.set()
    assert (hung.status, hung.output) == ("timeout", "Timed out after 0.05 seconds.")
    assert (raised.status, raised.output) == ("error", "{'error': 'the server is slow'}")


def test_the_concurrency_limit_holds():
    running, most = 0, 0

    async def busy() -> str:
        """Counts itself."""
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return ""

    run(Toolset([busy]), [ToolCall("busy", {})] * 20, max_concurrent=3)
    assert most == 3


def test_a_tool_knows_its_rollout_also_in_its_thread():
    def who() -> str:
        """Who calls?"""
        context = current_rollout()
        return f"{context.trajectory_id} {context.row['answer']}"

    async def main(name):
        enter_rollout(RolloutContext(name, 0, "current", 0, 0, 7, {"answer": name.upper()}))
        toolbox = Toolset([who]).open({}, ToolLimits())
        return (await toolbox.call([ToolCall("who", {})]))[0].output

    async def both():
        return await asyncio.gather(main("a"), main("b"))

    assert asyncio.run(both()) == ["a A", "b B"]
    with pytest.raises(LookupError, match="outside a rollout"):
        current_rollout()


@pytest.mark.parametrize(("kind", "error"), [("audio", "text and images alone"), ("image", "no image in it")])
def test_text_blocks_are_text_and_what_cannot_be_shown_is_refused(kind, error):
    def blocks(kind: str) -> list:
        """
        Returns blocks.

        Args:
            kind: Type of the last block.
        """
        return [{"type": "text", "text": "seen: "}, {"type": kind, "text": "a cat"}]

    (result,) = run(Toolset([blocks]), [ToolCall("blocks", {"kind": "text"})])
    assert result.output == "seen: a cat"
    with pytest.raises(TypeError, match=error):
        run(Toolset([blocks]), [ToolCall("blocks", {"kind": kind})])


def test_versions_change_with_the_source():
    assert Toolset([Notebook(), add]).versions() == {"note": "notebook-1", "add": tool_version(add)}
    assert tool_version(add).startswith("source:") and tool_version(add) != tool_version(wait_for)
