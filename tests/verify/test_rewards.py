import asyncio
import functools
import logging
import math
import threading
import time

import numpy as np
import pytest

from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import judge, judge_async, math_reward, paper_reward, resolve_reward_funcs, reward_calls
from trl_multiturn.verify.rewards import check_columns


def trajectory(answer, stop_reason=StopReason.ANSWERED, **info):
    return Trajectory(
        prompt=[{"role": "user", "content": "?"}],
        completion=[{"role": "assistant", "content": rf"\boxed{{{answer}}}"}],
        prompt_ids=[1],
        completion_ids=[2, 3],
        action_mask=[1, 1],
        stop_reason=stop_reason,
        info=info,
    )


def test_columns_reach_the_functions_as_in_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("seen", completions)
        log_metric("calls", 1.0)
        seen.update(prompts=prompts, ids=completion_ids, answer=answer, level=level, kwargs=kwargs)
        return [0.25, 1]

    rows = [{"prompt": "dropped", "answer": "1", "level": 3}, {"prompt": "dropped", "answer": "2", "level": 4}]
    judged = judge([trajectory(1, seed=5), trajectory(2)], rows, reward, reward_kwargs={"environments": ["a", "b"]})
    assert seen["prompts"] == [[{"role": "user", "content": "?"}]] * 2
    assert seen["ids"] == [[2, 3]] * 2 and seen["answer"] == ["1", "2"] and seen["level"] == [3, 4]
    assert seen["kwargs"] == {"environments": ["a", "b"]}
    assert [t.reward for t in judged] == [0.25, 1.0]
    assert [t.verdict for t in judged] == [Verdict.INCORRECT, Verdict.CORRECT]
    assert judged[0].info == {"seed": 5, "rewards": {"reward": 0.25}}


def test_weights_and_threshold():
    def first(completions, **kwargs):
        return [1.0, 1.0, 0.0]

    async def second(completions, **kwargs):
        return [0.0, 1.0, 1.0]

    rows = [{}] * 3
    judged = judge([trajectory(0)] * 3, rows, [first, second], reward_weights=[0.5, 2.0], threshold=2.0)
    assert [t.reward for t in judged] == [0.5, 2.5, 2.0]
    assert [t.verdict.value for t in judged] == ["incorrect", "correct", "correct"]
    assert judged[1].info["rewards"] == {"first": 1.0, "second": 1.0}


def test_tool_failures_are_never_shown_to_a_function():
    def count(completions, answer, **kwargs):
        assert len(completions) == len(answer) == 1
        return [1.0]

    failed = trajectory(1, StopReason.TOOL_FAILED)
    judged = judge([failed, trajectory(1)], [{"answer": "1"}] * 2, count)
    assert (judged[0].verdict, judged[0].reward) == (Verdict.UNDECIDED, None)
    assert judged[1].verdict is Verdict.CORRECT
    assert judge([failed], [{"answer": "1"}], count)[0].verdict is Verdict.UNDECIDED
    assert judge([], [], count) == []


def test_none_is_undecided_and_never_outvoted():
    def verifier(completions, **kwargs):
        return [None, float("nan"), 1.0]

    def style(completions, **kwargs):
        return [0.1, 0.1, 0.1]

    judged = judge([trajectory(0)] * 3, [{}] * 3, [verifier, style])
    assert [t.reward for t in judged] == [None, None, 1.1]
    assert [t.verdict.value for t in judged] == ["undecided", "undecided", "correct"]
    assert judged[1].info["rewards"] == {"verifier": None, "style": 0.1}


def test_functions_for_several_tasks_may_skip_rows(caplog):
    def arithmetic(task, **kwargs):
        return [1.0 if name == "arithmetic" else None for name in task]

    def coding(task, **kwargs):
        return [0.0 if name == "coding" else None for name in task]

    rows = [{"task": "arithmetic"}, {"task": "coding"}, {"task": "poetry"}]
    judged = judge([trajectory(0)] * 3, rows, [arithmetic, coding], missing="skip")
    assert [t.verdict.value for t in judged] == ["correct", "incorrect", "undecided"]
    assert not caplog.records
    assert {t.verdict for t in judge([trajectory(0)] * 2, rows[:2], [arithmetic, coding])} == {Verdict.UNDECIDED}
    assert "missing='skip'" in caplog.text


def test_async_functions_run_together():
    together = asyncio.Event()

    async def waits(completions, **kwargs):
        await asyncio.wait_for(together.wait(), 10)
        return [1.0]

    async def releases(completions, **kwargs):
        together.set()
        return [1.0]

    assert judge([trajectory(0)], [{}], [waits, releases])[0].reward == 2.0


def test_judging_inside_a_running_loop():
    async def main():
        return judge([trajectory(3)], [{"answer": "3"}], math_reward)

    assert asyncio.run(main())[0].verdict is Verdict.CORRECT


def test_a_plain_function_runs_in_the_callers_thread_unless_it_would_block_a_loop():
    def where(completions, **kwargs):
        return [float(threading.current_thread() is threading.main_thread())]

    assert judge([trajectory(0)], [{}], where)[0].reward == 1.0
    assert asyncio.run(judge_async([trajectory(0)], [{}], where))[0].reward == 0.0


def test_a_late_function_is_undecided_and_the_others_count():
    release = threading.Event()

    def hangs(completions, **kwargs):
        release.wait(60)
        return [1.0]

    async def sleeps(completions, **kwargs):
        await asyncio.sleep(60)
        return [1.0]

    def quick(completions, **kwargs):
        return [1.0]

    # The quick one has to be so on a crowded machine, too
    start = time.monotonic()
    judged = judge([trajectory(0)], [{}], [hangs, sleeps, quick], timeout_seconds=1.5, missing="skip")[0]
    assert time.monotonic() - start < 30
    assert judged.info["rewards"] == {"hangs": None, "sleeps": None, "quick": 1.0}
    assert judge([trajectory(0)], [{}], [hangs, quick], timeout_seconds=0.2)[0].verdict is Verdict.UNDECIDED
    release.set()


def test_the_users_mistakes_are_raised():
    def broken(completions, **kwargs):
        raise KeyError("answr")

    def short(completions, **kwargs):
        return [1.0]

    def words(completions, **kwargs):
        return ["good"] * len(completions)

    def infinite(completions, **kwargs):
        return [math.inf] * len(completions)

    def scalar(completions, **kwargs):
        return 1.0

    def text(completions, **kwargs):
        return "ok"

    def table(completions, **kwargs):
        return np.ones((len(completions), 1))

    two, rows = [trajectory(0)] * 2, [{}, {}]
    for timeout in (None, 10.0):
        with pytest.raises(KeyError, match="answr") as raised:
            judge(two, rows, broken, timeout_seconds=timeout)
        assert raised.value.__notes__[-1] == "It was raised by the reward function 'broken'."
    for func in (scalar, text, table):
        with pytest.raises(TypeError, match=f"'{func.__name__}' returned (.|\\n)*, not a list"):
            judge(two, rows, func)
    judged = judge(two, rows, lambda completions, **kwargs: np.ones(2))
    assert [t.reward for t in judged] == [1.0, 1.0]
    with pytest.raises(ValueError, match="'short' returned 1 values for 2"):
        judge(two, rows, short)
    with pytest.raises(ValueError, match="not a number"):
        judge(two, rows, words)
    with pytest.raises(ValueError, match="finite"):
        judge(two, rows, infinite)
    with pytest.raises(ValueError, match="`rows` has 1"):
        judge(two, [{}], short)
    with pytest.raises(ValueError, match="reward_weights"):
        judge(two, rows, words, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="missing"):
        judge(two, rows, words, missing="zero")
    with pytest.raises(ValueError, match="empty"):
        judge(two, rows, [])


def fussy(completions, answer, **kwargs):
    """Raises on answers that are no numbers."""
    return [float(int(a) == 1) for a in answer]


@pytest.mark.parametrize("timeout", [None, 10.0])
def test_a_function_that_raises_on_one_row_leaves_that_row_undecided(timeout, caplog, monkeypatch):
    monkeypatch.setattr(reward_calls, "_told", set())
    rows = [{"answer": a} for a in ("1", "one", "2", "two")]
    judged = judge([trajectory(0)] * 4, rows, [fussy, steady], timeout_seconds=timeout, missing="skip")
    assert [t.verdict.value for t in judged] == ["correct", "undecided", "incorrect", "undecided"]
    assert judged[1].reward is None and judged[1].info["rewards"] == {"fussy": None, "steady": 0.25}
    assert judged[1].info["reward_errors"] == {"fussy": "ValueError: invalid literal for int() with base 10: 'one'"}
    assert "reward_errors" not in judged[0].info
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "'fussy' raised on a trajectory, which stays undecided" in warnings[0].message


def steady(completions, **kwargs):
    return [0.25] * len(completions)


def test_a_verdict_of_a_repaired_function_forgets_the_error():
    again = judge(judge([trajectory(0)] * 2, [{"answer": "1"}, {"answer": "x"}], fussy), [{}] * 2, steady)
    assert [t.info for t in again] == [{"rewards": {"steady": 0.25}}] * 2


def test_an_async_function_that_raises_on_one_row_is_asked_row_by_row():
    calls = []

    async def fussy_too(answer, **kwargs):
        calls.append(answer)
        return fussy(answer=answer, **kwargs)

    judged = judge([trajectory(0)] * 3, [{"answer": a} for a in ("1", "x", "2")], fussy_too)
    assert [t.verdict.value for t in judged] == ["correct", "undecided", "incorrect"]
    assert calls == [["1", "x", "2"], ["1"], ["x"], ["2"]]


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_function_that_hangs_is_told(in_loop, caplog, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(reward_calls, "_SLOW_SECONDS", 0.01)
    messages = []

    def warning(message, *arguments):
        messages.append(message % arguments)
        told.set()

    monkeypatch.setattr(reward_calls.logger, "warning", warning)

    def hangs(completions, **kwargs):
        assert told.wait(60)
        return [1.0]

    async def holds_the_loop(completions, **kwargs):
        return hangs(completions)

    assert judge([trajectory(0)], [{}], holds_the_loop if in_loop else hangs)[0].reward == 1.0
    assert "has been at work on 1 trajectories" in messages[0] and "reward_timeout_seconds" in messages[0]
    assert ("holds_the_loop" if in_loop else "hangs") in messages[0]


def test_a_column_that_a_function_asks_for_is_missed_before_any_rollout():
    def needs(completions, solution, level=0, **kwargs):
        return [1.0] * len(completions)

    def sees(columns):
        seen.append(sorted(columns))

    seen = []
    needs.check_columns = sees
    columns = {"prompt": [[]], "answer": ["1"]}
    with pytest.raises(ValueError, match="'needs' needs `solution`.*'answer'"):
        check_columns([needs], columns)
    check_columns([needs], {**columns, "solution": ["1"]})
    assert seen == [["answer", "prompt", "solution"]]
    with pytest.raises(ValueError, match="`math_reward` was called without `answer`"):
        check_columns([math_reward], {"prompt": [[]]})


def test_names_resolve_to_functions():
    from trl.rewards import accuracy_reward

    assert resolve_reward_funcs("math_reward") == [math_reward]
    assert resolve_reward_funcs(["paper_reward"]) == [paper_reward]
    assert resolve_reward_funcs(["accuracy_reward"]) == [accuracy_reward]
    assert resolve_reward_funcs("trl_multiturn.verify.math_reward") == [math_reward]
    with pytest.raises(ValueError, match="'no_such_reward'"):
        resolve_reward_funcs("no_such_reward")
    with pytest.raises(TypeError, match="not a reward function"):
        resolve_reward_funcs([3])


def test_two_functions_of_one_name_are_kept_apart():
    def reward(scale, completions, **kwargs):
        return [scale]

    judged = judge([trajectory(0)], [{}], [functools.partial(reward, 1.0), functools.partial(reward, 2.0)])
    assert judged[0].info["rewards"] == {"reward": 1.0, "reward_2": 2.0}


def test_trls_own_reward_function_judges():
    judged = judge([trajectory(3), trajectory(4)], [{"solution": "$3$"}] * 2, "accuracy_reward")
    assert [t.verdict for t in judged] == [Verdict.CORRECT, Verdict.INCORRECT]
